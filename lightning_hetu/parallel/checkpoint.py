"""Checkpoints that do not depend on the plan they were written under.

A checkpoint is a folder written by torch.distributed.checkpoint (DCP): every rank writes its shards under the names of
the whole model, and reads back whatever its own plan needs. Optimizer state is flattened to one entry per parameter,
because nested parameter groups of different pipeline stages would collide under the same key.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lightning_hetu.parallel.optimizers import GroupNames

METADATA_FILE = "meta.pt"
PLAN_FILE = "plan.json"
PARAMETER_GROUPS_KEY = "hetu_parameter_groups"
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=True)
_OTHER_GROUPS = (
    "the checkpoint's optimizer has other parameter groups than this module configures: load it with ckpt_path on a"
    " module that configures the same, or load only its weights. Where a callback has added groups, it must add them"
    " again in its on_fit_start."
)


class DamagedCheckpointError(ValueError):
    """A checkpoint folder is incomplete or was cut short."""


def model_state(module: nn.Module) -> dict[str, Any]:
    """This rank's shards of parameters and buffers, by their names in the whole model."""
    return get_model_state_dict(module, options=StateDictOptions(cpu_offload=True))


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """This rank's shards of the optimizer state, one flat entry per parameter and quantity."""
    with _without_empty_groups(optimizer) as trains:
        if not trains:
            return {}
        return get_optimizer_state_dict(module, optimizer, options=_OPTIONS)


@contextmanager
def _without_empty_groups(optimizer: Optimizer) -> Iterator[bool]:
    """Takes out the groups of which this stage has no parameter, which torch refuses; gives whether any is left."""
    groups = optimizer.param_groups
    full = [bool(group["params"]) for group in groups]
    optimizer.param_groups = [group for group, has in zip(groups, full, strict=True) if has]
    try:
        yield any(full)
    finally:
        loaded = iter(optimizer.param_groups)
        optimizer.param_groups = [next(loaded) if has else group for group, has in zip(groups, full, strict=True)]


def save_folder(state: dict[str, Any], metadata: Mapping[str, Any], plan_json: str, path: Path) -> None:
    """Writes a checkpoint folder on all ranks together.

    It appears under its name only when it is complete; a failure leaves whatever was there before.

    Args:
        state: What every rank holds of model and optimizers.
        metadata: What Lightning needs besides; only that of rank 0 is written.
        plan_json: The plan it was trained under.
        path: Folder to write.

    Raises:
        OSError: If it cannot be written, a full disk for example.
    """
    rank = torch.distributed.get_rank()
    partial = path.with_name(path.name + ".partial")
    problem: str | None = None
    if rank == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    _raise_together(problem, path)
    try:
        dcp.save(state, checkpoint_id=str(partial))
        if rank == 0:
            torch.save(dict(metadata), partial / METADATA_FILE)
            (partial / PLAN_FILE).write_text(plan_json, encoding="utf-8")
    # Whatever it is: all ranks must hear of it, or they would wait for this one. (DCP's own is no Exception.)
    except (Exception, dcp.api.CheckpointException) as error:
        problem = _root_cause(error)
    try:
        _raise_together(problem, path)
    except OSError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if rank == 0:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        partial.rename(path)
    torch.distributed.barrier()


