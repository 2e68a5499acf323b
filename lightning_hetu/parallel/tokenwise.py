"""Whether a block, but for its attention, treats every token by itself: only then a rank can run it on some tokens.

Nobody has to read the code of a model for that. The block is run on a whole sequence and on a part of it, with
something in the place of attention that treats every token by itself. Queries, keys, values, and what every module
inside returns must then be the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_hetu.parallel.sequence_cut import SEQUENCE, Arguments, first_activation

_log = logging.getLogger(__name__)

LEAST_PART = 2
"""Fewest tokens of a rank: of a single one, models may take it that they generate."""
HEADS, TOKENS = 1, 2  # dimensions of query, key and value: [samples, heads, tokens, head size]
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 5e-2


class AttentionCall(NamedTuple):
    """What a block asked of attention.

    Args:
        heads: Heads of the query.
        sizes: Head sizes of query and value.
        mask: Shape of the mask it gave, if it gave one.
        is_causal: Whether a token sees itself and those before it only.
        scale: Factor of the products; ``None`` for that of the head size.
        dropout_p: Share of the weights that are dropped.
    """

    heads: int
    sizes: tuple[int, int]
    mask: torch.Size | None
    is_causal: bool
    scale: float | None
    dropout_p: float


class AttentionDegrees(NamedTuple):
    """Degrees above 1 that a block can run with.

    Args:
        ulysses: Of Ulysses.
        context: Of context parallelism.
    """

    ulysses: tuple[int, ...]
    context: tuple[int, ...]


def attention_degrees(block: nn.Module, arguments: Arguments, name: str, limit: int) -> AttentionDegrees | None:
    """Degrees, powers of two from 2 to ``limit``, with which the sequence of a block can be cut.

    Args:
        block: The block.
        arguments: Positional and keyword arguments, for whole sequences. Of fake tensors only the shapes are compared;
            whether the values are right is then seen when training begins.
        name: Name of the block.
        limit: Largest degree of interest.

    Returns:
        ``None`` where it does not treat every token by itself, or nobody can tell.
    """
    try:
        calls = check_tokenwise(lambda args, kwargs: block(*args, **kwargs), arguments, name, block)
    except ValueError as error:
        _log.info("no sp and cp: %s", error)
        return None
    tokens = first_activation(arguments, name)
    others = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf is not tokens]
    if not calls or any(leaf.shape == tokens.shape for leaf in others):
        # Another sequence, an encoder's, say, has the same length in this batch and maybe in no other one.
        return None
    length = tokens.shape[SEQUENCE]
    degrees = [2**power for power in range(1, limit.bit_length()) if 2**power <= limit]
    ring = all(one.mask is None and not one.dropout_p and one.sizes[0] == one.sizes[1] for one in calls)
    return AttentionDegrees(
        tuple(n for n in degrees if length >= LEAST_PART * n and all(one.heads % n == 0 for one in calls)),
        tuple(n for n in degrees if ring and length % (2 * n) == 0),
    )


def is_cut(value: Tensor, length: int) -> bool:
    """Whether an argument of a block is cut with the tokens: it has the length of the sequence in dimension 1."""
    return 2 <= value.ndim <= 3 and value.shape[SEQUENCE] == length


def cut_all(arguments: Any, length: int, part: Callable[[Tensor], Tensor], shared: Callable[[Tensor], Tensor]) -> Any:
    """Applies ``part`` to every tensor that is cut with the tokens, ``shared`` to all others."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return part(value) if is_cut(value, length) else shared(value)

    return tree_map(convert, arguments)


