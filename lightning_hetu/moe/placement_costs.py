"""Measures what experts and moves take, for plans that count seconds and not only balance."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetu.moe.experts import Experts
from lightning_hetu.moe.layer import MoELayer
from lightning_hetu.moe.placement.cost import PlacementCostModel
from lightning_hetu.planning.topology import Link, Topology
from lightning_hetu.profiling.links import measure_link

_ROWS = (64, 1024)
"""Rows of an expert: so few that starting counts, and so many that multiplying does."""
_REPEATS = 5


def measure_placement_costs(layer: MoELayer, states: int = 2, horizon: float = 20.0) -> PlacementCostModel:
    """Times one expert and the links between ranks; all ranks call this, and all get the same.

    Args:
        layer: A layer whose experts are shared out over at least 2 ranks.
        states: Numbers that the optimizer keeps for each weight.
        horizon: Steps for which a placement is expected to stay.

    Raises:
        ValueError: If the experts are not shared out over ranks.
    """
    groups = layer.groups
    if groups is None or groups.expert_size < 2:
        raise ValueError("layer: expected experts that at least 2 ranks share out.")
    weight = layer.experts.w1
    device = weight.device
    times = torch.tensor([_seconds(layer.experts, rows) for rows in _ROWS], dtype=torch.float64, device=device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)  # the slowest counts
    few, many = times.tolist()
    token_seconds = max(many - few, 0.0) / (_ROWS[1] - _ROWS[0])
    near, far, node = *_links(layer, device), groups.expert_size
    if groups.nodes is not None:
        node = groups.nodes.size(2)
    bytes_per_expert = sum(p[0].numel() * p.element_size() for p in layer.experts.parameters())
    return PlacementCostModel(
        token_seconds=token_seconds,
        token_bytes=layer.dim * weight.element_size(),
        weight_bytes=bytes_per_expert,
        state_bytes=(1 + states) * bytes_per_expert,
        topology=Topology(node, near, far),
        launch_seconds=max(few - _ROWS[0] * token_seconds, 0.0),
        horizon=horizon,
    )


def _links(layer: MoELayer, device: torch.device) -> Sequence[Link]:
    assert layer.groups is not None
    if layer.groups.links is not None:
        return layer.groups.links
    link = measure_link(layer.groups.expert, device)
    return link, link


def _seconds(experts: Experts, rows: int) -> float:
    """Median seconds of forward and backward of one expert, after one run that is not counted."""
    weight = experts.w1
    one = Experts(1, experts.dim, experts.hidden, experts.activation, experts.backend).to(weight)
    x = torch.randn(rows, experts.dim, device=weight.device, dtype=weight.dtype, requires_grad=True)
    counts, times = torch.tensor([rows]), []
    for _ in range(_REPEATS + 1):
        _wait(weight)
        begin = time.perf_counter()
        one(x, counts).backward(torch.ones_like(x))
        _wait(weight)
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
