"""``rotary``: the reference against other ways to write it, what a rotation keeps, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hetu_kernels
from hetu_kernels._common.registry import Case, op_spec
from hetu_kernels.norm_act.rotary_ref import rotary_reference
from tests.kernels._reads import check_reads


def table(positions: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(positions), 100 ** -(torch.arange(half) / half)).to(torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def test_reference_rotates_halves_like_llama() -> None:
    x = torch.randn(2, 9, 3, 16, dtype=torch.float64)
    cos, sin = table(9, 8, torch.float64)
    wide_cos, wide_sin = (torch.cat([t, t], -1)[:, None] for t in (cos, sin))
    turned = torch.cat([-x[..., 8:], x[..., :8]], -1)
    torch.testing.assert_close(rotary_reference(x, cos, sin), x * wide_cos + turned * wide_sin)


def test_interleaved_reference_multiplies_complex_numbers() -> None:
    x = torch.randn(2, 9, 3, 20, dtype=torch.float64)
    cos, sin = table(12, 8, torch.float64)
    positions = torch.randint(0, 12, (2, 9))
    turned = torch.view_as_complex(x[..., :16].unflatten(-1, (8, 2))) * torch.complex(cos, sin)[positions][:, :, None]
    expected = torch.cat([torch.view_as_real(turned).flatten(-2), x[..., 16:]], -1)
    torch.testing.assert_close(rotary_reference(x, cos, sin, positions=positions, interleaved=True), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_gradients_are_right(interleaved: bool) -> None:
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = table(5, 3, torch.float64)
    positions = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(
        lambda x: rotary_reference(x, cos, sin, positions=positions, interleaved=interleaved), (x,)
    )


@pytest.mark.interpret
@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_distance_only(interleaved: bool, device: torch.device) -> None:
    query, key = torch.randn(2, 1, 1, 16, device=device)
    cos, sin = (t.to(device) for t in table(64, 8))

    def product(m: int, n: int) -> Tensor:
        q, k = (
            hetu_kernels.rotary(x, cos, sin, positions=torch.tensor([at], device=device), interleaved=interleaved)
            for x, at in ((query, m), (key, n))
        )
        return (q * k).sum()

    torch.testing.assert_close(product(3, 10), product(50, 57), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(20, 20), (query * key).sum(), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(product(3, 10), product(3, 11))


@pytest.mark.interpret
@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_undoes_forward(interleaved: bool, device: torch.device) -> None:
    x = torch.randn(2, 7, 2, 24, device=device, requires_grad=True)
    cos, sin = (t.to(device) for t in table(7, 8))
    y = hetu_kernels.rotary(x, cos, sin, interleaved=interleaved)
    (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(back, x.detach())


@pytest.mark.interpret
def test_positions_and_layouts_agree(device: torch.device) -> None:
    """Packed, batched, transposed, and with positions spelled out: the same rotation."""
    x = torch.randn(2, 5, 3, 8, device=device)
    cos, sin = (t.to(device) for t in table(9, 4))
    y = hetu_kernels.rotary(x, cos, sin)
    counted = torch.arange(5, device=device)
    packed = hetu_kernels.rotary(x.flatten(0, 1), cos, sin, positions=counted.repeat(2))
    transposed = hetu_kernels.rotary(x.transpose(1, 2).contiguous().transpose(1, 2), cos, sin)
    for other in (
        hetu_kernels.rotary(x, cos, sin, positions=counted),
        hetu_kernels.rotary(x, cos, sin, positions=counted.to(torch.int32).expand(2, 5)),
        packed.view_as(x),
        transposed,
    ):
        assert torch.equal(other, y)
    assert transposed.is_contiguous()


@pytest.mark.interpret
def test_tables_may_have_any_strides(device: torch.device) -> None:
    """One table holds both, or they lie apart."""
    x = torch.randn(2, 5, 3, 8, device=device)
    cos, sin = (t.to(device) for t in table(5, 4))
    y = hetu_kernels.rotary(x, cos, sin)
    both = torch.cat([cos, sin], 1)
    assert torch.equal(hetu_kernels.rotary(x, both[:, :4], sin), y)
    assert torch.equal(hetu_kernels.rotary(x, cos, both[:, 4:]), y)
    assert torch.equal(hetu_kernels.rotary(x, cos.t().contiguous().t(), sin.t().contiguous().t()), y)
    one = cos[:1].expand(5, 4)
    assert torch.equal(hetu_kernels.rotary(x, one, one), hetu_kernels.rotary(x, one.clone(), one.clone()))


@pytest.mark.interpret
def test_positions_outside_of_the_table_are_nan(device: torch.device) -> None:
    x = torch.randn(4, 1, 6, device=device, requires_grad=True)
    cos, sin = (t.to(device) for t in table(3, 2))
    y = hetu_kernels.rotary(x, cos, sin, positions=torch.tensor([0, -1, 3, 2], device=device))
    y.sum().backward()
    for tensor in (y, x.grad):
        assert tensor[[1, 2], :, :4].isnan().all()
        assert tensor[[0, 3]].isfinite().all()
        assert tensor[..., 4:].isfinite().all()


@pytest.mark.interpret
def test_tables_get_no_gradients(device: torch.device) -> None:
    x = torch.randn(3, 1, 4, device=device, requires_grad=True)
    cos, sin = (t.to(device).requires_grad_() for t in table(3, 2))
    hetu_kernels.rotary(x, cos, sin).sum().backward()
    assert x.grad is not None
    assert cos.grad is None
    assert sin.grad is None


@pytest.mark.interpret
@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("case", op_spec("rotary").cases(), ids=lambda case: case.name)
def test_kernels_read_their_arguments_only(case: Case) -> None:
    check_reads(op_spec("rotary"), case, case.dtypes[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(5, 8)}, ValueError, r"x has shape \[5, 8\], expected \[..., tokens, heads, head_dim\]"),
        ({"x": torch.ones(5, 2, 8, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"sin": None}, TypeError, "sin is None, expected a tensor"),
        ({"interleaved": "gptj"}, TypeError, "interleaved='gptj', expected True or False"),
        ({"cos": torch.randn(9)}, ValueError, r"cos has shape \[9\], expected \[max_position, 1 to 4\]"),
        ({"cos": torch.randn(9, 5)}, ValueError, r"cos has shape \[9, 5\], expected \[max_position, 1 to 4\]"),
        ({"cos": torch.randn(9, 0)}, ValueError, r"cos has shape \[9, 0\], expected \[max_position, 1 to 4\]"),
        ({"sin": torch.randn(8, 4)}, ValueError, r"sin has shape \[8, 4\], expected that of cos, \[9, 4\]"),
        ({"sin": torch.randn(9, 4).half()}, TypeError, "sin has dtype torch.float16, cos torch.float32"),
        (
            {"cos": torch.randn(9, 4).half(), "sin": torch.randn(9, 4).half()},
            TypeError,
            "cos has dtype torch.float16, expected torch.float32 or that of x",
        ),
        ({"positions": torch.randn(5)}, TypeError, "positions has dtype torch.float32, expected int32 or int64"),
        (
            {"positions": torch.arange(4)},
            ValueError,
            r"positions has shape \[4\], expected \[5\] or \[2, 5\]",
        ),
        (
            {"positions": torch.zeros(1, 5, dtype=torch.int64)},
            ValueError,
            r"positions has shape \[1, 5\], expected \[5\] or \[2, 5\]",
        ),
    ],
)
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    cos, sin = table(9, 4)
    arguments = {"x": torch.randn(2, 5, 2, 8), "cos": cos, "sin": sin, **changes}
    with pytest.raises(error, match=f"rotary: {message}"):
        hetu_kernels.rotary(**arguments)
