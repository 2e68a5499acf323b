"""``grouped_gemm``: the reference against torch, random groups, strides, what backward keeps, and what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hetu_kernels._common import device as device_module
from hetu_kernels._common.device import TARGETS, Target, recording_for
from hetu_kernels._common.registry import Case
from hetu_kernels._common.testing import check_case, guarded_buffers
from hetu_kernels.moe import _grouped_gemm_kernels
from hetu_kernels.moe.grouped_gemm import grouped_gemm
from hetu_kernels.moe.grouped_gemm_ref import grouped_gemm_reference
from hetu_kernels.moe.grouped_gemm_spec import SPEC, _loads, _make

ROOT = Path(__file__).parents[2]

# Devices with less shared memory than those that are compiled for all kernels: CUDA C++ programming guide.
SMALL = [Target("sm_86", "cuda", 86, 32, 101_376, 84), Target("sm_89", "cuda", 89, 32, 101_376, 142)]


def gathered(x: Tensor, weight: Tensor, lengths: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """Each row times a copy of its own matrix; rows that are left over are zero."""
    expert = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    y = torch.bmm(x[: len(expert), None], weight[expert]).squeeze(1)
    y = y if bias is None else y + bias[expert]
    return torch.cat([y, y.new_zeros(len(x) - len(expert), weight.shape[2])])


def arguments_of(
    lengths: Sequence[int], depth: int = 12, width: int = 20, *, rest: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(lengths))
    return _make(lengths, depth, width, rest=rest, bias=True)(dtype, generator)


def leaves_of(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().requires_grad_() if value.is_floating_point() else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("lengths", [[3, 0, 4], [0, 0, 7], [0, 0, 0], [1]])
def test_reference_is_a_product_per_row(lengths: list[int]) -> None:
    arguments = leaves_of(arguments_of(lengths, rest=2))
    y = grouped_gemm_reference(**arguments)
    expected = gathered(arguments["x"], arguments["weight"], lengths, arguments["bias"])
    torch.testing.assert_close(y, expected)
    names = ("x", "weight", "bias")
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, [arguments[n] for n in names], dy) for out in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_reference_is_torch_grouped_mm() -> None:
    arguments = arguments_of([5, 0, 11, 1], 16, 24, dtype=torch.float32)
    del arguments["bias"]
    expected = F.grouped_mm(arguments["x"], arguments["weight"], offs=arguments["offsets"][1:])
    torch.testing.assert_close(grouped_gemm_reference(**arguments), expected)


@pytest.mark.parametrize("function", [grouped_gemm, grouped_gemm_reference])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_right(function: Any, transposed: bool) -> None:
    """In float64 the operator runs the reference, and its own backward."""
    arguments = arguments_of([2, 0, 3], 3, 4, rest=1)
    stored = arguments["weight"].transpose(1, 2).contiguous() if transposed else arguments["weight"]
    leaves = [t.clone().requires_grad_() for t in (arguments["x"], stored, arguments["bias"])]

    def of(x: Tensor, stored: Tensor, bias: Tensor) -> Tensor:
        return function(x, stored.transpose(1, 2) if transposed else stored, arguments["offsets"], bias=bias)

    assert torch.autograd.gradcheck(of, leaves)


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    experts = rng.randint(1, 9)
    lengths = [rng.choice([0, 0, 1, rng.randint(2, 40)]) for _ in range(experts)]
    depth, width = (rng.choice([1, 16, 32, rng.randint(2, 50)]) for _ in range(2))
    rest, bias, wide = rng.choice([0, 0, 5, 20]), rng.random() < 0.5, rng.random() < 0.3
    name = f"{lengths}, {rest} of no expert, {depth}x{width}"
    return Case(name, _make(lengths, depth, width, rest=rest, bias=bias, wide=wide), contiguous=rng.random() < 0.3)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 80))]
)  # fmt: skip
def test_random_groups(seed: int, device: torch.device) -> None:
    """Products and the gradients of all arguments, within the tolerances of each dtype."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    check_case(SPEC, random_case(seed), dtype, device)


