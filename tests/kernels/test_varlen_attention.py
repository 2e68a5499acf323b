"""``varlen_attention``: the reference against torch's attention, the tiling mask, and what is refused."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import hetu_kernels
from hetu_kernels._common import device as device_module
from hetu_kernels._common.triton_utils import tl, triton
from hetu_kernels.attention import _varlen_backward_kernels, _varlen_tiles
from hetu_kernels.attention.tiling_mask import BlockClass, TilingMask, key_phases, row_phases
from hetu_kernels.attention.varlen_ref import varlen_attention_reference


def cumulative(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_scaled_dot_product_attention(causal: bool) -> None:
    q, k, v = (torch.randn(12, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    out = varlen_attention_reference(q, k, v, cumulative(5, 7), max_seqlen_q=7, causal=causal)
    for part in (slice(0, 5), slice(5, 12)):
        one = (t[part].transpose(0, 1) for t in (q, k, v))
        expected = F.scaled_dot_product_attention(*one, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(out[part], expected.transpose(0, 1))


def test_reference_is_flex_attention_with_alibi_window_and_cap() -> None:
    """Another implementation's idea of bias, window and soft cap; rows and keys of different number."""
    q, k, v = (torch.randn(1, 4, n, 8, dtype=torch.float64) for n in (6, 9, 9))
    slopes, bias = torch.rand(4, dtype=torch.float64), torch.randn(1, 4, 6, 9, dtype=torch.float64)

    def score(s, b, h, i, j):
        s = 3.0 * torch.tanh(s / 3.0) + bias[0, h, i, j] - slopes[h] * (i + 3 - j).abs()
        return torch.where((j <= i + 3 + 1) & (j >= i + 3 - 4), s, -float("inf"))

    expected = flex_attention(q, k, v, score_mod=score)[0].transpose(0, 1)
    out = varlen_attention_reference(
        *(t[0].transpose(0, 1) for t in (q, k, v)), cumulative(6), cumulative(9), max_seqlen_q=6, max_seqlen_k=9,
        window=(4, 1), softcap=3.0, alibi_slopes=slopes, bias=bias,
    )  # fmt: skip
    torch.testing.assert_close(out, expected)


