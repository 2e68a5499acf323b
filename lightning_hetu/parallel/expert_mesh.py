"""Which ranks share out the experts of a layer, and which hold the same ones.

Expert parallelism as in GShard (arXiv 2006.16668, section 3): every rank has its own tokens and some of the experts.
With more ranks than are wanted for the experts, the experts are replicated: of ``world`` ranks, ``expert_parallel``
neighbors share them out, and the ranks at the same place of each such group hold the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_hetu.planning.topology import Link


@dataclass(eq=False)
class ExpertMesh:
    """The ranks of an expert-parallel run, as seen by one of them.

    Args:
        mesh: Two-dimensional mesh with the dimensions ``replica`` and ``expert``; every rank has tokens of its own.
        nodes: The same ranks in three dimensions, ``replica``, ``node`` and ``local``, for the two-stage all-to-all;
            ``None`` where an expert group is within one node.
        links: Within nodes and between them, once they are measured.
    """

    mesh: DeviceMesh
    nodes: DeviceMesh | None = None
    links: tuple[Link, Link] | None = None

    @classmethod
    def build(
        cls, device_type: str, *, expert_parallel: int | None = None, devices_per_node: int | None = None
    ) -> ExpertMesh:
        """Builds the mesh over all ranks; to be called by all of them.

        Args:
            device_type: ``"cpu"``, ``"cuda"``, ...
            expert_parallel: Ranks that share out the experts; by default all.
            devices_per_node: Ranks of one node. Neighbors belong to the same node.

        Raises:
            ValueError: If the numbers do not divide the number of ranks.
        """
        world = torch.distributed.get_world_size()
        check_expert_parallel(expert_parallel, world)
        size = world if expert_parallel is None else expert_parallel
        ranks = init_device_mesh(device_type, (world,), mesh_dim_names=("world",))
        return cls.within(ranks, size, devices_per_node)

    @classmethod
    def within(cls, ranks: DeviceMesh, expert_parallel: int, devices_per_node: int | None = None) -> ExpertMesh:
        """Builds the mesh over some ranks; to be called by all of them, and by other such sets of ranks alike.

        Args:
            ranks: One-dimensional mesh; neighbors in it belong to the same node.
            expert_parallel: Ranks that share out the experts; it divides the number of ranks.
            devices_per_node: How many of them a node has.

        Raises:
            ValueError: If ``devices_per_node`` does not divide ``expert_parallel``.
        """
        copies = ranks.size() // expert_parallel
        mesh = ranks._unflatten(0, (copies, expert_parallel), ("replica", "expert"))  # private in torch 2.11 to 2.13
        if devices_per_node is None or devices_per_node >= expert_parallel:
            return cls(mesh)
        if devices_per_node < 1 or expert_parallel % devices_per_node:
            raise ValueError(
                f"devices_per_node={devices_per_node}: expected a divisor of expert_parallel={expert_parallel}."
            )
        shape = (copies, expert_parallel // devices_per_node, devices_per_node)
        return cls(mesh, ranks._unflatten(0, shape, ("replica", "node", "local")))

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertMesh:
        return self  # a copied model has the same ranks

    @property
    def world_size(self) -> int:
        """All ranks that have tokens."""
        return self.mesh.size()

    @property
    def expert(self) -> ProcessGroup:
        """The ranks that share out the experts with this one."""
        return self.mesh.get_group("expert")

    @property
    def replica(self) -> ProcessGroup:
        """The ranks that hold the same experts as this one."""
        return self.mesh.get_group("replica")

    @property
    def expert_rank(self) -> int:
        """Place of this rank among those that share out the experts."""
        return self.mesh.get_local_rank("expert")

    @property
    def expert_size(self) -> int:
        """Number of ranks that share out the experts."""
        return self.mesh.size(1)


def check_expert_parallel(expert_parallel: int | None, ranks: int) -> None:
    """Refuses a number of ranks that cannot share out experts.

    Raises:
        ValueError: If it does not divide ``ranks``.
    """
    size = ranks if expert_parallel is None else expert_parallel
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or ranks % size:
        raise ValueError(f"expert_parallel={expert_parallel!r}: expected a divisor of the {ranks} ranks.")
