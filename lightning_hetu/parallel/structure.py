"""Finds the parts of a model that a plan speaks of: its blocks, what comes before them, and what comes behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_hetu.parallel.pipeline_mixin import PipelineMixin, uses_pipeline

TENSOR_PARALLEL_STYLES = ("colwise", "rowwise", "colwise_gather", "vocab_rowwise")


@dataclass(frozen=True)
class ModelStructure:
    """Where the layers of a model are.

    Args:
        blocks: Full names of the blocks, in the order they run.
        embedding: Full name of what runs before the blocks; ``None`` where it is not one module.
        head: Full name of what runs behind the blocks; ``None`` where it is not one module.

    A model without named embedding and head is run by its own ``training_step`` as one stage; everything outside its
    blocks is then one unit.
    """

    blocks: tuple[str, ...]
    embedding: str | None = None
    head: str | None = None

    @property
    def pipeline(self) -> bool:
        """Whether the model can be cut into stages and microbatches."""
        return self.embedding is not None and self.head is not None

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
    if uses_pipeline(module):
        assert isinstance(module, PipelineMixin)
        path = blocks or module.pipeline_blocks
        names = _children(module, path)
        for role in ("pipeline_embedding", "pipeline_head"):
            _submodule(module, getattr(module, role), role)
        if blocks is not None and blocks != module.pipeline_blocks:
            return ModelStructure(names)
        return ModelStructure(names, module.pipeline_embedding, module.pipeline_head)
    if blocks is not None:
        return ModelStructure(_children(module, blocks))
    candidates = sorted(block_containers(module), key=lambda item: (-item[1], item[0]))
    if not candidates:
        raise ValueError(
            f"blocks=None: {type(module).__name__} has no list of two or more equal modules to parallelize. Name it,"
            ' for example blocks="model.layers".'
        )
    return ModelStructure(_children(module, candidates[0][0]))


def block_containers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Full name and parameter count of every container whose two or more children are of one class."""
    for name, candidate in module.named_modules():
        children = list(candidate.children())
        if not name or not isinstance(candidate, nn.ModuleList | nn.ModuleDict | nn.Sequential) or len(children) < 2:
            continue
        sizes = [sum(p.numel() for p in child.parameters()) for child in children]
        if len({type(child) for child in children}) == 1 and min(sizes) > 0:
            yield name, sum(sizes)


def tensor_parallel_plan(root: nn.Module, name: str | None) -> dict[str, str]:
    """The tensor-parallel plan of the submodule ``name``: names relative to it, each with a style.

    Read from the submodule's own ``tensor_parallel_plan``, or from the root's, whose keys are full names in which
    ``*`` stands for anything (``"model.blocks.*.attention.query": "colwise"``). Empty where nothing is declared.

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
    sizes = [_split_size(module.get_submodule(child), style) for child, style in plan.items()]
    divisor = getattr(module, "tensor_parallel_divisor", None)
    if divisor is not None:
        sizes.append(int(divisor))
    degrees, degree = [], 1
    while degree <= limit:
        if all(size % degree == 0 for size in sizes):
            degrees.append(degree)
        degree *= 2
    return tuple(degrees)


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


def _children(module: nn.Module, path: str) -> tuple[str, ...]:
    try:
        container = module.get_submodule(path)
    except AttributeError:
        known = ", ".join(repr(name) for name, _ in block_containers(module)) or "none found"
        raise ValueError(
            f"blocks={path!r}: {type(module).__name__} has no such module. Containers of equal blocks: {known}."
        ) from None
    # not named_children(), which leaves out a module that stands there a second time
    names = tuple(f"{path}.{name}" for name, child in container._modules.items() if child is not None)
    if not names:
        raise ValueError(f"blocks={path!r}: {type(container).__name__} holds no modules to parallelize.")
    return names
