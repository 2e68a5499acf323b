"""AdamW for many tensors at once, in place.

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)        (1711.05101)

The arithmetic is in float32 whatever the dtypes; each result is rounded once. Step, gradient scale, the mark of an
infinite gradient and the norm stay on the device: nothing waits for the host. Kernels: ``_adamw_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hetu_kernels._common import checks
from hetu_kernels._common.device import use_triton
from hetu_kernels.optim.adamw_ref import adamw_reference, wide_dtype

_STEP_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    master_params: list[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_norm: float | None,
) -> Tensor:
    """In place; ``steps`` has one counter for all or one for each, ``master_params`` may be empty.

    Returns:
        The norm of the gradients; empty without ``max_norm``.
    """
    rate = lr if lr_tensor is None else lr_tensor
    if use_triton(params[0] if params else steps[0]):
        from hetu_kernels.optim._adamw_kernels import launch_adamw

        return launch_adamw(
            params, grads, exp_avgs, exp_avg_sqs, steps, master_params, lr=rate, betas=(beta1, beta2), eps=eps,
            weight_decay=weight_decay, maximize=maximize, grad_scale=grad_scale, found_inf=found_inf, max_norm=max_norm,
        )  # fmt: skip
    norm = adamw_reference(
        params, grads, exp_avgs, exp_avg_sqs, steps, lr=rate, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay,
        maximize=maximize, master_params=master_params or None, grad_scale=grad_scale, found_inf=found_inf,
        max_norm=max_norm,
    )  # fmt: skip
    return norm if norm is not None else steps[0].new_empty(0, dtype=_norm_dtype(grads))


adamw_update = torch.library.custom_op(
    "lightning_hetu::adamw", _update, mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps", "master_params")
)


@adamw_update.register_fake
def _(
    params, grads, exp_avgs, exp_avg_sqs, steps, master_params, lr, lr_tensor, beta1, beta2, eps, weight_decay,
    maximize, grad_scale, found_inf, max_norm,
):  # type: ignore[no-untyped-def]  # fmt: skip
    return steps[0].new_empty(() if max_norm is not None else (0,), dtype=_norm_dtype(grads))


def update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    master_params: list[Tensor],
    *others: Any,
) -> Tensor:
    """The operator, or what it calls where nothing looks on: for a thousand tensors its way there takes milliseconds.

    Nothing looks on outside of :func:`torch.compile` and dispatch modes, if the tensors are plain.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, master_params)
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None or not _real(steps[0]):
        return adamw_update(*lists, *others)
    norm = _update(*lists, *others)
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps, *master_params])
    return norm


