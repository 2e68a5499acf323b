"""Gradients of experts that are spread over ranks, and the norm of a model that has them.

The loss of a step is the mean over ranks of their losses. DDP and FSDP2 average or sum what all ranks hold; experts are
left to them by nobody. A rank's gradient of its experts is already the sum over the ranks that sent it tokens: what is
missing is the sum over the ranks that hold the same experts, in copies of the whole group or by a placement, and the
division that turns a sum into a mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from lightning_hetu.moe.layer import MoELayer
from lightning_hetu.moe.replicas import sum_over_replicas
from lightning_hetu.parallel.clip import clip_gradients_by_norm


def moe_layers(module: nn.Module) -> Iterator[MoELayer]:
    """All mixture-of-experts layers of a model."""
    return (layer for layer in module.modules() if isinstance(layer, MoELayer))


def expert_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are another share of the experts on every rank, by name."""
    return [
        (f"{name}.experts.{own}" if name else f"experts.{own}", parameter)
        for name, layer in module.named_modules()
        if isinstance(layer, MoELayer) and layer.groups is not None
        for own, parameter in layer.experts.named_parameters()
    ]


@torch.no_grad()
def sync_expert_gradients(
    module: nn.Module, *, mean: bool = True, parameters: Iterable[nn.Parameter] | None = None
) -> None:
    """Makes the gradients of experts those of the loss of all ranks; once per optimizer step, by all ranks.

    Args:
        module: The model.
        parameters: Those of the optimizer that steps; layers with none of them are left alone. By default all.
        mean: Whether that loss is the mean of the ranks' losses, as with DDP; otherwise their sum.
    """
    layers = [layer for layer in moe_layers(module) if layer.groups is not None]
    if parameters is not None:
        stepping = {id(parameter) for parameter in parameters}
        layers = [layer for layer in layers if any(id(p) in stepping for p in layer.experts.parameters())]
    for layer in layers:
        for parameter in layer.experts.parameters():
            if parameter.requires_grad and parameter.grad is None:  # other ranks may have one
                parameter.grad = torch.zeros_like(parameter)
    sum_over_replicas([layer for layer in layers if layer.placement is not None])
    for layer in layers:
        assert layer.groups is not None
        for parameter in layer.experts.parameters():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            if layer.groups.replica.size() > 1:
                dist.all_reduce(gradient, group=layer.groups.replica)
            if mean:
                gradient /= layer.groups.world_size


@torch.no_grad()
def clip_with_experts(module: nn.Module, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients in place so that their 2-norm is at most ``max_norm``, each expert counted once.

    Args:
        module: The model.
        parameters: Those whose gradients are scaled, with the experts of this rank among them.
        max_norm: Largest norm allowed.

    Returns:
        The norm before clipping, a float64 scalar, the same on every rank.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    experts = {id(parameter) for _, parameter in expert_parameters(module)}
    own = [parameter for parameter in parameters if id(parameter) in experts]
    if not own:
        return clip_gradients_by_norm(parameters, max_norm)
    sharded = [parameter for parameter in parameters if isinstance(parameter.grad, DTensor)]
    alike = [p for p in parameters if id(p) not in experts and not isinstance(p.grad, DTensor)]
    groups = next(layer.groups for layer in moe_layers(module) if layer.groups is not None)
    by_expert = _squared_by_expert(module, own)
    dist.all_reduce(by_expert, group=groups.expert)
    squared = by_expert.sum()  # always in the order of experts: where they are does not change a bit
    squared += _squared_norm([p.grad for p in alike if p.grad is not None], squared.device)
    if sharded:
        squared += clip_gradients_by_norm(sharded, float("inf")).double() ** 2  # nothing is scaled yet
    norm = squared.sqrt()
    for group in (own, alike, sharded):  # plain gradients and DTensors not in one call
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _squared_by_expert(module: nn.Module, own: Sequence[nn.Parameter]) -> Tensor:
    """Sums of squares of the gradients of each expert of each layer, float64; 0 for those that other ranks count.

    Of several holders the lowest one counts.
    """
    wanted, found = {id(parameter) for parameter in own}, []
    for layer in moe_layers(module):
        gradients = [p.grad for p in layer.experts.parameters() if id(p) in wanted and p.grad is not None]
        if not gradients or layer.groups is None:
            continue
        rank, share = layer.groups.expert_rank, layer.experts.num_slots
        if layer.placement is None:
            row = list(range(rank * share, (rank + 1) * share))
        else:
            placed = layer.placement
            row = [e if e >= 0 and placed.holders(e)[0] == rank else -1 for e in placed.slots[rank]]
        sums = torch.zeros(layer.num_experts, dtype=torch.float64, device=gradients[0].device)
        experts = torch.tensor(row, device=sums.device)
        counted = experts >= 0
        for gradient in gradients:
            rows = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64) ** 2
            sums[experts[counted]] += rows[counted]
        found.append(sums)
    return torch.cat(found)


def _squared_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of plain gradients, float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        total += torch.linalg.vector_norm(gradient, dtype=torch.float64).to(device) ** 2
    return total
