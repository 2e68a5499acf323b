"""The device meshes of a plan: one world mesh, unflattened once for every layout in it.

All layouts come from the same root mesh, because FSDP2 joins the data-parallel and the tensor-parallel mesh of a layer
and refuses meshes of different roots; it also lets them share process groups. Ranks are ordered with the pipeline
stage outermost, then data and context parallelism, and tensor or Ulysses parallelism innermost. Every rank must build
the same meshes in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard

from lightning_hetu.parallel.expert_mesh import ExpertMesh
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan


@dataclass(frozen=True)
class Layout:
    """Meshes of one factorization of a stage, as seen by this rank.

    Args:
        data: 1-D mesh of the ranks that have the same weights, of size ``dp * cp * sp``.
        replicate: 2-D mesh of size ``(dp * cp * sp, 1)``: replicate over the first dimension, shard over the second
            (HSDP).
        tensor: 1-D mesh of size ``tp``.
        sequence: 1-D mesh of size ``cp * sp``, of the ranks that share out sequences; ``None`` where that is 1.
        context: 1-D mesh of size ``cp``; ``None`` where ``sequence`` is.
        ulysses: 1-D mesh of size ``sp``; ``None`` where ``sequence`` is.
    """

    data: DeviceMesh
    replicate: DeviceMesh
    tensor: DeviceMesh
    sequence: DeviceMesh | None = None
    context: DeviceMesh | None = None
    ulysses: DeviceMesh | None = None


class PlanMesh:
    """All meshes that ``plan`` needs, built collectively.

    ``stage`` is this rank's place in the pipeline. Where a rank has several stages (``plan.virtual_stages``), they
    share all meshes.

    Args:
        plan: The plan; its ``world_size`` must be that of the process group.
        device_type: ``"cpu"``, ``"cuda"``, ...

    Raises:
        ValueError: If the world has another size than the plan, or its data-parallel degrees do not divide each other.
    """

    def __init__(self, plan: HybridPlan, device_type: str) -> None:
        world_size = torch.distributed.get_world_size()
        if plan.world_size != world_size:
            raise ValueError(
                f"plan.world_size={plan.world_size}, but {world_size} devices were started. Give"
                f" devices={plan.world_size}, or plan again for {world_size}."
            )
        self.plan = plan
        self.rank = torch.distributed.get_rank()
        self.stage, self.stage_rank = divmod(self.rank, plan.devices_per_stage)
        self.root = init_device_mesh(device_type, (world_size,), mesh_dim_names=("world",))
        stages, size = plan.pipeline_parallel_size, plan.devices_per_stage  # ranks of the pipeline, and their devices

        rows = [row for _, row in plan.rows()]
        self._layouts: dict[tuple[int, int], Layout] = {}
        for copies, tp in sorted({(row.shard_degree, row.tp) for row in rows}):
            if copies * tp != size:
                raise ValueError(
                    f"a layout of {copies} copies of the weights with tp={tp} does not fill a stage of {size} devices."
                )
            tag = f"{copies}x{tp}"
            mesh = _unflatten(self.root, (stages, copies, 1, tp), (f"pp{tag}", f"dp{tag}", f"shard{tag}", f"tp{tag}"))
            self._layouts[copies, tp] = Layout(
                data=mesh[f"dp{tag}"], replicate=mesh[f"dp{tag}", f"shard{tag}"], tensor=mesh[f"tp{tag}"]
            )
        self._experts: dict[tuple[int, int, int, int | None], ExpertMesh] = {}
        self._sequences: dict[tuple[int, int, int], Layout] = {}
        for dp, cp, sp in sorted({(row.dp, row.cp, row.sp) for row in rows if row.cp * row.sp > 1}):
            tag = f"{dp}x{cp}x{sp}"
            dims = (f"pp{tag}", f"dp{tag}", f"cp{tag}", f"sp{tag}")
            mesh = _unflatten(self.root, (stages, dp, cp, sp), dims)
            self._sequences[dp, cp, sp] = replace(
                self._layouts[dp * cp * sp, 1],
                sequence=_flatten(mesh[dims[2:]], f"sequence{tag}"),
                context=mesh[dims[2]],
                ulysses=mesh[dims[3]],
            )

        # The axes over which activations are described: the common refinement of all data-parallel degrees, so that
        # every layout shards some outer axes and replicates the rest. All degrees of a power-of-two stage refine.
        cuts = sorted({1, size, *(row.dp for row in rows)})
        sizes = tuple(b // a for a, b in zip(cuts, cuts[1:], strict=False)) or (1,)
        if any(b % a for a, b in zip(cuts, cuts[1:], strict=False)):
            raise ValueError(f"the data-parallel degrees {cuts} of one plan must divide each other.")
        names = tuple(f"batch{index}" for index in range(len(sizes)))
        mesh = _unflatten(self.root, (stages, *sizes), ("pp", *names))
        self.activation = mesh[names] if len(names) > 1 else mesh[names[0]]
        self._cuts = cuts
        # flattened, it also lets DTensor gather over several axes in one collective
        whole = _flatten(self.activation, "stage") if len(names) > 1 else self.activation
        self.stage_group = whole.get_group()
        self.pipeline = mesh["pp"]

    def layout(self, strategy: LayerStrategy) -> Layout:
        """Meshes of a layer."""
        if strategy.cp * strategy.sp > 1:
            return self._sequences[strategy.dp, strategy.cp, strategy.sp]
        return self._layouts[strategy.shard_degree, strategy.tp]

    def experts(self, strategy: LayerStrategy, size: int, devices_per_node: int | None = None) -> ExpertMesh:
        """The groups in which ``size`` ranks share out the experts of a layer; a collective call the first time."""
        key = strategy.shard_degree, strategy.tp, size, devices_per_node
        if key not in self._experts:
            self._experts[key] = ExpertMesh.within(self.layout(strategy).data, size, devices_per_node)
        return self._experts[key]

    def placements(self, dp: int) -> tuple[Placement, ...]:
        """How activations of a layer with ``dp`` lie on :attr:`activation`: batch sharded ``dp`` ways, else copied."""
        return tuple(Shard(0) if cut <= dp else Replicate() for cut in self._cuts[1:]) or (Replicate(),)

    def data_index(self, dp: int) -> int:
        """Which of ``dp`` batch shards this rank works on."""
        return self.stage_rank * dp // self.plan.devices_per_stage

    def group_across(self, stages: Sequence[int]) -> torch.distributed.ProcessGroup | None:
        """The ranks of some stages that have the place of this rank in theirs; ``None`` outside of those stages.

        A collective call: all ranks make it, with the same stages.
        """
        found = None
        for place in range(self.plan.devices_per_stage):
            ranks = [stage * self.plan.devices_per_stage + place for stage in stages]
            group = torch.distributed.new_group(ranks)
            if self.rank in ranks:
                found = group
        return found

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank works on the embedding."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank works on the head."""
        return self.stage == self.plan.pipeline_parallel_size - 1


def _unflatten(mesh: DeviceMesh, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return mesh._unflatten(0, sizes, names)  # private in torch 2.11 to 2.13


def _flatten(mesh: DeviceMesh, name: str) -> DeviceMesh:
    return mesh._flatten(name)  # private in torch 2.11 to 2.13
