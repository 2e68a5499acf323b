"""``linear_cross_entropy``: the reference against torch, what a case cannot say, vocabularies split over ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hetu_kernels
from hetu_kernels._common import alloc
from hetu_kernels.loss.linear_cross_entropy_ref import linear_cross_entropy_reference
from tests._ranks import RankPool

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"class_weight": True, "ignore_index": 3},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.2, "class_weight": True, "bias": True},
]


def tensors(rows: int = 9, hidden: int = 6, classes: int = 11, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight, bias, class weights and labels."""
    floats = [torch.randn(*size, dtype=dtype) for size in ((rows, hidden), (classes, hidden), (classes,))]
    return [*floats, torch.rand(classes, dtype=dtype) + 0.1, torch.randint(classes, (rows,))]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_reference_is_torch_cross_entropy(options: dict[str, Any], reduction: str) -> None:
    x, weight, bias, class_weight, target = tensors()
    target[4] = options.get("ignore_index", -100)
    x.requires_grad_()
    weight.requires_grad_()
    given = {
        **options,
        "bias": bias if options.get("bias") else None,
        "class_weight": class_weight if options.get("class_weight") else None,
        "reduction": reduction,
    }
    ours = linear_cross_entropy_reference(x, weight, target, **given)
    logits = F.linear(x, weight, given.pop("bias"))
    theirs = F.cross_entropy(logits, target, weight=given.pop("class_weight"), **given)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), cotangent),
        torch.autograd.grad(theirs, (x, weight), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_reference_adds_what_torch_lacks() -> None:
    x, weight, bias, _, target = tensors()
    logits = 2.0 * torch.tanh(F.linear(x, weight, bias) / 2.0)
    expected = F.cross_entropy(logits, target, reduction="none") + 0.3 * logits.logsumexp(1) ** 2
    ours = linear_cross_entropy_reference(x, weight, target, bias, softcap=2.0, z_loss=0.3, reduction="none")
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_reference_gradients_are_right(reduction: str) -> None:
    x, weight, bias, class_weight, target = tensors(4, 3, 5)
    target[1] = -100
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy_reference(
            x,
            w,
            target,
            b,
            class_weight=class_weight,
            label_smoothing=0.1,
            z_loss=0.1,
            softcap=2.0,
            reduction=reduction,
        ),
        (x, weight, bias),
    )


def test_reference_of_no_label_is_zero() -> None:
    x, weight, *_ = tensors()
    target = torch.full((9,), -100)
    loss = linear_cross_entropy_reference(x.requires_grad_(), weight, target)
    assert loss == 0
    assert not torch.autograd.grad(loss, x)[0].any()


def test_reference_in_float64_goes_through_the_operator() -> None:
    """There is no kernel for float64, in no mode."""
    x, weight, bias, class_weight, target = tensors()
    ours = hetu_kernels.linear_cross_entropy(x, weight, target, bias, class_weight=class_weight, softcap=3.0)
    theirs = linear_cross_entropy_reference(x, weight, target, bias, class_weight=class_weight, softcap=3.0)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def gradients(loss: Tensor, *inputs: Tensor, upstream: float = 1.0) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, torch.tensor(upstream, device=loss.device), retain_graph=True)


