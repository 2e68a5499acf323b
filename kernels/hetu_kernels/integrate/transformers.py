"""Models of the transformers library: its attention interface, and exchanges by type for its layers.

Imported only where transformers already is.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

import hetu_kernels
from hetu_kernels.integrate.attention import padded_attention
from hetu_kernels.integrate.layers import Exchange, as_autocast_norm, is_plain

NAME = "hetu"


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """What the attention function is given as mask: padding bool ``[batch, keys]``, None, or a dense mask.

    Causal order and windows are known to the kernel. Whatever else a mask function says (documents in one row, blocks
    that see each other) comes as torch's dense mask ``[batch, 1, rows, keys]``.
    """
    only_a_window = options.get("local_size") is not None and allow_is_causal_skip
    known = mask_function in (causal_mask_function, bidirectional_mask_function) or only_a_window
    # A preallocated cache is longer than what has been written to it.
    whole = isinstance(q_offset, int) and kv_length + kv_offset == q_length + q_offset
    if known and whole:
        if attention_mask is None:
            return None
        if attention_mask.dim() == 2 and attention_mask.shape[1] >= kv_length:
            return attention_mask[:, -kv_length:].bool()
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask,
        **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )  # fmt: skip


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The library's attention interface: ``[batch, heads, tokens, dim]`` in, ``[batch, tokens, heads, dim]`` out."""
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if attention_mask is not None and attention_mask.dim() == 4:
        out = _dense(query, key, value, attention_mask, dropout, scaling, softcap, s_aux)
    else:
        out = padded_attention(
            query, key, value, causal=causal, padding=attention_mask, window=_window(sliding_window, causal),
            scale=scaling, softcap=softcap, sinks=s_aux, dropout=dropout if module.training else 0.0,
        )  # fmt: skip
    return out.transpose(1, 2), None


def _window(sliding_window: int | None, causal: bool) -> int | tuple[int, int] | None:
    """The library counts a token's own key; without causal order its window reaches as far to the right."""
    if sliding_window is None or causal:
        return sliding_window
    return sliding_window, sliding_window


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention under a dense mask by torch."""
    if softcap is not None or sinks is not None:
        raise ValueError(
            "hetu attention: a dense mask together with softcap or sinks. Use attn_implementation='eager'."
        )
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, attention_mask)


def use_attention(model: nn.Module, integration: Any) -> None:
    """Set the attention implementation of every model of the library within ``model``."""
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or module.config._attn_implementation == NAME:
            continue
        if not module._can_set_attn_implementation():
            continue
        own = module.config._attn_implementation
        module.set_attn_implementation(NAME)
        integration.add(
            f"{name}.attention" if name else "attention",
            "varlen_attention",
            lambda module=module, own=own: module.set_attn_implementation(own),
        )


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if not is_plain(hidden_states, self.weight):
        return super(type(self), self).forward(hidden_states)
    y = hetu_kernels.rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
    return y.to(torch.promote_types(self.weight.dtype, hidden_states.dtype))


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    gate, up, activation = self.gate_proj(x), self.up_proj(x), _activation_of(self.act_fn)
    if activation is None or not is_plain(gate, up):
        return self.down_proj(self.act_fn(gate) * up)
    return self.down_proj(hetu_kernels.swiglu(gate, up, activation=activation))


def _gelu_forward(self: Any, input: Tensor) -> Tensor:
    if not is_plain(input):
        return super(type(self), self).forward(input)
    return hetu_kernels.bias_gelu(input, approximate="none" if isinstance(self, GELUActivation) else "tanh")


def _added_norm_forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    norm = self.LayerNorm
    hidden_states = self.dropout(self.dense(hidden_states))
    if not is_plain(hidden_states, norm.weight):
        return norm(hidden_states + input_tensor)
    hidden_states = as_autocast_norm(hidden_states)
    return hetu_kernels.add_layer_norm(hidden_states, input_tensor, norm.weight, norm.bias, eps=norm.eps)[0]


def _causal_lm_forward(self: Any, input_ids: Tensor | None = None, labels: Tensor | None = None, **options: Any) -> Any:
    if labels is None or options.get("return_dict") is False:
        return super(type(self), self).forward(input_ids=input_ids, labels=labels, **options)
    count = options.pop("num_items_in_batch", None)
    hidden = self.base_model(input_ids=input_ids, **options)[0]
    head = self.get_output_embeddings()
    loss = hetu_kernels.linear_cross_entropy(
        hidden[:, :-1], head.weight, labels[:, 1:], head.bias, reduction="mean" if count is None else "sum"
    )
    return CausalLMOutputWithPast(loss=loss if count is None else loss / count)


def _activation_of(module: Any) -> str | None:
    """Name of an activation module for :func:`~hetu_kernels.swiglu`."""
    if isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation":
        return "silu"
    if isinstance(module, NewGELUActivation | GELUTanh):
        return "gelu_tanh"
    if isinstance(module, GELUActivation) or (isinstance(module, nn.GELU) and module.approximate == "none"):
        return "gelu"
    return None


# Types by what they compute. The library repeats such classes for every model; each line was compared with the first.
_LIBRARY = "transformers.models"
_NORMS = ("llama.LlamaRMSNorm", "mistral.MistralRMSNorm", "qwen2.Qwen2RMSNorm", "qwen3.Qwen3RMSNorm")
_GATED = ("llama.LlamaMLP", "mistral.MistralMLP", "qwen2.Qwen2MLP", "qwen3.Qwen3MLP")
_ADDED_NORMS = ("bert.BertSelfOutput", "bert.BertOutput", "roberta.RobertaSelfOutput", "roberta.RobertaOutput")
_CAUSAL_LMS = (
    "llama.LlamaForCausalLM", "mistral.MistralForCausalLM", "qwen2.Qwen2ForCausalLM", "qwen3.Qwen3ForCausalLM",
    "gpt2.GPT2LMHeadModel",
)  # fmt: skip
_FORWARDS = (
    (_NORMS, _norm_forward, "norm", "add_rms_norm"),
    (_GATED, _gated_forward, "activation", "swiglu"),
    (_ADDED_NORMS, _added_norm_forward, "norm", "add_layer_norm"),
    (_CAUSAL_LMS, _causal_lm_forward, "loss", "linear_cross_entropy"),
)


def exchange_for(module: nn.Module) -> Exchange | None:
    """What a module of the library is exchanged for, by its exact type."""
    kind = type(module)
    if kind in (GELUActivation, NewGELUActivation, GELUTanh):
        return Exchange(_subclass(kind, _gelu_forward), "activation", "bias_gelu")
    folder = kind.__module__.removeprefix(_LIBRARY + ".").split(".")[0]
    for names, forward, group, what in _FORWARDS:
        if f"{folder}.{kind.__name__}" not in names or kind.__name__ not in vars(
            importlib.import_module(kind.__module__)
        ):
            continue
        if forward is _gated_forward and _activation_of(module.act_fn) is None:
            return None
        return Exchange(_subclass(kind, forward), group, what)
    return None


def _subclass(kind: type[nn.Module], forward: Any) -> type[nn.Module]:
    """A subclass with another ``forward``; kept in this module under its name, so that models can be pickled."""
    name = f"Kernel{kind.__name__}"
    if name not in globals():
        globals()[name] = type(name, (kind,), {"forward": forward, "__module__": __name__, "__qualname__": name})
    return globals()[name]
