"""Dataloaders that go on where a checkpoint in the middle of an epoch left them.

Lightning saves and restores the state of every loader that has ``state_dict`` and ``load_state_dict``. Without it,
a run resumed in mid-epoch would see the first batches of the epoch again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


class SkippingBatchSampler:
    """Another batch sampler, whose next iteration may leave out its first batches without loading them."""

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler
        self.skip = 0

    @property
    def sampler(self) -> Any:
        """The sampler below, which Lightning tells the epoch."""
        return getattr(self.batch_sampler, "sampler", None)

    @property
    def batch_size(self) -> int | None:
        """Samples per batch, where the batch sampler below knows."""
        return getattr(self.batch_sampler, "batch_size", None)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        skip, self.skip = self.skip, 0
        return islice(iter(self.batch_sampler), skip, None)


def resumable_class(base: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    """A subclass of a loader class, of the same layout, that can be resumed.

    Its batch sampler must have a ``skip``, such as :class:`SkippingBatchSampler`.
    """

    class Resumable(base):  # type: ignore[misc, valid-type]
        """A loader that can be resumed."""

        _resumable_done = 0
        _resumable_skip = 0

        def __iter__(self) -> Iterator[Any]:
            self._resumable_done, self._resumable_skip = self._resumable_skip, 0
            self.batch_sampler.skip = self._resumable_done
            for batch in super().__iter__():
                self._resumable_done += 1
                yield batch
            self._resumable_done = 0

        def state_dict(self) -> dict[str, Any]:
            """Batches of the epoch that were taken so far, and the seed of their order if one was drawn."""
            done = self._resumable_done if self._resumable_done < len(self.batch_sampler) else 0
            return {"batches": done, "seed": getattr(self.batch_sampler, "seed", None)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Makes the next iteration go on behind those batches."""
            self._resumable_skip = int(state_dict["batches"])
            if self._resumable_skip and hasattr(self.batch_sampler, "resume_seed"):
                self.batch_sampler.resume_seed = state_dict.get("seed")

    Resumable.__name__ = Resumable.__qualname__ = f"Resumable{base.__name__}"
    return Resumable


class ResumableDataLoader(resumable_class(DataLoader)):  # type: ignore[misc]
    """A ``DataLoader`` over a map-style dataset that can be resumed in mid-epoch; its order must be deterministic."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.batch_sampler is None:
            raise ValueError("ResumableDataLoader(batch_size=None): expected a batch size or a batch sampler.")
        # DataLoader refuses to set batch_sampler after construction.
        self.__dict__["batch_sampler"] = SkippingBatchSampler(self.batch_sampler)


def make_resumable(loader: DataLoader[Any]) -> None:
    """Turns a loader, in place, into one that can be resumed, unless it is one already."""
    if not hasattr(loader, "state_dict"):
        loader.__class__ = resumable_class(type(loader))
