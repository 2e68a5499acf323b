"""Applies a plan to a model, in place: per layer tensor parallelism, then recomputation, then data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_hetu.parallel.experts import layers_to_share, share_out_experts
from lightning_hetu.parallel.megatron_sequence import apply_sequence_parallel, sequence_regions
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.operator_groups import check_groups
from lightning_hetu.parallel.recompute import apply_recompute
from lightning_hetu.parallel.relayout import relayout, relayout_shared
from lightning_hetu.parallel.sequence_attention import cut_attention_layer
from lightning_hetu.parallel.sequence_cut import cut_activation
from lightning_hetu.parallel.shard import apply_data_parallel, sum_gradients
from lightning_hetu.parallel.stage import StageGroup, StageModule, boundary_dp
from lightning_hetu.parallel.structure import ModelStructure
from lightning_hetu.parallel.tensor import apply_tensor_parallel
from lightning_hetu.parallel.tensor_plan import outside_tensor_parallel_plan, tensor_parallel_plan
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan


def check_plan_fits_model(plan: HybridPlan, structure: ModelStructure, root: nn.Module) -> None:
    """Refuses a plan that this model cannot run.

    Raises:
        ValueError: One line that names the field of the plan and the remedy.
    """
    if plan.num_layers != len(structure.blocks):
        raise ValueError(
            f"plan.layers has {plan.num_layers} entries, but the model has {len(structure.blocks)} blocks"
            f" ({structure.blocks[0]} to {structure.blocks[-1]}). Plan again for this model."
        )
    for field, strategy in plan.rows():
        if strategy.cp > 1 and strategy.tp > 1:
            raise ValueError(f"plan.{field}={strategy}: cp goes with sp, not with tp; use one of them.")
        if not strategy.tp_consecutive and strategy.tp > 1 and strategy.dp > 1:
            raise ValueError(f"plan.{field}={strategy}: only consecutive tensor-parallel ranks can be run.")
    check_parameters(structure, root)
    for field, name in structure.rows():
        strategy = dict(plan.rows())[field]
        if strategy.tp > 1 and name is not None and structure.pipeline and not tensor_parallel_plan(root, name):
            raise ValueError(
                f"plan.{field}={strategy}, but {name} declares no tensor_parallel_plan: use tp1 for it, or declare one."
            )
    for index, (name, strategy) in enumerate(zip(structure.blocks, plan.layers, strict=True)):
        if strategy.tp > 1 and any(layers_to_share(root.get_submodule(name))):
            raise ValueError(
                f"plan.layers[{index}]={strategy}, but {name} has experts that are shared out, and so every rank needs"
                " tokens of its own: use tp1, or expert_parallel=1."
            )
        if strategy.sequence_parallel:
            try:
                sequence_regions(root, name)
            except ValueError as error:
                raise ValueError(f"plan.layers[{index}]={strategy}: {error} Leave out -sequence.") from None
        try:
            check_groups(root.get_submodule(name), strategy.sharded)
        except ValueError as error:
            raise ValueError(f"plan.layers[{index}]={strategy}: in {name}, {error}") from None
    for field, strategy in (("embedding", plan.embedding), ("head", plan.head)):
        if strategy.sequence_parallel or strategy.sp * strategy.cp > 1:
            raise ValueError(
                f"plan.{field}={strategy}: only the sequences of blocks can be cut, leave out -sequence, sp and cp."
            )
        if strategy.recompute:
            raise ValueError(f"plan.{field}={strategy}: only blocks can be recomputed.")
        if strategy.sharded:
            raise ValueError(f"plan.{field}={strategy}: only blocks can have operators sharded further than the rest.")
    if structure.trace is not None and plan.embedding.tp > 1 and not outside_tensor_parallel_plan(root, structure):
        raise ValueError(
            f"plan.embedding={plan.embedding}: {type(root).__name__} has no tensor-parallel plan for what is outside of"
            " its blocks, or ties its weights; use tp1."
        )
    if structure.pipeline and structure.trace is None:
        return
    if not structure.pipeline and (plan.pipeline_parallel_size > 1 or plan.num_microbatches > 1):
        raise ValueError(
            f"plan has {plan.pipeline_parallel_size} stages and {plan.num_microbatches} microbatches, but"
            f" {type(root).__name__} has no pipeline support: derive it from PipelineMixin, or pin"
            " pipeline_parallel_size=1 and num_microbatches=1."
        )
    if plan.embedding != plan.head:
        raise ValueError(
            f"plan.embedding={plan.embedding} and plan.head={plan.head} must be the same for {type(root).__name__}:"
            " it runs its own forward, and everything outside the blocks is one unit."
        )


def check_parameters(structure: ModelStructure, root: nn.Module) -> None:
    """Refuses models with parameters that no layer of the plan holds, or more than one.

    Raises:
        ValueError: If a block is listed twice, a weight is shared between layers, or one of a module with pipeline
            support lies outside of its three parts.
    """
    modules = [root.get_submodule(name) for name in structure.blocks]
    if len({id(module) for module in modules}) < len(modules):
        raise ValueError(
            f"one module stands more than once in the blocks {structure.blocks[0]} to {structure.blocks[-1]}: a layer"
            " can be parallelized only once. Give every position a module of its own."
        )
    units = tuple(name for _, name in structure.rows() if name is not None)
    if structure.trace is not None:
        units = (*structure.blocks, str(structure.model))  # what a model has outside of its blocks may be tied
    owners: dict[nn.Parameter, tuple[str | None, str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), None)
        if unit is None and structure.pipeline and parameter.requires_grad:
            parts = structure.model or f"{structure.embedding}, the blocks and {structure.head}"
            raise ValueError(
                f"parameter {name!r} lies outside of {parts}: no"
                " pipeline stage would train it. Move it into one of them."
            )
        other, first = owners.setdefault(parameter, (unit, name))
        if other != unit:
            raise ValueError(
                f"{name!r} and {first!r} are one shared parameter in two layers: tied weights across layers are not"
                " supported. Give each its own parameter."
            )


def synchronize_initial_state(root: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0; ranks may have drawn different initial weights."""
    with torch.no_grad():
        for tensor in (*root.parameters(), *root.buffers()):
            data = tensor.detach()
            if data.is_contiguous():
                torch.distributed.broadcast(data, src=0)
            else:
                copy = data.contiguous()
                torch.distributed.broadcast(copy, src=0)
                data.copy_(copy)


