"""Attention of a layer whose ranks share out the sequence: Ulysses and context parallelism.

Everything in a transformer block but attention treats every token by itself, so a rank can run the block on its part of
the sequence. In place of ``scaled_dot_product_attention`` comes

* Ulysses (arXiv 2309.14509): an all-to-all gives each rank whole sequences for some of the heads, and one back;
* context parallelism: torch's ring attention (arXiv 2310.01889), in which keys and values go round the ranks.

Both together make Ulysses the inner one. Sequences are cut for a ring so that causal attention is balanced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from lightning_hetu.parallel.mesh import Layout
from lightning_hetu.parallel.ring_attention import ring_attention
from lightning_hetu.parallel.sequence_cut import (
    SEQUENCE,
    Arguments,
    SequenceCut,
    drop_in_part,
    first_activation,
    join,
    like,
    map_first,
)
from lightning_hetu.parallel.tokenwise import (
    HEADS,
    LEAST_PART,
    TOKENS,
    check_tokenwise,
    cut_all,
    is_cut,
    without_attention,
)

_checking = True


@contextmanager
def without_checks() -> Iterator[None]:
    """No block is looked at as long as the context lasts: its input has shapes only, and no values."""
    global _checking
    before, _checking = _checking, False
    try:
        yield
    finally:
        _checking = before


def cut_attention_layer(layer: nn.Module, layout: Layout, name: str) -> Callable[[], None]:
    """Makes a block work on a part of the sequence, in two steps: before recomputation is applied, and after it.

    All tensors among the block's arguments that have the length of the sequence in dimension 1 are cut with the tokens
    (positions and their embeddings); attention masks ``[samples, heads, sequence, sequence]`` are not. Where a sequence
    is too short or does not divide as the ring needs, all ranks work on all of it, which is exact, too.

    Where it meets arguments of a new kind, a block is looked at first, see
    :func:`~lightning_hetu.parallel.tokenwise.check_tokenwise`.

    Args:
        layer: The block. It takes and returns ``[samples, sequence, hidden]`` first, and calls
            ``scaled_dot_product_attention`` for self-attention.
        layout: Meshes of its strategy.
        name: Its name, for error messages.

    Returns:
        Call it when recomputation has been applied.
    """
    assert layout.sequence is not None and layout.context is not None and layout.ulysses is not None
    cut = SequenceCut(layout.sequence, folds=layout.context.size())
    attention = _SharedAttention(cut, layout, name)
    innermost = layer.forward

    def work(*args: Any, sequence_length: int | None, **kwargs: Any) -> Any:
        if sequence_length is None:
            return innermost(*args, **kwargs)
        with attention.over(sequence_length):
            return innermost(*args, **kwargs)

    layer.forward = work  # type: ignore[method-assign]

    def finish() -> None:
        inner = layer.forward
        known = _Known(layer, name)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = args, kwargs
            length = first_activation(given, name).shape[SEQUENCE]
            uneven = min(cut.lengths(length)) < LEAST_PART or (cut.folds > 1 and length % (2 * cut.ranks))
            if uneven or _has_cache(given):
                return _work_on_all(inner, cut.ranks, args, kwargs)
            if _checking:
                known.check(lambda a, k: inner(*a, **k, sequence_length=None), given, length)
            args, kwargs = cut_all(given, length, cut.part, cut.shared)
            output = inner(*args, **kwargs, sequence_length=length)
            # What else is returned is the same on all ranks, each of which makes a summand of its gradient.
            output = _scale(output, 1.0 / cut.ranks, first=False)
            return map_first(output, lambda part: join(cut, part, length, name))

        layer.forward = forward  # type: ignore[method-assign]

    return finish


class _Known:
    """What a block has been looked at with: its mode, the arguments that are cut, and the longest sequence."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name
        self.lengths: dict[tuple[Any, ...], int] = {}
        self.cut: dict[Any, tuple[bool, ...]] = {}

    def check(self, run: Callable[[Any, Any], Any], arguments: Arguments, length: int) -> None:
        """Looks at the block where it meets something new.

        Raises:
            ValueError: If it cannot run on a part of the sequence, or an argument has the length of the sequence only
                now.
        """
        leaves, spec = tree_flatten(arguments)
        cut = tuple(isinstance(leaf, Tensor) and is_cut(leaf, length) for leaf in leaves)
        kind = str(spec), tuple(leaf.ndim if isinstance(leaf, Tensor) else -1 for leaf in leaves)
        if self.cut.setdefault(kind, cut) != cut:
            raise ValueError(
                f"{self.name} is given an argument that has the length of the sequence, {length}, in some batches and"
                " not in others: nobody can tell whether it is cut with the tokens. Plan it without sp and cp."
            )
        key = self.layer.training, *kind
        if length <= self.lengths.get(key, 0):
            return
        if check_tokenwise(run, arguments, self.name, self.layer):
            self.lengths[key] = length


