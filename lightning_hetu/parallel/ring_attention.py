"""Attention over sequences that are cut over a ring of ranks (arXiv 2310.01889), by torch's context parallelism.

torch has it for the attention of CUDA devices, behind distributed tensors. Its ring is the same for any kernel that
returns the logarithm of the sum of exponentials; here it runs that of the CPU, too, and on plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor.experimental._context_parallel import _attention as context_parallel  # private in 2.13

_SEQUENCE = 2
_aten = torch.ops.aten


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup, *, is_causal: bool, scale: float | None = None
) -> Tensor:
    """Attention of this rank's tokens to those of all ranks of ``group``.

    Args:
        query: ``[samples, heads, tokens, head size]``. With ``is_causal`` the tokens are the rank's first piece of the
            sequence and then its last one: of ``2 n`` pieces rank ``r`` has piece ``r`` and piece ``2 n - 1 - r``.
        key: Same shape.
        value: Same shape.
        group: The ranks, in the order of the sequence.
        is_causal: Whether a token sees itself and those before it, and not all.
        scale: Factor of the products of queries and keys; one over the root of the head size if not given.

    Returns:
        Same shape.
    """
    mixed: Tensor = _Ring.apply(query, key, value, group, is_causal, scale)
    return mixed


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup, is_causal: bool, scale: float | None
    ) -> Tensor:
        options: dict[str, Any] = {"dropout_p": 0.0, "scale": scale}
        if query.device.type == "cpu":
            operator = _aten._scaled_dot_product_flash_attention_for_cpu.default
        elif query.dtype == torch.float32:
            operator = _aten._scaled_dot_product_efficient_attention.default
            options |= {"attn_bias": None, "compute_log_sumexp": True}
        else:
            operator = _aten._scaled_dot_product_flash_attention.default
        with _balanced(is_causal):
            output, sums, *rest = context_parallel._templated_ring_attention(
                group, _SEQUENCE, operator, query, key, value, is_causal=is_causal, **options
            )
        # In memory tokens before heads, as from torch's own attention: models put them next to each other, and what
        # is kept for backward then is that, and not another copy.
        output = output.transpose(1, _SEQUENCE).contiguous().transpose(1, _SEQUENCE)
        ctx.group, ctx.is_causal, ctx.scale = group, is_causal, scale
        ctx.save_for_backward(query, key, value, output, sums, *(x for x in rest if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in rest]
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, output, sums, *tensors = ctx.saved_tensors
        rest = [tensors.pop(0) if other is None else other[0] for other in ctx.others]
        options: dict[str, Any] = {"dropout_p": 0.0, "scale": ctx.scale}
        name = "grad_out"
        if query.device.type == "cpu":
            operator = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        elif query.dtype == torch.float32:
            operator, name = _aten._scaled_dot_product_efficient_attention_backward.default, "grad_out_"
            seed, offset = rest[:2]
            options |= {"attn_bias": None, "philox_seed": seed, "philox_offset": offset}
            options |= {"grad_input_mask": (True, True, True, False)}
        else:
            operator = _aten._scaled_dot_product_flash_attention_backward.default
            lengths_q, lengths_k, longest_q, longest_k, seed, offset = rest[:6]
            options |= {"cum_seq_q": lengths_q, "cum_seq_k": lengths_k, "max_q": longest_q, "max_k": longest_k}
            options |= {"philox_seed": seed, "philox_offset": offset}
        with _balanced(ctx.is_causal):
            found = context_parallel._templated_ring_attention_backward(
                ctx.group,
                _SEQUENCE,
                operator,
                grad_out=gradients[0].contiguous(),
                grad_out_name=name,
                query=query,
                key=key,
                value=value,
                out=output,
                logsumexp=sums,
                is_causal=ctx.is_causal,
                **options,
            )
        return (*found[:3], None, None, None)


@contextmanager
def _balanced(is_causal: bool) -> Iterator[None]:
    """Tells torch's ring how the sequence is cut: it has one setting for all."""
    options = context_parallel._cp_options
    before = options.enable_load_balance
    options.enable_load_balance = is_causal
    try:
        yield
    finally:
        options.enable_load_balance = before