def build_stage(
    root: nn.Module, structure: ModelStructure, plan: HybridPlan, mesh: PlanMesh
) -> StageModule | StageGroup:
    """Parallelizes this rank's stages of a model with pipeline support and removes the other ones from ``root``.

    Parameter names stay those of the whole model, so checkpoints do not depend on the plan.
    """
    assert structure.embedding is not None and structure.head is not None
    indices = plan.stages_of_rank(mesh.stage)
    rows = [_stage_rows(structure, plan, index) for index in indices]
    keep = {name for names in rows for name, _ in names}
    everything = (structure.embedding, *structure.blocks, structure.head)
    removed = RemovedLayers(root, [name for name in everything if name not in keep])
    stages = [_build_one(root, names, plan, mesh, index) for index, names in zip(indices, rows, strict=True)]
    whole = stages[0] if plan.virtual_stages == 1 else StageGroup(stages)
    whole.removed = removed
    return whole


def _stage_rows(structure: ModelStructure, plan: HybridPlan, index: int) -> list[tuple[str, LayerStrategy]]:
    """The layers of a stage, by name."""
    assert structure.embedding is not None and structure.head is not None
    first, last = plan.stage_bounds[index]
    names = [(structure.blocks[block], plan.layers[block]) for block in range(first, last)]
    if index == 0:
        names.insert(0, (structure.embedding, plan.embedding))
    if index == len(plan.stages) - 1:
        names.append((structure.head, plan.head))
    return names


def _build_one(
    root: nn.Module, names: list[tuple[str, LayerStrategy]], plan: HybridPlan, mesh: PlanMesh, index: int
) -> StageModule:
    layers = [(root.get_submodule(name), strategy.dp) for name, strategy in names]
    for name, strategy in names:
        parallelize(root, name, strategy, mesh)
    stage = StageModule(
        layers,
        mesh,
        input_dp=plan.embedding.dp if index == 0 else boundary_dp(plan, index - 1),
        output_dp=plan.head.dp if index == len(plan.stages) - 1 else boundary_dp(plan, index),
    )
    # The root has no parameters of its own left, but it ties the layers into one FSDP context.
    fully_shard(stage, mesh=mesh.layout(names[0][1]).data, reshard_after_forward=False)
    sum_gradients(stage)
    return stage


class RemovedLayers:
    """Takes the layers of other stages out of a model, and can show it whole again for a moment.

    Args:
        root: The whole model.
        names: Full names of the layers. They are moved to the meta device, where they take no memory.
        stand_in: Makes of each layer what takes its place; by default nothing does.
    """

    def __init__(
        self, root: nn.Module, names: list[str], stand_in: Callable[[nn.Module], nn.Module] | None = None
    ) -> None:
        self.parents: dict[nn.Module, dict[str, nn.Module | None]] = {}
        for name in names:
            parent_name, _, child = name.rpartition(".")
            parent = root.get_submodule(parent_name)
            self.parents.setdefault(parent, dict(parent._modules))
            layer = root.get_submodule(name).to("meta")
            if stand_in is not None:
                parent._modules[child] = stand_in(layer)
            elif isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                del parent._modules[child]  # not delattr: it would renumber, and names must stay those of the whole
            else:
                setattr(parent, child, None)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """The model has all its layers, in their order, for as long as the context lasts."""
        present = {parent: dict(parent._modules) for parent in self.parents}
        for parent, whole in self.parents.items():
            parent._modules.clear()
            parent._modules.update(whole)
        try:
            yield
        finally:
            for parent, modules in present.items():
                parent._modules.clear()
                parent._modules.update(modules)


