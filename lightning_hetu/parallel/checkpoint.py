"""Checkpoints that do not depend on the plan they were written under.

A checkpoint is a folder written by torch.distributed.checkpoint (DCP): every rank writes its shards under the names of
the whole model, and reads back whatever its own plan needs. Optimizer state is flattened to one entry per parameter,
because nested parameter groups of different pipeline stages would collide under the same key. Operators that run in
slices are saved and loaded whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lightning_hetu.parallel.checkpoint_files import METADATA_FILE, PLAN_FILE, check_folder
from lightning_hetu.parallel.optimizers import GroupNames
from lightning_hetu.parallel.osdp.merged import OPTIMIZER_KINDS, SlicedState

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=True)
_OTHER_GROUPS = (
    "the checkpoint's optimizer has other parameter groups than this module configures: load it with ckpt_path on a"
    " module that configures the same, or load only its weights. Where a callback has added groups, it must add them"
    " again in its on_fit_start."
)


def model_state(module: nn.Module) -> dict[str, Any]:
    """This rank's shards of parameters and buffers, by their names in the whole model."""
    return SlicedState(module).merge(get_model_state_dict(module, options=StateDictOptions(cpu_offload=True)))


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """This rank's shards of the optimizer state, one flat entry per parameter and quantity."""
    with _without_empty_groups(optimizer) as trains:
        if not trains:
            return {}
        state = get_optimizer_state_dict(module, optimizer, options=_OPTIONS)
    return SlicedState(module).merge(state, OPTIMIZER_KINDS)


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
        try:
            _replace(path, partial)
        except OSError as error:
            problem = str(error)
    _raise_together(problem, path)


def _replace(path: Path, new: Path) -> None:
    """Gives ``new`` the name ``path``; what was there is removed when that has succeeded."""
    old = path.with_name(path.name + ".old")
    if not path.exists():
        new.rename(path)
        return
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


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
    slices = SlicedState(module)
    weights = slices.split(state["state_dict"])
    set_model_state_dict(module, weights, options=StateDictOptions(strict=strict and not missing))
    for index, optimizer in enumerate(optimizers):
        entries = state[f"optimizer_{index}"]
        for group, key, entry in _empty_groups(optimizer, names[index] if names is not None else None):
            if entry in entries:
                group[key] = entries.pop(entry)
        with _without_empty_groups(optimizer) as trains:
            if entries and trains:
                entries = slices.split(entries, OPTIMIZER_KINDS)
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
    slices = SlicedState(module)
    set_model_state_dict(
        module, slices.split({key: value for key, value in weights.items() if key in own}), options=full
    )
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
            kept = [name for name in members if set(slices.names_of(name)) <= local]
            param_groups.append({**saved, "params": slices.names(kept)})
            identifiers = dict(zip(members, saved["params"], strict=True))
            for name in kept:
                if identifiers[name] not in plain["state"]:
                    continue
                state |= {own_name: {} for own_name in slices.names_of(name)}
                for quantity, value in plain["state"][identifiers[name]].items():
                    for own_name, part in slices.split({name: value}).items():
                        state[own_name][quantity] = part
        for group, loaded in zip(optimizer.param_groups, param_groups, strict=True):
            if not group["params"]:
                group.update({key: value for key, value in loaded.items() if key != "params"})
        nested: dict[str, Any] = {"state": state, "param_groups": [group for group in param_groups if group["params"]]}
        with _without_empty_groups(optimizer) as trains:
            if trains:
                set_optimizer_state_dict(module, optimizer, nested, options=full)


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
