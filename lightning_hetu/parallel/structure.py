"""Finds the parts of a model that a plan speaks of: its blocks, what comes before them, and what comes behind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import gcd
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_hetu.parallel.pipeline_mixin import PipelineMixin, runs_own_forward, uses_pipeline

if TYPE_CHECKING:
    from lightning_hetu.parallel.forward_trace import ForwardTrace

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
_NORM_OF_TOKENS = re.compile(r"(Layer|RMS)_?Norm")
"""Class names of norms that treat every token by itself, whoever wrote them."""


@dataclass(frozen=True)
class ModelStructure:
    """Where the layers of a model are.

    Args:
        blocks: Full names of the blocks, in the order they run.
        embedding: Full name of what runs before the blocks; ``None`` where it is not one module.
        head: Full name of what runs behind the blocks; ``None`` where it is not one module.
        model: Full name of the model, where it runs its own forward and can be cut; see ``trace``.
        trace: What that forward does; names in it are relative to the model.

    A model without named embedding and head is run by its own ``training_step`` as one stage; everything outside its
    blocks is then one unit.
    """

    blocks: tuple[str, ...]
    embedding: str | None = None
    head: str | None = None
    model: str | None = None
    trace: ForwardTrace | None = None

    @property
    def pipeline(self) -> bool:
        """Whether the model can be cut into stages and microbatches."""
        return self.trace is not None or (self.embedding is not None and self.head is not None)

    def modules(self, field: str) -> list[str]:
        """Full names of the modules of one row of the plan.

        What runs between two blocks of a model with its own forward counts with what runs before the first.
        """
        if self.trace is None or field not in ("embedding", "head"):
            return [name for row, name in self.rows() if row == field and name is not None]
        blocks = len(self.blocks)
        names = self.trace.modules_at(0, blocks) if field == "embedding" else self.trace.modules_at(blocks, blocks + 1)
        return [f"{self.model}.{name}" for name in names]

    def rows(self) -> list[tuple[str, str | None]]:
        """Plan row and full module name, in model order."""
        blocks = [(f"layers[{index}]", name) for index, name in enumerate(self.blocks)]
        return [("embedding", self.embedding), *blocks, ("head", self.head)]


def find_structure(module: nn.Module, blocks: str | None = None) -> ModelStructure:
    """Finds the layers of ``module``.

    A module with pipeline support says where they are. Elsewhere the blocks are the children of ``blocks``, or of the
    container whose children share one class and hold the most parameters.

    Args:
        module: The whole model.
        blocks: Dotted path of the container of the blocks, for example ``"model.layers"``.

    Raises:
        ValueError: If ``blocks`` names no container of modules, or none is found; the message lists what is there.
    """
    if uses_pipeline(module) and not runs_own_forward(module):
        assert isinstance(module, PipelineMixin)
        path = blocks or module.pipeline_blocks
        names = children_of(module, path)
        for role in ("pipeline_embedding", "pipeline_head"):
            _submodule(module, getattr(module, role), role)
        if blocks is not None and blocks != module.pipeline_blocks:
            return ModelStructure(names)
        return ModelStructure(names, module.pipeline_embedding, module.pipeline_head)
    if blocks is not None:
        return ModelStructure(children_of(module, blocks))
    candidates = sorted(block_containers(module), key=lambda item: (-item[1], item[0]))
    if not candidates:
        raise ValueError(
            f"blocks=None: {type(module).__name__} has no list of two or more equal modules to parallelize. Name it,"
            ' for example blocks="model.layers".'
        )
    return ModelStructure(children_of(module, candidates[0][0]))


def block_containers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Full name and parameter count of every container whose two or more children are of one class."""
    for name, candidate in module.named_modules():
        children = list(candidate.children())
        if not name or not isinstance(candidate, nn.ModuleList | nn.ModuleDict | nn.Sequential) or len(children) < 2:
            continue
        sizes = [sum(p.numel() for p in child.parameters()) for child in children]
        if len({type(child) for child in children}) == 1 and min(sizes) > 0:
            yield name, sum(sizes)


@dataclass(frozen=True)
class EqualModules:
    """Modules of one class that stand in containers.

    Args:
        names: Full names, in the order of the model.
        parameters: Number of parameters in all of them.
    """

    names: tuple[str, ...]
    parameters: int


def children_of_one_class(module: nn.Module) -> list[EqualModules]:
    """For every class with two or more modules in containers of equal modules, all those modules."""
    found: dict[type, list[tuple[str, int]]] = {}
    for container, _ in block_containers(module):
        for name in children_of(module, container):
            child = module.get_submodule(name)
            found.setdefault(type(child), []).append((name, sum(p.numel() for p in child.parameters())))
    return [EqualModules(tuple(n for n, _ in items), sum(size for _, size in items)) for items in found.values()]


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
        _submodule(module, child, f"{name}.tensor_parallel_plan")
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


