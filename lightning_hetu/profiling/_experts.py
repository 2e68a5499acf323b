"""What is to be known of the experts in a layer that ranks share out."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from lightning_hetu.parallel.experts import SharesExperts
from lightning_hetu.planning.profile import ExpertProfile


def experts_of(layers: Sequence[SharesExperts], samples: int) -> ExpertProfile | None:
    """The experts of some layers together, after a forward pass; ``None`` where there are none.

    Args:
        layers: Layers whose experts are to be shared out.
        samples: Samples of that forward pass.
    """
    if not layers:
        return None
    parameters = [parameter for layer in layers for parameter in layer.stacked_parameters()]
    total = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    return ExpertProfile(
        parameter_bytes=total,
        number=gcd(*(gcd(layer.num_experts, layer.expert_parallel or 0) for layer in layers)),
        routed_bytes=sum(layer.routed_bytes() for layer in layers) / samples,
        trainable_fraction=trained / total if total else 1.0,
    )
