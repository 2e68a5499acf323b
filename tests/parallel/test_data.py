"""Every rank loads its rows of the batches a loader describes, and can go on in mid-epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_hetu.parallel.batch import evaluation_microbatches, finer_rows, shard_rows
from lightning_hetu.parallel.data import RowSelector, ShardedBatchSampler, shard_dataloader
from lightning_hetu.parallel.resumable import ResumableDataLoader
from lightning_hetu.planning.plan import HybridPlan


def selector(dp: int, index: int, microbatches: int = 2, *, training: bool = True) -> RowSelector:
    plan = HybridPlan.uniform(f"dp{dp}", num_layers=2, global_batch_size=8, num_microbatches=microbatches)
    mesh: Any = SimpleNamespace(data_index=lambda degree: index)
    return RowSelector(plan, mesh, training=training)


def numbers(count: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(count)), batch_size=8, **options)


def rows_of(loader: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def same(value: int) -> int:
    return value


def test_rows_are_shards_of_every_microbatch() -> None:
    """A rank's rows are its shard of each microbatch, and all ranks together have every row once."""
    assert shard_rows(8, 2, 2, 0) == [0, 1, 4, 5]
    assert shard_rows(8, 2, 2, 1) == [2, 3, 6, 7]
    for micro, dp in ((1, 8), (4, 2), (2, 1)):
        assert sorted(row for index in range(dp) for row in shard_rows(8, micro, dp, index)) == list(range(8))
    with pytest.raises(ValueError, match="6 samples cannot be cut into 2 microbatches of 2"):
        shard_rows(6, 2, 2, 0)


def test_finer_rows_are_those_of_the_finer_layout() -> None:
    """Cutting the rows of dp=2 further gives the rows of dp=4."""
    everything = torch.arange(16)
    for coarse in range(2):
        local = everything[shard_rows(16, 2, 2, coarse)]
        for part in range(2):
            assert finer_rows(local, 8, 2, 2, part).tolist() == shard_rows(16, 2, 4, 2 * coarse + part)


def test_only_the_rows_of_the_rank_are_read() -> None:
    """A map-style dataset is asked for nothing but the rank's own rows."""
    asked: list[int] = []

    class Recorder(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            asked.append(int(index))
            return super().__getitem__(index)

    loader = DataLoader(Recorder(torch.arange(16)), batch_size=8)
    assert rows_of(shard_dataloader(loader, selector(2, 1), same)) == [[2, 3, 6, 7], [10, 11, 14, 15]]
    assert asked == [2, 3, 6, 7, 10, 11, 14, 15]
    assert len(rows_of(loader)) == 2, "the user's loader is left as it was"


def test_shuffled_order_is_that_of_one_process() -> None:
    """With the same random state, the ranks' rows make up the batches that one process would shuffle."""
    torch.manual_seed(3)
    whole = rows_of(numbers(32, shuffle=True))
    parts = []
    for index in range(2):
        torch.manual_seed(3)
        parts.append(rows_of(shard_dataloader(numbers(32, shuffle=True), selector(2, index), same)))
    for batch, first, second in zip(whole, *parts, strict=True):
        assert first == [batch[row] for row in shard_rows(8, 2, 2, 0)]
        assert second == [batch[row] for row in shard_rows(8, 2, 2, 1)]


def test_shuffled_order_follows_rank_0() -> None:
    """The seed of the order is rank 0's, whatever the random state here."""
    orders = []
    for state in (1, 2):
        torch.manual_seed(state)
        orders.append(rows_of(shard_dataloader(numbers(32, shuffle=True), selector(2, 0), lambda _: 7)))
    assert orders[0] == orders[1]


def test_training_batches_must_divide() -> None:
    """A last, smaller training batch is refused in one line that says what would do."""
    loader = shard_dataloader(numbers(20), selector(2, 0), same)
    with pytest.raises(ValueError, match=r"6 samples.*multiple of 4"):
        rows_of(shard_dataloader(numbers(22), selector(2, 0), same))
    assert rows_of(loader)[-1] == [16, 18], "4 samples in 2 microbatches of 2 shards do divide"


def test_last_evaluation_batch_is_filled_up() -> None:
    """A last evaluation batch that does not divide repeats its last sample."""
    parts = [rows_of(shard_dataloader(numbers(11), selector(2, index, training=False), same))[-1] for index in range(2)]
    assert sorted({*parts[0], *parts[1]}) == [8, 9, 10]
    assert len(parts[0]) == len(parts[1]) == 2


def test_evaluation_uses_as_many_microbatches_as_divide() -> None:
    """Fewer microbatches where the plan's number does not divide a batch; an error where not even one does."""
    plan = HybridPlan.uniform("dp2", num_layers=2, global_batch_size=8, num_microbatches=4)
    assert [evaluation_microbatches(plan, samples) for samples in (16, 12, 4, 2)] == [4, 3, 2, 1]
    with pytest.raises(ValueError, match="multiple of 2"):
        evaluation_microbatches(plan, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterables_are_cut(workers: int) -> None:
    """Batches of iterable datasets and of plain lists are cut to the rank's rows, in any nesting."""

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(range(8))

    loader = DataLoader(Stream(), batch_size=8, num_workers=workers)
    assert [batch.tolist() for batch in shard_dataloader(loader, selector(2, 1), same)][0] == [2, 3, 6, 7]
    nested = [{"x": torch.arange(8), "name": "all", "scale": torch.tensor(2.0)}]
    batch = next(iter(shard_dataloader(nested, selector(2, 0), same)))
    assert batch["x"].tolist() == [0, 1, 4, 5] and batch["name"] == "all" and batch["scale"] == 2.0


def test_epoch_reaches_the_sampler() -> None:
    """A distributed sampler below still learns the epoch, which changes its order."""
    from torch.utils.data.distributed import DistributedSampler

    data = TensorDataset(torch.arange(32))
    sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=1, rank=0, seed=1)
    loader = shard_dataloader(DataLoader(data, batch_size=8, sampler=sampler), selector(2, 0), same)
    assert isinstance(loader.batch_sampler, ShardedBatchSampler)
    first = rows_of(loader)
    loader.batch_sampler.set_epoch(1)
    assert rows_of(loader) != first


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_in_mid_epoch(shuffle: bool, workers: int) -> None:
    """The state of a half-read loader makes a new one go on with the next batch, of the same order."""
    torch.manual_seed(5)
    loader = shard_dataloader(numbers(40, shuffle=shuffle, num_workers=workers), selector(2, 0), same)
    iterator = iter(loader)
    _ = [next(iterator)[0].tolist() for _ in range(2)]
    state = loader.state_dict()
    rest = [batch[0].tolist() for batch in iterator]
    assert len(rest) == 3
    torch.manual_seed(6)
    other = shard_dataloader(numbers(40, shuffle=shuffle, num_workers=workers), selector(2, 0), same)
    other.load_state_dict(state)
    assert rows_of(other) == rest
    assert len(rows_of(other)) == 5, "the epoch after that is whole again"


def test_state_at_the_end_of_an_epoch_starts_over() -> None:
    """A state taken after the last batch leads to a whole epoch, not to an empty one."""
    loader = ResumableDataLoader(TensorDataset(torch.arange(16)), batch_size=8)
    iterator = iter(loader)
    next(iterator), next(iterator)
    other = ResumableDataLoader(TensorDataset(torch.arange(16)), batch_size=8)
    other.load_state_dict(loader.state_dict())
    assert len(list(other)) == 2
