"""Models of the transformers library: exchanges by type for its layers and losses.

Imported only where transformers already is. Attention is in :mod:`hetu_kernels.integrate.transformers_attention`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
)

import hetu_kernels
from hetu_kernels.integrate.layers import (
    Exchange,
    KernelGELU,
    KernelLayerNorm,
    as_autocast_norm,
    can_be_bypassed,
    is_plain,
    normalizes_rows,
)


def _own_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The ``forward`` of the type that was exchanged, also where others have derived types from ours since."""
    return self._exchanged.forward(self, *args, **kwargs)


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if not is_plain(hidden_states, self.weight):
        return _own_forward(self, hidden_states)
    y = hetu_kernels.rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
    return y.to(torch.promote_types(self.weight.dtype, hidden_states.dtype))


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    gate, up, activation = self.gate_proj(x), self.up_proj(x), _activation_of(self.act_fn)
    if activation is None or not is_plain(gate, up):
        return self.down_proj(self.act_fn(gate) * up)
    return self.down_proj(hetu_kernels.swiglu(gate, up, activation=activation))


def _gelu_forward(self: Any, input: Tensor) -> Tensor:
    if not is_plain(input):
        return _own_forward(self, input)
    return hetu_kernels.bias_gelu(input, approximate="none" if isinstance(self, GELUActivation) else "tanh")


def _added_norm_forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    norm = self.LayerNorm
    hidden_states = self.dropout(self.dense(hidden_states))
    known = type(norm) in (nn.LayerNorm, KernelLayerNorm) and normalizes_rows(norm) and can_be_bypassed(norm)
    if not known or not is_plain(hidden_states, input_tensor, norm.weight):
        return norm(hidden_states + input_tensor)
    # The sum has the wider of the two dtypes, and the norm that of the sum.
    hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, input_tensor.dtype))
    hidden_states = as_autocast_norm(hidden_states)
    return hetu_kernels.add_layer_norm(hidden_states, input_tensor, norm.weight, norm.bias, eps=norm.eps)[0]


# What a loss is told and the model below it is not.
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep", "return_dict")


def _causal_lm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    given = {**dict(zip(self._positional, args, strict=False)), **kwargs}
    # Arguments too many or given twice are for the model to complain about.
    unambiguous = len(given) == len(args) + len(kwargs)
    if not unambiguous or not _can_do_without_logits(self, given):
        return _own_forward(self, *args, **kwargs)
    inner = self.base_model(**{name: argument for name, argument in given.items() if name not in _OF_THE_LOSS})
    kept = {name: getattr(inner, name) for name in ("past_key_values", "hidden_states", "attentions")}
    loss = _loss(inner.last_hidden_state, self.get_output_embeddings(), given)
    if isinstance(inner, BaseModelOutputWithPastAndCrossAttentions):
        return CausalLMOutputWithCrossAttentions(loss=loss, **kept, cross_attentions=inner.cross_attentions)
    return CausalLMOutputWithPast(loss=loss, **kept)


def _can_do_without_logits(self: Any, given: dict[str, Any]) -> bool:
    """Whether the loss of a call is the one the kernel computes, and nobody asks for more than the loss."""
    if given.get("labels") is None or self.loss_function is not ForCausalLMLoss:
        return False
    # The fields of a tuple would change their places without logits.
    if not self.config.return_dict or given.get("return_dict") not in (None, True):
        return False
    rows_left_out = given.get("logits_to_keep", 0)
    head = self.get_output_embeddings()
    plain_head = type(head) is nn.Linear and can_be_bypassed(head) and is_plain(head.weight, head.bias)
    return plain_head and isinstance(rows_left_out, int) and rows_left_out == 0


def _loss(hidden: Tensor, head: nn.Linear, given: dict[str, Any]) -> Tensor:
    """The library's ``ForCausalLMLoss`` of the logits that ``head`` would compute."""
    labels, count, ignored = given.get("shift_labels"), given.get("num_items_in_batch"), given.get("ignore_index", -100)
    if labels is None:
        hidden, labels = hidden[:, :-1], given["labels"][..., 1:]
    labels = labels.reshape(hidden.shape[:-1]).to(hidden.device)
    reduction = "mean" if count is None else "sum"
    loss = hetu_kernels.linear_cross_entropy(
        hidden, head.weight, labels, head.bias, ignore_index=ignored, reduction=reduction
    )
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def _activation_of(module: Any) -> str | None:
    """Name of an activation module for :func:`~hetu_kernels.swiglu`; None for what may do more than that."""
    if not can_be_bypassed(module):
        return None
    kind = type(module)
    if kind in (nn.SiLU, SiLUActivation):
        return "silu"
    # The exchanged types are derived from the library's.
    if isinstance(module, NewGELUActivation | GELUTanh):
        return "gelu_tanh"
    if isinstance(module, GELUActivation) or (kind in (nn.GELU, KernelGELU) and module.approximate == "none"):
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

# Names of the classes that ``loss=True`` exchanges.
LOSS_CLASSES = tuple(name.split(".")[1] for name in _CAUSAL_LMS)


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


def __getattr__(name: str) -> type[nn.Module]:
    """The subclass of that name, for models that are unpickled before anything was exchanged."""
    for kind in (GELUActivation, NewGELUActivation, GELUTanh):
        if name == f"Kernel{kind.__name__}":
            return _subclass(kind, _gelu_forward)
    for names, forward, _, _ in _FORWARDS:
        for folder, kind_name in (path.split(".") for path in names):
            if name == f"Kernel{kind_name}":
                found = importlib.import_module(f"{_LIBRARY}.{folder}.modeling_{folder}")
                return _subclass(getattr(found, kind_name), forward)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _subclass(kind: type[nn.Module], forward: Any) -> type[nn.Module]:
    """A subclass with another ``forward``; kept in this module, so that models can be pickled."""
    name = f"Kernel{kind.__name__}"
    if name not in globals():
        # Trainers ask for the signature, and saved configurations name the class: both are those of the model.
        @functools.wraps(kind.forward)
        def exchanged(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
        members = {
            "forward": exchanged,
            "_exchanged": kind,
            "_positional": tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),
            "__module__": __name__,
            "__qualname__": name,
        }
        globals()[name] = type(kind.__name__, (kind,), members)
    return globals()[name]
