"""Profiles a model without running it: memory from fake tensors, times from counted operations.

For models that are too large for the machine at hand, or that exist on the meta device only.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_hetu.parallel.structure import ModelStructure
from lightning_hetu.planning.profile import LayerProfile, ModelProfile, Precision
from lightning_hetu.profiling._case import LayerCase
from lightning_hetu.profiling._isolation import autocast_factory
from lightning_hetu.profiling._measure import layer_profile
from lightning_hetu.profiling._parts import ModelParts
from lightning_hetu.profiling._tracker import trace_memory
from lightning_hetu.profiling.model import optimizer_state_bytes


def estimate_model(
    module: nn.Module,
    structure: ModelStructure,
    inputs: Tensor,
    target: Any = None,
    *,
    flops_per_second: float,
    precision: Precision = "32-true",
    device: torch.device | str = "cpu",
    max_tp: int = 1,
    optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer] | str | None = None,
) -> ModelProfile:
    """Estimates a model with pipeline support; nothing is computed and no memory is used.

    Args:
        module: The whole module, on any device; it is not changed.
        structure: Where its parts are; must name an embedding and a head.
        inputs: A local batch as the embedding takes it; only shape and dtype count, so it may be on the meta device.
        target: What ``pipeline_loss`` compares with, likewise. ``None`` leaves out the loss.
        flops_per_second: Floating-point operations per second that the device reaches in matrix products. The times
            count those only.
        precision: Lightning's name of the precision.
        device: The device to estimate for: it decides which kernels run, and so what they keep.
        max_tp: Largest tensor-parallel degree of interest.
        optimizer: See :func:`~lightning_hetu.profiling.profile_model`.

    Raises:
        ValueError: If the structure has no embedding or head, or ``flops_per_second`` is not positive.
    """
    if not structure.pipeline:
        raise ValueError(f"structure={structure}: names no embedding and head; only such models can be estimated.")
    if not flops_per_second > 0:
        raise ValueError(f"flops_per_second={flops_per_second}: expected a positive number.")
    device = torch.device(device)

    def fake(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, Tensor) else value

    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        parts = ModelParts(module, structure, autocast_factory(precision, device, None), max_tp)
        embedding, types, head = parts.profiles(
            fake(inputs),
            tree_map(fake, target),
            lambda part: _fake_copy(part, device),
            lambda case: _estimate_layer(case, flops_per_second),
        )
    return ModelProfile(
        layer_types=types,
        layers=tuple(parts.layers),
        embedding=embedding,
        head=head,
        precision=precision,
        pipeline=not parts.shared,
        split_vocab=not parts.shared,
        optimizer_state_bytes=optimizer_state_bytes(optimizer),
        name=type(module).__name__,
    )


def _estimate_layer(case: LayerCase, flops_per_second: float) -> LayerProfile:
    with FlopCounterMode(display=False) as counter:
        loss = case.forward(case.batch)
        forward = counter.get_total_flops()
        if loss is not None:
            loss.backward()
        backward = counter.get_total_flops() - forward
    del loss
    case.clear_gradients()
    return layer_profile(
        case,
        points=((case.batch, forward / flops_per_second),),
        backward_ratio=backward / forward if forward else 0.0,
        memory=trace_memory(case, case.batch),
        samples=case.batch,
    )


def _fake_copy(part: nn.Module, device: torch.device) -> nn.Module:
    """The module with fake tensors for its parameters and buffers; to be called in fake mode."""
    memo: dict[int, Any] = {}
    for tensor in chain(part.parameters(), part.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = empty
    return copy.deepcopy(part, memo).train()
