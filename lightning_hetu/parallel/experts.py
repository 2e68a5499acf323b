"""Experts that are shared out over the ranks with the same dense weights, each rank with tokens of its own.

Expert parallelism beside data parallelism (GShard, arXiv 2006.16668, section 3): of the ranks that hold the same dense
weights of a layer, as many as divide its experts share those out; with more ranks, groups of them hold copies. FSDP2
must leave such parameters alone: they are another share on every rank already.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from math import gcd

from torch import nn

from lightning_hetu.parallel.expert_mesh import ExpertMesh
from lightning_hetu.parallel.structure import ModelStructure


class SharesExperts(nn.Module):
    """Base of layers whose experts are stacked along the first dimension of their parameters.

    ``num_experts`` is their number. ``expert_parallel`` tells how many ranks may share them out: ``None`` for as many
    as there are, 1 to keep all of them on every rank, as parameters like any other. ``devices_per_node`` tells how many
    of those ranks are neighbors in a node.
    """

    num_experts: int
    expert_parallel: int | None = 1
    devices_per_node: int | None = None

    @abstractmethod
    def stacked_parameters(self) -> list[nn.Parameter]:
        """The parameters with an expert in each row."""

    @property
    @abstractmethod
    def shared(self) -> bool:
        """Whether they are shared out already."""

    @abstractmethod
    def share_out(self, groups: ExpertMesh) -> None:
        """Keeps this rank's share, as DTensors, and exchanges tokens from now on; to be called by all of the ranks.

        Args:
            groups: The ranks that have the same dense weights.
        """

    @abstractmethod
    def routed_bytes(self) -> int:
        """Bytes of the rows that the last forward pass has sent to experts, in one direction."""


def layers_to_share(module: nn.Module) -> Iterator[SharesExperts]:
    """The layers in ``module`` whose experts are not to stay whole."""
    return (part for part in module.modules() if isinstance(part, SharesExperts) and part.expert_parallel != 1)


def expert_ranks(num_experts: int, expert_parallel: int | None, ranks: int) -> int:
    """How many of ``ranks`` share out the experts: as many as divide the experts, the ranks and what is allowed."""
    return gcd(num_experts, ranks, expert_parallel or 0)


def settle_experts(structure: ModelStructure, module: nn.Module, ranks: int) -> None:
    """Decides which experts a plan shares out: none that ranks cannot divide, and none of a model in stages.

    Args:
        structure: Where the layers of the model are.
        module: The whole model.
        ranks: All ranks.

    Raises:
        ValueError: If a number of ranks was asked for where experts stay whole.
    """
    for layer in layers_to_share(module):
        if structure.pipeline and layer.expert_parallel is not None:
            raise ValueError(
                f"expert_parallel={layer.expert_parallel}: experts of a model with pipeline support stay whole;"
                " leave it out."
            )
        if structure.pipeline or expert_ranks(layer.num_experts, layer.expert_parallel, ranks) == 1:
            layer.expert_parallel = 1


def share_out_experts(module: nn.Module, groups: Callable[[int, int | None], ExpertMesh], ranks: int) -> None:
    """Shares out the experts in ``module`` that are not yet.

    Args:
        module: A layer of a model, or what is around its layers.
        groups: Gives the groups, by how many ranks share out the experts, and how many of them a node has.
        ranks: How many ranks have the same dense weights.
    """
    for layer in layers_to_share(module):
        if not layer.shared:
            size = expert_ranks(layer.num_experts, layer.expert_parallel, ranks)
            layer.share_out(groups(size, layer.devices_per_node))


def shared_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The parameters in ``module`` that data parallelism must leave alone."""
    return {parameter for layer in layers_to_share(module) if layer.shared for parameter in layer.stacked_parameters()}


def stacked_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The parameters in ``module`` of experts that are, or are to be, shared out."""
    return {parameter for layer in layers_to_share(module) for parameter in layer.stacked_parameters()}
