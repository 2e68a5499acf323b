"""What a step of a layer takes under a placement, and what changing the placement takes.

FlexMoE (arXiv 2304.03946) prices computation, the all-to-all, the synchronization of replicas and adjustments from
profiled constants. Forward and backward together, a layer takes ::

    max over ranks (tokens * token_seconds + experts with tokens * launch_seconds)
    + 4 * max over ranks max(sent, received)                     dispatch and combine, each also in backward
    + (1 - sync_overlap) * sum over replicated experts of an all-reduce of their gradients

where sending to a rank takes bytes over the bandwidth to it, and tokens that stay cost nothing. A copy of an expert
takes its states over the bandwidth, one after another: an upper bound, as copies may overlap each other and training.
A change pays if what it saves per step, times the steps until the next change, is more than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_hetu.moe.placement.apportion import assign
from lightning_hetu.moe.placement.operations import Copy
from lightning_hetu.moe.placement.placement import Placement
from lightning_hetu.planning.cluster import ClusterSpec
from lightning_hetu.planning.presets import cluster_preset, device_preset
from lightning_hetu.planning.topology import Link, Topology

STATE_BYTES_PER_WEIGHT = 14
"""Mixed precision with Adam: bf16 weight, fp32 master weight and two fp32 moments."""
_WEIGHT_BYTES = 2
_EXCHANGES = 4  # dispatch and combine, in forward and in backward


class StepSeconds(NamedTuple):
    """Seconds of a layer's forward and backward.

    Args:
        compute: Of the rank that computes longest.
        exchange: Of the four all-to-alls.
        sync: Of the gradients of replicas, as far as it is not hidden.
    """

    compute: float
    exchange: float
    sync: float

    @property
    def total(self) -> float:
        """All together."""
        return self.compute + self.exchange + self.sync


@dataclass(frozen=True)
class PlacementCostModel:
    """Constants of one layer on one cluster.

    Args:
        token_seconds: Seconds that an expert takes for one token, forward and backward.
        token_bytes: Bytes of a token on its way to an expert.
        weight_bytes: Bytes of an expert's weights, and of its gradients, as they are communicated.
        state_bytes: Bytes of an expert with everything its optimizer knows of it.
        topology: Links between ranks; ranks fill one node after the other.
        launch_seconds: Seconds that an expert with tokens takes besides.
        sync_overlap: Share of the synchronization of replicas that is hidden behind backward, 0 to 1.
        horizon: Steps for which a placement is expected to stay.

    Raises:
        ValueError: If a number is out of range.
    """

    token_seconds: float
    token_bytes: float
    weight_bytes: float
    state_bytes: float
    topology: Topology
    launch_seconds: float = 0.0
    sync_overlap: float = 0.0
    horizon: float = 20.0

    def __post_init__(self) -> None:
        for name in ("token_seconds", "token_bytes", "weight_bytes", "state_bytes", "launch_seconds"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: expected a number of at least 0.")
        if not 0 <= self.sync_overlap <= 1:
            raise ValueError(f"sync_overlap={self.sync_overlap!r}: expected a share from 0 to 1.")
        if not 0 < self.horizon < math.inf:
            raise ValueError(f"horizon={self.horizon!r}: expected a number of steps above 0.")

    @classmethod
    def for_experts(
        cls,
        dim: int = 2048,
        hidden: int = 768,
        cluster: ClusterSpec | str = "8xH100-80GB",
        *,
        matrices: int = 3,
        launch_seconds: float = 2e-5,
        sync_overlap: float = 0.0,
        horizon: float = 20.0,
    ) -> PlacementCostModel:
        """The constants of feed-forward experts in mixed precision with Adam, from a description of the cluster.

        Args:
            dim: Width of a token.
            hidden: Width of an expert between its two products.
            cluster: Of known devices, or its name (see :func:`lightning_hetu.planning.cluster_preset`).
            matrices: Products of an expert, each ``dim`` by ``hidden``: 3 with a gated activation, 2 without.
            launch_seconds: As the field.
            sync_overlap: As the field.
            horizon: As the field.

        Raises:
            ValueError: If the cluster is unknown, or its devices or links are.
        """
        if isinstance(cluster, str):
            cluster = cluster_preset(cluster)
        if cluster.topology is None:
            raise ValueError(f"cluster of {cluster.device} has no topology: expected described links, or a name.")
        weights = matrices * dim * hidden
        # Two operations per weight in forward, twice as many in backward.
        return cls(
            token_seconds=6 * weights / device_preset(cluster.device).matmul_flops("half"),
            token_bytes=_WEIGHT_BYTES * dim,
            weight_bytes=_WEIGHT_BYTES * weights,
            state_bytes=STATE_BYTES_PER_WEIGHT * weights,
            topology=cluster.topology,
            launch_seconds=launch_seconds,
            sync_overlap=sync_overlap,
            horizon=horizon,
        )

    @cached_property
    def far(self) -> Link:
        """What one rank has to those of other nodes: its share of the adapters."""
        topology = self.topology
        nics = topology.devices_per_node if topology.nics_per_node is None else topology.nics_per_node
        share = topology.inter_node.bytes_per_second * nics / topology.devices_per_node
        return Link(share, topology.inter_node.latency)

    def node_of(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.topology.devices_per_node

    def link(self, one: int, other: int) -> Link:
        """What connects two ranks."""
        return self.topology.intra_node if self.node_of(one) == self.node_of(other) else self.far

    def step_seconds(
        self, tokens: NDArray[np.float64], fractions: NDArray[np.float64], placement: Placement
    ) -> StepSeconds:
        """Seconds of one step.

        Args:
            tokens: Of each expert by the rank they come from, ``[ranks, experts]``, whole or not.
            fractions: Of a split, ``[experts, ranks]``.
            placement: Where experts are.
        """
        ranks = placement.num_ranks
        wanted = tokens.sum(axis=0)[:, None] * fractions
        sent = assign(tokens, wanted, placement)
        traffic = np.bincount(sent.source * ranks + sent.destination, sent.tokens, ranks * ranks).reshape(ranks, ranks)
        active = (wanted > 0).sum(axis=0)
        compute = float((wanted.sum(axis=0) * self.token_seconds + active * self.launch_seconds).max())
        return StepSeconds(compute, self._exchange(traffic), self.sync_seconds(placement))

    def _exchange(self, traffic: NDArray[Any]) -> float:
        """Seconds of the all-to-alls for tokens from rank to rank, ``[ranks, ranks]``."""
        ranks = len(traffic)
        if ranks == 1:
            return 0.0
        node = np.arange(ranks) // self.topology.devices_per_node
        near = node[:, None] == node
        here, there = self.topology.intra_node, self.far
        pace = np.where(near, 1 / here.bytes_per_second, 1 / there.bytes_per_second)
        np.fill_diagonal(pace, 0.0)
        seconds = traffic * self.token_bytes * pace
        latency = here.latency if near.all() else max(here.latency, there.latency)
        return float(_EXCHANGES * (latency + max(seconds.sum(axis=0).max(), seconds.sum(axis=1).max())))

    def sync_seconds(self, placement: Placement) -> float:
        """Seconds that the gradients of replicas take, as far as they are not hidden."""
        return sum(self.all_reduce(ranks) for ranks in placement.all_holders if len(ranks) > 1)

    def all_reduce(self, ranks: Sequence[int]) -> float:
        """Seconds in which the ranks of one expert sum up its gradients, as far as they are not hidden."""
        return self.all_reduce_of(len(ranks), self.node_of(ranks[0]) != self.node_of(ranks[-1]))

    def all_reduce_of(self, count: int, spans_nodes: bool) -> float:
        """The same for a number of ranks, on one node or on several."""
        if count < 2:
            return 0.0
        link = self.far if spans_nodes else self.topology.intra_node
        sending = self.weight_bytes / count / link.bytes_per_second
        return (1 - self.sync_overlap) * 2 * (count - 1) * (link.latency + sending)

    def copy_seconds(self, copies: Sequence[Copy], *, weights_only: bool = False) -> float:
        """Seconds of copies one after another.

        Args:
            copies: What is sent.
            weights_only: Whether the optimizer's states stay where they are.
        """
        size = self.weight_bytes if weights_only else self.state_bytes
        total = 0.0
        for _, source, destination in copies:
            link = self.link(source, destination)
            total += link.latency + size / link.bytes_per_second
        return total

    @cached_property
    def received_token_seconds(self) -> float:
        """Seconds that one more token on the fullest rank costs, its exchange within the node included."""
        return self.token_seconds + _EXCHANGES * self.token_bytes / self.topology.intra_node.bytes_per_second
