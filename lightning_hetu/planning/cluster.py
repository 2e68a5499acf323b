"""What the planner knows of the devices: how many, how much memory, and what a collective costs."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from lightning_hetu.planning.topology import Collective as Collective
from lightning_hetu.planning.topology import Topology

FORMAT_VERSION = 1


@dataclass(frozen=True)
class CollectiveCost:
    """Measured seconds of one collective in one group shape.

    Args:
        op: Which collective. ``p2p`` is a neighbor-to-neighbor send and receive.
        group_size: Ranks taking part.
        consecutive: Whether they are neighboring ranks, or strided over the stage.
        points: ``(bytes, seconds)`` in ascending order of bytes. Bytes are of the full tensor: the reduced tensor of
            ``all_reduce``, the gathered one of ``all_gather``, the input of ``reduce_scatter`` and ``all_to_all``.
    """

    op: Collective
    group_size: int
    consecutive: bool
    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        points = tuple(sorted((int(size), float(seconds)) for size, seconds in self.points))
        object.__setattr__(self, "points", points)
        if self.op not in get_args(Collective):
            raise ValueError(f"collective op={self.op!r}: expected one of {', '.join(get_args(Collective))}.")
        if not points or points[0][0] < 0 or any(seconds < 0 for _, seconds in points):
            raise ValueError(f"collective {self.op} over {self.group_size}: needs points of non-negative numbers.")

    def seconds(self, num_bytes: float) -> float:
        """Seconds for a message: interpolated between the points, extended by the slope of the last two."""
        if num_bytes <= 0:
            return 0.0
        points = self.points
        if len(points) == 1 or num_bytes <= points[0][0]:
            size, seconds = points[0]
            return seconds if num_bytes <= size or size == 0 else seconds * num_bytes / size
        index = min(bisect_left([size for size, _ in points], num_bytes), len(points) - 1)
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        return max(y0 + (y1 - y0) * (num_bytes - x0) / (x1 - x0), 0.0)


@dataclass(frozen=True)
class ClusterSpec:
    """A homogeneous cluster.

    Args:
        num_devices: Devices (processes) in total, a power of two.
        devices_per_node: Devices that share a node.
        collectives: Measured or described costs; see :class:`CollectiveCost`.
        device_memory: Bytes of memory of one device, if known.
        overlap_slowdown: Factor by which computation and communication slow each other down when they overlap;
            ``None`` when they do not overlap at all (CPU processes).
        compute_slots: Devices that can compute at full speed at the same time. Equal to ``num_devices`` for
            accelerators; smaller when processes share the cores of a host.
        layer_overhead: Seconds the runtime adds for one layer and microbatch, forward and backward together, whatever
            the layer computes: hooks and bookkeeping that are not hidden behind computation.
        device: Human-readable device name.
        topology: Described links, for every collective that was not measured in the wanted group shape.

    Raises:
        ValueError: If a number is not a power of two, or ``topology`` has nodes of another size.
    """

    num_devices: int
    devices_per_node: int
    collectives: tuple[CollectiveCost, ...] = ()
    device_memory: int | None = None
    overlap_slowdown: float | None = 1.15
    compute_slots: float | None = None
    layer_overhead: float = 0.0
    device: str = "unknown"
    topology: Topology | None = None
    _index: dict[tuple[str, int, bool], CollectiveCost] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("num_devices", "devices_per_node"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"cluster.{name}={value!r}: expected a power of two (1, 2, 4, ...).")
        if self.topology is not None and self.topology.devices_per_node != self.devices_per_node:
            raise ValueError(
                f"cluster.topology.devices_per_node={self.topology.devices_per_node}: expected"
                f" {self.devices_per_node}, the cluster's own."
            )
        object.__setattr__(self, "collectives", tuple(self.collectives))
        for cost in self.collectives:
            self._index[cost.op, cost.group_size, cost.consecutive] = cost

    @property
    def slots(self) -> float:
        """``compute_slots``, or the number of devices where it is not given."""
        return min(self.compute_slots or self.num_devices, self.num_devices)

    def seconds(
        self, op: Collective, group_size: int, num_bytes: float, *, stride: int = 1, first_rank: int = 0
    ) -> float:
        """Seconds of one collective; 0 for groups of one.

        What was measured for this group shape counts, where ranks are consecutive or strided by whatever stride; then
        the described topology. Without one, a group that was not measured strided falls back on the consecutive one
        and the other way round; one whose size was not measured on the next larger, then the largest measured.

        Args:
            op: Which collective.
            group_size: Ranks taking part.
            num_bytes: Bytes of the full tensor, see :class:`CollectiveCost`.
            stride: Distance between the ranks of the group; 1 are neighbors. For ``p2p`` the distance between sender
                and receiver.
            first_rank: First rank of the group. Only ``p2p`` over a topology depends on it: whether two neighboring
                stages are on one node.

        Raises:
            ValueError: If the operation was never measured and there is no topology.
        """
        if group_size <= 1 or num_bytes <= 0:
            return 0.0
        near = stride == 1
        # p2p is measured in one arrangement only.
        for consecutive in (near, not near) if self.topology is None or op == "p2p" else (near,):
            cost = self._index.get((op, group_size, consecutive))
            if cost is not None:
                return cost.seconds(num_bytes)
        if self.topology is not None:
            return self.topology.seconds(op, group_size, num_bytes, stride=stride, first_rank=first_rank)
        known = sorted((key[1], key[2] != near, key) for key in self._index if key[0] == op)
        if not known:
            raise ValueError(
                f"the cluster has no measurement of {op}: profile it, add it to collectives, or describe a topology."
            )
        larger = [item for item in known if item[0] >= group_size]
        return self._index[(larger or known[-1:])[0][2]].seconds(num_bytes)

    @classmethod
    def from_bandwidth(
        cls,
        num_devices: int,
        *,
        gigabytes_per_second: float,
        latency: float = 1e-5,
        devices_per_node: int | None = None,
        **kwargs: Any,
    ) -> ClusterSpec:
        """Rings over links of one described bandwidth (1e9 bytes per second) and latency (seconds per hop)."""
        if not gigabytes_per_second > 0 or latency < 0:
            raise ValueError(
                f"gigabytes_per_second={gigabytes_per_second}, latency={latency}: expected a positive bandwidth and a"
                " latency of at least 0."
            )
        rate = gigabytes_per_second * 1e9
        steps = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
        costs = []
        size = 2
        while size <= num_devices:
            for op, rounds in steps.items():
                line = [(n, rounds * (size - 1) * (latency + n / size / rate)) for n in (1, 1 << 30)]
                costs += [CollectiveCost(op, size, consecutive, tuple(line)) for consecutive in (True, False)]  # type: ignore[arg-type]
            size *= 2
        costs.append(CollectiveCost("p2p", 2, False, tuple((n, latency + n / rate) for n in (1, 1 << 30))))
        return cls(num_devices, devices_per_node or num_devices, tuple(costs), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The cluster as JSON-compatible values."""
        out: dict[str, Any] = {"version": FORMAT_VERSION}
        numbers = ("num_devices", "devices_per_node", "device_memory", "overlap_slowdown", "compute_slots")
        for name in (*numbers, "layer_overhead", "device"):
            out[name] = getattr(self, name)
        out["collectives"] = [
            {
                "op": c.op,
                "group_size": c.group_size,
                "consecutive": c.consecutive,
                "points": [list(p) for p in c.points],
            }
            for c in self.collectives
        ]
        if self.topology is not None:  # files without one stay as they were
            out["topology"] = self.topology.to_dict()
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClusterSpec:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ValueError: If a field is missing, unknown or malformed.
        """
        data = dict(data)
        version = data.pop("version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(f"cluster.version={version!r}: this release reads version {FORMAT_VERSION}.")
        try:
            collectives = tuple(
                CollectiveCost(**{**item, "points": tuple(map(tuple, item["points"]))})
                for item in data.pop("collectives", ())
            )
            topology = data.pop("topology", None)
            return cls(
                collectives=collectives,
                topology=None if topology is None else Topology.from_dict(topology),
                **data,
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"the cluster description is malformed: {error}.") from error

    def save(self, path: str | Path) -> Path:
        """Writes the cluster as JSON and returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> ClusterSpec:
        """Reads a cluster file.

        Raises:
            ValueError: If the file does not hold a cluster; the message names it.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"cluster file {str(path)!r}: {error}") from error
