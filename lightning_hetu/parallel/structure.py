"""Finds the parts of a model that a plan speaks of: its blocks, what comes before them, and what comes behind."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lightning_hetu.parallel.pipeline_mixin import PipelineMixin, runs_own_forward, uses_pipeline

if TYPE_CHECKING:
    from lightning_hetu.parallel.forward_trace import ForwardTrace


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
            named_submodule(module, getattr(module, role), role)
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


def named_submodule(module: nn.Module, path: str, what: str) -> nn.Module:
    """The submodule ``path``; ``what`` is named in the error where there is none.

    Raises:
        ValueError: If there is none.
    """
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{what}={path!r}: {type(module).__name__} has no such module.") from None


def outermost(names: Collection[str]) -> list[str]:
    """Those of some names of modules that are inside of no other one."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


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
