"""Recomputation of a layer in backward, without renaming its parameters."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_recompute(layer: nn.Module) -> None:
    """Makes ``layer`` keep only its input in training and run its forward again in backward.

    ``layer.forward`` is replaced on the instance: a wrapper module would put a prefix before every parameter name, and
    hooks on the layer (FSDP's, relayouts) must stay outside of the recomputation.
    """
    if is_recomputed(layer):
        return
    forward = layer.forward

    def recomputed(*args: object, **kwargs: object) -> object:
        if not layer.training:
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=True)

    layer.forward = recomputed  # type: ignore[method-assign]
    layer._hetu_recompute = True  # type: ignore[assignment]


def is_recomputed(layer: nn.Module) -> bool:
    """Whether :func:`apply_recompute` has changed the layer."""
    return getattr(layer, "_hetu_recompute", False) is True