def _real(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type != "meta"


def _norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    return wide_dtype(grads[0]) if grads else torch.float32


def adamw(
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
    """One step of AdamW for all tensors, in place, in a few launches whatever their number.

    Tensors of different dtypes may be mixed. Any strides will do; those of one index that are not laid out alike are
    copied, and back. Gradients are left as they are.

    Args:
        params: Parameters, float32, float16 or bfloat16; any number of them, of any size.
        grads: Their gradients, in any of these dtypes.
        exp_avgs: First moments, zeros at the start, in any of these dtypes.
        exp_avg_sqs: Second moments, likewise.
        step: Number of steps done, of one element, on the device, float32, float64, int32 or int64; counted up here.
            One for all tensors, or a sequence with one for each.
        lr: Learning rate: a number, or a tensor of one element on the device.
        betas: Decay of the moments: two numbers from 0 to below 1.
        eps: Added to the root of the second moment.
        weight_decay: Decay of the parameters, times ``lr``; apart from the gradients.
        maximize: Go up instead of down.
        master_params: Float32 copies of ``params`` (float64 of float64): they are updated, and ``params`` rounded from
            them.
        grad_scale: What the gradients were multiplied by, of one element on the device.
        found_inf: Of one element on the device; where it is not 0, nothing changes, ``step`` included.
        max_norm: Gradients are multiplied by ``max_norm / norm`` if their norm, over all tensors, is larger.

    Returns:
        The norm of all gradients, without scale and before it is bounded; None without ``max_norm``.

    Raises:
        ValueError: If lists, shapes, devices or numbers do not fit.
        TypeError: If a dtype does not fit, an argument is of the wrong type, or a tensor is distributed or sparse.
    """
    op = "adamw"
    if isinstance(step, Tensor):
        steps = [step]
    else:
        checks.tensor_list(op, "step", step)
        steps = list(step)
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if master_params is not None:
        lists["master_params"] = master_params
    for name, tensors in lists.items():
        checks.tensor_list(op, name, tensors)
        if len(tensors) != len(params):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} tensors, expected {len(params)}, one for each of params."
            )
    if len(steps) != 1 and len(steps) != len(params) or not steps:
        raise ValueError(
            f"{op}: step has {len(steps)} tensors, expected one, or {len(params)}, one for each of params."
        )
    singles = {"lr": lr if isinstance(lr, Tensor) else None, "grad_scale": grad_scale, "found_inf": found_inf}
    named = {f"{name}[{i}]": tensor for name, tensors in lists.items() for i, tensor in enumerate(tensors)}
    counters = {"step" if isinstance(step, Tensor) else f"step[{i}]": tensor for i, tensor in enumerate(steps)}
    checks.not_distributed(op, **named)
    checks.same_device(op, **named, **counters, **singles)
    checks.floating(op, **named, **{name: tensor for name, tensor in singles.items() if name != "found_inf"})
    checks.all_or_no_float64(op, **{name: tensor.dtype for name, tensor in named.items()})
    for i, master in enumerate(master_params or ()):
        if master.dtype not in (torch.float32, torch.float64):  # in a narrow one, small steps would vanish
            raise TypeError(f"{op}: master_params[{i}] has dtype {master.dtype}, expected torch.float32.")
    for name, tensor in named.items():
        param = params[int(name[name.index("[") + 1 : -1])]
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} has layout {tensor.layout}, expected torch.strided.")
        if tensor.shape != param.shape:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}, expected that of params, {list(param.shape)}."
            )
    for name, tensor in counters.items():
        if tensor.dtype not in _STEP_DTYPES or tensor.dtype != steps[0].dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected one of float32, float64, int32, int64.")
    for name, single in (*counters.items(), *singles.items()):
        if single is not None and single.dim() and tuple(single.shape) != (1,):
            raise ValueError(f"{op}: {name} has shape {list(single.shape)}, expected one element.")
    for number, beta in enumerate(betas) if isinstance(betas, tuple | list) else ():
        if isinstance(beta, Tensor):
            raise TypeError(f"{op}: betas[{number}] is a Tensor, expected a number.")
    check_numbers(op, lr, betas, eps, weight_decay)
    checks.flags(op, maximize=maximize)
    if max_norm is not None:
        max_norm = checks.number(op, "max_norm", max_norm, sign="positive", infinite=True, meaning=", or None")
    with torch.no_grad():
        norm = update(
            list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), steps, list(master_params or ()),
            0.0 if isinstance(lr, Tensor) else lr, lr if isinstance(lr, Tensor) else None, *betas, eps, weight_decay,
            maximize, grad_scale, found_inf, max_norm,
        )  # fmt: skip
    return None if max_norm is None else norm


def check_numbers(op: str, lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Checks of what an optimizer is made with; what is a tensor on a device is not looked at.

    Raises:
        ValueError: Naming the argument, its value and what is allowed.
        TypeError: Likewise.
    """
    numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    for name, value in numbers.items():
        if name != "lr" or not isinstance(value, Tensor):
            checks.number(op, name, value, sign="0 or more")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"{op}: betas={betas}, expected two numbers from 0 to below 1.")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if beta.device.type != "cpu" or beta.numel() != 1:
                raise ValueError(
                    f"{op}: betas[{i}] has shape {list(beta.shape)} on {beta.device}, expected a number, or a tensor of"
                    " one element on the CPU: each step reads it."
                )
        else:
            checks.number(op, f"betas[{i}]", beta)
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{op}: betas={tuple(map(float, betas))}, expected two numbers from 0 to below 1.")
