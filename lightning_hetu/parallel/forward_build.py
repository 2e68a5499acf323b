"""Applies a plan to a model that runs its own forward: this rank's stage of it, with stand-ins for the rest.

Everything outside of the blocks has one layout, that of ``plan.embedding`` and ``plan.head``. A parameter that serves
in several stages, the table of tied embeddings, is kept by each of them; they add up its gradients, and so its copies
stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from lightning_hetu.parallel.build import RemovedLayers, parallelize
from lightning_hetu.parallel.forward_stage import ForwardStage, StandIn
from lightning_hetu.parallel.forward_trace import ForwardTrace
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.shard import apply_data_parallel
from lightning_hetu.parallel.stage import boundary_dp
from lightning_hetu.parallel.structure import ModelStructure, outermost
from lightning_hetu.parallel.tensor import apply_tensor_parallel
from lightning_hetu.parallel.tensor_plan import outside_tensor_parallel_plan
from lightning_hetu.planning.plan import HybridPlan, PricedSchedule


@dataclass(frozen=True)
class TiedParameter:
    """A parameter of which more than one stage has a copy.

    Args:
        names: Full names in the whole model, the one that optimizers know it by first.
        stages: The stages that have it.
    """

    names: tuple[str, ...]
    stages: tuple[int, ...]


class TiedGradients:
    """Adds up the gradients of tied parameters over the stages that have them.

    Args:
        parameters: This rank's copies, with the group of ranks that hold the same shard.
    """

    def __init__(self, parameters: list[tuple[nn.Parameter, ProcessGroup]]) -> None:
        self.parameters = parameters

    def add_up(self) -> None:
        """To be called once per batch, when all gradients are there."""
        for parameter, group in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            torch.distributed.all_reduce(local, group=group)


def module_stages(root: nn.Module, structure: ModelStructure, plan: HybridPlan) -> dict[str, int]:
    """The stage of every module outside of the blocks that has parameters of its own, by full name.

    What did not run when the model was traced is kept by the last stage; a second name of a module's parameter goes
    with the first.
    """
    assert structure.trace is not None and structure.model is not None
    model = root.get_submodule(structure.model)
    inside = {part for name in structure.blocks for part in root.get_submodule(name).modules()}
    owners: dict[nn.Parameter, int] = {}
    stages: dict[str, int] = {}
    idle = []
    for name, part in model.named_modules():
        own = [parameter for parameter in part._parameters.values() if parameter is not None]
        if part in inside or not own:
            continue
        full = f"{structure.model}.{name}" if name else structure.model
        position = _position(structure.trace, name)
        if position is None:
            idle.append((full, own))
            continue
        stages[full] = 0 if position == 0 else plan.stage_of(min(position, len(structure.blocks)) - 1)
        for parameter in own:
            owners.setdefault(parameter, stages[full])
    for full, own in idle:
        stages[full] = next((owners[p] for p in own if p in owners), plan.pipeline_parallel_size - 1)
    return stages


def _position(trace: ForwardTrace, name: str) -> int | None:
    """Where a module ran, or the module it is a part of and that uses its parameters."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        position = trace.outside.get(".".join(parts[:count]))
        if position is not None:
            return position
    return None


def tied_parameters(root: nn.Module, stages: dict[str, int]) -> list[TiedParameter]:
    """Parameters outside of the blocks that more than one stage needs."""
    found: dict[nn.Parameter, list[tuple[str, int]]] = {}
    for name, stage in stages.items():
        for child, parameter in root.get_submodule(name)._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append((f"{name}.{child}", stage))
    first = {parameter: name for name, parameter in root.named_parameters()}
    tied = []
    for parameter, places in found.items():
        needed = tuple(sorted({stage for _, stage in places}))
        if len(needed) > 1:
            others = [name for name, _ in places if name != first[parameter]]
            tied.append(TiedParameter((first[parameter], *others), needed))
    return tied