def load_folder(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    path: Path,
    names: Sequence[GroupNames] | None = None,
    *,
    strict: bool = True,
) -> None:
    """Fills model and optimizers from a checkpoint folder that any plan may have written.

    Args:
        module: The parallelized module.
        optimizers: Its optimizers; pass none to load weights only.
        path: The folder.
        names: For each optimizer, for each group, the parameter names over the whole model; from them, groups of which
            this rank has no parameter learn their options.
        strict: Whether the entries must be exactly those of the model.

    Raises:
        DamagedCheckpointError: If files are missing or cut short.
        ValueError: If it belongs to another model.
    """
    saved = check_folder(path)
    model = model_state(module)
    problem = None
    missing = sorted(key for key in model if f"state_dict.{key}" not in saved.state_dict_metadata)
    unexpected = _unexpected(model, [key for key in saved.state_dict_metadata if key.startswith("state_dict.")])
    if unexpected and strict:
        problem = (
            f"checkpoint {str(path)!r} has {unexpected[0]!r} ({len(unexpected)} of its entries are not in this model):"
            " it was written for another model."
        )
    if missing and strict:
        problem = (
            f"checkpoint {str(path)!r} has no {missing[0]!r} ({len(missing)} of {len(model)} entries of this model are"
            " missing): it was written for another model."
        )
    wrong = [key for key in model if key not in missing and _differs(model[key], saved, f"state_dict.{key}")]
    if wrong:
        problem = f"checkpoint {str(path)!r}: {wrong[0]!r} has another shape than in this model."
    _refuse_together(problem)
    state: dict[str, Any] = {"state_dict": {key: value for key, value in model.items() if key not in missing}}
    if not any(key.startswith("optimizer_0.") for key in saved.state_dict_metadata):
        optimizers = []
    for index, optimizer in enumerate(optimizers):
        entries = optimizer_state(module, optimizer)
        # A parameter that never had a gradient has no state there.
        prefix = f"optimizer_{index}."
        entries |= _options_of_empty_groups(optimizer, names[index] if names is not None else None)
        state[f"optimizer_{index}"] = {k: v for k, v in entries.items() if f"{prefix}{k}" in saved.state_dict_metadata}
    dcp.load(state, checkpoint_id=str(path))
    set_model_state_dict(module, state["state_dict"], options=StateDictOptions(strict=strict and not missing))
    for index, optimizer in enumerate(optimizers):
        entries = state[f"optimizer_{index}"]
        for group, key, entry in _empty_groups(optimizer, names[index] if names is not None else None):
            if entry in entries:
                group[key] = entries.pop(entry)
        with _without_empty_groups(optimizer) as trains:
            if entries and trains:
                set_optimizer_state_dict(module, optimizer, entries, options=_OPTIONS)


def check_parameter_groups(saved: Sequence[GroupNames] | None, names: Sequence[GroupNames] | None) -> None:
    """Refuses a checkpoint folder whose optimizers have other parameter groups; their states would be left out.

    Args:
        saved: Parameter names over the whole model in the checkpoint, from its metadata; ``None`` if they are unknown.
        names: The same now.

    Raises:
        ValueError: If a group has come, gone, or changed its parameters.
    """
    if saved is None or names is None:
        return
    before, now = ([[set(group) for group in groups] for groups in optimizers] for optimizers in (saved, names))
    if before != now:
        raise ValueError(_OTHER_GROUPS)