@pytest.mark.interpret
@pytest.mark.parametrize("layout", [(0, 2, 1), (1, 0, 2), (2, 1, 0), (2, 0, 1)])
def test_weight_may_have_any_strides(layout: tuple[int, ...], device: torch.device) -> None:
    """The same bits as of a contiguous weight, and the gradient of what is stored is contiguous."""
    plain = leaves_of({n: t.to(device) for n, t in arguments_of([5, 0, 20], dtype=torch.float32).items()})
    stored = plain["weight"].detach().permute(layout).contiguous().requires_grad_()
    inverse = [layout.index(d) for d in range(3)]
    y, other = grouped_gemm(**plain), grouped_gemm(**{**plain, "weight": stored.permute(inverse)})
    assert torch.equal(y, other)
    dy = torch.randn_like(y)
    ours, expected = (
        torch.autograd.grad(out, [plain["x"], weight], dy) for out, weight in ((other, stored), (y, plain["weight"]))
    )
    assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(ours[1].permute(inverse), expected[1], rtol=1e-5, atol=1e-5)
    if layout == (0, 2, 1):
        assert ours[1].is_contiguous()


@pytest.mark.interpret
def test_transposed_weight_is_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    launch = _grouped_gemm_kernels.launch_products

    def watched(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        seen.append(weight.data_ptr())
        return launch(x, weight, *others)

    monkeypatch.setattr(_grouped_gemm_kernels, "launch_products", watched)
    arguments = {n: t.to(device) for n, t in arguments_of([3, 4], dtype=torch.float32).items()}
    stored = arguments["weight"].transpose(1, 2).contiguous()
    x = arguments["x"].requires_grad_()
    grouped_gemm(x, stored.transpose(1, 2), arguments["offsets"]).sum().backward()
    assert seen == [stored.data_ptr()] * 2


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ["one number", "a row", "a column", "transposed"])
def test_incoming_gradient_may_have_any_strides(kind: str, device: torch.device) -> None:
    arguments = leaves_of({n: t.to(device) for n, t in arguments_of([5, 0, 9], dtype=torch.float32).items()})
    y = grouped_gemm(**arguments)
    dy = {
        "one number": lambda: torch.ones((), device=device).expand(y.shape),
        "a row": lambda: torch.randn(1, y.shape[1], device=device).expand(y.shape),
        "a column": lambda: torch.randn(y.shape[0], 1, device=device).expand(y.shape),
        "transposed": lambda: torch.randn(y.shape[1], y.shape[0], device=device).T,
    }[kind]()
    leaves = [arguments[name] for name in ("x", "weight", "bias")]
    ours = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    expected = torch.autograd.grad(y, leaves, dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.interpret
def test_rows_of_no_expert_are_zero_whatever_they_contain(device: torch.device) -> None:
    made = arguments_of([3, 0, 4], rest=30, dtype=torch.float32)
    made["x"][7:] = float("nan")
    arguments = leaves_of({n: t.to(device) for n, t in made.items()})
    with guarded_buffers():
        y = grouped_gemm(**arguments)
        dy = torch.randn_like(y)
        dy[7:] = float("nan")
        dx, dweight, dbias = torch.autograd.grad(y, [arguments[n] for n in ("x", "weight", "bias")], dy)
    assert torch.equal(y[7:], torch.zeros_like(y[7:]))
    assert torch.equal(dx[7:], torch.zeros_like(dx[7:]))
    for grad in (dweight, dbias):
        assert torch.equal(grad[1], torch.zeros_like(grad[1])), "an expert without rows"
        assert grad[0].isfinite().all() and grad[2].isfinite().all()


@pytest.mark.interpret
@pytest.mark.skipif(torch.cuda.is_available(), reason="changes the interpreter's multiprocessors")
def test_result_does_not_depend_on_the_number_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of([33, 0, 3], 17, 40, dtype=torch.float32, rest=3)
    found = []
    for multiprocessors in (1, 4, 100):
        monkeypatch.setattr(device_module, "_INTERPRETED_MULTIPROCESSORS", multiprocessors)
        leaves = leaves_of(arguments)
        y = grouped_gemm(**leaves)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaves["x"], leaves["weight"]])])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.interpret
