"""``pack`` and the layout: against boolean indexing, with and without a known number of tokens, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import hetu_kernels
from hetu_kernels import padding_layout
from hetu_kernels._common.registry import Case, op_spec
from hetu_kernels.norm_act.pack_ref import pack_reference
from tests.kernels._reads import check_reads

MASK = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


def test_layout_of_a_mask() -> None:
    layout = padding_layout(MASK)
    rows = MASK.flatten().nonzero().flatten()
    assert (layout.batch, layout.max_length) == (4, 5)
    assert layout.cu_seqlens.tolist() == [0, 3, 3, 8, 9]
    assert layout.gather_idx.tolist() == rows.tolist() + [-1] * 11
    assert layout.scatter_idx[rows].tolist() == list(range(9))
    assert (layout.scatter_idx[MASK.flatten() == 0] == -1).all()
    assert {t.dtype for t in layout[:3]} == {torch.int32}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
def test_masks_of_any_dtype_and_strides(dtype: torch.dtype) -> None:
    one, other = padding_layout(MASK), padding_layout((3 * MASK).to(dtype).t().contiguous().t())
    for a, b in zip(one[:3], other[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_are_masks_of_prefixes(dtype: torch.dtype) -> None:
    lengths = torch.tensor([2, 0, 5, 9, -3], dtype=dtype)
    mask = torch.arange(5) < lengths[:, None]
    one, other = padding_layout(mask), padding_layout(lengths=lengths, max_length=5)
    for a, b in zip(one[:3], other[:3], strict=True):
        assert torch.equal(a, b)
    assert one.cu_seqlens.tolist() == [0, 2, 2, 7, 12, 12]


def test_total_tokens_bounds_everything() -> None:
    """Fewer rows than tokens: the rest is dropped, and no index points outside."""
    exact, more, fewer = (padding_layout(MASK, total_tokens=total) for total in (9, 12, 6))
    assert exact.gather_idx.tolist() == MASK.flatten().nonzero().flatten().tolist()
    assert more.gather_idx.tolist() == exact.gather_idx.tolist() + [-1] * 3
    assert torch.equal(more.scatter_idx, exact.scatter_idx)
    assert fewer.gather_idx.tolist() == exact.gather_idx[:6].tolist()
    assert fewer.scatter_idx.max() == 5
    assert fewer.cu_seqlens.tolist() == [0, 3, 3, 6, 6]


def test_positions_from_a_layout() -> None:
    layout = padding_layout(lengths=torch.tensor([2, 0, 3]), max_length=4, total_tokens=5)
    assert (layout.gather_idx % layout.max_length).tolist() == [0, 1, 0, 1, 2]


def test_layout_is_a_pytree() -> None:
    layout = padding_layout(MASK)
    moved = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), layout)
    assert isinstance(moved, hetu_kernels.PaddingLayout)
    assert moved.gather_idx.device.type == "meta"
    assert moved.batch == 4


@pytest.mark.interpret
def test_pack_is_boolean_indexing(device: torch.device) -> None:
    x = torch.randn(4, 5, 2, 3, device=device)
    layout = padding_layout(MASK.to(device), total_tokens=9)
    assert torch.equal(hetu_kernels.pack(x, layout), x[MASK.bool()])
    assert torch.equal(pack_reference(x, layout), x[MASK.bool()])
    ids = torch.randint(0, 2**40, (4, 5), device=device)
    assert torch.equal(hetu_kernels.pack(ids, layout), ids[MASK.bool()])


@pytest.mark.interpret
def test_bits_arrive_as_they_were(device: torch.device) -> None:
    """Negative zeros, NaN with a payload, subnormal numbers."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4, 5, 7), device=device, dtype=torch.int32)
    packed = hetu_kernels.pack(bits.view(torch.float32), padding_layout(MASK.to(device), total_tokens=9))
    assert torch.equal(packed.view(torch.int32), bits[MASK.bool()])


def test_gradients_are_right() -> None:
    """Through the operators themselves, once and twice: in float64 they run the reference."""
    layout = padding_layout(MASK, total_tokens=11)
    x = torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)
    for function in (hetu_kernels.pack, pack_reference):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, layout), (x,))
    assert torch.autograd.gradgradcheck(lambda x: hetu_kernels.pack(x, layout) ** 2, (x,))
    hetu_kernels.pack(x, layout).sum().backward()
    assert torch.equal(x.grad, MASK.unsqueeze(-1).expand_as(x).double())