def _empty_groups(optimizer: Optimizer, names: GroupNames | None) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Each option of each group without parameters here, and the entry in which another rank has saved it."""
    for group, members in zip(optimizer.param_groups, names or (), strict=names is not None):
        if not group["params"] and members:
            yield from ((group, key, f"param_groups.{members[0]}.{key}") for key in list(group) if key != "params")


def _options_of_empty_groups(optimizer: Optimizer, names: GroupNames | None) -> dict[str, Any]:
    return {entry: group[key] for group, key, entry in _empty_groups(optimizer, names)}


def load_full(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    checkpoint: Mapping[str, Any],
    names: Sequence[GroupNames] | None,
    *,
    strict: bool = True,
) -> None:
    """Fills model and optimizers from a checkpoint of one file, as a plain Trainer writes it.

    Args:
        module: The parallelized module.
        optimizers: Its optimizers; pass none to load weights only.
        checkpoint: Content of the file.
        names: For each optimizer, for each group, the parameter names in the order of the whole model.
        strict: Whether every parameter must be there.
    """
    full = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
    weights = checkpoint["state_dict"]
    own = model_state(module)
    missing = sorted(set(own) - set(weights))
    wrong = [name for name, value in own.items() if name in weights and weights[name].shape != value.shape]
    problem = None
    unexpected = _unexpected(own, list(weights))
    if unexpected and strict:
        problem = f"the checkpoint has {unexpected[0]!r} ({len(unexpected)} of its entries are not in this model)."
    if missing and strict:
        problem = f"the checkpoint has no {missing[0]!r} ({len(missing)} entries of this model are missing)."
    if wrong:
        problem = f"the checkpoint's {wrong[0]!r} has another shape than in this model."
    _refuse_together(problem)
    set_model_state_dict(module, {key: value for key, value in weights.items() if key in own}, options=full)
    if optimizers and names is None:
        raise ValueError(
            "the optimizer takes parameters in another order than the module has them, so the states in a one-file"
            " checkpoint cannot be assigned to pipeline stages: resume under a plan with one stage."
        )
    for index, optimizer in enumerate(optimizers):
        assert names is not None
        plain = checkpoint["optimizer_states"][index]
        groups = names[index]
        if [len(group["params"]) for group in plain["param_groups"]] != [len(group) for group in groups]:
            raise ValueError(_OTHER_GROUPS)
        local = {name for name, _ in module.named_parameters()}
        state: dict[str, Any] = {}
        param_groups: list[dict[str, Any]] = []
        for saved, members in zip(plain["param_groups"], groups, strict=True):
            kept = [name for name in members if name in local]
            param_groups.append({**saved, "params": kept})
            identifiers = dict(zip(members, saved["params"], strict=True))
            state |= {name: plain["state"][identifiers[name]] for name in kept if identifiers[name] in plain["state"]}
        for group, loaded in zip(optimizer.param_groups, param_groups, strict=True):
            if not group["params"]:
                group.update({key: value for key, value in loaded.items() if key != "params"})
        nested: dict[str, Any] = {"state": state, "param_groups": [group for group in param_groups if group["params"]]}
        with _without_empty_groups(optimizer) as trains:
            if trains:
                set_optimizer_state_dict(module, optimizer, nested, options=full)


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


def parameter_groups(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    all_names: Sequence[str],
    known: Sequence[GroupNames] | None = None,
) -> list[GroupNames] | None:
    """For each optimizer, for each group, the parameter names over all stages, in the order the optimizer has them.

    torch numbers optimizer states by that order. ``None`` where it cannot be told: with several stages whose parameters
    are not in the order of the model.

    Args:
        module: This rank's part of the model.
        optimizers: Its optimizers; the groups must be the same on every rank.
        all_names: Parameter names of the whole model, in order.
        known: What the optimizers had over the whole model when they were made; used for the groups that are still so.

    Raises:
        ValueError: If ranks have different numbers of groups.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    own = [[[names[p] for p in group["params"]] for group in opt.param_groups] for opt in optimizers]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    counts = {tuple(map(len, rank)) for rank in gathered}
    if len(counts) > 1:
        raise ValueError(
            f"the optimizers have {' or '.join(map(str, sorted(counts)))} parameter groups, depending on the pipeline"
            " stage: where a group is added later, add it in every stage, without parameters if need be."
        )
    position = {name: index for index, name in enumerate(all_names)}
    merged: list[GroupNames] = []
    for index, optimizer in enumerate(own):
        before = known[index] if known is not None else []
        groups = []
        for group in range(len(optimizer)):
            parts = [rank[index][group] for rank in gathered]
            members = {name for part in parts for name in part}
            if group < len(before) and members == set(before[group]) and all(_is_part(p, before[group]) for p in parts):
                groups.append(before[group])
                continue
            if all(set(part) == members for part in parts):
                groups.append(parts[0])  # one stage: the order of the optimizer itself
                continue
            if any(part != sorted(part, key=lambda name: position[name]) for part in parts):
                return None
            groups.append(sorted(members, key=lambda name: position[name]))
        merged.append(groups)
    return merged


def _is_part(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether a rank has its parameters of a group in the order of the whole group."""
    own = set(part)
    return [name for name in whole if name in own] == list(part)


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


def _unexpected(own: Mapping[str, Any], saved: Sequence[str]) -> list[str]:
    """Entries that no rank has."""
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, list(own))
    known = {name for names in everywhere for name in names}
    return sorted(name for name in (key.removeprefix("state_dict.") for key in saved) if name not in known)


def _differs(value: Any, saved: Metadata, key: str) -> bool:
    size = getattr(saved.state_dict_metadata[key], "size", None)
    return isinstance(value, torch.Tensor) and size is not None and tuple(size) != tuple(value.shape)


def _refuse_together(problem: str | None) -> None:
    """Raises on every rank if any has a problem; one that raised alone would leave the others waiting."""
    problems: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    first = next((item for item in problems if item), None)
    if first is not None:
        raise ValueError(first)


def _raise_together(problem: str | None, path: Path) -> None:
    problems: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    first = next((item for item in problems if item), None)
    if first is not None:
        raise OSError(f"checkpoint {str(path)!r} could not be written: {first}. Earlier checkpoints are untouched.")


def _root_cause(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        wrapped = next(iter(error.failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
