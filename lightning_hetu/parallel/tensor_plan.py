"""Which modules of a layer tensor parallelism splits, and how, as the layer or a model around it declares it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from math import gcd
from typing import Any

from torch import nn

from lightning_hetu.parallel.structure import ModelStructure, named_submodule

TENSOR_PARALLEL_STYLES = ("colwise", "rowwise", "colwise_gather", "vocab_rowwise", "per_head")
_TRANSFORMERS_STYLES = {
    "colwise": "colwise",
    "rowwise": "rowwise",
    "colwise_gather_output": "colwise_gather",
    "colwise_rep": "colwise_gather",
    "embedding_rowwise": "vocab_rowwise",
    "replicated_with_grad_allreduce": "per_head",
}
"""What transformers (5.x, and 4.x where it differs) calls our styles."""


def tensor_parallel_plan(root: nn.Module, name: str | None) -> dict[str, str]:
    """The tensor-parallel plan of the submodule ``name``: names relative to it, each with a style.

    Read from the submodule's own ``tensor_parallel_plan``, or from the root's, whose keys are full names in which
    ``*`` stands for anything (``"model.blocks.*.attention.query": "colwise"``), or from the ``tp_plan`` of the Hugging
    Face model it is in. Empty where nothing is declared.

    Raises:
        ValueError: If a style is unknown or a name leads to no module.
    """
    if name is None:
        return {}
    module = root.get_submodule(name)
    own = _declared(module, f"{name}.tensor_parallel_plan") if module is not root else {}
    plan = dict(own)
    patterns = _declared(root, "tensor_parallel_plan")
    if not plan and patterns:
        for child, _ in module.named_modules():
            full = f"{name}.{child}"
            style = next((style for pattern, style in patterns.items() if fnmatchcase(full, pattern)), None)
            if child and style:
                plan[child] = style
    for child in plan:
        named_submodule(module, child, f"{name}.tensor_parallel_plan")
    return plan or _transformers_plan(root, name)


def outside_tensor_parallel_plan(root: nn.Module, structure: ModelStructure) -> dict[str, str]:
    """Full names and styles of what is split outside of the blocks of a model that runs its own forward.

    Empty where one parameter serves two modules: each would have to be split in its own way.
    """
    names = [*structure.modules("embedding"), *structure.modules("head")]
    owners: dict[Any, set[str]] = {}
    for name in names:
        for parameter in root.get_submodule(name)._parameters.values():
            owners.setdefault(parameter, set()).add(name)
    if any(len(found) > 1 for parameter, found in owners.items() if parameter is not None):
        return {}
    plan = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        style = tensor_parallel_plan(root, parent).get(child)
        if style is not None:
            plan[name] = style
    return plan


def tensor_parallel_degrees(root: nn.Module, name: str | None, limit: int) -> tuple[int, ...]:
    """Tensor-parallel degrees, powers of two up to ``limit``, that the submodule ``name`` can run with.

    A degree must divide the split dimension of every module in the plan, and ``tensor_parallel_divisor`` where the
    submodule has one (its number of attention heads, say).
    """
    plan = tensor_parallel_plan(root, name)
    if not plan or name is None:
        return (1,)
    module = root.get_submodule(name)
    sizes = [_split_size(module.get_submodule(child), style) for child, style in plan.items() if style != "per_head"]
    divisor = getattr(module, "tensor_parallel_divisor", None)
    if divisor is None:
        divisor = _attention_heads(root, name)
    if divisor is not None:
        sizes.append(int(divisor))
    return _degrees(sizes, limit)


def outside_tensor_parallel_degrees(root: nn.Module, structure: ModelStructure, limit: int) -> tuple[int, ...]:
    """The same for all that runs outside of the blocks."""
    plan = outside_tensor_parallel_plan(root, structure)
    return _degrees([_split_size(root.get_submodule(name), style) for name, style in plan.items()] or [1], limit)


def _degrees(sizes: list[int], limit: int) -> tuple[int, ...]:
    degrees, degree = [], 1
    while degree <= limit:
        if all(size % degree == 0 for size in sizes):
            degrees.append(degree)
        degree *= 2
    return tuple(degrees)


def _transformers_plan(root: nn.Module, name: str) -> dict[str, str]:
    """The plan that the innermost Hugging Face model around the submodule gives for it."""
    found: dict[str, str] = {}
    module = root.get_submodule(name)
    for ancestor, path in _ancestors(root, name):
        plan = getattr(ancestor, "tp_plan", None)
        if not isinstance(plan, Mapping) or not plan:
            continue
        for child, _ in module.named_modules():
            full = ".".join(part for part in (path, child) if part)
            style = next((style for pattern, style in plan.items() if fnmatchcase(full, pattern)), None)
            if style is None or not child:
                continue
            found[child] = _TRANSFORMERS_STYLES.get(style, "")
            per_head = found[child] == "per_head" and not _is_per_head(ancestor, module.get_submodule(child))
            if not found[child] or per_head:
                return {}  # experts, packed weights, norms over all heads: such a layer is not split
        return found
    return found


def _is_per_head(model: nn.Module, norm: nn.Module) -> bool:
    weight, size = getattr(norm, "weight", None), getattr(getattr(model, "config", None), "head_dim", None)
    return weight is not None and list(weight.shape) == [size]


def _ancestors(root: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules around ``name``, from the outermost in, each with the path from there to it."""
    parts = name.split(".") if name else []
    for depth in range(len(parts) + 1):
        yield root.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:])


def _attention_heads(root: nn.Module, name: str) -> int | None:
    """What the attention heads of a Hugging Face model can be divided by."""
    for ancestor, _ in _ancestors(root, name):
        config = getattr(ancestor, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if isinstance(heads, int):
            groups = getattr(config, "num_key_value_heads", None)
            return gcd(heads, groups) if isinstance(groups, int) else heads
    return None


def _split_size(module: nn.Module, style: str) -> int:
    weight = getattr(module, "weight", None)
    if weight is None:
        raise ValueError(f"tensor_parallel_plan names a {type(module).__name__}, which has no weight to split.")
    if style == "rowwise":
        return int(weight.shape[1])
    return int(weight.shape[0])


def _declared(module: nn.Module, what: str) -> dict[str, str]:
    plan = getattr(module, "tensor_parallel_plan", None)
    if callable(plan):
        plan = plan()
    if plan is None:
        return {}
    if not isinstance(plan, Mapping):
        raise ValueError(f"{what} is a {type(plan).__name__}: expected a mapping of module names to styles.")
    for name, style in plan.items():
        if style not in TENSOR_PARALLEL_STYLES:
            raise ValueError(f"{what}[{name!r}]={style!r}: expected one of {', '.join(TENSOR_PARALLEL_STYLES)}.")
    return dict(plan)