@dataclass(frozen=True)
class SequenceRegions:
    """Where a sequence-parallel block works on whole sequences, and what it does to parts of them.

    Args:
        whole: The modules around the split products, attention and MLP: their input is gathered. Relative names.
        norms: The norms outside of them, whose weights see the tokens of one rank only. Relative names.
        dropouts: The dropouts outside of them. Relative names.
    """

    whole: tuple[str, ...]
    norms: tuple[str, ...]
    dropouts: tuple[str, ...]


def sequence_regions(root: nn.Module, name: str) -> SequenceRegions:
    """How the block ``name`` can be run with Megatron sequence parallelism.

    Raises:
        ValueError: If it cannot: the message is one line that says what stands in the way.
    """
    block = root.get_submodule(name)
    plan = tensor_parallel_plan(root, name)
    if not plan:
        raise ValueError(f"{name} declares no tensor_parallel_plan, on which sequence parallelism builds.")
    parents: dict[str, set[str]] = {}
    for child, style in plan.items():
        if style not in ("colwise", "rowwise", "per_head"):
            raise ValueError(
                f"{name}.{child} is {style}: with sequence parallelism use colwise and rowwise in a block."
            )
        parents.setdefault(child.rpartition(".")[0], set()).add(style)
    # Elsewhere code may go by the shape of an input that is not gathered yet, without any error.
    for parent, styles in parents.items():
        if not parent:
            raise ValueError(
                f"{name} has split layers of its own: sequence parallelism needs them in submodules of it."
            )
        if not {"colwise", "rowwise"} <= styles:
            raise ValueError(
                f"{name}.{parent} has only {' and '.join(sorted(styles))} layers: sequence parallelism needs the"
                " colwise and the rowwise ones of a product in one module."
            )
        outer = next((other for other in parents if parent.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"{name}.{parent} is inside of {outer}: sequence parallelism cannot gather in both.")
    norms, dropouts = [], []
    for child, module in block.named_modules():
        # What is behind a row-wise product sees a part of the sequence, what is before it all: here nothing tells.
        inside = any(child == parent or child.startswith(f"{parent}.") for parent in parents)
        if type(module) is nn.Dropout and not inside:
            dropouts.append(child)
        own = [key for key, parameter in module._parameters.items() if parameter is not None]
        if not own or child in plan:
            continue
        if inside or not _is_norm_of_tokens(module):
            full = ".".join(part for part in (name, child, own[0]) if part)
            raise ValueError(
                f"parameter '{full}' is neither split nor of a LayerNorm or RMSNorm between the split products: its"
                " gradient under sequence parallelism is not known."
            )
        norms.append(child)
    return SequenceRegions(tuple(parents), tuple(norms), tuple(dropouts))


def sequence_parallel_degrees(root: nn.Module, name: str, degrees: Iterable[int], length: int) -> tuple[int, ...]:
    """Those of its tensor-parallel ``degrees`` that the block ``name`` can run with Megatron sequence parallelism.

    Args:
        root: The whole model.
        name: Full name of the block.
        degrees: Its tensor-parallel degrees.
        length: Tokens per sample, which the degree must divide.
    """
    try:
        sequence_regions(root, name)
    except ValueError:
        return ()
    return tuple(degree for degree in degrees if degree > 1 and length % degree == 0)


def _is_norm_of_tokens(module: nn.Module) -> bool:
    known = isinstance(module, nn.LayerNorm | nn.RMSNorm) or _NORM_OF_TOKENS.search(type(module).__name__) is not None
    return known and all(parameter is None or parameter.ndim == 1 for parameter in module._parameters.values())


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


def _submodule(module: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{what}={path!r}: {type(module).__name__} has no such module.") from None


def children_of(module: nn.Module, path: str) -> tuple[str, ...]:
    """Full names of the modules in the container ``path``.

    Raises:
        ValueError: If there is no such container, or nothing in it.
    """
    try:
        container = module.get_submodule(path)
    except AttributeError:
        known = ", ".join(repr(name) for name, _ in block_containers(module)) or "none found"
        raise ValueError(
            f"blocks={path!r}: {type(module).__name__} has no such module. Containers of equal blocks: {known}."
        ) from None
    # not namedchildren_of(), which leaves out a module that stands there a second time
    names = tuple(f"{path}.{name}" for name, child in container._modules.items() if child is not None)
    if not names:
        raise ValueError(f"blocks={path!r}: {type(container).__name__} holds no modules to parallelize.")
    return names
