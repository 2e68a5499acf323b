"""How long collectives take, as OSDP needs to know it (arXiv 2209.13258: rings with a latency per hop)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from lightning_hetu.planning.topology import Collective


class CollectiveSeconds(Protocol):
    """Whatever knows how long a collective takes: a ``ClusterSpec``, or :class:`Ring`."""

    def seconds(self, op: Collective, group_size: int, num_bytes: float, /) -> float:
        """Seconds of one collective over ``group_size`` ranks, for bytes of the full tensor; 0 for groups of one."""
        ...


@dataclass(frozen=True)
class Ring:
    """Collectives as rings over links of one speed.

    Args:
        seconds_per_byte: Inverse bandwidth of the slowest link of the ring.
        latency: Seconds per hop.
        host_seconds_per_byte: Inverse bandwidth between a device and its host; mode ``off`` needs it.

    Raises:
        ValueError: If a number is negative or not finite.
    """

    seconds_per_byte: float
    latency: float = 0.0
    host_seconds_per_byte: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"ring.{name}={value!r}: expected a number of at least 0.")

    def seconds(self, op: Collective, group_size: int, num_bytes: float, /) -> float:
        """Seconds of one collective: ``N - 1`` hops with one ``N``-th of the tensor, twice that for an all-reduce."""
        if group_size <= 1 or num_bytes <= 0:
            return 0.0
        hop = self.latency + num_bytes / group_size * self.seconds_per_byte
        return (2 if op == "all_reduce" else 1) * (group_size - 1) * hop


@dataclass(frozen=True)
class HostLink:
    """Adds the speed between device and host to collectives that do not know it, such as a ``ClusterSpec``'s.

    Args:
        collectives: What knows the collectives.
        host_seconds_per_byte: Inverse bandwidth between a device and its host.
    """

    collectives: CollectiveSeconds
    host_seconds_per_byte: float

    def seconds(self, op: Collective, group_size: int, num_bytes: float, /) -> float:
        """Seconds of one collective."""
        return self.collectives.seconds(op, group_size, num_bytes)


@dataclass(frozen=True)
class CallOverhead:
    """Adds what the host does for every collective: hooks, copies and the call itself, where these are not hidden.

    Args:
        collectives: What knows the collectives.
        seconds_per_call: Seconds that come on top of each.
    """

    collectives: CollectiveSeconds
    seconds_per_call: float

    @property
    def host_seconds_per_byte(self) -> float | None:
        """Inverse bandwidth between a device and its host, where ``collectives`` knows it."""
        value: float | None = getattr(self.collectives, "host_seconds_per_byte", None)
        return value

    def seconds(self, op: Collective, group_size: int, num_bytes: float, /) -> float:
        """Seconds of one collective."""
        seconds = self.collectives.seconds(op, group_size, num_bytes)
        return seconds + self.seconds_per_call if group_size > 1 and num_bytes > 0 else seconds
