"""Makes many different experts out of one, the first phase of EvoMoE (arXiv 2112.14397, section 3.2).

Training begins with a single expert. At some step all become copies of it, each changed a little in its own way. Noise
is drawn for all experts of a layer from a generator of its own, so that it does not depend on which rank has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_hetu.moe.layer import MoELayer

Diversity = Literal["noise", "mask", "drop"]
Moments = Literal["copy", "zero"]


@torch.no_grad()
def diversify(
    layer: MoELayer,
    *,
    how: Diversity = "noise",
    amount: float = 0.1,
    seed: int = 0,
    optimizers: Iterable[Optimizer] = (),
    moments: Moments = "copy",
) -> None:
    """Makes all experts of a layer copies of expert 0, all but expert 0 itself changed; to be called by all ranks.

    Args:
        layer: The layer.
        how: ``noise`` adds normal noise with ``amount`` times the standard deviation of the weights; ``mask`` sets a
            random share of ``amount`` of the entries to zero; ``drop`` draws that share anew.
        amount: How much; 0 leaves copies.
        seed: Seed of the noise.
        optimizers: Optimizers of the experts, so that what they keep of the weights' shape follows.
        moments: Whether that is copied from expert 0 or zero.

    Raises:
        ValueError: If an option is unknown or out of range.
    """
    for name, value, allowed in (("how", how, Diversity), ("moments", moments, Moments)):
        if value not in get_args(allowed):
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(get_args(allowed))}.")
    if amount < 0 or (how != "noise" and amount > 1):
        raise ValueError(f"amount={amount!r}: expected {'at least 0' if how == 'noise' else '0 to 1'}.")
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.experts.parameters():
        first = _first(parameter, layer)
        parameter.copy_(_changed(first, layer, how, amount, generator))
        for optimizer in optimizers:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.copy_(_first(value, layer).expand_as(value) if moments == "copy" else torch.zeros_like(value))


def _first(stacked: Tensor, layer: MoELayer) -> Tensor:
    """What belongs to expert 0, on every rank."""
    first = stacked[0].detach().clone()
    if layer.groups is not None:
        dist.broadcast(first, group=layer.groups.expert, group_src=0)
    return first


def _changed(first: Tensor, layer: MoELayer, how: Diversity, amount: float, generator: torch.Generator) -> Tensor:
    """This rank's experts, ``[slots, ...]``."""
    slots = layer.experts.num_slots
    start = 0 if layer.groups is None else layer.groups.expert_rank * slots
    spread = first.std() if first.numel() > 1 else torch.ones_like(first.sum())
    out = []
    for expert in range(layer.num_experts):
        # Drawn for every expert by every rank: the same whoever has it.
        normal = torch.randn(first.shape, generator=generator)
        uniform = torch.rand(first.shape, generator=generator)
        if not start <= expert < start + slots:
            continue
        noise, chosen = normal.to(first) * spread, uniform.to(first.device) < amount
        if expert == 0:
            out.append(first)
        elif how == "noise":
            out.append(first + amount * noise)
        else:
            out.append(torch.where(chosen, noise if how == "drop" else torch.zeros_like(first), first))
    return torch.stack(out)