def check_tokenwise(
    run: Callable[[Any, Any], Any], arguments: Arguments, name: str, block: nn.Module
) -> list[AttentionCall]:
    """Makes sure that a block, but for its attention, treats every token by itself, given the arguments of that token.

    Args:
        run: Runs the block, given positional and keyword arguments.
        arguments: Both, for whole sequences; the first sample of them is used.
        name: Its name, for error messages.
        block: The block.

    Returns:
        Its attention; nothing where the arguments are not finite and so tell nothing.

    Raises:
        ValueError: If it does not.
    """
    tokens = first_activation(arguments, name)
    samples, length = tokens.shape[:2]
    if length < 2 * LEAST_PART:
        raise ValueError(f"{name} is given {length} tokens, too few to be shared out: plan it without sp and cp.")
    start = length // 2
    fake = isinstance(tokens, FakeTensor)
    if not fake and not bool(tokens.isfinite().all()):
        return []

    def one_sample(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        alone = value.ndim > 0 and value.shape[0] == samples and samples != length
        return value[:1].clone() if alone else value.clone()

    whole = tree_map(one_sample, arguments)
    part = cut_all(whole, length, lambda tensor: tensor[:, start:].clone(), torch.clone)
    watches = [_Watch(block, *first_activation(given, name).shape[:2]) for given in (whole, part)]
    outputs = []
    with torch.no_grad(), _drawing_nothing():
        for watch, given in zip(watches, (whole, part), strict=True):
            torch.manual_seed(0)  # what is drawn by chance, for whole layers, say, is the same
            try:
                with watch:
                    outputs.append(tree_leaves(run(*given)))
            except _NotTokenwiseError as error:
                raise ValueError(f"{name} {error}: plan it without sp and cp.") from None
            except Exception as error:  # whatever a block says to an input that it was not written for
                said = (str(error).splitlines() or [""])[0]
                raise ValueError(
                    f"{name} cannot run on a part of the sequence ({type(error).__name__}: {said}): plan it without sp"
                    " and cp."
                ) from None
    if not watches[0].calls:
        raise ValueError(without_attention(name))
    mixing = f"{name} does not treat every token by itself outside of attention: plan it without sp and cp."
    if watches[0].calls != watches[1].calls:
        raise ValueError(mixing)
    if any(not found or not isinstance(found[0], Tensor) or found[0].ndim < 2 for found in outputs):
        raise ValueError(mixing)
    if (outputs[0][0].shape[SEQUENCE], outputs[1][0].shape[SEQUENCE]) != (length, length - start):
        raise ValueError(mixing)
    pairs = [*_pairs(outputs[0], outputs[1]), *_pairs(watches[0].seen, watches[1].seen)]
    if not all(_same(a, b, start, length, fake=fake) for a, b in pairs):
        raise ValueError(mixing)
    return watches[0].calls


def without_attention(name: str) -> str:
    """What is wrong with a block that calls no attention that can be seen."""
    return (
        f"{name} calls no scaled_dot_product_attention, or out of sight in nn.MultiheadAttention: its tokens cannot see"
        " those of other ranks. Plan it without sp and cp, or use that function for its attention."
    )


class _NotTokenwiseError(Exception):
    """What a block does, for the rest of a sentence."""


class _Watch(TorchFunctionMode):
    """Puts something in the place of attention that treats every token by itself, drops nothing out, and keeps all.

    Args:
        block: The block.
        samples: Samples that it is given.
        length: Tokens that it is given.
    """

    def __init__(self, block: nn.Module, samples: int, length: int) -> None:
        super().__init__()
        self.block, self.samples, self.length = block, samples, length
        self.calls: list[AttentionCall] = []
        self.seen: list[Any] = []
        self._hooks = ExitStack()

    def __enter__(self) -> _Watch:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.seen += [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(output)]

        for module in self.block.modules():
            if module is not self.block:
                self._hooks.callback(module.register_forward_hook(keep).remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

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
        for one in (query, key, value):
            if one.ndim != 4 or one.shape[0] != self.samples or one.shape[TOKENS] != self.length:
                raise _NotTokenwiseError(f"attends among {list(one.shape)} where it is given {self.length} tokens")
        mask = None if attn_mask is None else attn_mask.shape
        sizes = query.shape[-1], value.shape[-1]
        self.calls.append(AttentionCall(query.shape[HEADS], sizes, mask, is_causal, scale, dropout_p))
        self.seen += [query.clone(), key.clone(), value.clone()]
        group = query.shape[HEADS] // key.shape[HEADS]
        key, value = (x.repeat_interleave(group, HEADS) if group > 1 else x for x in (key, value))
        return value * (1 + torch.tanh(query.mean(-1, keepdim=True) + 2 * key.mean(-1, keepdim=True)))


def _pairs(one: Sequence[Any], other: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Elements at the same place; a pair that is not the same where there are more of one."""
    return [*zip(one, other, strict=False), *([(True, False)] if len(one) != len(other) else [])]


def _same(whole: Any, part: Any, start: int, length: int, *, fake: bool) -> bool:
    """Whether what was computed of a part is that part of what was computed of the whole."""
    if not isinstance(whole, Tensor) or not isinstance(part, Tensor):
        return isinstance(whole, Tensor) == isinstance(part, Tensor) and (not isinstance(whole, bool) or whole == part)
    if whole.ndim != part.ndim or whole.dtype != part.dtype:
        return False
    cut = [d for d, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
    if len(cut) == 1 and (whole.shape[cut[0]], part.shape[cut[0]]) == (length, length - start):
        whole = whole.narrow(cut[0], start, length - start)
    elif cut:
        # In another order, as tokens behind each other: what comes of it is looked at.
        return whole.numel() * (length - start) == part.numel() * length
    return fake or _close(whole, part)


def _close(wanted: Tensor, got: Tensor) -> bool:
    """Whether tensors are equal up to the rounding of other shapes, measured against the largest value of a channel."""
    if not wanted.is_floating_point():
        return torch.equal(wanted, got)
    tolerance = _TOLERANCES.get(wanted.dtype, _COARSE_TOLERANCE)
    if torch.is_autocast_enabled(wanted.device.type):
        tolerance = _COARSE_TOLERANCE
    wanted, got = (x.detach().float().reshape(-1, x.shape[-1] if x.ndim else 1) for x in (wanted, got))
    if not wanted.numel():
        return True
    return bool(((wanted - got).abs().amax(0) <= tolerance * wanted.abs().amax(0)).all())


@contextmanager
def _drawing_nothing() -> Iterator[None]:
    """Puts random states back."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
