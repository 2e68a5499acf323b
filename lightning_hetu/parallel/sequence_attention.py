"""Attention of a layer whose ranks share out the sequence: Ulysses and context parallelism.

Everything in a transformer block but attention treats every token by itself, so a rank can run the block on its part of
the sequence. In place of ``scaled_dot_product_attention`` comes

* Ulysses (arXiv 2309.14509): an all-to-all gives each rank whole sequences for some of the heads, and one back;
* context parallelism: torch's ring attention (arXiv 2310.01889), in which keys and values go round the ranks.

Both together make Ulysses the inner one. Sequences are cut for a ring so that causal attention is balanced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_hetu.parallel.mesh import Layout
from lightning_hetu.parallel.ring_attention import ring_attention
from lightning_hetu.parallel.sequence_cut import (
    SEQUENCE,
    SequenceCut,
    drop_in_part,
    first_activation,
    join,
    map_first,
)

_log = logging.getLogger(__name__)

_LEAST_PART = 2
"""Fewest tokens of a rank: of a single one, models may take it that they generate."""
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 2e-2
_HEADS, _TOKENS = 1, 2  # dimensions of query, key and value: [samples, heads, tokens, head size]


def cut_attention_layer(layer: nn.Module, layout: Layout, name: str) -> Callable[[], None]:
    """Makes a block work on a part of the sequence, in two steps: before recomputation is applied, and after it.

    All tensors among the block's arguments that have the length of the sequence in dimension 1 are cut with the tokens
    (positions and their embeddings); attention masks ``[samples, heads, sequence, sequence]`` are not. Where a sequence
    is too short or does not divide as the ring needs, all ranks work on all of it, which is exact, too.

    In its first forward the block is run once on all of a sequence and once on a part of it, with something in the
    place of attention that treats every token by itself: both must give the same.

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
    for module in layer.modules():
        if type(module) is nn.Dropout:
            module.forward = _partial_dropout(module, cut)  # type: ignore[method-assign, assignment]
    innermost = layer.forward

    def work(*args: Any, sequence_length: int | None, **kwargs: Any) -> Any:
        cut.length = sequence_length or 0
        if sequence_length is None:
            return innermost(*args, **kwargs)
        before = attention.calls
        try:
            with attention:
                output = innermost(*args, **kwargs)
        finally:
            cut.length = 0
        if attention.calls == before:
            raise ValueError(_without_attention(name))
        return output

    layer.forward = work  # type: ignore[method-assign]

    def finish() -> None:
        inner = layer.forward
        checked = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal checked
            length = first_activation((args, kwargs), name).shape[SEQUENCE]
            parts = cut.lengths(length)
            if min(parts) < _LEAST_PART or (cut.folds > 1 and length % (2 * cut.ranks)):
                return _work_on_all(inner, cut.ranks, args, kwargs)
            if not checked:
                check_tokenwise(lambda a, k: inner(*a, **k, sequence_length=None), (args, kwargs), name)
                checked = True
            args, kwargs = _cut_all((args, kwargs), length, cut.part, cut.shared)
            output = inner(*args, **kwargs, sequence_length=length)
            # What else is returned is the same on all ranks, each of which makes a summand of its gradient.
            output = _scale(output, 1.0 / cut.ranks, first=False)
            return map_first(output, lambda part: join(cut, part, length, name))

        layer.forward = forward  # type: ignore[method-assign]

    return finish


def _without_attention(name: str) -> str:
    return (
        f"{name} calls no scaled_dot_product_attention: its tokens cannot see those of other ranks. Plan it without sp"
        " and cp, or use that function for its attention."
    )


def _partial_dropout(dropout: nn.Dropout, cut: SequenceCut) -> Callable[[Tensor], Tensor]:
    whole = dropout.forward

    def forward(values: Tensor) -> Tensor:
        in_part = cut.length and values.ndim > SEQUENCE
        return drop_in_part(dropout, cut, values) if in_part else whole(values)

    return forward