@pytest.mark.interpret
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_gradient_scales_what_forward_computed(reduction: str, device: torch.device) -> None:
    """And leaves it as it is for a second pass through the same graph."""
    x, weight, bias, _, target = (t.to(device) for t in tensors(dtype=torch.float32))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = hetu_kernels.linear_cross_entropy(x, weight, target, bias, reduction=reduction, chunk_bytes=4 * 16 * 2)
    expected = linear_cross_entropy_reference(x, weight, target, bias, reduction=reduction)
    for upstream in (1.0, -3.0, 0.0):
        for a, b in zip(
            gradients(loss, *leaves, upstream=upstream), gradients(expected, *leaves, upstream=upstream), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_gradients_that_are_wanted(wanted: tuple[int, ...], reduction: str, device: torch.device) -> None:
    x, weight, bias, _, target = (t.to(device) for t in tensors(dtype=torch.float32))
    leaves = [t.requires_grad_() for i, t in enumerate((x, weight, bias)) if i in wanted]
    losses = [
        function(x, weight, target, bias, reduction=reduction).sum()
        for function in (hetu_kernels.linear_cross_entropy, linear_cross_entropy_reference)
    ]
    torch.testing.assert_close(*losses)
    if wanted:
        for a, b in zip(*(gradients(loss, *leaves) for loss in losses), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    else:
        assert not losses[0].requires_grad


@pytest.mark.interpret
def test_mean_in_float16_does_not_underflow(device: torch.device) -> None:
    """The gradient of a mean over many rows is below what float16 holds; a loss scale must be able to bring it back."""
    rows, scale = 64, 2.0**14
    x, weight, _, _, target = (t.to(device) for t in tensors(rows, 8, 12, torch.float16))
    weight *= 1e-3
    found = []
    for function, dtype in (
        (hetu_kernels.linear_cross_entropy, torch.float16),
        (linear_cross_entropy_reference, torch.float64),
    ):
        leaf = x.detach().to(dtype).requires_grad_()
        loss = function(leaf, weight.to(dtype), target)
        found.append(gradients(loss, leaf, upstream=scale)[0].double())
    assert (found[0] - found[1]).abs().max() < 2e-3 * found[1].abs().max()


@pytest.mark.interpret
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_multiplies_in_its_dtype(reduction: str, device: torch.device) -> None:
    x, weight, bias, _, target = (t.to(device) for t in tensors(16, 32, 40, dtype=torch.float32))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autocast(device.type, torch.bfloat16):
        loss = hetu_kernels.linear_cross_entropy(x, weight, target, bias, reduction=reduction)
        assert loss.dtype == torch.float32
        mixed = hetu_kernels.linear_cross_entropy(x, weight.bfloat16(), target, reduction=reduction)
        assert mixed.dtype == torch.float32
    narrow = [t.detach().bfloat16().requires_grad_() for t in leaves]
    plain = hetu_kernels.linear_cross_entropy(narrow[0], narrow[1], target, bias, reduction=reduction)
    torch.testing.assert_close(loss, plain, rtol=0, atol=0)
    for a, b in zip(gradients(loss.sum(), *leaves), gradients(plain.sum(), *narrow[:2], bias), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=2e-2, atol=1e-3)


@pytest.mark.interpret
def test_checkpointed_loss_is_the_same(device: torch.device) -> None:
    x, weight, _, _, target = (t.to(device) for t in tensors(dtype=torch.float32))
    leaves = [t.requires_grad_() for t in (x, weight)]
    plain = hetu_kernels.linear_cross_entropy(x, weight, target)
    again = torch.utils.checkpoint.checkpoint(hetu_kernels.linear_cross_entropy, x, weight, target, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(plain, leaves), torch.autograd.grad(again, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.interpret
def test_gradients_in_forward_work_under_compile_and_opcheck(device: torch.device) -> None:
    """The example that all operators share takes the other way, through an operator for backward."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(hetu_kernels.linear_cross_entropy, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for rows in (7, 13):
        found = []
        for function in (hetu_kernels.linear_cross_entropy, compiled):
            torch.manual_seed(rows)
            x, weight, bias, class_weight, target = (t.to(device) for t in tensors(rows, dtype=torch.float32))
            leaves = [t.requires_grad_() for t in (x, weight, bias)]
            loss = function(x, weight, target, bias, class_weight=class_weight)
            found.append((loss, *torch.autograd.grad(2.0 * loss, leaves)))
        torch.testing.assert_close(*found, rtol=0, atol=0)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] > 0
    torch._dynamo.reset()
    torch.library.opcheck(
        torch.ops.lightning_hetu.linear_cross_entropy_fwd,
        (
            x,
            weight,
            bias,
            target,
            class_weight,
            -100,
            0.1,
            0.0,
            None,
            torch.float32,
            10_000,
            True,
            True,
            True,
            True,
            "",
        ),
    )


class _Sizes(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_one_chunk(
    mode: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor has as many elements as all logits, in either direction; the buffer of logits is within its bound."""
    from hetu_kernels.loss.linear_cross_entropy import backward_chunks, forward_chunks

    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", mode)
    rows, hidden, classes, chunk_bytes = 48, 4, 500, 4 * 512 * 5
    x, weight, bias, _, target = (t.to(device) for t in tensors(rows, hidden, classes, dtype))
    sizes: list[int] = []

    def counted(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        made = torch.empty(tuple(shape), dtype=dtype, device=device)
        sizes.append(made.numel() * made.element_size())
        return made

    alloc.set_allocator(counted)
    try:
        with _Sizes() as seen:
            options = (target, None, -100, 0.0, 0.0, None, dtype, chunk_bytes)
            loss, lse, vocabulary, *_ = forward_chunks(x, weight, bias, *options, True, True, True, None)
            backward_chunks(torch.ones_like(loss), lse, vocabulary, x, weight, bias, *options, True, True, True, None)
    finally:
        alloc.set_allocator(None)
    logits = max(sizes)
    assert logits <= chunk_bytes
    assert logits == 5 * 512 * 4, "the bound allows for five rows"
    assert seen.largest <= max(chunk_bytes, classes * hidden * 4)
    assert rows * classes * dtype.itemsize > 4 * seen.largest


def test_chunks_do_not_change_the_result(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", "reference")  # the interpreter would take long over so many rows
    x, weight, _, _, target = (t.to(device) for t in tensors(300, 5, 7, torch.float32))
    leaves = [t.requires_grad_() for t in (x, weight)]
    found = []
    for chunk_bytes in (1, 4 * 16 * 100, 4 * 16 * 200, 2**28):  # 1 row, 100, 128 (not 200: whole tiles), all
        loss = hetu_kernels.linear_cross_entropy(x, weight, target, chunk_bytes=chunk_bytes, reduction="sum")
        found.append((loss, *gradients(loss, *leaves)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def mixed_products_on_the_cpu() -> Iterator[list[str]]:
    """cuBLAS's products of narrow matrices in float32, with its checks of arguments; gives the names of calls."""
    called: list[str] = []

    def check(out_dtype: torch.dtype, out: Tensor, *factors: Tensor) -> None:
        assert out_dtype == out.dtype == torch.float32
        assert {factor.dtype for factor in factors} == {torch.bfloat16}
        assert out.stride(1) == 1

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        check(out_dtype, out, a, b)
        called.append("mm")
        return out.copy_(a.float() @ b.float())

    def addmm(
        c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: int = 1, alpha: int = 1, out: Tensor
    ) -> Tensor:
        check(out_dtype, out, a, b)
        assert c.data_ptr() == out.data_ptr()
        called.append("addmm")
        return out.copy_(c + a.float() @ b.float())

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    yield called
    library._destroy()


@pytest.mark.interpret
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own products")
@pytest.mark.parametrize("products", ["mixed", "narrow"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products_as_on_a_gpu(
    products: str, reduction: str, mixed_products_on_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls that a GPU would get, and logits that are rounded where there are no mixed products."""
    from hetu_kernels.loss import linear_cross_entropy as module

    monkeypatch.setattr(module, "products_of", lambda device: products)
    x, weight, bias, _, target = tensors(7, 16, 37, torch.bfloat16)
    target[3] = -100
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = hetu_kernels.linear_cross_entropy(x, weight, target, bias, reduction=reduction, chunk_bytes=4 * 48 * 3)
    expected = linear_cross_entropy_reference(x, weight, target, bias, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-5 if products == "mixed" else 2e-2, atol=1e-5)
    for a, b in zip(torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()
    assert set(mixed_products_on_the_cpu) == ({"mm", "addmm"} if products == "mixed" else set())


@pytest.mark.gpu
def test_peak_memory_on_a_gpu() -> None:
    """Forward: the gradient of the weight in float32, that of x, one chunk. Backward: gradients as they go out."""
    rows, hidden, classes, chunk = 2048, 1024, 65_536, 64 * 2**20
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(classes, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(classes, (rows,), device="cuda")
    slack = 4 * 2**20
    for attempt in range(2):  # the first one allocates the workspaces of cuBLAS
        x.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = hetu_kernels.linear_cross_entropy(x, weight, target, chunk_bytes=chunk)
        forward = torch.cuda.max_memory_allocated() - before
        loss.backward()
        both = torch.cuda.max_memory_allocated() - before
        if attempt:
            gradients = 4 * weight.numel() + 2 * x.numel()
            assert forward <= gradients + chunk + slack
            assert both <= gradients + max(chunk, 2 * weight.numel() + 2 * x.numel()) + slack


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(3, 0)}, ValueError, r"x has shape \[3, 0\], expected rows of at least one element"),
        ({"weight": torch.randn(5, 7)}, ValueError, r"weight has shape \[5, 7\], expected \[any, 8\]"),
        ({"weight": torch.randn(0, 8)}, ValueError, r"weight has shape \[0, 8\], expected at least one class"),
        ({"weight": torch.randn(5, 8).half()}, TypeError, "weight has dtype torch.float16, x torch.float32"),
        ({"target": torch.zeros(4, dtype=torch.long)}, ValueError, r"target has shape \[4\], expected \[3\]"),
        ({"target": torch.zeros(3)}, TypeError, "target has dtype torch.float32, expected int32 or int64"),
        ({"bias": torch.randn(4)}, ValueError, r"bias has shape \[4\], expected \[5\]"),
        ({"class_weight": torch.randn(6)}, ValueError, r"class_weight has shape \[6\], expected \[5\]"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5, expected 0 to 1"),
        ({"label_smoothing": None}, TypeError, "label_smoothing is None, expected a number"),
        ({"softcap": 0.0}, ValueError, r"softcap=0.0, expected a positive number \(finite\), or None for no cap"),
        ({"softcap": float("inf")}, ValueError, "softcap=inf, expected a positive number"),
        ({"z_loss": -0.1}, ValueError, "z_loss=-0.1, expected 0 or more"),
        ({"z_loss": float("nan")}, ValueError, "z_loss=nan, expected 0 or more"),
        ({"ignore_index": None}, TypeError, "ignore_index is None, expected an integer"),
        ({"chunk_bytes": 1e6}, TypeError, "chunk_bytes=1000000.0, expected an integer"),
        ({"group": "tp"}, TypeError, "group='tp', expected a torch.distributed.ProcessGroup or None"),
        ({"weight": None}, TypeError, "weight is None, expected a tensor"),
        ({"target": [0, 1, 2]}, TypeError, "target is a list, expected a tensor"),
        ({"reduction": "avg"}, ValueError, "reduction='avg', expected one of 'mean', 'sum', 'none'"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes=0, expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.randn(3, 8), "weight": torch.randn(5, 8), "target": torch.zeros(3, dtype=torch.long), **changes
    }  # fmt: skip
    with pytest.raises(error, match=f"linear_cross_entropy: {message}"):
        hetu_kernels.linear_cross_entropy(**arguments)


def test_autocast_does_not_hide_a_float64_beside_others() -> None:
    weight = torch.randn(5, 8, dtype=torch.float64)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="weight has dtype torch.float64, x torch"),
    ):
        hetu_kernels.linear_cross_entropy(torch.randn(3, 8), weight, torch.zeros(3, dtype=torch.long))


def test_distributed_tensors_are_refused() -> None:
    class Fake(Tensor):
        def to_local(self) -> Tensor:
            raise NotImplementedError

    weight = torch.randn(5, 8).as_subclass(Fake)
    with pytest.raises(TypeError, match=r"weight is a DTensor, expected a plain tensor: pass weight.to_local\(\)"):
        hetu_kernels.linear_cross_entropy(torch.randn(3, 8), weight, torch.zeros(3, dtype=torch.long))


CALLS: list[dict[str, Any]] = [
    {"reduction": "mean"},
    {"reduction": "none", "bias": True, "softcap": 3.0, "z_loss": 0.1},
    {"reduction": "sum", "label_smoothing": 0.2, "bias": True},
    {"reduction": "mean", "label_smoothing": 0.2, "class_weight": True, "z_loss": 0.1, "chunk_bytes": 4 * 16 * 3},
]


def _arguments(call: dict[str, Any]) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    torch.manual_seed(1)
    x, weight, bias, class_weight, target = tensors(6, 5, 23, torch.float32)
    x, target = x.view(2, 3, 5), target.view(2, 3)
    target[1, 2] = -100
    options = {**call, "bias": None, "class_weight": class_weight if call.get("class_weight") else None}
    return [x, weight, bias] if call.get("bias") else [x, weight], target, options


def _split_results(rank: int, sizes: tuple[int, ...], mode: str, compiled: bool) -> list[Any]:
    """What one rank gets for each of the calls: loss, gradients of x and of its slices."""
    os.environ["LIGHTNING_HETU_KERNELS"] = "auto" if mode == "ref" else mode
    function = linear_cross_entropy_reference if mode == "ref" else hetu_kernels.linear_cross_entropy
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    group = torch.distributed.group.WORLD
    results = []
    for call in CALLS:
        (x, *rest), target, options = _arguments(call)
        slices = [t.split(list(sizes))[rank].clone() for t in rest]
        leaves = [t.requires_grad_() for t in (x, *slices)]
        if len(slices) > 1:
            options["bias"] = slices[1]
        loss = function(x, slices[0], target, group=group, **options)
        cotangent = torch.arange(loss.numel(), dtype=torch.float32).view(loss.shape) + 0.5
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, cotangent)])
    os.environ["LIGHTNING_HETU_KERNELS"] = "auto"
    return results


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference", "ref"])
@pytest.mark.parametrize("sizes", [(12, 11), (4, 0, 19)])
def test_split_vocabulary_is_the_whole_one(mode: str, sizes: tuple[int, ...], ranks: Callable[[int], RankPool]) -> None:
    """Slices of different sizes, one of them empty: the loss on all ranks, and the gradients, are those of one."""
    check_split(ranks(len(sizes)).run(_split_results, sizes, mode, False), sizes)


@pytest.mark.interpret
def test_split_vocabulary_compiles(ranks: Callable[[int], RankPool]) -> None:
    check_split(ranks(2).run(_split_results, (10, 13), "auto", True), (10, 13))


def check_split(results: list[Any], sizes: tuple[int, ...]) -> None:
    for number, call in enumerate(CALLS):
        (x, *rest), target, options = _arguments(call)
        leaves = [t.double().requires_grad_() for t in (x, *rest)]
        if len(rest) > 1:
            options["bias"] = leaves[2]
        if options["class_weight"] is not None:
            options["class_weight"] = options["class_weight"].double()
        loss = linear_cross_entropy_reference(leaves[0], leaves[1], target, **options)
        cotangent = torch.arange(loss.numel(), dtype=torch.float64).view(loss.shape) + 0.5
        dx, *others = torch.autograd.grad(loss, leaves, cotangent)
        for rank, result in enumerate(results):
            ours_loss, ours_dx, *ours = result[number]
            torch.testing.assert_close(ours_loss.double(), loss, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours_dx.double(), dx, rtol=1e-5, atol=1e-5)
            for mine, whole in zip(ours, others, strict=True):
                torch.testing.assert_close(mine.double(), whole.split(list(sizes))[rank], rtol=1e-5, atol=1e-5)


def _out_of_order(rank: int, mode: str) -> list[Any]:
    """Labels out of range, a slice that is ruled out, infinite and NaN logits on one rank only."""
    os.environ["LIGHTNING_HETU_KERNELS"] = mode
    x, weight = torch.ones(4, 1), torch.zeros(3, 1)
    x[3] = float("nan")
    bias = torch.tensor([-float("inf")] * 3 if rank else [-200.0, -201.0, -202.0])
    target = torch.tensor([1, 6, -1, 0])
    none = hetu_kernels.linear_cross_entropy(
        x.requires_grad_(), weight, target, bias, reduction="none", group=torch.distributed.group.WORLD
    )
    (dx,) = torch.autograd.grad(none.sum(), x)
    os.environ["LIGHTNING_HETU_KERNELS"] = "auto"
    return [none.detach(), dx]


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_split_vocabulary_with_logits_out_of_order(mode: str, ranks: Callable[[int], RankPool]) -> None:
    expected = -torch.tensor([-200.0, -201.0, -202.0]).log_softmax(0)[1]
    for loss, dx in ranks(2).run(_out_of_order, mode):
        torch.testing.assert_close(loss[0], expected)
        assert loss[1:].isnan().all()
        assert not dx[0].isnan().any()
        assert dx[1:].isnan().all()