class ModuleRoot(nn.Module):
    """Runs an unchanged module below one FSDP root. Lightning redirects the step methods through its forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.samples = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the module, or of whatever Lightning has put in its place for a step."""
        self.samples = _local_samples((args, kwargs))
        return self.module(*args, **kwargs)


def build_module(root: nn.Module, structure: ModelStructure, plan: HybridPlan, mesh: PlanMesh) -> ModuleRoot:
    """Parallelizes the blocks of any model, and everything outside them as one more unit.

    The model runs its own forward; hooks change the layout of what goes into a block and comes out of the last one.
    """
    outside = plan.head
    wrapper = ModuleRoot(root)
    current = outside.dp
    for name, strategy in zip(structure.blocks, plan.layers, strict=True):
        parallelize(root, name, strategy, mesh)
        if {current, strategy.dp} != {outside.dp}:
            hook = partial(_relayout_inputs, wrapper, mesh, (current, outside.dp), strategy.dp, name)
            root.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        current = strategy.dp
    if current != outside.dp:
        hook = partial(_relayout_outputs, wrapper, mesh, (current, outside.dp), structure.blocks[-1])
        root.get_submodule(structure.blocks[-1]).register_forward_hook(hook)
    share_out_experts(root, partial(mesh.experts, outside), outside.shard_degree)
    apply_data_parallel(wrapper, mesh.layout(outside), outside.dp_type)
    return wrapper


def parallelize(root: nn.Module, name: str, strategy: LayerStrategy, mesh: PlanMesh) -> None:
    """Applies one row of a plan to the layer ``name``: tensor parallelism, recomputation, data parallelism."""
    layer = root.get_submodule(name)
    layout = mesh.layout(strategy)
    share_out_experts(layer, partial(mesh.experts, strategy), strategy.shard_degree)
    cut: Callable[[], None] | None = None  # outside of recomputation, which then keeps a part of the input
    if strategy.sequence_parallel:
        split, regions = tensor_parallel_plan(root, name), sequence_regions(root, name)
        shared = apply_sequence_parallel(layer, layout.tensor, split, regions, recompute=strategy.recompute)
        cut = partial(cut_activation, layer, shared, name)
    elif strategy.tp > 1:
        apply_tensor_parallel(layer, layout.tensor, tensor_parallel_plan(root, name))
    elif layout.sequence is not None:
        cut = cut_attention_layer(layer, layout, name)
    if strategy.recompute:
        apply_recompute(layer)
    if cut is not None:
        cut()
    apply_data_parallel(layer, layout, strategy.dp_type, strategy.sharded)


def _relayout_inputs(
    wrapper: ModuleRoot,
    mesh: PlanMesh,
    sources: tuple[int, int],
    target_dp: int,
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    moved: tuple[tuple[Any, ...], dict[str, Any]] = _relayout_from(
        (args, kwargs), wrapper, mesh, sources, target_dp, name
    )
    return moved


def _relayout_outputs(
    wrapper: ModuleRoot,
    mesh: PlanMesh,
    sources: tuple[int, int],
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> Any:
    return _relayout_from(output, wrapper, mesh, sources, sources[1], name)


def _relayout_from(
    values: Any, wrapper: ModuleRoot, mesh: PlanMesh, sources: tuple[int, int], target_dp: int, name: str
) -> Any:
    """Brings every tensor with a batch dimension into one layout.

    Args:
        values: What a block is given or returns.
        wrapper: Knows the local rows outside of the blocks.
        mesh: Meshes of the plan.
        sources: Batch shards of what the previous block returns, and of what comes from outside. The number of rows of
            a tensor tells which it is; where both give the same number, they are the same layout.
        target_dp: Batch shards wanted.
        name: Name of the block, for the error message.
    """
    total = wrapper.samples * sources[1]
    rows = {total // dp: dp for dp in sources}
    first = _local_samples(values)
    if first not in rows:
        raise ValueError(
            f"{name} works on {first} rows where the batch has {wrapper.samples}: its activations do not keep the batch"
            " in dimension 0, so its layers cannot have different data-parallel degrees. Pin one, for example"
            " pins={'layers': 'dp4-zero3'}."
        )

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0 or tensor.shape[0] not in rows:
            # the same for all samples, and made outside of the blocks
            return relayout_shared(tensor, mesh, sources[1], target_dp) if tensor.requires_grad else tensor
        # What comes from outside tells: later layouts are then known.
        if tensor.shape[0] == wrapper.samples and wrapper.samples in tensor.shape[1:]:
            raise ValueError(
                f"{name} works on a tensor of shape {list(tensor.shape)}, where more than one dimension may be the"
                f" {tensor.shape[0]} samples of this rank, so its layers cannot have different data-parallel degrees."
                " Use another batch size, or pin one, for example pins={'layers': 'dp4-zero3'}."
            )
        return relayout(tensor, mesh, rows[tensor.shape[0]], target_dp)

    return torch.utils._pytree.tree_map_only(torch.Tensor, move, values)


def _local_samples(values: Any) -> int:
    """Local rows: dimension 0 of the first tensor that has one."""
    leaves = torch.utils._pytree.tree_leaves(values)
    return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim), 0)
