"""Measures the links that all-to-alls between experts take: latency and bandwidth, within nodes and between them."""

from __future__ import annotations

import math
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lightning_hetu.parallel.expert_mesh import ExpertMesh
from lightning_hetu.planning.topology import Link
from lightning_hetu.profiling._measure import Stopwatch

_SIZES = (4 << 10, 4 << 20)
"""Bytes that a rank sends: so few that latency decides, and so many that bandwidth does."""
_REPEATS = 7


def measure_links(groups: ExpertMesh, sizes: tuple[int, int] = _SIZES) -> tuple[Link, Link]:
    """Times all-to-alls within nodes and between them; all ranks call this, and all get the same.

    Args:
        groups: The ranks, with nodes. They all communicate at once, as they do in training.
        sizes: Bytes that a rank sends, few and many.

    Returns:
        Links within and between nodes, as one rank sees them.

    Raises:
        ValueError: If the groups have no nodes, or the sizes do not ascend.
    """
    if groups.nodes is None:
        raise ValueError("groups.nodes=None: expected groups with nodes; build them with devices_per_node.")
    if not 0 < sizes[0] < sizes[1]:
        raise ValueError(f"sizes={sizes}: expected two numbers above 0 that ascend.")
    device = torch.device(groups.mesh.device_type)
    inside, between = (measure_link(groups.nodes.get_group(dim), device, sizes) for dim in ("local", "node"))
    return inside, between


def measure_link(group: ProcessGroup, device: torch.device, sizes: tuple[int, int] = _SIZES) -> Link:
    """Times all-to-alls of groups that communicate at once; all ranks call this with one, and all get the same.

    Args:
        group: A group of at least 2 ranks; every rank's has as many.
        device: This rank's device.
        sizes: Bytes that a rank sends, few and many.
    """
    seconds = torch.tensor([_seconds(group, size, device) for size in sizes], dtype=torch.float64, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # the slowest counts
    return fit_link(group.size(), sizes, (float(seconds[0]), float(seconds[1])))


def fit_link(ranks: int, sizes: tuple[int, int], seconds: tuple[float, float]) -> Link:
    """The link of which ``ranks - 1`` messages, each of a ``ranks``-th of ``sizes`` bytes, take ``seconds``."""
    sent = [size * (ranks - 1) / ranks for size in sizes]
    per_byte = max(seconds[1] - seconds[0], 0.0) / (sent[1] - sent[0])
    latency = max(seconds[0] - sent[0] * per_byte, 0.0) / (ranks - 1)
    return Link(1 / per_byte if per_byte else math.inf, latency)


def _seconds(group: ProcessGroup, size: int, device: torch.device) -> float:
    """Median of several runs, after two that are not counted."""
    own = torch.zeros(max(size // group.size(), 1) * group.size(), dtype=torch.uint8, device=device)
    other, times, watch = torch.empty_like(own), [], Stopwatch(device)
    for _ in range(_REPEATS + 2):
        watch.start()
        dist.all_to_all_single(other, own, group=group)
        times.append(watch.stop())
    return median(times[2:])
