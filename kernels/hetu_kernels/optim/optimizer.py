"""``torch.optim.AdamW`` whose step is :func:`hetu_kernels.adamw`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hetu_kernels.optim.adamw import check_numbers, update


class AdamW(torch.optim.AdamW):
    """A drop-in of :class:`torch.optim.AdamW` that updates all tensors of a group in a few launches.

    Checkpoints are those of torch's optimizer, both ways. As with ``fused=True``, a gradient scaler leaves it to the
    step to divide by the scale and to skip what has overflowed, without waiting for the device; steps can be captured
    in a CUDA graph. DTensors are updated shard by shard.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay of the moments: numbers, or tensors of one element on the CPU, which each step reads.
        eps: Added to the root of the second moment.
        weight_decay: Decay of the parameters, times ``lr``.
        amsgrad: Not supported.
        maximize: Go up instead of down.
        foreach: Means nothing here: accepted so that arguments need not change, as are ``capturable`` and ``fused``.
        capturable: Every step is.
        differentiable: Not supported.
        fused: Every step is.

    Raises:
        ValueError: For ``amsgrad`` or ``differentiable``, or numbers out of range.
        TypeError: If a number is none.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_numbers("AdamW", lr, betas, eps, weight_decay)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, differentiable=differentiable
        )
        self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as :meth:`torch.optim.Optimizer.add_param_group`."""
        # First: what is refused must not stay behind. What is no dictionary, torch refuses.
        if isinstance(param_group, dict):
            _check_group(len(self.param_groups), {**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state, this optimizer's or torch's, whose step counters may be on the CPU."""
        for number, group in enumerate(
            state.get("param_groups", ())
        ):  # first, as above; loading a checkpoint ends up here
            _check_group(number, group)
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        for param, values in self.state.items():
            if "step" in values:
                # A copy: it counts in place, and the state may be somebody's checkpoint.
                values["step"] = torch.as_tensor(values["step"]).to(param.device, torch.float32, copy=True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                alike: dict[tuple[torch.device, bool], list[Tensor]] = {}
                for param in group["params"]:
                    if param.grad is not None:
                        alike.setdefault((param.device, param.dtype == torch.float64), []).append(param)
                for (device, _), params in alike.items():
                    self._step_on(device, params, group)
        return loss

    def _step_on(self, device: torch.device, params: list[Tensor], group: dict[str, Any]) -> None:
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
        add_param, add_grad, add_exp_avg, add_exp_avg_sq, add_step = (members.append for members in lists)
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            grad, exp_avg, exp_avg_sq = param.grad, state["exp_avg"], state["exp_avg_sq"]
            if type(grad) is not Tensor or grad.layout != torch.strided or not grad.is_floating_point():
                _check_gradient(param)
                param, grad, exp_avg, exp_avg_sq = (_local(each) for each in (param, grad, exp_avg, exp_avg_sq))
            elif type(param) is not torch.nn.Parameter:
                _check_gradient(param)
            add_param(param)
            add_grad(grad)
            add_exp_avg(exp_avg)
            add_exp_avg_sq(exp_avg_sq)
            add_step(state["step"])
        lr, betas = group["lr"], map(float, group["betas"])
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        update(
            *lists, [], 0.0 if on_device else float(lr), _moved(lr, device) if on_device else None, *betas,
            group["eps"], group["weight_decay"], group["maximize"], _moved(getattr(self, "grad_scale", None), device),
            _moved(getattr(self, "found_inf", None), device), None,
        )  # fmt: skip


def _check_group(number: int, group: dict[str, Any]) -> None:
    """A group must not ask for what there is not."""
    for option in ("amsgrad", "differentiable"):
        if group.get(option):
            raise ValueError(f"AdamW: group {number} has {option}=True, expected False.")
    check_numbers("AdamW", group["lr"], group["betas"], group["eps"], group["weight_decay"])


def _check_gradient(param: Tensor) -> None:
    """The elements of a gradient's memory must be those of the parameter's."""
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided or not param.is_floating_point():
        raise TypeError(f"AdamW: a gradient is {grad.layout} of {param.dtype}, expected torch.strided, floating.")
    ours, theirs = (getattr(tensor, "placements", None) for tensor in (param, grad))
    if ours != theirs:
        raise ValueError(f"AdamW: a gradient is placed {theirs}, its parameter {ours}: they must agree.")


def _local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor, in the same memory; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)
