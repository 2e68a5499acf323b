"""``paged_decode_attention``: the reference against torch's attention, caches of any layout, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hetu_kernels
from hetu_kernels._common.device import TARGETS
from hetu_kernels.attention import _decode_kernels as kernels
from hetu_kernels.attention.decode_ref import paged_decode_attention_reference
from hetu_kernels.attention.decode_spec import packed, paged, random_tree

Arguments = dict[str, Any]


def make(lens: list[int], *, tokens: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = 8, page_size: int = 4,
         dtype: torch.dtype = torch.float64, spare_pages: int = 2) -> Arguments:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    made = paged(lens, page_size, kv_heads, dim, dtype, generator, spare_pages=spare_pages)
    return {"q": torch.randn(len(lens), tokens, heads, dim, generator=generator).to(dtype), **made}


def contiguous_cache(arguments: Arguments, b: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence in order, ``[heads, len, dim]``."""
    length, page_size = int(arguments["lens"][b]), arguments["k_cache"].shape[1]
    table = arguments["block_table"][b].tolist()
    k, v = (
        torch.stack([arguments[name][table[n // page_size], n % page_size] for n in range(length)], 1)
        for name in ("k_cache", "v_cache")
    )
    return k, v


def expected(arguments: Arguments, b: int, mask: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """torch's attention for one sequence under a dense mask ``[tokens, len]``."""
    k, v = contiguous_cache(arguments, b)
    dense = torch.where(mask, bias, -float("inf")).to(k.dtype)
    q = arguments["q"][b].transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True).transpose(0, 1)


def on(device: torch.device, arguments: Arguments) -> Arguments:
    return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in arguments.items()}


def test_reference_of_one_token_is_torch_attention() -> None:
    arguments = make([5, 12, 1])
    out = paged_decode_attention_reference(**{**arguments, "q": arguments["q"].squeeze(1)})
    for b, length in enumerate((5, 12, 1)):
        torch.testing.assert_close(out[b : b + 1], expected(arguments, b, torch.ones(1, length, dtype=torch.bool)))


def test_reference_of_several_tokens_is_causal_from_the_end() -> None:
    arguments = make([5, 12], tokens=3, heads=6)
    out = paged_decode_attention_reference(**arguments, scale=0.3)
    for b, length in enumerate((5, 12)):
        mask = torch.ones(3, length, dtype=torch.bool).tril(length - 3)
        scaled = {**arguments, "q": arguments["q"] * 0.3 * 8**0.5}
        torch.testing.assert_close(out[b], expected(scaled, b, mask))


@pytest.mark.parametrize("tokens", [3, 64, 65, 128])
def test_reference_with_a_tree_is_attention_with_a_dense_mask(tokens: int) -> None:
    """Any bits at all, the sign bit and the second word among them."""
    arguments = make([tokens + 9, tokens], tokens=tokens)
    seen = torch.rand(2, tokens, tokens) < 0.5
    seen |= torch.eye(tokens, dtype=torch.bool)
    words = torch.stack([packed(s) for s in seen])
    assert words.shape == (2, tokens, 1 + (tokens > 64))
    out = paged_decode_attention_reference(**arguments, tree_mask=words)
    for b, before in enumerate((9, 0)):
        mask = torch.cat([torch.ones(tokens, before, dtype=torch.bool), seen[b]], 1)
        torch.testing.assert_close(out[b], expected(arguments, b, mask))


def test_reference_of_a_chain_of_drafts_is_causal() -> None:
    arguments = make([9, 20], tokens=4)
    chain = torch.tensor([0b1, 0b11, 0b111, 0b1111]).expand(2, 4)
    torch.testing.assert_close(
        paged_decode_attention_reference(**arguments, tree_mask=chain), paged_decode_attention_reference(**arguments)
    )


def test_reference_with_window_biases_and_cap_is_an_explicit_softmax() -> None:
    """Distances are those of positions in the cache, for drafts too: row ``t`` is at ``len - T + t``."""
    arguments = make([11], tokens=3)
    slopes, tree = torch.rand(4, dtype=torch.float64), torch.tensor([[0b001, 0b111, 0b101]])
    out, lse = paged_decode_attention_reference(
        **arguments, tree_mask=tree, window=4, softcap=2.0, alibi_slopes=slopes, return_lse=True
    )
    k, v = contiguous_cache(arguments, 0)
    for t, drafts in enumerate([[8], [8, 9, 10], [8, 10]]):
        # Position 8 + t; the last four keys up to there: of the older ones, those from 5 + t on.
        keys = [n for n in [*range(8), *drafts] if n > 8 + t - 4]
        for h in range(4):
            scores = k[h // 2, keys] @ arguments["q"][0, t, h] / 8**0.5
            scores = 2 * torch.tanh(scores / 2) - slopes[h] * (torch.tensor(keys) - 8 - t).abs()
            torch.testing.assert_close(lse[0, t, h], scores.logsumexp(0))
            torch.testing.assert_close(out[0, t, h], scores.softmax(0) @ v[h // 2, keys])


def test_random_trees_are_trees() -> None:
    """Every token sees itself and its ancestors: what an ancestor sees, it sees, and nothing later."""
    tree = random_tree(20, torch.Generator().manual_seed(0)).squeeze(-1).tolist()
    assert tree[0] == 1
    for t, bits in enumerate(tree):
        assert bits >> t == 1
        for j in range(t):
            if bits >> j & 1:
                assert tree[j] & ~bits == 0


# ---------------------------------------------------------------------------------------------------------------------
# The kernel, where a case of the spec cannot say it


@pytest.mark.interpret
@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 3, 0, 1), (3, 1, 0, 2)])
def test_keys_and_values_may_be_laid_out_differently(layout: tuple[int, ...], device: torch.device) -> None:
    """Heads outside of the tokens of a page, dimensions outside of pages: nothing but strides."""
    arguments = on(device, make([70, 33], tokens=2, dtype=torch.float32, page_size=8))
    out = hetu_kernels.paged_decode_attention(**arguments)
    back = [layout.index(i) for i in range(4)]
    for name in ("k_cache", "v_cache"):
        changed = {**arguments, name: arguments[name].permute(layout).contiguous().permute(back)}
        assert layout == (0, 1, 2, 3) or not changed[name].is_contiguous()
        assert torch.equal(hetu_kernels.paged_decode_attention(**changed), out)


@pytest.mark.interpret
def test_pages_that_nobody_sees_are_not_read(device: torch.device) -> None:
    """Table entries behind a sequence, and of pages that have left the window, may be no pages at all."""
    arguments = on(device, make([100, 35], dtype=torch.float32))
    pages = arguments["k_cache"].shape[0]
    table = arguments["block_table"].clone()
    table[0, 25:] = torch.tensor([-1, pages])
    table[1, 9:] = pages + 1
    changed = {**arguments, "block_table": table}
    for name in ("k_cache", "v_cache"):  # what a wrong entry finds here is NaN, not somebody else's memory
        changed[name] = F.pad(arguments[name], (0, 0, 0, 0, 0, 0, 5, 5), value=float("nan"))[5:-5]
    out = hetu_kernels.paged_decode_attention(**arguments)
    assert out.isfinite().all()
    assert torch.equal(hetu_kernels.paged_decode_attention(**changed), out)
    out = hetu_kernels.paged_decode_attention(**arguments, window=10)
    table[0, : (100 - 10) // 4] = -2
    table[1, : (35 - 10) // 4] = pages
    assert torch.equal(hetu_kernels.paged_decode_attention(**changed, window=10), out)
    torch.testing.assert_close(paged_decode_attention_reference(**changed, window=10), out)


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", [1, 5])
def test_number_of_splits_changes_rounding_only(tokens: int, device: torch.device) -> None:
    arguments = on(device, make([200, 7, 0], tokens=tokens, kv_heads=1, dtype=torch.float32, page_size=16))
    out, lse = hetu_kernels.paged_decode_attention(**arguments, num_splits=1, return_lse=True)
    for num_splits in (None, 2, 5):
        again = hetu_kernels.paged_decode_attention(**arguments, num_splits=num_splits, return_lse=True)
        torch.testing.assert_close(again, (out, lse), rtol=1e-5, atol=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("num_splits", [1, 3])
def test_other_sequences_do_not_change_a_result(num_splits: int, device: torch.device) -> None:
    """With a number of splits of one's own, not in one bit, whatever else is in the batch."""
    arguments = on(device, make([200, 33, 90], dtype=torch.float32, page_size=16))
    together = hetu_kernels.paged_decode_attention(**arguments, num_splits=num_splits)
    for b in range(3):
        alone = {name: t if "cache" in name else t[b : b + 1] for name, t in arguments.items()}
        assert torch.equal(hetu_kernels.paged_decode_attention(**alone, num_splits=num_splits), together[b : b + 1])


@pytest.mark.interpret
def test_parts_of_a_cache_merge_by_their_log_sum_exp(device: torch.device) -> None:
    """What lse is for: old keys here, recent ones there."""
    arguments = on(device, make([100], dtype=torch.float32))
    out, lse = hetu_kernels.paged_decode_attention(**arguments, return_lse=True)
    old = {**arguments, "lens": torch.full_like(arguments["lens"], 60)}
    recent = {
        **arguments,
        "lens": torch.full_like(arguments["lens"], 40),
        "block_table": arguments["block_table"][:, 15:],
    }
    parts = [hetu_kernels.paged_decode_attention(**each, return_lse=True) for each in (old, recent)]
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), lse)
    torch.testing.assert_close(sum(o * (s - lse).exp()[..., None] for o, s in parts), out)


@pytest.mark.interpret
def test_a_cache_may_have_no_pages(device: torch.device) -> None:
    arguments = on(device, make([0, 0], dtype=torch.float32))
    arguments |= {name: arguments[name][:0] for name in ("k_cache", "v_cache")}
    out, lse = hetu_kernels.paged_decode_attention(**arguments, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -float("inf")).all()
    torch.testing.assert_close(paged_decode_attention_reference(**arguments, return_lse=True), (out, lse))


@pytest.mark.interpret
def test_float64_is_computed_in_float64(device: torch.device) -> None:
    arguments = on(device, make([37]))
    assert torch.equal(hetu_kernels.paged_decode_attention(**arguments), paged_decode_attention_reference(**arguments))


def test_splits_are_enough_for_every_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "sm_count", lambda device: 132)
    cpu = torch.device("cpu")
    assert kernels.default_num_splits(8, 10_000, cpu) == 33
    assert kernels.default_num_splits(1, 10_000, cpu) == 64
    assert kernels.default_num_splits(1, 5, cpu) == 5
    assert kernels.default_num_splits(264, 10_000, cpu) == 1
    assert kernels.default_num_splits(100, 0, cpu) == 1


@pytest.mark.parametrize("limit", [101_376, TARGETS["sm_80"].shared_memory, TARGETS["sm_90"].shared_memory])
def test_every_configuration_is_within_shared_memory(limit: int) -> None:
    """Of NVIDIA's GPUs, those of consumers first; AMD's keep the queries in registers, which the estimate ignores."""
    for itemsize in (2, 4):
        for block_d in (16, 32, 64, 128, 256):
            for rows in (1, 16, 17, 64, 512):
                block_r = kernels._row_block(rows, block_d, itemsize)
                assert block_r in (16, 32, 64, 128)
                config = kernels._config(block_r, block_d, itemsize, limit)
                used = kernels._shared_memory(config.blocks["BLOCK_N"], config.num_stages, block_r, block_d, itemsize)
                assert used <= limit, (itemsize, block_d, block_r)


@pytest.mark.gpu
def test_caches_of_more_than_two_to_the_31_elements(device: torch.device) -> None:
    pages = 2**31 // (16 * 8 * 128) + 64
    cache = torch.zeros(pages, 16, 8, 128, dtype=torch.bfloat16, device=device)
    cache[-16:] = torch.randn(16, 16, 8, 128, device=device)
    q = torch.randn(2, 1, 32, 128, dtype=torch.bfloat16, device=device)
    table = torch.arange(pages - 1, pages - 17, -1, dtype=torch.int32, device=device).view(2, 8)
    lens = torch.tensor([128, 77], dtype=torch.int32, device=device)
    out = hetu_kernels.paged_decode_attention(q, cache, cache, table, lens)
    small = hetu_kernels.paged_decode_attention(q, cache[-64:], cache[-64:], table - (pages - 64), lens)
    assert torch.equal(out, small)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_gradients_are_refused(name: str) -> None:
    arguments = make([5])
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"paged_decode_attention: {name} requires a gradient"):
        hetu_kernels.paged_decode_attention(**arguments)
    with torch.no_grad():
        assert not hetu_kernels.paged_decode_attention(**arguments).requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.randn(2, 8)}, ValueError, r"q has shape \[2, 8\], expected \[B, T, H, D\]"),
        ({"q": torch.randn(2, 1, 4, 264)}, ValueError, r"q has shape .* with D from 1 to 256"),
        ({"q": torch.randn(2, 1, 3, 8)}, ValueError, "q has 3 heads, expected a multiple of the 2 of k_cache"),
        ({"q": torch.randn(2, 1, 4, 8).half()}, TypeError, "k_cache has dtype torch.float32, q torch.float16"),
        ({"k_cache": torch.randn(9, 4, 2, 9)}, ValueError, r"k_cache has shape .* expected \[any, any, any, 8\]"),
        ({"v_cache": torch.randn(9, 4, 2, 8)[:7]}, ValueError, r"v_cache has shape \[7, 4, 2, 8\]"),
        ({"k_cache": torch.randn(9, 6, 2, 8), "v_cache": torch.randn(9, 6, 2, 8)}, ValueError,
         "k_cache has pages of 6 tokens, expected a power of two"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, r"block_table has shape \[3, 2\]"),
        ({"block_table": torch.zeros(2, 2)}, TypeError, "block_table has dtype torch.float32, expected int32"),
        ({"lens": torch.zeros(2, dtype=torch.int16)}, TypeError, "lens has dtype torch.int16, expected int32"),
        ({"lens": torch.zeros(3, dtype=torch.int32)}, ValueError, r"lens has shape \[3\], expected \[2\]"),
        ({"tree_mask": torch.zeros(2, 1, dtype=torch.int32)}, TypeError, "tree_mask has dtype torch.int32"),
        ({"tree_mask": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"tree_mask has shape \[2, 3\], expected"),
        ({"tree_mask": torch.zeros(2, 1, 3, dtype=torch.int64)}, ValueError, r"tree_mask has shape \[2, 1, 3\]"),
        ({"q": torch.randn(2, 65, 4, 8), "tree_mask": torch.zeros(2, 65, dtype=torch.int64)}, ValueError,
         "q has 65 tokens, expected at most the 64 bits"),
        ({"alibi_slopes": torch.rand(2)}, ValueError, r"alibi_slopes has shape \[2\], expected \[4\]"),
        ({"window": 0}, ValueError, "window=0, expected at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0, expected a positive number"),
        ({"num_splits": 0}, ValueError, "num_splits=0, expected 1 to 256"),
        ({"num_splits": 257}, ValueError, "num_splits=257, expected 1 to 256"),
        ({"num_splits": 2.0}, TypeError, "num_splits=2.0, expected an integer, or None to choose"),
        ({"window": (3, 0)}, TypeError, r"window=\(3, 0\), expected an integer, or None for no window"),
        ({"scale": "1"}, TypeError, "scale='1', expected a number"),
        ({"softcap": float("inf")}, ValueError, "softcap=inf, expected a positive number"),
        ({"lens": [5, 7]}, TypeError, "lens is a list, expected a tensor"),
        ({"block_table": None}, TypeError, "block_table is None, expected a tensor"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {**make([5, 7], dtype=torch.float32), **changes}
    with pytest.raises(error, match=f"paged_decode_attention: {message}"):
        hetu_kernels.paged_decode_attention(**arguments)


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("page", [-1, 9])
def test_pages_that_are_none_are_named(
    mode: str, page: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are read: not behind a sequence's end, nor wholly before a window."""
    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", mode)
    monkeypatch.setenv("LIGHTNING_HETU_CHECK", "1")  # without it, those on a GPU are not looked at
    q = torch.randn(2, 1, 4, 8, device=device)
    cache = torch.randn(9, 4, 2, 8, device=device)
    lens = torch.tensor([5, 7], device=device)
    table = torch.tensor([[1, 2, page], [page, 4, page]], device=device)
    with pytest.raises(ValueError, match=rf"block_table\[1, 0\] is {page}, expected 0 to 8, the pages of k_cache"):
        hetu_kernels.paged_decode_attention(q, cache, cache, table, lens)
    with pytest.raises(ValueError, match=r"block_table\[1, 0\]"):
        hetu_kernels.paged_decode_attention(q, cache, cache, table, lens, window=4)  # keys 3 to 6 of pages of 4
    found = hetu_kernels.paged_decode_attention(q, cache, cache, table, lens, window=3)
    table[1, 0] = 0
    assert torch.equal(hetu_kernels.paged_decode_attention(q, cache, cache, table, lens, window=3), found)