def build_forward_stage(root: nn.Module, structure: ModelStructure, plan: HybridPlan, mesh: PlanMesh) -> ForwardStage:
    """Parallelizes this rank's stage and puts stand-ins in the place of the others.

    Parameter names stay those of the whole model, so checkpoints do not depend on the plan.

    Raises:
        ValueError: If the schedule of the plan needs several stages per rank or split backwards.
    """
    trace = structure.trace
    assert trace is not None and structure.model is not None
    if plan.schedule not in get_args(PricedSchedule):
        raise ValueError(
            f"plan.schedule={plan.schedule!r}: {type(root).__name__} runs its own forward, which is cut into one stage"
            " per rank and whole backwards. Use schedule='1f1b' with virtual_stages=1."
        )
    model = root.get_submodule(structure.model)
    first, last = plan.stage_bounds[mesh.stage]
    stages = module_stages(root, structure, plan)
    tied = tied_parameters(root, stages)
    outside = plan.embedding
    layout = mesh.layout(outside)
    split = outside_tensor_parallel_plan(root, structure) if outside.tp > 1 else {}

    removed = [name for index, name in enumerate(structure.blocks) if not first <= index < last]
    gone = [name for name, stage in stages.items() if stage != mesh.stage]
    # A module goes with all that is in it, unless a part is needed here or is a block of its own.
    kept = {name for name, stage in stages.items() if stage == mesh.stage} | set(structure.blocks)
    for name in gone:
        if any(other.startswith(f"{name}.") for other in kept):
            child = next(key for key, value in root.get_submodule(name)._parameters.items() if value is not None)
            raise ValueError(
                f"parameter '{name}.{child}' belongs to a module that runs in several stages: pin"
                " pipeline_parallel_size=1, or move the parameter into a module of its own."
            )
        removed.append(name)
    device = next(model.parameters()).device
    taken = RemovedLayers(root, outermost(removed), partial(StandIn, device=device))

    for index in range(first, last):
        parallelize(root, structure.blocks[index], plan.layers[index], mesh)
    here = {name: style for name, style in split.items() if stages.get(name) == mesh.stage}
    if here:
        prefix = len(structure.model) + 1
        apply_tensor_parallel(model, layout.tensor, {name[prefix:]: style for name, style in here.items()})
    for item in tied:
        _keep_all_names(root, item)
    single = plan.pipeline_parallel_size == 1
    stage = ForwardStage(
        model,
        trace,
        (first, last),
        [layer.dp for layer in plan.layers],
        mesh,
        outside_dp=outside.dp,
        input_dp=outside.dp if mesh.is_first_stage else boundary_dp(plan, mesh.stage - 1),
        output_dp=outside.dp if single or mesh.is_last_stage else boundary_dp(plan, mesh.stage),
    )
    apply_data_parallel(stage, layout, outside.dp_type)
    stage.removed = taken
    model.register_forward_pre_hook(stage.check_running)
    stage.tied = _tied_gradients(root, tied, mesh)
    return stage


def _keep_all_names(root: nn.Module, item: TiedParameter) -> None:
    """Makes this rank's copy of a tied parameter known by all its names, as in the whole model.

    Optimizers and checkpoints then find it by the same name in every stage.
    """
    held = _held(root, item)
    if held is None:
        return
    for name in item.names:
        *path, child = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module._modules[part] = nn.Module()
            inner = module._modules[part]
            assert inner is not None
            module = inner
        module._parameters[child] = held


def _held(root: nn.Module, item: TiedParameter) -> nn.Parameter | None:
    """This rank's copy of a tied parameter."""
    here = dict(root.named_parameters(remove_duplicate=False))
    return next((here[name] for name in item.names if name in here), None)


def _tied_gradients(root: nn.Module, tied: list[TiedParameter], mesh: PlanMesh) -> TiedGradients:
    groups: dict[tuple[int, ...], ProcessGroup | None] = {}
    held = []
    for item in tied:
        if item.stages not in groups:
            groups[item.stages] = mesh.group_across(item.stages)
        parameter, group = _held(root, item), groups[item.stages]
        if parameter is not None and group is not None and parameter.requires_grad:
            if mesh.stage != item.stages[0]:
                parameter._hetu_copy = True  # type: ignore[attr-defined]
            held.append((parameter, group))
    return TiedGradients(held)
