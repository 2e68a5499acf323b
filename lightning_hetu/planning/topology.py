"""What a collective costs on links that are described instead of measured.

Alpha-beta models: ``n`` bytes over one link take ``latency + n / bandwidth``. Of ``p`` ranks and a full tensor of ``n``
bytes (Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH"; the cost of
the additions is left out):

* ring all-gather and reduce-scatter: ``(p - 1) * (latency + n / p / bandwidth)``;
* ring all-reduce: a reduce-scatter and an all-gather. Its ``bandwidth`` is what nccl-tests call bus bandwidth
  (doc/PERFORMANCE.md there), and that of a ring is that of its slowest link;
* all-to-all: every rank exchanges ``n / p`` with each other one.

A group that spans nodes has ``k`` ranks on each of ``m`` of them. Two ways are priced, and the faster one counts, as a
communication library picks its algorithm by such a model:

* One ring through all ranks. It is laid out once for each of the ``k`` ranks, so that all their network adapters are
  used: the slowest link is that of the device inside its node, or the ``k`` shares of the adapters. Of the ``p - 1``
  hops ``m - 1`` go over the network.
* By levels (Cho et al. 2019, "BlueConnect: decomposing all-reduce for deep learning on heterogeneous network
  hierarchy"): reduce-scatter inside the node, then across the nodes between ranks of equal position, and all-gather in
  reverse order. It has fewer hops over the network.

A layout tiles the devices with groups of one shape, which communicate at the same time. Inside a node every device has
its link for itself. The adapters of a node are shared by all of its devices, each of which is in a group that leaves
the node if one of them is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"]


@dataclass(frozen=True)
class Link:
    """A connection.

    Args:
        bytes_per_second: Bytes per second in each direction, both directions at once.
        latency: Seconds per hop.

    Raises:
        ValueError: If the bandwidth is not positive, or the latency is negative.
    """

    bytes_per_second: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0 or not self.latency >= 0:
            raise ValueError(
                f"link.bytes_per_second={self.bytes_per_second}, link.latency={self.latency}: expected a positive"
                " bandwidth and a latency of at least 0."
            )


@dataclass(frozen=True)
class Topology:
    """Equal nodes of equal devices; ranks fill one node after the other.

    Args:
        devices_per_node: Devices of a node.
        intra_node: What each device has to the others of its node, while all of them use it.
        inter_node: One network adapter (NIC).
        nics_per_node: Adapters of a node, shared by its devices; ``None`` is one for each device.

    Raises:
        ValueError: If a number is out of range.
    """

    devices_per_node: int
    intra_node: Link
    inter_node: Link
    nics_per_node: int | None = None

    def __post_init__(self) -> None:
        if self.devices_per_node < 1:
            raise ValueError(f"topology.devices_per_node={self.devices_per_node}: expected at least 1.")
        if self.nics_per_node is not None and not 1 <= self.nics_per_node <= self.devices_per_node:
            raise ValueError(
                f"topology.nics_per_node={self.nics_per_node}: expected 1 to {self.devices_per_node}, the devices of a"
                " node."
            )

    def placement(self, group_size: int, *, stride: int = 1, first_rank: int = 0) -> tuple[int, int]:
        """``(k, m)``: most ranks of a group on one node, and the nodes it spans.

        Args:
            group_size: Ranks of the group.
            stride: Distance between its ranks.
            first_rank: Its first rank.
        """
        if stride >= self.devices_per_node:
            return 1, group_size
        nodes = (first_rank % self.devices_per_node + (group_size - 1) * stride) // self.devices_per_node + 1
        return -(-group_size // nodes), nodes

    def seconds(
        self, op: Collective, group_size: int, num_bytes: float, *, stride: int = 1, first_rank: int = 0
    ) -> float:
        """Seconds of one collective while all other groups of the same layout communicate too.

        Args:
            op: Which collective. ``p2p`` goes from ``first_rank`` to ``first_rank + stride``, while the ``stride``
                ranks before the latter all do the same.
            group_size: Ranks taking part; ``p2p`` ignores it.
            num_bytes: Bytes of the full tensor, see :class:`~lightning_hetu.planning.cluster.CollectiveCost`.
            stride: Distance between the ranks of the group.
            first_rank: First rank of the group. Groups of a layout start at multiples of ``group_size * stride``, and
                then any of these gives the same; it tells which two ranks a ``p2p`` connects.
        """
        if op == "p2p":
            return self._pair_seconds(num_bytes, stride, first_rank)
        near, nodes = self.placement(group_size, stride=stride, first_rank=first_rank)
        here, there = self.intra_node, self.inter_node
        piece = num_bytes / group_size
        if nodes == 1:
            rounds = 2 if op == "all_reduce" else 1
            return rounds * (group_size - 1) * (here.latency + piece / here.bytes_per_second)
        share = self._share(self.devices_per_node)
        if op == "all_to_all":
            # All messages are on their way at once, and the two kinds of links work side by side.
            hops = (near - 1) * here.latency + (group_size - near) * there.latency
            sending = max((near - 1) / here.bytes_per_second, (group_size - near) / share)
            return hops + piece * sending
        ring = (nodes - 1) * there.latency + (group_size - nodes) * here.latency
        ring += (group_size - 1) * piece / min(here.bytes_per_second, near * share)
        levels = (nodes - 1) * (there.latency + piece / share)
        levels += (near - 1) * (here.latency + nodes * piece / here.bytes_per_second)
        return (2 if op == "all_reduce" else 1) * min(ring, levels)

    def _pair_seconds(self, num_bytes: float, stride: int, first_rank: int) -> float:
        _, nodes = self.placement(2, stride=stride, first_rank=first_rank)
        if nodes == 1:
            return self.intra_node.latency + num_bytes / self.intra_node.bytes_per_second
        return self.inter_node.latency + num_bytes / self._share(min(stride, self.devices_per_node))

    def _share(self, devices: int) -> float:
        """Bytes per second that leave a node from each of ``devices`` that send at the same time."""
        nics = self.devices_per_node if self.nics_per_node is None else self.nics_per_node
        return self.inter_node.bytes_per_second * min(1.0, nics / devices)

    def to_dict(self) -> dict[str, Any]:
        """The topology as JSON-compatible values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Topology:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            TypeError, KeyError: If a field is missing or unknown.
            ValueError: If a number is out of range.
        """
        links = {name: Link(**data[name]) for name in ("intra_node", "inter_node")}
        return cls(**{**data, **links})
