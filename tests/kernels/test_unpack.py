"""``unpack``: against assignment by a mask, what the padding is filled with, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hetu_kernels
from hetu_kernels import padding_layout
from hetu_kernels._common.registry import Case, op_spec
from hetu_kernels.norm_act.pack_ref import unpack_reference
from tests.kernels._reads import check_reads

MASK = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


@pytest.mark.interpret
def test_unpack_is_assignment_by_a_mask(device: torch.device) -> None:
    packed = torch.randn(9, 2, 3, device=device)
    expected = torch.full((4, 5, 2, 3), 7.0, device=device)
    expected[MASK.bool()] = packed
    layout = padding_layout(MASK.to(device), total_tokens=9)
    assert torch.equal(hetu_kernels.unpack(packed, layout, fill=7.0), expected)
    assert torch.equal(unpack_reference(packed, layout, fill=7.0), expected)


@pytest.mark.interpret
def test_unpack_undoes_pack(device: torch.device) -> None:
    x = torch.randn(4, 5, 6, device=device)
    mask = MASK.to(device)
    for total in (None, 9, 13):
        layout = padding_layout(mask, total_tokens=total)
        packed = hetu_kernels.pack(x, layout)
        assert torch.equal(hetu_kernels.unpack(packed, layout), x * mask[..., None])
        assert torch.equal(hetu_kernels.pack(hetu_kernels.unpack(packed, layout, fill=3.0), layout), packed)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.int64, -100),
        (torch.int64, 2**53),
        (torch.int32, -(2**31)),
        (torch.uint8, 200),
        (torch.int16, -2),
        (torch.bool, 1),
        (torch.float16, 0.1),
        (torch.bfloat16, 0.1),
        (torch.float32, -0.0),
        (torch.float32, float("nan")),
        (torch.bfloat16, float("-inf")),
    ],
)
def test_padding_is_what_torch_makes_of_the_number(dtype: torch.dtype, fill: float, device: torch.device) -> None:
    """In every dtype, to the last bit."""
    packed = torch.ones(9, 3, device=device).to(dtype)
    padded = hetu_kernels.unpack(packed, padding_layout(MASK.to(device), total_tokens=9), fill=fill)
    expected = torch.full((4, 5, 3), fill, dtype=dtype, device=device)
    expected[MASK.bool()] = packed
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(padded.view(integer), expected.view(integer))


def test_gradients_are_right() -> None:
    """Through the operators themselves, once and twice: in float64 they run the reference."""
    layout = padding_layout(MASK, total_tokens=11)
    packed = torch.randn(11, 2, dtype=torch.float64, requires_grad=True)
    for function in (hetu_kernels.unpack, unpack_reference):
        assert torch.autograd.gradcheck(lambda p, f=function: f(p, layout, fill=2.0), (packed,))
    assert torch.autograd.gradgradcheck(lambda p: hetu_kernels.unpack(p, layout) ** 2, (packed,))
    hetu_kernels.unpack(packed, layout).sum().backward()
    assert packed.grad.sum(1).tolist() == [2.0] * 9 + [0.0] * 2


@pytest.mark.interpret
@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("case", op_spec("unpack").cases(), ids=lambda case: case.name)
def test_kernels_read_their_arguments_only(case: Case) -> None:
    check_reads(op_spec("unpack"), case, case.dtypes[0])


@pytest.mark.parametrize(
    ("packed", "options", "error", "message"),
    [
        (torch.randn(8, 2), {}, ValueError, r"packed has shape \[8, 2\], expected \[9, ...\] as in layout"),
        (torch.tensor(1.0), {}, ValueError, r"packed has shape \[\], expected \[9, ...\]"),
        (torch.arange(9), {"fill": 0.5}, ValueError, "fill=0.5, expected an integer for torch.int64"),
        (torch.arange(9), {"fill": float("nan")}, ValueError, "fill=nan, expected an integer"),
        (torch.randn(9).half(), {"fill": 1e10}, ValueError, "fill=10000000000.0, expected -65504.0 to 65504.0 for"),
        (torch.arange(9).to(torch.uint8), {"fill": -1}, ValueError, "fill=-1, expected 0 to 255 for torch.uint8"),
        (torch.randn(9), {"fill": "0"}, TypeError, "fill='0', expected a number"),
        (torch.randn(9), {"fill": None}, TypeError, "fill is None, expected a number"),
        (torch.randn(9, dtype=torch.complex64), {}, TypeError, "packed has dtype torch.complex64"),
        (1.0, {}, TypeError, "packed is a float, expected a tensor"),
        (torch.randn(9, device="meta"), {}, ValueError, "layout.gather_idx is on cpu, packed on meta"),
    ],
)
def test_wrong_arguments_are_named(packed: Any, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"unpack: {message}"):
        hetu_kernels.unpack(packed, padding_layout(MASK, total_tokens=9), **options)
