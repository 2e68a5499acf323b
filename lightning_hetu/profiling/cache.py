"""Keeps profiles on disk, so that the second run of the same model on the same devices starts at once.

A profile is stored under the hash of everything that was measured. Whatever changes in model, inputs, precision, device
or library makes another hash, so a stored profile is never stale; a file that was damaged is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from warnings import warn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_hetu.parallel.structure import ModelStructure
from lightning_hetu.parallel.tensor_plan import outside_tensor_parallel_plan, tensor_parallel_plan
from lightning_hetu.planning.cluster import ClusterSpec
from lightning_hetu.planning.profile import ModelProfile
from lightning_hetu.profiling._agreement import broadcast, gather, rank_and_size
from lightning_hetu.profiling._layers import describe
from lightning_hetu.profiling.cluster import device_name

CACHE_VERSION = 5
"""Grows whenever the profilers measure something in a new way, so that older files are not found any more."""

CACHE_VARIABLE = "LIGHTNING_HETU_CACHE"
P = TypeVar("P", ModelProfile, ClusterSpec)


class CorruptProfileError(ValueError):
    """A file of the profile cache does not hold what was written there."""


class ProfileCache:
    """A folder of profiles.

    Args:
        folder: By default ``$LIGHTNING_HETU_CACHE``, else ``~/.cache/lightning_hetu``. Made when first written to.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        folder = folder or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "lightning_hetu"
        self.folder = Path(folder).expanduser()

    @classmethod
    def from_option(cls, option: ProfileCache | str | Path | bool | None) -> ProfileCache | None:
        """The cache a user asked for: ``True`` is the default folder, a path is that folder, else there is none."""
        if option is None or option is False:
            return None
        if isinstance(option, ProfileCache):
            return option
        return cls() if option is True else cls(option)

    def path(self, kind: str, key: str) -> Path:
        """The file of a profile; ``kind`` is ``"model"`` or ``"cluster"``."""
        return self.folder / f"{kind}-{key}.json"

    def model(
        self, key: str, measure: Callable[[], ModelProfile], *, group: dist.ProcessGroup | None = None
    ) -> ModelProfile:
        """The stored profile of a model, else what ``measure`` gives, which is then stored.

        All processes call this; the first one reads and writes, and all get the same.

        Args:
            key: From :func:`model_key`.
            measure: Called in every process when nothing is stored.
            group: The processes; the default group for ``None``.

        Raises:
            CorruptProfileError: In every process, if the file is damaged.
        """
        return self._get("model", key, measure, ModelProfile.from_dict, group)

    def cluster(
        self, key: str, measure: Callable[[], ClusterSpec], *, group: dist.ProcessGroup | None = None
    ) -> ClusterSpec:
        """The stored description of a cluster (key from :func:`cluster_key`); see :meth:`model`."""
        return self._get("cluster", key, measure, ClusterSpec.from_dict, group)

    def _get(
        self,
        kind: str,
        key: str,
        measure: Callable[[], P],
        parse: Callable[[dict[str, Any]], P],
        group: dist.ProcessGroup | None,
    ) -> P:
        rank, _ = rank_and_size(group)
        path = self.path(kind, key)
        found: tuple[str, Any] | None = None
        if rank == 0:
            try:
                found = ("profile", self._read(path, kind, key, parse))
            except CorruptProfileError as error:
                found = ("error", str(error))
        outcome, value = broadcast(found, group)
        if outcome == "error":
            raise CorruptProfileError(value)
        if value is not None:
            return parse(value)
        profile = measure()
        if rank == 0:
            self._write(path, kind, key, profile.to_dict())
        return profile

    def _read(self, path: Path, kind: str, key: str, parse: Callable[[dict[str, Any]], Any]) -> dict[str, Any] | None:
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnicodeDecodeError as error:
            raise _corrupt(path, "it is not text") from error
        except OSError as error:
            warn(f"profile_cache: {str(path)!r} cannot be read ({error.strerror}); profiling again.", stacklevel=2)
            return None
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise _corrupt(path, "it is not JSON") from error
        if not isinstance(data, dict) or data.get("version") != CACHE_VERSION:
            raise _corrupt(path, f"it is not of version {CACHE_VERSION}")
        profile: Any = data.get("profile")
        if data.get("kind") != kind or data.get("key") != key or data.get("checksum") != _checksum(profile):
            raise _corrupt(path, "its contents do not match their checksum")
        try:
            parse(profile)
        except ValueError as error:
            raise _corrupt(path, str(error)) from error
        return dict(profile)

    def _write(self, path: Path, kind: str, key: str, profile: dict[str, Any]) -> None:
        # Through JSON once, because what is read back has string keys and lists.
        profile = json.loads(json.dumps(profile))
        data = {
            "version": CACHE_VERSION, "kind": kind, "key": key, "checksum": _checksum(profile), "profile": profile
        }  # fmt: skip
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another run may write the same file: each writes its own, and the last one to be renamed stays.
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
            ) as file:
                temporary = Path(file.name)
                json.dump(data, file, indent=1)
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            warn(
                f"profile_cache: nothing can be written to {str(self.folder)!r} ({error.strerror}); the next run will"
                " profile again.",
                stacklevel=2,
            )


def model_key(
    module: nn.Module,
    structure: ModelStructure,
    batch: Any,
    *,
    precision: str,
    device: torch.device | str,
    max_tp: int = 1,
    **settings: Any,
) -> str:
    """Hash of everything that a model's profile depends on.

    Args:
        module: The whole module: its classes with their source text, parameters, buffers and plain settings count.
        structure: Where its layers are.
        batch: Inputs and targets; shapes and dtypes count.
        precision: Lightning's name of the precision.
        device: Where it is measured; the name of the device counts, not its index.
        max_tp: Largest tensor-parallel degree profiled.
        settings: Further JSON-compatible settings of the profiler that change the result, such as ``batch_sizes``.
    """
    device = torch.device(device)
    rows = [name for _, name in structure.rows() if name is not None]
    return _hash(
        {
            "kind": "model",
            "module": describe(module),
            "structure": [structure.embedding, structure.blocks, structure.head],
            "batch": [
                [list(item.shape), str(item.dtype)] if isinstance(item, Tensor) else type(item).__name__
                for item in tree_flatten(batch)[0]
            ],
            "precision": precision,
            "device": device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "tensor_parallel": {name: tensor_parallel_plan(module, name) for name in rows}
            | (outside_tensor_parallel_plan(module, structure) if structure.trace is not None else {}),
            "max_tp": max_tp,
            "settings": settings,
        }
    )


def cluster_key(device: torch.device | str, **settings: Any) -> str:
    """Hash of everything that a cluster's description depends on; all processes of the default group call it.

    Args:
        device: This process's device.
        settings: Further JSON-compatible settings of the profiler that change the result.
    """
    device = torch.device(device)
    rank, world = rank_and_size()
    return _hash(
        {
            "kind": "cluster",
            "world": world,
            "backend": dist.get_backend() if world > 1 else None,
            "devices": gather((device_name(device), socket.gethostname(), torch.get_num_threads())),
            "settings": settings,
        }
    )


def _hash(value: dict[str, Any]) -> str:
    value = {"cache": CACHE_VERSION, "torch": torch.__version__, **value}
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _checksum(profile: Any) -> str:
    return hashlib.sha256(json.dumps(profile, sort_keys=True).encode()).hexdigest()


def _corrupt(path: Path, reason: str) -> CorruptProfileError:
    return CorruptProfileError(
        f"profile cache file {str(path)!r} is corrupt: {reason}. Delete it, or set profile_cache to another folder."
    )
