"""Reference of :func:`adamw` in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NORM_EPS = 1e-6
"""Added to the norm that gradients are divided by when they are clipped, as torch's ``clip_grad_norm_`` does."""


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor | Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
    master_params: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_norm: float | None = None,
) -> Tensor | None:
    """See :func:`hetu_kernels.adamw`. In place, one tensor after the other."""
    steps = [step] if isinstance(step, Tensor) else list(step)
    found = None if found_inf is None else found_inf.reshape(()) != 0
    with torch.no_grad():
        counters = steps if len(steps) == 1 else {counter.data_ptr(): counter for counter in steps}.values()
        for counter in counters:
            _store(counter, counter + 1, found)
        factor: float | Tensor = -1.0 if maximize else 1.0
        if grad_scale is not None:
            factor = factor / grad_scale.reshape(())
        norm = None
        if max_norm is not None:
            squares = [grad.to(wide_dtype(grad)).square().sum() for grad in grads]
            norm = (torch.stack(squares).sum() if squares else torch.zeros((), device=steps[0].device)).sqrt()
            norm = norm if grad_scale is None else norm / grad_scale.reshape(())
            ratio = max_norm / (norm + NORM_EPS)
            factor = factor * torch.where(ratio > 1.0, 1.0, ratio)
        rate = lr.reshape(()).double() if isinstance(lr, Tensor) else lr
        decay = 1.0 - rate * weight_decay
        for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
            count = steps[i if len(steps) > 1 else 0].reshape(()).double()
            step_size = rate / bias_correction(betas[0], count)
            scale = bias_correction(betas[1], count).sqrt()
            target = param if master_params is None else master_params[i]
            wide = wide_dtype(target)
            g = grad.to(wide) * factor
            m = exp_avg.to(wide)
            m = m + (1.0 - betas[0]) * (g - m)
            v = betas[1] * exp_avg_sq.to(wide) + (1.0 - betas[1]) * g * g
            p = target.to(wide) * decay - step_size * (m / (v.sqrt() / scale + eps))
            _store(exp_avg, m, found)
            _store(exp_avg_sq, v, found)
            _store(param, p, found)
            if master_params is not None:
                _store(master_params[i], p, found)
    return norm


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What is computed in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def bias_correction(beta: float, count: Tensor) -> Tensor:
    """``1 - beta^count`` in float64: in float32, 1 - 0.999 would be off by 1e-5."""
    return -torch.expm1(count * log_beta(beta))


def log_beta(beta: float) -> float:
    """``log(beta)``, finite for 0."""
    return math.log(max(beta, 1e-300))


def _store(target: Tensor, value: Tensor, found: Tensor | None) -> None:
    """Round ``value`` into ``target``, unless an infinity was found among the gradients."""
    target.copy_(value if found is None else torch.where(found, target, value))