@pytest.mark.interpret
@pytest.mark.parametrize("known", [False, True])
def test_layout_compiles_with_its_use_and_only_once(known: bool, device: torch.device) -> None:
    def through(x: Tensor, mask: Tensor, total: int | None) -> Tensor:
        layout = padding_layout(mask, total_tokens=total)
        return hetu_kernels.unpack(2 * hetu_kernels.pack(x, layout), layout, fill=-1.0)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(through, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for length in (5, 8, 3):
        mask = torch.rand(3, length, device=device) < 0.6
        x = torch.randn(3, length, 4, device=device)
        total = int(mask.sum()) + 1 if known else None
        expected = torch.where(mask[..., None], 2 * x, -1.0)
        assert torch.equal(compiled(x, mask, total), expected)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] == 1
    torch._dynamo.reset()


@pytest.mark.interpret
@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("case", op_spec("pack").cases(), ids=lambda case: case.name)
def test_kernels_read_their_arguments_only(case: Case) -> None:
    check_reads(op_spec("pack"), case, case.dtypes[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "neither of mask and lengths given"),
        ({"mask": MASK, "lengths": torch.tensor([1])}, ValueError, "both of mask and lengths given"),
        ({"mask": torch.ones(5)}, ValueError, r"mask has shape \[5\], expected \[batch, max_length\]"),
        ({"mask": MASK, "max_length": 6}, ValueError, "max_length=6, expected 5"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, "max_length=None, expected the length"),
        ({"lengths": torch.tensor([[1, 2]]), "max_length": 3}, ValueError, r"lengths has shape \[1, 2\]"),
        ({"lengths": torch.tensor([1.0]), "max_length": 3}, TypeError, "lengths has dtype torch.float32"),
        ({"lengths": [1, 2], "max_length": 3}, TypeError, "lengths is a list, expected a tensor"),
        ({"lengths": torch.tensor([1]), "max_length": -1}, ValueError, "max_length=-1, expected at least 0"),
        ({"mask": MASK, "total_tokens": -2}, ValueError, "total_tokens=-2, expected at least 0"),
        ({"mask": MASK, "total_tokens": 9.0}, TypeError, "total_tokens=9.0, expected an integer"),
        ({"mask": MASK, "total_tokens": MASK.sum()}, TypeError, "total_tokens is a Tensor, expected an integer; take"),
    ],
)
def test_wrong_layouts_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"padding_layout: {message}"):
        padding_layout(**arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(4, 6, 2), ValueError, r"x has shape \[4, 6, 2\], expected \[4, 5, ...\] as in layout"),
        (torch.randn(20), ValueError, r"x has shape \[20\], expected \[4, 5, ...\]"),
        (torch.randn(4, 5, dtype=torch.complex64), TypeError, "x has dtype torch.complex64"),
        ([1.0], TypeError, "x is a list, expected a tensor"),
        (torch.randn(4, 5, device="meta"), ValueError, "layout.gather_idx is on cpu, x on meta"),
    ],
)
def test_wrong_arguments_are_named(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"pack: {message}"):
        hetu_kernels.pack(x, padding_layout(MASK))


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        (None, TypeError, "layout is a NoneType, expected a PaddingLayout"),
        (MASK, TypeError, "layout is a Tensor, expected a PaddingLayout"),
        (padding_layout(MASK)._replace(gather_idx=torch.zeros(9)), TypeError, "layout.gather_idx has dtype torch.fl"),
        (padding_layout(MASK)._replace(scatter_idx=torch.zeros(9, dtype=torch.int32)), ValueError,
         r"layout.scatter_idx has shape \[9\], expected \[20\]"),
    ],
)  # fmt: skip
def test_what_is_no_layout_is_refused(layout: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^pack: {message}"):
        hetu_kernels.pack(torch.randn(4, 5), layout)
    with pytest.raises(error, match=f"unpack: {message}"):
        hetu_kernels.unpack(torch.randn(9), layout)


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_indices_beside_a_tensor_are_named(mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", mode)
    monkeypatch.setenv("LIGHTNING_HETU_CHECK", "1")  # without it, those on a GPU are not looked at
    layout = padding_layout(MASK.to(device), total_tokens=9)
    layout.gather_idx[3] = 20
    layout.scatter_idx[2] = 9
    with pytest.raises(ValueError, match=r"^pack: layout.gather_idx\[3\] is 20, expected below 20, the rows"):
        hetu_kernels.pack(torch.randn(4, 5, device=device), layout)
    with pytest.raises(ValueError, match=r"unpack: layout.scatter_idx\[2\] is 9, expected below 9, the rows"):
        hetu_kernels.unpack(torch.randn(9, device=device), layout)