def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    """Of a matrix and of a row, in memory that is hardly touched."""
    made = arguments_of([1, 2], 16, 24, dtype=torch.float16)
    memory = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)
    weight = memory.as_strided((2, 16, 24), (2**31, 24, 1))
    x = memory.as_strided((3, 16), (2**30, 1), 2048)
    weight.copy_(made["weight"])
    x.copy_(made["x"])
    offsets = made["offsets"].to(device)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    small = [made[name].to(device).requires_grad_() for name in ("x", "weight")]
    outputs = [grouped_gemm(pair[0], pair[1], offsets) for pair in (leaves, small)]
    assert torch.equal(outputs[0], outputs[1])
    dy = torch.randn_like(outputs[0])
    far, near = (torch.autograd.grad(y, pair, dy) for y, pair in zip(outputs, (leaves, small), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


@pytest.mark.interpret
def test_autocast_rounds_operands_and_not_the_gradient_of_the_weight(device: torch.device) -> None:
    plain = leaves_of({n: t.to(device) for n, t in arguments_of([5, 0, 9], dtype=torch.float32).items()})
    names = ("x", "weight", "bias")
    with torch.autocast(device.type, torch.bfloat16):
        y = grouped_gemm(**plain)
        narrow_weight = grouped_gemm(**{**plain, "weight": plain["weight"].half()})
    assert y.dtype == narrow_weight.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [plain[name] for name in names], dy)
    assert all(grad.dtype == torch.float32 for grad in grads)
    wide = {n: plain[n].detach().bfloat16().double() if n != "offsets" else plain[n] for n in plain}
    wide["bias"] = plain["bias"].detach().double()
    wide = leaves_of(wide)
    exact = torch.autograd.grad(grouped_gemm_reference(**wide), [wide[name] for name in names], dy.double())
    torch.testing.assert_close(grads[0].double(), exact[0], rtol=2e-2, atol=2e-2)
    for ours, expected in zip(grads[1:], exact[1:], strict=True):  # rounded to bfloat16 they would be 1000 times worse
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.interpret
def test_only_what_is_wanted_is_kept_and_computed(device: torch.device) -> None:
    """Rows are kept for the gradient of the weight alone; a bias needs neither rows nor weight gradients."""
    made = {n: t.to(device) for n, t in arguments_of([5, 0, 9], dtype=torch.float32).items()}
    full = leaves_of(made)
    y = grouped_gemm(**full)
    dy = torch.randn_like(y)
    names = ("x", "weight", "bias")
    expected = dict(zip(names, torch.autograd.grad(y, [full[name] for name in names], dy), strict=True))
    for wanted in names:
        arguments = {**made, wanted: made[wanted].clone().requires_grad_()}
        kept: list[Tensor] = []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = grouped_gemm(**arguments)
        assert (arguments["x"].data_ptr() in [t.data_ptr() for t in kept]) == (wanted == "weight")
        (grad,) = torch.autograd.grad(y, [arguments[wanted]], dy)
        assert torch.equal(grad, expected[wanted])


def test_loads_of_the_benchmark_have_the_skew_they_say() -> None:
    assert _loads(96, 8, 0.0) == [12] * 8
    loads = sorted(_loads(100_000, 8, 1.2), reverse=True)
    assert sum(loads) == 100_000
    for rank, load in enumerate(loads, 1):
        assert load == pytest.approx(loads[0] * rank**-1.2, abs=1)


@pytest.mark.parametrize("target", [*TARGETS.values(), *SMALL], ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_configurations_fit_into_shared_memory(target: Target, dtype: torch.dtype) -> None:
    x = torch.empty(1, dtype=dtype, device="meta")
    with recording_for(target):
        for kernel in ("grouped_gemm_fwd", "grouped_gemm_wgrad"):
            for rows in (1, 16, 64, 4096):
                for aligned in (True, False):
                    config = _grouped_gemm_kernels.default_config(kernel, x, rows, aligned=aligned)
                    needed = _grouped_gemm_kernels.shared_bytes(config, x.element_size(), target.name)
                    assert needed <= target.shared_memory, f"{kernel}, {rows} rows: {config}"
                    assert config.num_stages > 1, f"{kernel}, {rows} rows: loads do not overlap with products"


# Compiles the shipped launches for a device that the report on all kernels does not have.
_COMPILE = """
import json, sys
from hetu_kernels._common import aot
from hetu_kernels._common.device import TARGETS, Target
from hetu_kernels.moe.grouped_gemm_spec import SPEC
target = TARGETS[sys.argv[1]] = Target(*json.loads(sys.argv[2]))
for call in SPEC.aot():
    for launch in aot.record(call.launch, target):
        for problem in aot._compile("grouped_gemm", call, launch, target, True).problems():
            print(problem)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", SMALL, ids=lambda target: target.name)
def test_compiles_for_devices_with_less_shared_memory(target: Target) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", _COMPILE, target.name, json.dumps(list(vars(target).values()))],
        env={**environment, "PYTHONPATH": os.pathsep.join(["kernels", environment.get("PYTHONPATH", "")])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout == ""


X, WEIGHT, BIAS = torch.randn(6, 4), torch.randn(3, 4, 5), torch.randn(3, 5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": None}, TypeError, "x is None, expected a tensor"),
        ({"offsets": [0, 2, 2, 6]}, TypeError, "offsets is a list, expected a tensor"),
        ({"x": X[0]}, ValueError, r"x has shape \[4\], expected \[M, K\]"),
        ({"x": X[:, :0]}, ValueError, r"x has shape \[6, 0\], expected \[M, K\], rows of at least one element"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight has shape \[4, 5\], expected \[any, 4, any\]"),
        ({"weight": WEIGHT.mT}, ValueError, r"weight has shape \[3, 5, 4\], expected \[any, 4, any\]"),
        ({"weight": WEIGHT[:, :, :0]}, ValueError, r"weight has shape \[3, 4, 0\], expected at least one column"),
        ({"bias": BIAS[0]}, ValueError, r"bias has shape \[5\], expected \[3, 5\]"),
        ({"offsets": torch.tensor([0, 6])}, ValueError, r"offsets has shape \[2\], expected \[4\]"),
        ({"offsets": torch.tensor([0.0, 2, 2, 6])}, TypeError, "offsets has dtype torch.float32, expected int32"),
        ({"offsets": torch.tensor([1, 2, 2, 6])}, ValueError, r"offsets\[0\] is 1, expected 0"),
        ({"offsets": torch.tensor([0, 3, 2, 6])}, ValueError, r"offsets\[2\] is 2, expected at least 3"),
        ({"offsets": torch.tensor([0, 2, 2, 7])}, ValueError, r"offsets\[3\] is 7, expected at most 6, the rows of x"),
        ({"x": X.long()}, TypeError, "x has dtype torch.int64, expected float32"),
        ({"weight": WEIGHT.half()}, TypeError, "weight has dtype torch.float16, x torch.float32: convert weight"),
        ({"weight": WEIGHT.double()}, TypeError, "weight has dtype torch.float64, x torch.float32: float64 does not"),
        ({"bias": BIAS.double()}, TypeError, "bias has dtype torch.float64, x torch.float32: float64 does not mix"),
        ({"allow_tf32": 1}, TypeError, "allow_tf32=1, expected True or False"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight is on meta, x on cpu"),
    ],
)
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight": WEIGHT, "offsets": torch.tensor([0, 2, 2, 6]), "bias": BIAS, **changes}
    with pytest.raises(error, match=f"grouped_gemm: {message}"):
        grouped_gemm(**arguments)


def test_experts_hold_their_offsets_to_the_same_rules_without_a_kernel(reference_only: None) -> None:
    with pytest.raises(ValueError, match=r"grouped_gemm: offsets\[1\] is 9, expected at most 6"):
        grouped_gemm(X, WEIGHT[:1], torch.tensor([0, 9]))