def _cut_all(arguments: Any, length: int, part: Callable[[Tensor], Tensor], shared: Callable[[Tensor], Tensor]) -> Any:
    """Applies ``part`` to every tensor that has the length of the sequence in dimension 1, ``shared`` to all others."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return part(value) if 2 <= value.ndim <= 3 and value.shape[SEQUENCE] == length else shared(value)

    return tree_map(convert, arguments)


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
    return type(values)((*values[:1], *tree_map(convert, tuple(values[1:]))))


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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

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
        self._check(query, key, attn_mask, dropout_p)
        heads = query.shape[_HEADS]
        if key.shape[_HEADS] != heads and (self.context_size > 1 or key.shape[_HEADS] % self.ulysses_size):
            key, value = (x.repeat_interleave(heads // x.shape[_HEADS], _HEADS) for x in (key, value))
            enable_gqa = False
        if self.ulysses_size > 1:
            query, key, value = self._to_heads(query, key, value)
            attn_mask = self._heads_of(attn_mask, heads)
        if self.context_size > 1:
            mixed = ring_attention(query, key, value, self.context, is_causal=is_causal, scale=scale)
        else:
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return self._to_tokens(mixed) if self.ulysses_size > 1 else mixed

    def _check(self, query: Tensor, key: Tensor, mask: Tensor | None, dropout_p: float) -> None:
        tokens = self.cut.lengths(self.cut.length)[self.cut.mesh.get_local_rank()]
        if query.ndim != 4 or query.shape[_TOKENS] != tokens or key.shape[_TOKENS] != tokens:
            raise ValueError(
                f"{self.name} attends from {list(query.shape)} to {list(key.shape)} where a rank has {tokens} tokens:"
                " only self-attention over the whole sequence can be shared out. Plan it without sp and cp."
            )
        if query.shape[_HEADS] % self.ulysses_size:
            raise ValueError(
                f"{self.name} has {query.shape[_HEADS]} heads, which sp={self.ulysses_size} ranks cannot share out: use"
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

    def _to_heads(self, *tensors: Tensor) -> Iterator[Tensor]:
        """From all heads of some tokens to some heads of all tokens, in one exchange."""
        ranks = self.ulysses_size
        # one row for every rank: its heads of all tensors
        rows = [tensor.transpose(0, _HEADS).reshape(ranks, -1) for tensor in tensors]
        sent = torch.cat(rows, 1)
        shapes = [(x.shape[_HEADS] // ranks, x.shape[0], x.shape[-1]) for x in tensors]
        lengths = self._lengths()
        sizes = [[heads * samples * length * size for heads, samples, size in shapes] for length in lengths]
        got = all_to_all_single_autograd(
            sent.flatten(), [sum(row) for row in sizes], [sent.shape[1]] * ranks, self.ulysses
        )
        pieces = got.split([size for row in sizes for size in row])
        for index, (heads, samples, size) in enumerate(shapes):
            parts = [
                pieces[rank * len(shapes) + index].view(heads, samples, length, size)
                for rank, length in enumerate(lengths)
            ]
            yield torch.cat(parts, _TOKENS).transpose(0, _HEADS)

    def _to_tokens(self, tensor: Tensor) -> Tensor:
        """The reverse, of one tensor."""
        ranks, lengths = self.ulysses_size, self._lengths()
        samples, heads, _, size = tensor.shape
        parts = [part.reshape(-1) for part in tensor.transpose(0, _HEADS).split(lengths, _TOKENS)]
        mine = lengths[torch.distributed.get_rank(self.ulysses)]
        got = all_to_all_single_autograd(
            torch.cat(parts), [heads * samples * mine * size] * ranks, [part.numel() for part in parts], self.ulysses
        )
        return got.view(ranks * heads, samples, mine, size).transpose(0, _HEADS)

    def _heads_of(self, mask: Tensor | None, heads: int) -> Tensor | None:
        """The mask of this rank's heads."""
        if mask is None or mask.ndim < 3 or mask.shape[-3] != heads or heads == 1:
            return mask
        return mask.chunk(self.ulysses_size, -3)[torch.distributed.get_rank(self.ulysses)]


# ---- the check ------------------------------------------------------------------------------------------------------


class AttentionCall(NamedTuple):
    """What a block asked of attention.

    Args:
        heads: Heads of the query.
        mask: Shape of the mask it gave, if it gave one.
        is_causal: Whether a token sees itself and those before it only.
        scale: Factor of the products; ``None`` for that of the head size.
        dropout_p: Share of the weights that are dropped.
    """

    heads: int
    mask: torch.Size | None
    is_causal: bool
    scale: float | None
    dropout_p: float


