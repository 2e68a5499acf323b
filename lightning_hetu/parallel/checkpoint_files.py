"""The files of a checkpoint: what a folder must hold, and reading it without any process group."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

METADATA_FILE = "meta.pt"
PLAN_FILE = "plan.json"
PARAMETER_GROUPS_KEY = "hetu_parameter_groups"


class DamagedCheckpointError(ValueError):
    """A checkpoint folder is incomplete or was cut short."""


def check_folder(path: Path) -> Metadata:
    """Reads the index of a checkpoint folder and checks that every file it names is complete.

    Raises:
        FileNotFoundError: If there is no checkpoint folder.
        DamagedCheckpointError: If files are missing or cut short.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist.")
    remedy = "The checkpoint is damaged: use an earlier one."
    for name in (".metadata", METADATA_FILE):
        if not (path / name).is_file():
            raise DamagedCheckpointError(f"checkpoint {str(path)!r} lacks its file {name!r}. {remedy}")
    try:
        metadata = FileSystemReader(str(path)).read_metadata()
    except (EOFError, pickle.UnpicklingError, AttributeError, OSError, ValueError, IndexError, KeyError) as error:
        raise DamagedCheckpointError(f"checkpoint {str(path)!r}: '.metadata' cannot be read. {remedy}") from error
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        end = info.offset + info.length
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
    for name, size in sorted(needed.items()):
        file = path / name
        found = file.stat().st_size if file.is_file() else 0
        if found < size:
            raise DamagedCheckpointError(
                f"checkpoint {str(path)!r}: file {name!r} has {found} bytes, expected at least {size}. {remedy}"
            )
    return metadata


def load_metadata(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """What Lightning stored beside the tensors: loops, callbacks, schedulers, hyperparameters.

    Raises:
        DamagedCheckpointError: If it cannot be read.
    """
    metadata = load_file(path / METADATA_FILE, weights_only)
    if not isinstance(metadata, dict):
        raise DamagedCheckpointError(f"checkpoint {str(path)!r}: {METADATA_FILE!r} holds a {type(metadata).__name__}.")
    return metadata


def load_file(path: Path, weights_only: bool | None = None) -> Any:
    """What ``torch.save`` wrote to one file.

    Raises:
        DamagedCheckpointError: If it cannot be read.
        ValueError: If it holds objects that ``weights_only`` does not allow.
    """
    damaged = f"checkpoint file {str(path)!r} cannot be read: it is damaged, or no checkpoint. Use an earlier one."
    if not zipfile.is_zipfile(path):
        raise DamagedCheckpointError(damaged)
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Weights only" not in str(error):
            raise DamagedCheckpointError(damaged) from error
        raise ValueError(
            f"checkpoint file {str(path)!r} holds other objects than tensors and plain values. If you trust it, load it"
            " with weights_only=False."
        ) from error
    except (EOFError, RuntimeError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise DamagedCheckpointError(damaged) from error


def check_content(checkpoint: Any, path: Path) -> None:
    """Refuses a file that is no Lightning checkpoint.

    Raises:
        ValueError: It names what is missing.
    """
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        found = f"keys {', '.join(map(str, list(checkpoint)[:5]))}" if isinstance(checkpoint, dict) else "no mapping"
        raise ValueError(
            f"checkpoint file {str(path)!r} has no 'state_dict' ({found}): expected what a Trainer has saved."
        )
