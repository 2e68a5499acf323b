"""Tells which layers of a model are alike, so that one of each kind is measured."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_hetu.parallel.tensor_plan import tensor_parallel_plan


def describe(part: nn.Module) -> dict[str, Any]:
    """All that decides what a module costs, as JSON-compatible values.

    Class and source text, names, shapes and dtypes of parameters and buffers, which of them are trained, and the plain
    settings (numbers, texts, truth values) of every submodule.
    """
    return {
        "class": _class_name(part),
        "source": source_hash(part),
        "parameters": [
            [name, list(p.shape), str(p.dtype), p.requires_grad] for name, p in sorted(part.named_parameters())
        ],
        "buffers": [[name, list(b.shape), str(b.dtype)] for name, b in sorted(part.named_buffers())],
        "settings": {
            f"{path}.{key}" if path else key: value
            for path, module in part.named_modules()
            for key, value in [("class", _class_name(module)), *sorted(vars(module).items())]
            if not key.startswith("_") and key != "training" and _is_plain(value)
        },
    }


def group_layers(root: nn.Module, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Kind of every layer in ``names``, and the first layer of every kind.

    Layers are of one kind when :func:`describe` and the tensor-parallel plan agree; settings that only count the layers
    (a ``layer_idx`` that grows by one) are no difference.
    """
    described = [describe(root.get_submodule(name)) for name in names]
    containers: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        containers.setdefault(name.rpartition(".")[0], []).append(position)
    for key in {key for item in described for key in item["settings"]}:
        values = [item["settings"].get(key) for item in described]
        # Where blocks stand in several containers (encoder and decoder), each may count from zero again.
        runs = [[values[index] for index in members] for members in containers.values()]
        if all(_is_position(run) for run in runs if set(run) != {None}):
            for item in described:
                item["settings"].pop(key, None)
    kinds: dict[str, int] = {}
    layers, first = [], []
    for position, (name, item) in enumerate(zip(names, described, strict=True)):
        key = repr((item, sorted(tensor_parallel_plan(root, name).items())))
        if key not in kinds:
            kinds[key] = len(kinds)
            first.append(position)
        layers.append(kinds[key])
    return layers, first


def source_hash(part: nn.Module) -> str:
    """Hash of the source text of every class in ``part`` that torch does not ship; what has no source is left out."""
    digest = hashlib.sha256()
    classes = {type(module) for module in part.modules() if not type(module).__module__.startswith("torch.")}
    for cls in sorted(classes, key=lambda item: (item.__module__, item.__qualname__)):
        digest.update(_source(cls).encode())  # type: ignore[arg-type]
    return digest.hexdigest()[:16]


@functools.cache  # a model has many layers of few classes
def _source(cls: type[nn.Module]) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # defined in an interactive session: only its name is known
        return cls.__qualname__


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_position(values: list[Any]) -> bool:
    """Whether the values count up by one: as whole numbers, or as the last number inside a text."""
    if len(values) < 2:
        return False
    if all(isinstance(value, str) for value in values):
        found = [re.search(r"^(.*?)(\d+)(\D*)$", value) for value in values]
        if not all(found) or len({(match[1], match[3]) for match in found if match}) != 1:
            return False
        values = [int(match[2]) for match in found if match]
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return False
    return all(value - values[0] == position for position, value in enumerate(values))