class _TokenwiseAttention(TorchFunctionMode):
    """Puts something in the place of attention that treats every token by itself, and drops nothing out.

    ``seen`` has what tells one attention from another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[AttentionCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return args[0] if args else kwargs["input"]
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._mix(*args, **kwargs)

    def _mix(
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
        mask = None if attn_mask is None else attn_mask.shape
        self.seen.append(AttentionCall(query.shape[_HEADS], mask, is_causal, scale, dropout_p))
        if query.shape[_TOKENS] != key.shape[_TOKENS]:
            raise _NotTokenwise
        group = query.shape[_HEADS] // key.shape[_HEADS]
        key, value = (x.repeat_interleave(group, _HEADS) if group > 1 else x for x in (key, value))
        return (query * key).sum(-1, keepdim=True) * query.shape[-1] ** -0.5 * value


class _NotTokenwise(Exception):
    pass


def attention_degrees(
    run: Callable[[Any, Any], Any], arguments: Any, name: str, limit: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Degrees, powers of two from 2 to ``limit``, of Ulysses and of context parallelism that a block can run with.

    Args:
        run: Runs the block, given positional and keyword arguments.
        arguments: Both, for whole sequences. Of fake tensors only the shapes are compared; whether the values are
            right is then seen when training begins.
        name: Name of the block.
        limit: Largest degree of interest.
    """
    try:
        seen = check_tokenwise(run, arguments, name)
    except ValueError as error:
        _log.debug("no sp and cp: %s", error)
        return (), ()
    length = first_activation(arguments, name).shape[SEQUENCE]
    degrees = [2**power for power in range(1, limit.bit_length()) if 2**power <= limit]
    ulysses = [n for n in degrees if length >= _LEAST_PART * n and all(one.heads % n == 0 for one in seen)]
    ring = all(one.mask is None and not one.dropout_p for one in seen)
    context = [n for n in degrees if ring and length % (2 * n) == 0]
    return tuple(ulysses), tuple(context)


def check_tokenwise(run: Callable[[Any, Any], Any], arguments: Any, name: str) -> list[AttentionCall]:
    """Makes sure that a block, but for its attention, treats every token by itself, given the arguments of that token.

    Args:
        run: Runs the block, given positional and keyword arguments.
        arguments: Both, for whole sequences.
        name: Its name, for error messages.

    Returns:
        Its attention.

    Raises:
        ValueError: If it does not.
    """
    tokens = first_activation(arguments, name)
    length = tokens.shape[SEQUENCE]
    start = length // 2
    mixing = f"{name} does not treat every token by itself outside of attention: plan it without sp and cp."
    if length - start < _LEAST_PART:
        raise ValueError(f"{name} is given {length} tokens, too few to be shared out: plan it without sp and cp.")
    whole, part = _TokenwiseAttention(), _TokenwiseAttention()
    with torch.no_grad(), _drawing_nothing():
        try:
            with whole:
                expected = run(*arguments)
            if not whole.seen:
                raise ValueError(_without_attention(name))
            with part:
                found = run(*_cut_all(arguments, length, lambda tensor: tensor[:, start:], lambda tensor: tensor))
        except _NotTokenwise:
            message = f"{name} attends to other tokens than its own: plan it without sp and cp."
            raise ValueError(message) from None
        except (RuntimeError, IndexError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            message = f"{name} cannot run on a part of the sequence ({first}): plan it without sp and cp."
            raise ValueError(message) from None
    leaves = [tree_leaves(x) for x in (expected, found)]
    first_of = [x[0] for x in leaves if x and isinstance(x[0], Tensor) and x[0].ndim >= 2]
    if len(first_of) < 2 or len(leaves[0]) != len(leaves[1]) or whole.seen != part.seen:
        raise ValueError(mixing)
    wanted, got = first_of[0][:, start:], first_of[1]
    # other outputs are to be the same for all tokens
    others = [pair for pair in zip(leaves[0][1:], leaves[1][1:], strict=True) if isinstance(pair[0], Tensor)]
    fake = isinstance(tokens, FakeTensor)
    if not all(a.shape == b.shape and (fake or _close(a, b)) for a, b in ((wanted, got), *others)):
        raise ValueError(mixing)
    return whole.seen


def _close(wanted: Tensor, got: Tensor) -> bool:
    """Whether tensors are equal up to the rounding of other shapes, measured against their largest value."""
    wanted, got = wanted.detach(), got.detach()
    tolerance = _TOLERANCES.get(wanted.dtype, _COARSE_TOLERANCE)
    if torch.is_autocast_enabled(wanted.device.type):
        tolerance = _COARSE_TOLERANCE
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    return largest == 0.0 or float((wanted - got).abs().max()) <= tolerance * largest


@contextmanager
def _drawing_nothing() -> Iterator[None]:
    """Puts random states back."""
    devices: Iterable[int] = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        yield
