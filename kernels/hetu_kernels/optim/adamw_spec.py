"""Cases, launches and benchmarks of :func:`hetu_kernels.adamw`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hetu_kernels._common.registry import LOW_AND_FULL, AotCall, Benchmark, Case, OpSpec
from hetu_kernels.optim.adamw import adamw
from hetu_kernels.optim.adamw_ref import adamw_reference

_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "master_params")


def _changed(function: Callable[..., Tensor | None]) -> Callable[..., dict[str, Any]]:
    """A function that calls one that works in place and returns what that has changed, by name."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
        norm = function(*args, **kwargs)
        given = dict(zip((*_LISTS[:4], "step"), args, strict=False)) | kwargs
        return {name: given.get(name) for name in ("params", "exp_avgs", "exp_avg_sqs", "master_params", "step")} | {
            "norm": norm
        }

    return call


def _make(
    sizes: Sequence[tuple[int, ...]],
    *,
    grad_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    dtypes: Sequence[torch.dtype] = (),
    master: bool = False,
    step: float | Sequence[float] = 3.0,
    step_dtype: torch.dtype = torch.float32,
    grad_scale: float | None = None,
    found_inf: float | None = None,
    device_lr: bool = False,
    fill: tuple[int, float] | None = None,
    grad_size: float = 1.0,
    started: bool = True,
    transposed: bool = False,
    **options: Any,
) -> Callable[[torch.dtype, torch.Generator], dict[str, Any]]:
    def arguments(dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        def normal(size: tuple[int, ...]) -> Tensor:
            made = torch.randn(size, generator=generator)
            return made.transpose(0, 1).contiguous().transpose(0, 1) if transposed and len(size) > 1 else made

        each = [dtypes[i % len(dtypes)] if dtypes else dtype for i in range(len(sizes))]
        pairs = list(zip(sizes, each, strict=True))
        masters = [normal(size) for size in sizes]
        made: dict[str, Any] = {
            "params": [m.to(d) for m, d in zip(masters, each, strict=True)],
            "grads": [(grad_size * normal(size)).to(grad_dtype or d) for size, d in pairs],
            "exp_avgs": [(0.3 * started * normal(size)).to(state_dtype or d) for size, d in pairs],
            "exp_avg_sqs": [(started * normal(size).square()).to(state_dtype or d) for size, d in pairs],
            "step": torch.tensor(step, dtype=step_dtype)
            if isinstance(step, float)
            else [torch.tensor([count], dtype=step_dtype) for count in step],
            # Large enough that any wrong term shows.
            **{"lr": 0.1, "weight_decay": 0.3, "eps": 0.01, "betas": (0.8, 0.95), **options},
        }
        if master:
            made["master_params"] = masters
        if grad_scale is not None:
            made["grad_scale"] = torch.tensor([grad_scale])
            made["grads"] = [grad * grad_scale for grad in made["grads"]]
        if found_inf is not None:
            made["found_inf"] = torch.tensor(found_inf)
        if device_lr:
            made["lr"] = torch.tensor(made["lr"])
        if fill is not None:
            made["grads"][fill[0]].view(-1)[1] = fill[1]
        return made

    return arguments


def _cases() -> Sequence[Case]:
    """Sizes below, at and above a block and a chunk; every option; dtypes mixed; gradients out of order."""
    inf, nan, full, bf16 = float("inf"), float("nan"), (torch.float32,), (torch.bfloat16,)
    few = [(5, 7), (1,), (), (3, 2, 4)]
    return [
        Case("plain", _make(few), frozenset({"ragged", "strided"})),
        Case("contiguous", _make(few), contiguous=True),
        Case("defaults, first step", _make(few, step=0.0, lr=1e-3, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.01)),
        Case("blocks", _make([(2048,), (2049,), (4096,), (70, 100)]), contiguous=True),
        Case("chunks", _make([(70_000,), (5,), (40_001,)], max_norm=1.0), contiguous=True, dtypes=full),
        Case("transposed", _make([(6, 9), (4, 5, 2)], transposed=True)),
        Case("bfloat16 with master copies", _make(few, master=True), dtypes=bf16),
        Case("chunks with master copies", _make([(3000,)], master=True), dtypes=bf16),
        Case("float32 moments", _make(few, state_dtype=torch.float32), dtypes=(torch.float16, torch.bfloat16)),
        Case("float32 gradients", _make(few, grad_dtype=torch.float32, max_norm=2.0), dtypes=bf16),
        Case("bfloat16 moments", _make(few, state_dtype=torch.bfloat16), dtypes=full),
        Case("mixed dtypes", _make(few, dtypes=LOW_AND_FULL, max_norm=1.0), dtypes=full),
        Case("mixed dtypes with master copies", _make(few, dtypes=LOW_AND_FULL, master=True), dtypes=full),
        Case("clipped", _make(few, max_norm=0.5)),
        Case("not clipped", _make(few, max_norm=100.0), dtypes=full),
        Case("tiny gradients, clipped", _make(few, grad_size=1e-6, max_norm=5e-6, started=False), dtypes=full),
        Case("scaled", _make(few, grad_scale=256.0)),
        Case("scaled and clipped", _make(few, grad_scale=64.0, max_norm=0.5, found_inf=0.0)),
        Case("infinity found", _make(few, found_inf=1.0, max_norm=0.5, master=True, fill=(0, inf))),
        Case("infinity found by two", _make(few, found_inf=2.0, grad_scale=8.0), dtypes=full),
        Case("none found", _make(few, found_inf=0.0, grad_scale=8.0)),
        Case("maximize", _make(few, maximize=True, max_norm=0.5)),
        Case("learning rate on the device", _make(few, device_lr=True)),
        Case("a step for each", _make(few, step=(0.0, 1.0, 7.0, 100.0)), dtypes=full),
        Case("int32 step", _make(few, step=4.0, step_dtype=torch.int32), dtypes=full),
        Case("int64 step for each", _make(few, step=(4, 1, 0, 9), step_dtype=torch.int64), dtypes=full),
        Case("late step", _make(few, step=1e6, betas=(0.9, 0.999)), dtypes=full),
        Case("no decay of moments", _make(few, betas=(0.0, 0.0), step=0.0), dtypes=full),
        Case("no weight decay", _make(few, weight_decay=0.0), dtypes=full),
        Case("empty tensors", _make([(0,), (3,), (2, 0)], max_norm=0.5), frozenset({"empty"})),
        Case("no tensors", _make([]), frozenset({"empty"}), dtypes=full),
        Case("no tensors, clipped", _make([], max_norm=1.0), dtypes=full),
        Case("only empty tensors", _make([(0,)], max_norm=0.5), frozenset({"empty"})),
        Case("many tensors", _make([(i % 5 + 1,) for i in range(12)], max_norm=1.0), dtypes=full),
        Case("one infinity", _make(few, fill=(0, inf)), frozenset({"inf"})),
        Case("one -infinity, clipped", _make(few, fill=(0, -inf), max_norm=1.0), frozenset({"inf"})),
        Case("one NaN", _make(few, fill=(3, nan)), frozenset({"nan"})),
        Case("one NaN, clipped", _make(few, fill=(3, nan), max_norm=1.0), frozenset({"nan"})),
    ]


def _example(tokens: int) -> dict[str, Any]:
    """Small float32 arguments."""
    make = _make([(tokens, 6), (tokens,), (3,)], grad_scale=2.0, found_inf=0.0, max_norm=1.0)
    made = make(torch.float32, torch.Generator().manual_seed(tokens))
    return {**made, "step": made["step"].reshape(1)}


def _aot_calls() -> Sequence[AotCall]:
    """Parameters of a transformer block: bfloat16 with master copies, float32, and what nothing is aligned in."""
    from hetu_kernels.optim._adamw_kernels import launch_adamw

    def launch(
        sizes: Sequence[int],
        dtype: torch.dtype,
        *,
        master: bool = False,
        options: bool = False,
        misaligned: bool = False,
    ) -> Callable[[], object]:
        def call() -> None:
            def meta(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
                return torch.empty(size + 1, dtype=dtype, device="meta")[1 if misaligned else 0 :][:size]

            params, grads = ([meta(size, dtype) for size in sizes] for _ in range(2))
            exp_avgs, exp_avg_sqs = ([meta(size) for size in sizes] for _ in range(2))
            one = torch.empty((), device="meta")
            launch_adamw(
                params, grads, exp_avgs, exp_avg_sqs, [torch.empty((), device="meta")],
                [meta(size) for size in sizes] if master else [],
                lr=one if options else 1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, maximize=False,
                grad_scale=one if options else None, found_inf=one if options else None, max_norm=1.0,
            )  # fmt: skip

        return call

    bf16 = torch.bfloat16
    return [
        AotCall(
            "bf16, fp32 master", launch([4096 * 4096, 4096], bf16, master=True, options=True),
            same_as=launch([77, 1001, 5], bf16, master=True, options=True),
        ),
        AotCall("fp32", launch([4096 * 4096, 4096], torch.float32)),
        AotCall("bf16, misaligned", launch([4096 * 4096, 4096], bf16, misaligned=True)),
    ]  # fmt: skip


def _benchmarks() -> Sequence[Benchmark]:
    """A billion parameters in the shapes of a transformer's blocks, and many small tensors."""

    def benchmark(name: str, sizes: Sequence[tuple[int, ...]], dtype: torch.dtype, master: bool) -> Benchmark:
        def make(device: torch.device, tiny: bool) -> dict[str, Any]:
            shapes = [(8, 4), (5,)] if tiny else sizes
            masters = [torch.randn(shape, device=device) for shape in shapes]
            made: dict[str, Any] = {
                "params": [m.to(dtype) for m in masters],
                "grads": [torch.randn_like(m).to(dtype) for m in masters],
                "exp_avgs": [torch.randn_like(m) for m in masters],
                "exp_avg_sqs": [torch.rand_like(m) for m in masters],
                "step": torch.tensor(10.0, device=device),
                "lr": 1e-3,
            }
            return {**made, "master_params": masters} if master else made

        def bytes_moved(arguments: dict[str, Any]) -> tuple[int, int]:
            def total(name: str) -> int:
                return sum(tensor.numel() * tensor.element_size() for tensor in arguments.get(name) or ())

            moments = total("exp_avgs") + total("exp_avg_sqs")
            written = total("params") + moments + total("master_params")
            read = (total("master_params") or total("params")) + total("grads") + moments
            return read + written, 0

        return Benchmark(name, make, bytes=bytes_moved, backward=False)

    block = [(4096, 4096)] * 4 + [(14_336, 4096)] * 3 + [(4096,)] * 2
    return [
        benchmark("fp32, 5 transformer blocks", block * 5, torch.float32, False),
        benchmark("bf16 with master, 5 transformer blocks", block * 5, torch.bfloat16, True),
        benchmark("fp32, 1000 tensors of 10k", [(10_000,)] * 1000, torch.float32, False),
    ]


def _torch(arguments: dict[str, Any], **how: Any) -> Callable[..., Any]:
    """torch's own, over the same tensors; it knows no master copies."""
    if arguments.get("master_params") is not None:
        raise RuntimeError("torch's AdamW keeps no master copies")
    params = [param.detach().requires_grad_() for param in arguments["params"]]
    optimizer = torch.optim.AdamW(params, lr=arguments["lr"], **how)
    for i, (param, grad) in enumerate(zip(params, arguments["grads"], strict=True)):
        param.grad = grad
        count = arguments["step"] if how.get("fused") else arguments["step"].cpu()
        optimizer.state[param] = {
            "step": count.clone(),
            "exp_avg": arguments["exp_avgs"][i],
            "exp_avg_sq": arguments["exp_avg_sqs"][i],
        }

    def step(**_: Any) -> list[Tensor]:
        optimizer.step()
        return params

    return step


SPEC = OpSpec(
    name="adamw",
    function=_changed(adamw),
    reference=_changed(adamw_reference),
    custom_ops=("adamw",),
    differentiable=(),
    cases=_cases,
    example=_example,
    aot=_aot_calls,
    benchmarks=_benchmarks,
    peers={
        "torch fused": functools.partial(_torch, fused=True),
        "torch foreach": functools.partial(_torch, foreach=True),
        "torch.compile": lambda _: torch.compile(_changed(adamw_reference)),
    },
    goal="0.88 of the copy limit; at least 1.0x torch.optim.AdamW(fused=True)",
)
