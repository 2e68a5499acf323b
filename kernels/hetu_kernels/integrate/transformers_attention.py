"""The attention implementation ``hetu`` of the transformers library, and the masks that are made for it.

A mask says all that the library's dense mask for torch's attention would say, in less memory. Its shape tells what
else than padding it means, so a layer's own idea of its order is never asked for, as torch's attention does not either:

    None                          as for torch's attention: causal if the layer says so
    uint8 [batch, keys]           keys that are no padding, in any order
    uint8 [batch, window, keys]   the same, causal, and of the keys up to its own a row sees the last ``window``;
                                  shaped [1, window, 1] where there is no padding
    anything else                 a dense mask: torch's attention runs

torch's attention takes no mask of type uint8, so none is mistaken for another. What the kernel cannot do is done by
torch's attention, or by the model's own one where that is needed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from hetu_kernels.integrate.attention import dense_mask, has_gaps, once, packed_attention, tell_once, why_no_kernel

NAME = "hetu"

# Keys that sparse attention has chosen. Models hand them over only to attention that is not torch's.
_CHOSEN_KEYS = ("indices", "block_indices")


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """The library's mask interface. Its arguments are those of its function for torch's attention.

    Causal order, windows and padding are known to the kernel. Whatever else a mask function says (documents in one row,
    blocks that see each other, chunks) comes as torch's dense mask, and so does a mask that the model builds upon.
    """
    padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length] != 0
    covered = padding is None or (padding.dim() == 2 and padding.shape[1] == kv_length)
    if covered and allow_is_bidirectional_skip and mask_function is bidirectional_mask_function:
        return None if padding is None else padding.to(torch.uint8)
    # A preallocated cache is longer than what has been written to it: its last key is not the last row's.
    aligned = isinstance(q_offset, int) and kv_length + kv_offset == q_length + q_offset
    window = _causal_window(mask_function, local_size, kv_length)
    if covered and aligned and allow_is_causal_skip and window is not None:
        if padding is None and window == kv_length and q_length in (1, kv_length):
            return None
        if padding is None or window == kv_length or not has_gaps(padding):
            said = torch.ones(1, 1, dtype=torch.uint8, device=device) if padding is None else padding.to(torch.uint8)
            return said[:, None, :].expand(-1, window, -1)
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device,
        **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )  # fmt: skip


def _causal_window(mask_function: Any, local_size: int | None, kv_length: int) -> int | None:
    """How many keys up to its own a row sees, ``kv_length`` for all of them; None for any other mask function."""
    if mask_function is causal_mask_function:
        return kv_length
    # Chunks come with a local size too: only the function itself says that it is a window. A compiled graph cannot look
    # into it.
    if local_size is None or torch.compiler.is_compiling():
        return None
    if _says_the_same(mask_function, sliding_window_causal_mask_function(local_size)):
        return min(local_size, kv_length)
    return None


def _says_the_same(one: Any, other: Any) -> bool:
    """Whether two mask functions have the same code, and hold the same numbers and functions."""
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        held, other_held = ([cell.cell_contents for cell in f.__closure__ or ()] for f in (one, other))
        return one.__code__ is other.__code__ and _says_the_same(tuple(held), tuple(other_held))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_says_the_same(*pair) for pair in zip(one, other, strict=True))
    return isinstance(one, int) and isinstance(other, int) and one == other


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The library's attention interface: ``[batch, heads, tokens, dim]`` in, ``[batch, tokens, heads, dim]`` out."""
    for name in _CHOSEN_KEYS:
        if options.get(name) is not None:
            raise ValueError(f"hetu attention: {name} is given, expected None: there is no kernel for chosen keys.")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    seen = _what_is_seen(query, key, attention_mask, is_causal)
    own_arguments = _own_arguments(type(module))
    own = {name for name, given in options.items() if given is not None and name in own_arguments}
    weights = options.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False)
    reason = f"dropout={dropout}" if dropout else why_no_kernel(query, key, value)
    if seen is not None and not own and not weights and reason is None:
        out = packed_attention(query, key, value, **seen, scale=scaling, softcap=softcap, sinks=s_aux)
        return out.transpose(1, 2), None
    if reason is not None:
        tell_once(f"{reason}: the model's own attention runs instead of the kernel.")
    dense = attention_mask if seen is None or attention_mask is None else dense_mask(query, key, **seen)
    given = {"softcap": softcap, "s_aux": s_aux, **options}
    given = {name: argument for name, argument in given.items() if argument is not None}
    if weights or "softcap" in given or "s_aux" in given or own - _SDPA_ARGUMENTS:
        return _eager(module, query, key, value, dense, dropout, scaling, is_causal, given)
    return sdpa_attention_forward(
        module, query, key, value, dense, dropout=dropout, scaling=scaling, is_causal=is_causal, **given
    )


