"""From a checkpoint folder to one file that a plain Trainer loads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_hetu.parallel.checkpoint_files import PARAMETER_GROUPS_KEY, check_folder, load_metadata


def consolidate(folder: str | Path, file: str | Path) -> Path:
    """Writes a checkpoint folder as one file that a plain ``Trainer`` loads, without any process group.

    Args:
        folder: A checkpoint folder.
        file: File to write, for example ``"model.ckpt"``; it must not exist.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If there is no such folder.
        FileExistsError: If the file exists.
        DamagedCheckpointError: If the folder is incomplete.
    """
    folder, file = Path(folder), Path(file)
    if file.exists():
        raise FileExistsError(f"{str(file)!r} exists already: remove it, or give another name.")
    check_folder(folder)
    checkpoint = load_metadata(folder, weights_only=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    raw_file = file.with_name(file.name + ".raw")
    partial = file.with_name(file.name + ".partial")
    try:
        dcp_to_torch_save(str(folder), str(raw_file))
        raw = torch.load(raw_file, map_location="cpu", weights_only=False)
        checkpoint["state_dict"] = raw["state_dict"]
        groups = checkpoint.pop(PARAMETER_GROUPS_KEY, [])
        if groups is None:
            raise ValueError(
                f"checkpoint {str(folder)!r}: its optimizer takes parameters in another order than the module has them,"
                " over several stages; resume it under a plan with one stage and save again."
            )
        checkpoint["optimizer_states"] = [
            _plain_optimizer_state(raw[f"optimizer_{index}"], names) for index, names in enumerate(groups)
        ]
        torch.save(checkpoint, partial)
        os.replace(partial, file)
    finally:
        raw_file.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return file


def _plain_optimizer_state(flat: Mapping[str, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """torch's own ``{state, param_groups}`` from flattened entries (which DCP may have nested again)."""
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    entries = _flatten("", flat)
    identifier = 0
    for members in names:
        group: dict[str, Any] = {}
        identifiers = []
        for name in members:
            prefix = f"param_groups.{name}."
            group |= {key[len(prefix) :]: value for key, value in entries.items() if key.startswith(prefix)}
            prefix = f"state.{name}."
            values = {key[len(prefix) :]: value for key, value in entries.items() if key.startswith(prefix)}
            if values:
                state[identifier] = values
            identifiers.append(identifier)
            identifier += 1
        groups.append({**group, "params": identifiers})
    return {"state": state, "param_groups": groups}


def _flatten(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= _flatten(f"{prefix}{key}.", value)
        else:
            out[f"{prefix}{key}"] = value
    return out