def _has_cache(arguments: Arguments) -> bool:
    """Whether an argument collects keys and values from call to call: those of all ranks would be in it by turns."""
    leaves = tree_leaves(arguments)
    return any(not isinstance(leaf, Tensor) and callable(getattr(leaf, "update", None)) for leaf in leaves)


# ---- all ranks on all of it -----------------------------------------------------------------------------------------


class _Scaled(torch.autograd.Function):
    """The same tensor, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def _work_on_all(inner: Callable[..., Any], ranks: int, args: Any, kwargs: Any) -> Any:
    """All ranks run the block on whole sequences.

    The gradients of its weights are added up over the ranks, so each rank makes a share of them.
    """
    args, kwargs = _scale((args, kwargs), float(ranks))
    return _scale(inner(*args, **kwargs, sequence_length=None), 1.0 / ranks)


def _scale(values: Any, factor: float, *, first: bool = True) -> Any:
    """Multiplies the gradients of all tensors; without ``first`` not that of the first value."""

    def convert(value: Any) -> Any:
        return _Scaled.apply(value, factor) if isinstance(value, Tensor) and value.requires_grad else value

    if first:
        return tree_map(convert, values)
    if not isinstance(values, tuple | list):
        return values
    return like(values, (*values[:1], *tree_map(convert, tuple(values[1:]))))


# ---- attention ------------------------------------------------------------------------------------------------------


class _SharedAttention(TorchFunctionMode):
    """Replaces attention by that over the sequences of all ranks."""

    def __init__(self, cut: SequenceCut, layout: Layout, name: str) -> None:
        super().__init__()
        assert layout.context is not None and layout.ulysses is not None
        self.cut = cut
        self.name = name
        self.context, self.ulysses = layout.context.get_group(), layout.ulysses.get_group()
        self.context_size, self.ulysses_size = layout.context.size(), layout.ulysses.size()
        self.calls = 0
        self.outer: tuple[Any, ...] = ()

    @contextmanager
    def over(self, length: int) -> Iterator[None]:
        """Sequences have ``length`` tokens as long as the context lasts.

        Raises:
            ValueError: If there was no attention in it.
        """
        before = self.calls
        self.cut.length, self.outer = length, _recording()
        try:
            with self:
                yield
        finally:
            self.cut.length = 0
        if self.calls == before:
            raise ValueError(without_attention(self.name))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            self._check_recording()
            return self.attend(*args, **kwargs)
        if func is F.dropout:
            return self._drop(*args, **kwargs)
        return func(*args, **kwargs)

    def _check_recording(self) -> None:
        if _recording() != self.outer:
            raise ValueError(
                f"{self.name} recomputes a part of itself in backward, where the other ranks are out of reach. Leave"
                " that to the plan, with -recompute, or plan it without sp and cp."
            )

    def _drop(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return input
        self._check_recording()
        tokens = self.cut.mine(self.cut.length)
        if input.ndim > SEQUENCE and input.shape[SEQUENCE] == tokens:
            return drop_in_part(input, p, self.cut)
        if input.ndim > SEQUENCE and input.shape[SEQUENCE] > 1:
            raise ValueError(
                f"{self.name} drops out of a tensor of shape {list(input.shape)} where a rank has {tokens} tokens: only"
                " [samples, tokens, ...] can be shared out. Plan it without sp and cp."
            )
        return F.dropout(input, p, training, inplace)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As ``scaled_dot_product_attention``, of this rank's tokens: ``[samples, heads, tokens, head size]``.

        Raises:
            ValueError: If this attention cannot be shared out.
        """
        device = query.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            query, key, value = (x.to(dtype) if x.dtype == torch.float32 else x for x in (query, key, value))
        self._check(query, key, value, attn_mask, dropout_p)
        heads = query.shape[HEADS]
        if key.shape[HEADS] != heads and (self.context_size > 1 or key.shape[HEADS] % self.ulysses_size):
            key, value = (x.repeat_interleave(heads // x.shape[HEADS], HEADS) for x in (key, value))
            enable_gqa = False
        if self.ulysses_size > 1:
            query, key, value = (self._to_heads(x) for x in (query, key, value))
            attn_mask = self._heads_of(attn_mask, heads)
        if self.context_size > 1:
            mixed = ring_attention(query, key, value, self.context, is_causal=is_causal, scale=scale)
        else:
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return self._to_tokens(mixed) if self.ulysses_size > 1 else mixed

    def _check(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> None:
        tokens = self.cut.mine(self.cut.length)
        if query.ndim != 4 or any(
            x.shape[TOKENS] != tokens or x.shape[0] != query.shape[0] for x in (query, key, value)
        ):
            raise ValueError(
                f"{self.name} attends from {list(query.shape)} to {list(key.shape)} where a rank has {tokens} tokens:"
                " only self-attention over the whole sequence can be shared out. Plan it without sp and cp."
            )
        if self.context_size > 1 and query.shape[-1] != value.shape[-1]:
            raise ValueError(
                f"{self.name} has values of size {value.shape[-1]} and queries of size {query.shape[-1]}: ring"
                " attention takes one size. Use sp in the place of cp."
            )
        if query.shape[HEADS] % self.ulysses_size:
            raise ValueError(
                f"{self.name} has {query.shape[HEADS]} heads, which sp={self.ulysses_size} ranks cannot share out: use"
                " a degree that divides them."
            )
        if self.context_size > 1 and mask is not None:
            raise ValueError(
                f"{self.name} has an attention mask: torch's ring attention has causal attention and attention to all"
                " tokens. Use sp in the place of cp, or give the model no mask."
            )
        if self.context_size > 1 and dropout_p:
            raise ValueError(
                f"{self.name} has dropout_p={dropout_p} in attention: ring attention has none. Use sp in the place of"
                " cp."
            )

    # ---- Ulysses ----------------------------------------------------------------------------------------------------

    def _lengths(self) -> list[int]:
        """Tokens of the ranks that exchange heads."""
        lengths = self.cut.lengths(self.cut.length)
        first = self.cut.mesh.get_local_rank() // self.ulysses_size * self.ulysses_size
        return lengths[first : first + self.ulysses_size]

    def _to_heads(self, tensor: Tensor) -> Tensor:
        """From all heads of this rank's tokens to some heads of all tokens."""
        ranks, lengths = self.ulysses_size, self._lengths()
        samples, _, mine, size = tensor.shape
        # Tokens first: what comes from the ranks then is the sequence, without another copy.
        sent = tensor.unflatten(HEADS, (ranks, -1)).permute(1, 3, 0, 2, 4)
        row = sent[0, :1].numel()
        got = all_to_all_single_autograd(
            sent.reshape(-1), [length * row for length in lengths], [mine * row] * ranks, self.ulysses
        )
        return got.view(sum(lengths), samples, -1, size).permute(1, 2, 0, 3)

    def _to_tokens(self, tensor: Tensor) -> Tensor:
        """The reverse."""
        ranks, lengths = self.ulysses_size, self._lengths()
        samples, heads, _, size = tensor.shape
        row, mine = samples * heads * size, lengths[torch.distributed.get_rank(self.ulysses)]
        sent = tensor.permute(2, 0, 1, 3).reshape(-1)
        got = all_to_all_single_autograd(sent, [mine * row] * ranks, [length * row for length in lengths], self.ulysses)
        # In memory tokens come before heads, as from torch's own attention: models put them next to each other.
        parts = got.view(ranks, mine, samples, heads, size).permute(2, 1, 0, 3, 4)
        return parts.reshape(samples, mine, ranks * heads, size).transpose(HEADS, TOKENS)

    def _heads_of(self, mask: Tensor | None, heads: int) -> Tensor | None:
        """The mask of this rank's heads."""
        if mask is None or mask.ndim < 3 or mask.shape[-3] != heads or heads == 1:
            return mask
        return mask.chunk(self.ulysses_size, -3)[torch.distributed.get_rank(self.ulysses)]


def _recording() -> tuple[Any, ...]:
    """Whether gradients are recorded, and who keeps what is saved for them: both are others inside of checkpoint."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), *(hooks or ())