def _what_is_seen(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> dict[str, Any] | None:
    """Which keys the rows see, as arguments of :func:`packed_attention`; None if only torch's attention knows."""
    rows, keys = query.shape[2], key.shape[2]
    if mask is None:
        causal = bool(is_causal) and rows > 1
        # torch aligns the first row with the first key, the kernel the last with the last.
        return None if causal and rows != keys else {"causal": causal, "padding": None, "window": None}
    if mask.dtype != torch.uint8:
        return None
    if mask.dim() == 2:
        return {"causal": False, "padding": mask, "window": None}
    window = mask.shape[1] if mask.shape[1] < keys else None
    # A copy, not a view: it would keep the mask alive, and with it what is kept for the mask's life.
    padding = once(mask, "padding", lambda: mask[:, 0].clone()) if mask.shape[2] == keys else None
    return {"causal": True, "padding": padding, "window": window}


_SDPA_ARGUMENTS = frozenset(inspect.signature(sdpa_attention_forward).parameters)
_KERNEL_ARGUMENTS = frozenset(inspect.signature(attention_function).parameters)


_own_arguments_of: dict[type, frozenset[str]] = {}  # no functools.cache, which torch.compile warns of


def _own_arguments(kind: type) -> frozenset[str]:
    """What the attention a layer comes with, or torch's, is told and the kernel is not."""
    if kind not in _own_arguments_of:
        eager = _eager_of(kind)
        named = _SDPA_ARGUMENTS if eager is None else _SDPA_ARGUMENTS | inspect.signature(eager).parameters.keys()
        # A window is in the mask. Keywords that have no name of their own are not looked at there either.
        _own_arguments_of[kind] = named - _KERNEL_ARGUMENTS - {"sliding_window", "kwargs"}
    return _own_arguments_of[kind]


def _eager_of(kind: type) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The attention that the file of a layer, or of a class it is derived from, comes with."""
    for base in kind.__mro__:
        found = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    given: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The model's own attention, which adds its mask to the logits."""
    eager = _eager_of(type(module))
    if eager is None:
        raise ValueError(
            f"hetu attention: {type(module).__name__} is given {', '.join(given)} and has no eager_attention_forward,"
            " expected one: neither the kernel nor torch's attention can do it."
        )
    if mask is None and is_causal and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, hidden)
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **given)


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, attention_mask)


def uses_it(module: nn.Module) -> bool:
    """Whether this is a model of the library with this attention."""
    return isinstance(module, PreTrainedModel) and module.config._attn_implementation == NAME


def use_attention(model: nn.Module, integration: Any) -> None:
    """Set the attention implementation of the models of the library within ``model``.

    Of those only whose attention follows from order, window and padding, which is what the library calls support of
    flash attention. Parts of a model make masks for each other: all of them change, or none.
    """
    inner: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module) in inner:
            continue
        parts = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
        inner.update(id(part) for part in parts)
        if all(uses_it(part) for part in parts):
            continue
        if not all(part._can_set_attn_implementation() and part._supports_flash_attn for part in parts):
            continue
        owns = {id(config): (config, config._attn_implementation) for part in parts for config in _configs(part.config)}
        module.set_attn_implementation(NAME)
        integration.add(
            f"{name}.attention" if name else "attention", "varlen_attention", lambda owns=owns: _set_back(owns)
        )


def _configs(config: Any) -> list[Any]:
    """A configuration and those within it."""
    within = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(deeper for each in within if each is not None for deeper in _configs(each))]


def _set_back(owns: dict[int, tuple[Any, str]]) -> None:
    # Not by set_attn_implementation, which sets all parts of a model to one implementation.
    for config, own in owns.values():
        config._attn_implementation_internal = own