def test_sink_is_one_more_key_without_a_value() -> None:
    q, k, v = (torch.randn(5, 2, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(2, dtype=torch.float64)
    out, lse = varlen_attention_reference(q, k, v, cumulative(5), max_seqlen_q=5, sinks=sinks, return_lse=True)
    scores = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
    scores = torch.cat([scores, sinks[:, None, None].expand(2, 5, 1)], 2)
    torch.testing.assert_close(out, torch.einsum("hij,jhd->ihd", scores.softmax(2)[:, :, :5], v))
    torch.testing.assert_close(lse, scores.logsumexp(2))


def test_reference_gradients_are_right() -> None:
    q, k, v = (torch.randn(7, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, bias, sinks):
        return varlen_attention_reference(
            q, k, v, cumulative(3, 4), max_seqlen_q=4, causal=True, bias=bias, sinks=sinks, softcap=2.0, return_lse=True
        )

    assert torch.autograd.gradcheck(function, (q, k, v, bias, sinks))


def test_rows_that_see_nothing_have_no_gradient() -> None:
    q, k, v = (torch.randn(n, 1, 4, dtype=torch.float64, requires_grad=True) for n in (3, 1, 1))
    out, lse = varlen_attention_reference(
        q, k, v, cumulative(3), cumulative(1), max_seqlen_q=3, max_seqlen_k=1, causal=True, return_lse=True
    )
    assert torch.equal(out[:2], torch.zeros(2, 1, 4, dtype=torch.float64))
    assert (lse[:, :2] == -float("inf")).all()
    out.sum().backward()
    assert torch.equal(q.grad[:2], torch.zeros_like(q.grad[:2]))
    assert torch.isfinite(k.grad).all()


# ---------------------------------------------------------------------------------------------------------------------
# The tiling mask


def random_mask(rng: random.Random) -> TilingMask:
    return TilingMask(rng.choice([-1, 0, 1, 5, 17, 40]), rng.choice([-1, 0, 0, 2, 9, 33]))


def test_tiling_mask_is_the_dense_mask_on_every_block() -> None:
    rng = random.Random(0)
    for _ in range(300):
        mask, len_q, len_k = random_mask(rng), rng.randint(1, 70), rng.randint(1, 70)
        block_m, block_n = rng.choice([1, 4, 16, 32]), rng.choice([1, 8, 16, 32])
        dense = mask.dense(len_q, len_k)
        for m in range(0, len_q, block_m):
            for n in range(0, len_k, block_n):
                block = dense[m : m + block_m, n : n + block_n]
                found = mask.block_class(range(m, m + block_m), range(n, n + block_n), len_q, len_k)
                ragged = n + block_n > len_k
                if not block.any():
                    # A block that touches the band outside of the matrix only may be visited in vain.
                    assert found in (BlockClass.EMPTY, BlockClass.PARTIAL)
                elif block.all() and not ragged:
                    assert found == BlockClass.FULL
                else:
                    assert found == BlockClass.PARTIAL


@triton.jit
def _phases_kernel(out_ptr, len_q, len_k, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, OF_KEYS: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    if OF_KEYS:
        a, b, c, d = key_phases(block * BLOCK_M, len_q, len_k, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    else:
        a, b, c, d = row_phases(block * BLOCK_N, len_q, len_k, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    tl.store(out_ptr + block * 4, a)
    tl.store(out_ptr + block * 4 + 1, b)
    tl.store(out_ptr + block * 4 + 2, c)
    tl.store(out_ptr + block * 4 + 3, d)


@pytest.mark.interpret
@pytest.mark.parametrize("of_keys", [True, False])
def test_phases_of_a_kernel_are_the_classes_of_the_mask(of_keys: bool, device: torch.device) -> None:
    """Every visible element is visited, and what is visited without a mask is wholly visible."""
    rng = random.Random(1)
    for _ in range(60):
        mask, len_q, len_k = random_mask(rng), rng.randint(1, 70), rng.randint(1, 70)
        block_m, block_n = rng.choice([4, 16]), rng.choice([8, 16])
        own, other, length, step = (
            (block_m, len_q, len_k, block_n) if of_keys else (block_n, len_k, len_q, block_m)
        )  # fmt: skip
        blocks = -(-other // own)
        out = torch.zeros(blocks, 4, dtype=torch.int32, device=device)
        _phases_kernel[(blocks,)](
            out, len_q, len_k, mask.left, mask.right, BLOCK_M=block_m, BLOCK_N=block_n,
            HAS_LEFT=mask.left >= 0, HAS_RIGHT=mask.right >= 0, OF_KEYS=of_keys,
        )  # fmt: skip
        dense = mask.dense(len_q, len_k) if of_keys else mask.dense(len_q, len_k).T
        for block, (begin, full_begin, full_end, end) in enumerate(out.tolist()):
            rows = dense[block * own : (block + 1) * own]
            assert begin % step == 0 and full_begin % step == 0 and full_end % step == 0
            assert not rows[:, :begin].any()
            assert not rows[:, max(end, 0) :].any()
            assert full_begin <= full_end
            # Past the end of the matrix nothing is stored (rows) or the block is PARTIAL (keys).
            assert rows[:, full_begin : min(full_end, length)].all()
            if of_keys:
                assert full_end <= length or full_begin == full_end


def test_tiling_mask_takes_no_memory_for_128k_tokens() -> None:
    """Every block of a 131072 x 131072 mask is classified by arithmetic; a dense one would be 16 GiB."""
    mask = TilingMask.of(causal=True, window=4096)
    length, block = 131072, 128
    rows = range(65536, 65536 + block)
    classes = [mask.block_class(rows, range(n, n + block), length, length) for n in range(0, length, block)]
    assert classes.count(BlockClass.FULL) == 4096 // block - 1
    assert classes.count(BlockClass.PARTIAL) == 2
    assert classes.count(BlockClass.EMPTY) == length // block - 4096 // block - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, r"window=0, expected at least 1 \(a token's own key\), a pair"),
        ({"window": (-1, 3)}, r"window\[0\]=-1, expected at least 0 or None"),
        ({"window": (1, 2, 3)}, r"window=\(1, 2, 3\), expected a pair \(left, right\)"),
    ],
)
def test_impossible_windows_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TilingMask.of(**arguments)


def test_a_window_of_an_integer_leaves_the_keys_behind_alone() -> None:
    assert TilingMask.of(window=4) == TilingMask.of(window=(3, None))
    assert TilingMask.of(window=4, causal=True) == TilingMask.of(window=(3, 0)) != TilingMask.of(window=(3, 3))


# ---------------------------------------------------------------------------------------------------------------------
# The operator


@pytest.mark.interpret
@pytest.mark.parametrize("subtiles", [1, 2])
@pytest.mark.parametrize("window", [None, (25, 3)])
def test_two_level_tiling_gives_the_same(
    subtiles: int, window: tuple[int, int] | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outer block of 64 keys, rescaled once, in one or two products."""
    default = _varlen_tiles.default_config

    def config(kernel, *args, **kwargs):
        found = default(kernel, *args, **kwargs)
        if kernel != "varlen_fwd":
            return found
        return _varlen_tiles.Config({"BLOCK_M": 32, "BLOCK_N": 64, "SUBTILES": subtiles}, 4, 1)

    monkeypatch.setattr(_varlen_tiles, "default_config", config)
    q, k, v = torch.randn(3, 150, 2, 16, device=device)
    lengths = cumulative(101, 49).to(device)
    options = {"max_seqlen_q": 101, "window": window}
    out = hetu_kernels.varlen_attention(q, k, v, lengths, **options)
    expected = varlen_attention_reference(*(t.double() for t in (q, k, v)), lengths, **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.interpret
def test_max_seqlen_may_be_larger_than_needed(device: torch.device) -> None:
    q, k, v = (torch.randn(20, 2, 16, device=device, requires_grad=True) for _ in range(3))
    lengths = cumulative(12, 8).to(device)
    tight = hetu_kernels.varlen_attention(q, k, v, lengths, max_seqlen_q=12, causal=True)
    loose = hetu_kernels.varlen_attention(q, k, v, lengths, max_seqlen_q=100, causal=True)
    assert torch.equal(tight, loose)


@pytest.mark.interpret
def test_autocast_multiplies_in_its_dtype(device: torch.device) -> None:
    q, k, v = (torch.randn(9, 2, 16, device=device, requires_grad=True) for _ in range(3))
    with torch.autocast(device.type, torch.bfloat16):
        out = hetu_kernels.varlen_attention(q, k, v, cumulative(9).to(device), max_seqlen_q=9)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_leaves_float64() -> None:
    """As torch's linear does; the rest of the batch is computed as without it."""
    given = {name: value.double() if name in "qkv" else value for name, value in arguments().items()}
    expected = hetu_kernels.varlen_attention(**given)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(given["q"][0], torch.ones(3, 16, dtype=torch.float64)).dtype == torch.float64
        found = hetu_kernels.varlen_attention(**given)
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)


@pytest.mark.interpret
def test_a_row_that_sees_nothing_with_a_sink_that_weighs_nothing(device: torch.device) -> None:
    """-inf minus -inf is no number: output 0, log-sum-exp -inf, gradients 0."""
    q, k, v = torch.randn(8, 2, 16), torch.randn(3, 1, 16), torch.randn(3, 1, 16)
    sinks = torch.tensor([-float("inf"), 0.5])
    lengths = {"max_seqlen_q": 5, "max_seqlen_k": 3, "return_lse": True}
    found = []
    for function, dtype, place in (
        (hetu_kernels.varlen_attention, torch.float32, device),
        (varlen_attention_reference, torch.float64, torch.device("cpu")),
    ):
        leaves = [t.to(place, dtype).requires_grad_() for t in (q, k, v, sinks)]
        starts = cumulative(3, 5).to(place), cumulative(3, 0).to(place)
        out, lse = function(*leaves[:3], *starts, **lengths, sinks=leaves[3])
        grads = torch.autograd.grad(out.square().sum() + lse[1].sum(), leaves)
        found.append([t.detach().cpu().double() for t in (out, lse, *grads)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert found[0][0][3:, 0].count_nonzero() == 0
    assert (found[0][1][0, 3:] == -float("inf")).all()


def test_grids_are_within_the_limits_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """65535 programs in the second and third dimension: many biases, or long ones, need more."""
    grids: list[tuple[str, tuple[int, ...]]] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append((self.name, grid))
            return lambda *args, **kwargs: None

    for name in vars(_varlen_backward_kernels):
        if name.endswith("_kernel"):
            monkeypatch.setattr(_varlen_backward_kernels, name, Kernel(name))
    options = _varlen_tiles.Options(1.0, TilingMask(), None, "ieee")
    for shape in ((1024, 64, 1, 1), (1, 1, 1, 2_000_000), (1, 1, 2_000_000, 1)):
        grids.clear()
        q = torch.empty(1024, 64, 16, device="meta")
        starts = torch.empty(1025, dtype=torch.int32, device="meta")
        bias = torch.empty(shape, device="meta")
        _varlen_backward_kernels.launch_backward(
            q, None, q, q, q, q, torch.empty(64, 1024, device="meta"), starts, starts, 2_000_000, 2_000_000, options,
            None, bias, want_dbias=True,
        )  # fmt: skip
        assert len({name for name, _ in grids}) == 4
        for name, grid in grids:
            assert all(size <= 65_535 for size in grid[1:]), f"{name}: {grid} for a bias {shape}"
        programs = sum(math.prod(grid) for name, grid in grids if "dbias" in name)
        assert programs == shape[0] * shape[1] * -(-shape[2] // 16) * -(-shape[3] // 16)  # tiles of the interpreter


@pytest.mark.interpret
@pytest.mark.parametrize("shape", [(3, 2, 60, 1), (3, 1, 1, 60), (1, 2, 60, 20), (3, 2, 20, 60)])
def test_bias_gradient_in_parts_is_the_same(
    shape: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More biases, and more rows, than fit into the grid."""
    q, k, v = (torch.randn(100, 2, 16, device=device) for _ in range(3))
    bias = torch.randn(shape, device=device, requires_grad=True)
    starts_q, starts_k = ((20, 7, 11), (60, 9, 31)) if shape[3] == 60 else ((60, 9, 31), (20, 7, 11))
    if shape[2] == 1:
        starts_q = starts_k
    if shape[3] == 1:
        starts_k = starts_q
    grads = []
    for limit in (_varlen_backward_kernels.GRID_LIMIT, 3):
        monkeypatch.setattr(_varlen_backward_kernels, "GRID_LIMIT", limit)
        out = hetu_kernels.varlen_attention(
            q, k, v, cumulative(*starts_q).to(device), cumulative(*starts_k).to(device),
            max_seqlen_q=max(starts_q), max_seqlen_k=max(starts_k), bias=bias,
        )  # fmt: skip
        grads.append(torch.autograd.grad(out.square().sum(), bias)[0])
    assert torch.equal(*grads)
    assert grads[0].count_nonzero() > 10


def test_no_gradient_for_a_bias_that_wants_none(device: torch.device) -> None:
    q, k, v = (torch.randn(6, 2, 16, device=device, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, 6, 6, device=device)
    hetu_kernels.varlen_attention(q, k, v, cumulative(6).to(device), max_seqlen_q=6, bias=bias).sum().backward()
    assert q.grad is not None
    assert bias.grad is None


def arguments(**changes) -> dict:
    q, k, v = torch.randn(8, 4, 16), torch.randn(8, 2, 16), torch.randn(8, 2, 16)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": cumulative(3, 5), "max_seqlen_q": 5, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.randn(8, 4, 300)}, ValueError, r"q has shape \[8, 4, 300\].*head_dim up to 256"),
        ({"q": torch.randn(8, 3, 16)}, ValueError, "k has 2 heads, expected a divisor of the 3 heads of q"),
        ({"v": torch.randn(8, 2, 8)}, ValueError, r"v has shape \[8, 2, 8\], expected \[8, 2, 16\]"),
        ({"k": torch.randn(8, 2, 16).half()}, TypeError, "k has dtype torch.float16, q torch.float32"),
        ({"cu_seqlens_q": torch.tensor([0.0, 8.0])}, TypeError, "cu_seqlens_q has dtype torch.float32, expected int32"),
        ({"cu_seqlens_k": cumulative(8), "max_seqlen_k": 8}, ValueError, "cu_seqlens_k has shape"),
        ({"cu_seqlens_k": cumulative(4, 4)}, TypeError,
         "max_seqlen_k=None, expected the length of the longest sequence beside cu_seqlens_k"),
        ({"max_seqlen_q": torch.tensor(5)}, TypeError, "max_seqlen_q is a Tensor, expected an integer; take .item()"),
        ({"max_seqlen_q": None}, TypeError, "max_seqlen_q is None, expected an integer"),
        ({"max_seqlen_q": True}, TypeError, "max_seqlen_q=True, expected an integer"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q=-1, expected at least 0"),
        ({"bias": torch.randn(1, 4, 5, 4)}, ValueError, r"bias has shape \[1, 4, 5, 4\], expected \[2, 4, 5, 5\]"),
        ({"alibi_slopes": torch.randn(2)}, ValueError, r"alibi_slopes has shape \[2\], expected \[4\]"),
        ({"sinks": torch.randn(2)}, ValueError, r"sinks has shape \[2\], expected \[4\]"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0, expected a positive number"),
        ({"softcap": float("inf")}, ValueError, r"softcap=inf, expected a positive number \(finite\), or None"),
        ({"softcap": float("nan")}, ValueError, "softcap=nan, expected a positive number"),
        ({"scale": "1"}, TypeError, "scale='1', expected a number"),
        ({"scale": float("nan")}, ValueError, "scale=nan, expected a number"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale is a Tensor, expected a number"),
        ({"window": [2, 2]}, TypeError, r"window=\[2, 2\], expected an integer .* a pair \(left, right\) as a tuple"),
        ({"window": 2.5}, TypeError, "window=2.5, expected an integer"),
        ({"window": (2, 1.5)}, TypeError, r"window\[1\]=1.5, expected an integer or None"),
        ({"window": 0}, ValueError, "window=0, expected at least 1"),
        ({"causal": 1}, TypeError, "causal=1, expected True or False"),
        ({"q": [1]}, TypeError, "q is a list, expected a tensor"),
        ({"v": None}, TypeError, "v is None, expected a tensor"),
        ({"cu_seqlens_q": [0, 8]}, TypeError, "cu_seqlens_q is a list, expected a tensor"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"varlen_attention: {message}") as caught:
        hetu_kernels.varlen_attention(**arguments(**changes))
    assert "\n" not in str(caught.value)


def test_lengths_may_be_integers_of_numpy() -> None:
    ours = {name: value.double() if name in "qkv" else value for name, value in arguments().items()}
    expected = hetu_kernels.varlen_attention(**ours, window=3, scale=0.5)
    ours.update(max_seqlen_q=np.int64(5), max_seqlen_k=np.int32(5), window=np.int16(3), scale=np.float32(0.5))
    assert torch.equal(hetu_kernels.varlen_attention(**ours), expected)


OFFSETS = [
    ({"max_seqlen_q": 4}, "max_seqlen_q=4, expected at least 5, the longest sequence of cu_seqlens_q"),
    ({"cu_seqlens_k": [0, 3, 8], "max_seqlen_k": 4}, "max_seqlen_k=4, expected at least 5, the longest sequence of"),
    ({"cu_seqlens_q": [1, 3, 8]}, r"cu_seqlens_q\[0\] is 1, expected 0"),
    ({"cu_seqlens_q": [0, 5, 4]}, r"cu_seqlens_q\[2\] is 4, expected at least 5, the entry before it"),
    ({"cu_seqlens_q": [0, -2, 3]}, r"cu_seqlens_q\[1\] is -2, expected at least 0"),
    ({"cu_seqlens_q": [0, 4, 9]}, r"cu_seqlens_q\[2\] is 9, expected at most 8, the rows of q"),
    ({"cu_seqlens_k": [0, 4, 9], "max_seqlen_k": 5}, r"cu_seqlens_k\[2\] is 9, expected at most 8, the rows of k"),
]


def with_offsets(changes: dict, dtype: torch.dtype, device: torch.device) -> dict:
    changed = {name: torch.tensor(value, dtype=dtype) if name[:2] == "cu" else value for name, value in changes.items()}
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in arguments(**changed).items()}


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize(("changes", "message"), OFFSETS)
def test_wrong_offsets_are_named(
    mode: str, changes: dict, message: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", mode)
    monkeypatch.setenv("LIGHTNING_HETU_CHECK", "1")  # without it, those on a GPU are not looked at
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(ValueError, match=f"varlen_attention: {message}"):
            hetu_kernels.varlen_attention(**with_offsets(changes, dtype, device))


def test_offsets_are_checked_when_compiled_code_runs() -> None:
    """Within the graph there is nothing to look at."""
    torch._dynamo.reset()
    compiled = torch.compile(hetu_kernels.varlen_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="max_seqlen_q=4, expected at least 5"):
        compiled(**with_offsets({"max_seqlen_q": 4}, torch.int32, torch.device("cpu")))
    torch._dynamo.reset()


def test_values_on_a_device_are_read_on_demand_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        device = torch.device("cuda")

    monkeypatch.setattr(device_module, "capturing", lambda device: False)
    monkeypatch.delenv("LIGHTNING_HETU_CHECK", raising=False)
    assert not device_module.may_read(OnDevice())
    monkeypatch.setenv("LIGHTNING_HETU_CHECK", "1")
    assert device_module.may_read(OnDevice())
    assert not device_module.may_read(torch.zeros(2, device="meta"))
    monkeypatch.setattr(device_module, "capturing", lambda device: True)
    assert not device_module.may_read(OnDevice())
