"""Models of the transformers library that ask for more than a kernel does: they go on computing what they did."""

from __future__ import annotations

import inspect
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetu_kernels.integrate import attention as integrate_attention
from hetu_kernels.integrate import use_kernels
from hetu_kernels.integrate.attention import padded_attention

transformers = pytest.importorskip("transformers")

from hetu_kernels.integrate import transformers as transformers_layers  # noqa: E402  # they import transformers
from hetu_kernels.integrate import transformers_attention  # noqa: E402

WIDTHS = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**WIDTHS, "num_key_value_heads": 2}
TWO_KINDS = {**GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
OF_BART = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
OF_T5 = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
OF_DEEPSEEK = {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16,
}  # fmt: skip
OF_QWEN2_MOE = {
    "use_sliding_window": True, "sliding_window": 4, "layer_types": TWO_KINDS["layer_types"], "num_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "wide_llama": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "head_dim": 320}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**TWO_KINDS, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", TWO_KINDS),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**TWO_KINDS, **EXPERTS, "rope_parameters": None}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**GROUPED, **OF_QWEN2_MOE}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**GROUPED, **EXPERTS, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 4},
    ),
    "deepseek": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**WIDTHS, **OF_DEEPSEEK}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 97, "n_layer": 2, "n_positions": 64, "n_embd": 32, "n_head": 4, "bos_token_id": 1,
         "eos_token_id": 2},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", WIDTHS),
    "bart": ("BartForConditionalGeneration", "BartConfig", OF_BART),
    "t5": ("T5ForConditionalGeneration", "T5Config", OF_T5),
}  # fmt: skip
IDS = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))


def build(name: str, **changes: Any) -> Any:
    """A model in which attention weighs: the library's own initialization makes all keys nearly alike."""
    model, config, sizes = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **changes})).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return made


def mask_without(*places: int) -> Tensor:
    """Ones, with zeros at some places of the second row."""
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, list(places)] = 0
    return mask


BETWEEN, RIGHT, LEFT = mask_without(4, 5), mask_without(7, 8, 9, 10), mask_without(0, 1, 2)


@torch.no_grad()
def logits(model: nn.Module, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """Logits where there are tokens."""
    found = model(input_ids=IDS, **({} if mask is None else {"attention_mask": mask}), **inputs).logits
    return found if mask is None else found[mask.bool()]


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by the window of every call of attention that the kernel serves."""
    calls: list[Any] = []
    packed = integrate_attention.packed_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["window"])
        return packed(*args, **kwargs)

    for module in (integrate_attention, transformers_attention):
        monkeypatch.setattr(module, "packed_attention", counted)
    return calls


# Attention


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_padding_in_inference_mode(name: str, dtype: torch.dtype, reference_only: None) -> None:
    """Tensors of this mode do not count their changes. The mask may be older than the mode."""
    model = build(name)
    expected = logits(model, RIGHT)
    with use_kernels(model):
        for made_inside in (False, True):
            with torch.inference_mode():
                mask = RIGHT.clone().to(dtype) if made_inside else RIGHT.to(dtype)
                assert_same(logits(model, mask), expected)


@pytest.mark.parametrize("name", ["t5", "llama4"])
def test_attention_that_order_and_padding_do_not_describe(name: str, reference_only: None) -> None:
    """Learned position biases, and chunks that do not see each other."""
    model = build(name)
    inputs = {"decoder_input_ids": IDS[:, :6]} if name == "t5" else {}
    expected = [model(input_ids=IDS, attention_mask=mask, **inputs).logits for mask in (None, LEFT)]
    if name == "t5":
        with use_kernels(model) as integration:  # its activations are exchanged
            assert "varlen_attention" not in integration.replaced.values()
            assert_same(model(input_ids=IDS, **inputs).logits, expected[0])
    else:
        with pytest.raises(ValueError, match="Llama4ForCausalLM has no module"):
            use_kernels(model)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("hetu")
    for mask, expectation in zip((None, LEFT), expected, strict=True):
        kept = slice(None) if mask is None or name == "t5" else mask.bool()
        found = model(input_ids=IDS, attention_mask=mask, **inputs).logits
        assert_same(found[kept], expectation[kept])


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss", "qwen2_moe"])
def test_window_with_padding_between_tokens(name: str, reference_only: None, kernel_calls: list[Any]) -> None:
    """Packing would shorten distances over the padding. Soft caps and sinks need the model's own attention then."""
    model = build(name)
    expected = logits(model, BETWEEN)
    padded = [logits(model, mask) for mask in (None, RIGHT, LEFT)]
    windows = [4, 4] if name == "mistral" else [4, None]
    with use_kernels(model):
        assert_same(logits(model, BETWEEN), expected)
        assert kernel_calls == [window for window in windows if window is None]
        for mask, expectation in zip((None, RIGHT, LEFT), padded, strict=True):
            kernel_calls.clear()
            assert_same(logits(model, mask), expectation)
            assert kernel_calls == windows


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_generation_behind_padding_between_tokens(name: str, reference_only: None) -> None:
    model = build(name)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(IDS, attention_mask=BETWEEN, **options).logits
    with use_kernels(model):
        assert_same(model.generate(IDS, attention_mask=BETWEEN, **options).logits, expected)


@pytest.mark.parametrize("name", ["deepseek", "wide_llama"])
def test_heads_the_kernel_does_not_have(
    name: str, reference_only: None, kernel_calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Values narrower than keys, and heads wider than the kernel's."""
    integrate_attention._told.clear()
    model = build(name)
    expected = [logits(model, mask) for mask in (None, RIGHT)]
    with use_kernels(model):
        assert_same([logits(model, mask) for mask in (None, RIGHT)], expected)
    assert not kernel_calls
    assert "the model's own attention runs instead of the kernel" in caplog.text


def test_padding_of_keys_says_nothing_of_other_queries(reference_only: None) -> None:
    """Cross attention with as many queries as keys: no query is left out where a key is padding."""
    model = build("bart")
    inputs = {"attention_mask": RIGHT, "decoder_input_ids": IDS}
    expected = model(IDS, **inputs).logits
    with use_kernels(model):
        assert_same(model(IDS, **inputs).logits, expected)


def test_attention_weights_are_still_given(reference_only: None) -> None:
    model = build("llama", attn_implementation="eager")
    expected = model(IDS, attention_mask=LEFT, output_attentions=True).attentions
    with use_kernels(model):
        found = model(IDS, attention_mask=LEFT, output_attentions=True).attentions
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        assert_same(one[LEFT.bool()[:, None].expand(-1, 4, -1)], other[LEFT.bool()[:, None].expand(-1, 4, -1)])


def test_dropout_runs_the_models_attention_for_soft_caps_too(reference_only: None, kernel_calls: list[Any]) -> None:
    model = build("gemma2", attention_dropout=0.5).train()
    with use_kernels(model):
        assert not torch.equal(logits(model, RIGHT), logits(model, RIGHT))
        assert not kernel_calls
        model.eval()
        assert torch.equal(logits(model, RIGHT), logits(model, RIGHT))
        assert len(kernel_calls) == 4


def test_keys_chosen_by_the_model_are_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="hetu attention: indices is given, expected None"):
        transformers_attention.attention_function(nn.Module(), q, q, q, None, indices=torch.zeros(1, 4, 2))


def test_a_window_mask_is_known_by_its_function_alone() -> None:
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    def shape(function: Callable[..., Any], size: int) -> list[int]:
        mask = transformers_attention.attention_mask(2, 11, 11, mask_function=function, local_size=size)
        return list(mask.shape)

    assert shape(sliding_window_causal_mask_function(4), 4) == [1, 4, 1]
    assert shape(sliding_window_causal_mask_function(4), 5) == [2, 1, 11, 11]
    assert shape(chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)), 4) == [2, 1, 11, 11]


def test_undo_gives_every_part_its_own_attention_back(reference_only: None) -> None:
    parts = [
        transformers.BertConfig(**WIDTHS, attn_implementation="eager"),
        transformers.BertConfig(**WIDTHS, is_decoder=True, add_cross_attention=True),
    ]
    model = transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    ).eval()
    model.encoder.set_attn_implementation("eager")
    model.decoder.set_attn_implementation("sdpa")
    expected = logits(model, decoder_input_ids=IDS[:, :5])
    with use_kernels(model):
        assert {part.config._attn_implementation for part in (model, model.encoder, model.decoder)} == {"hetu"}
        assert_same(logits(model, decoder_input_ids=IDS[:, :5]), expected)
    assert model.encoder.config._attn_implementation == "eager"
    assert model.decoder.config._attn_implementation == "sdpa"


@pytest.mark.interpret
def test_padded_attention_falls_back_to_torchs() -> None:
    q, k, v = (torch.randn(3, 2, 11, 8) for _ in range(3))
    options = {"causal": True, "window": 4}
    visible = torch.ones(11, 11, dtype=torch.bool).tril().triu(-3) & BETWEEN.bool()[:, None, None]
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    assert_same(padded_attention(q, k, v, padding=BETWEEN.bool(), **options), expected)
    with pytest.raises(ValueError, match="window=4 over padding between tokens together with softcap"):
        padded_attention(q, k, v, padding=BETWEEN.bool(), softcap=2.0, **options)
    wide = torch.randn(1, 2, 5, 320)
    expected = nn.functional.scaled_dot_product_attention(wide, wide, wide, is_causal=True)
    assert_same(padded_attention(wide, wide, wide, causal=True), expected)
    narrow = wide[..., :16]
    expected = nn.functional.scaled_dot_product_attention(narrow, narrow, narrow[..., :8])
    assert_same(padded_attention(narrow, narrow, narrow[..., :8]), expected)


@pytest.mark.interpret
def test_padded_attention_without_an_order_keeps_all_queries() -> None:
    q, k, v = (torch.randn(3, 2, 11, 8) for _ in range(3))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=BETWEEN.bool()[:, None, None])
    assert_same(padded_attention(q, k, v, padding=BETWEEN.bool()), expected)


def test_a_model_compiles_into_one_graph(reference_only: None) -> None:
    """A graph cannot look into mask functions: the window comes as a dense mask."""
    model = build("mistral", num_hidden_layers=1)
    expected = logits(model, RIGHT)
    with use_kernels(model, loss=True):
        torch._dynamo.reset()
        assert_same(logits(torch.compile(model, backend="eager", fullgraph=True), RIGHT), expected)


# Losses

LABELS = IDS.masked_fill(RIGHT == 0, -100)
SHIFTED = nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:].roll(1, 0)
ONLY_LOSS = {"attention": False, "norms": False, "activations": False, "loss": True}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_keeps_the_signature(name: str, reference_only: None) -> None:
    """Trainers drop the columns it does not name, and arguments may come by position."""
    model = build(name)
    signature = inspect.signature(model.forward)
    positions = [IDS, RIGHT, None, None, None, LABELS] if name == "llama" else [IDS, None, RIGHT]
    named = {} if name == "llama" else {"labels": LABELS}
    masked, expected = model(IDS, RIGHT if name == "llama" else None), model(*positions, **named).loss
    with use_kernels(model, **ONLY_LOSS):
        assert inspect.signature(model.forward) == signature
        assert model._supports_logits_to_keep()
        assert torch.equal(model(IDS, RIGHT if name == "llama" else None).logits, masked.logits)
        out = model(*positions, **named)
        assert_same(out.loss, expected)
        assert out.logits is None
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            model(IDS, input_ids=IDS)


LOSS_OPTIONS = {
    "shift_labels": {"shift_labels": SHIFTED},
    "ignore_index": {"ignore_index": int(LABELS[0, 3])},
    "num_items_in_batch": {"num_items_in_batch": torch.tensor(7)},
    "output_hidden_states": {"output_hidden_states": True},
    "use_cache": {"use_cache": False},
    "return_dict": {"return_dict": False},
    "logits_to_keep": {"logits_to_keep": 11},
}


@pytest.mark.parametrize("option", list(LOSS_OPTIONS))
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_heeds_the_options_of_a_call(name: str, option: str, reference_only: None) -> None:
    model = build(name)
    labels = LABELS.masked_fill(LABELS == -100, int(LABELS[0, 3])) if option == "ignore_index" else LABELS
    inputs = {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels, **LOSS_OPTIONS[option]}
    expected = model(**inputs)
    with use_kernels(model, **ONLY_LOSS):
        found = model(**inputs)
    assert type(found) is type(expected)
    assert_same(found[0], expected[0])
    if option in ("return_dict", "logits_to_keep"):  # which go to the model's own forward
        assert len(found) == len(expected)
        return
    assert list(found) == [field for field in expected if field != "logits"]
    if option == "output_hidden_states":
        assert_same(found.hidden_states, expected.hidden_states)


def test_a_loss_or_a_head_of_ones_own_is_used(reference_only: None) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = build("llama")
    with use_kernels(model, **ONLY_LOSS):
        model.loss_function = lambda **_: torch.tensor(3.0)
        assert model(IDS, labels=LABELS).loss == 3.0
        del model._loss_function
        seen: list[Any] = []
        handle = model.lm_head.register_forward_hook(lambda *args: seen.append(args))
        model(IDS, labels=LABELS)
        handle.remove()
        assert len(seen) == 1
        model.lm_head.__class__ = Scaled
        found = model(IDS, labels=LABELS).loss
    assert_same(found, model(IDS, labels=LABELS).loss)


def test_a_saved_model_names_its_own_class(tmp_path: Path) -> None:
    model = build("llama")
    with use_kernels(model, loss=True):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_model_is_unpickled_where_nothing_was_exchanged_yet(
    monkeypatch: pytest.MonkeyPatch, reference_only: None
) -> None:
    """In another process, the exchanged classes are made when they are asked for."""
    model = build("llama")
    with use_kernels(model, loss=True):
        pickled, expected = pickle.dumps(model), logits(model)
    for name in [name for name in vars(transformers_layers) if name.startswith("KernelLlama")]:
        monkeypatch.delattr(transformers_layers, name)
    twin = pickle.loads(pickled)
    assert type(twin).__qualname__ == "KernelLlamaForCausalLM"
    assert torch.equal(logits(twin), expected)


def test_types_may_be_derived_from_exchanged_ones(reference_only: None) -> None:
    """As fully_shard does, by an object's class."""
    model = build("llama")
    expected, loss = logits(model), model(IDS, labels=LABELS).loss
    use_kernels(model, loss=True)
    model.__class__ = type("Sharded", (type(model),), {})
    assert_same(logits(model), expected)
    assert_same(model(IDS, labels=LABELS).loss, loss)


def test_a_loss_nothing_is_known_of_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = build("bert")
    with caplog.at_level(logging.WARNING, "hetu_kernels"):
        use_kernels(model, loss=True)
    assert "loss=True changes no loss of BertForMaskedLM, expected one of LlamaForCausalLM" in caplog.text


# Inner modules, which exchanged ones do not call


@pytest.mark.parametrize(("name", "ending"), [("bert", "output.LayerNorm"), ("llama", "mlp.act_fn")])
def test_hooks_of_inner_modules_are_called(name: str, ending: str, reference_only: None) -> None:
    """Those that were there before, and those that come later. The hook changes the result, to be sure."""
    model = build(name)
    inner = next(module for path, module in model.named_modules() if path.endswith(ending))
    without = logits(model)

    def hooked() -> Tensor:
        handle = inner.register_forward_hook(lambda *args: args[-1] * 2)
        found = logits(model)
        handle.remove()
        return found

    expected = hooked()
    assert not torch.allclose(expected, without, atol=1e-2)
    with use_kernels(model):
        assert_same(logits(model), without)
        assert_same(hooked(), expected)
    handle = inner.register_forward_hook(lambda *args: args[-1] * 2)
    with use_kernels(model):
        assert_same(logits(model), expected)
        handle.remove()
        assert_same(logits(model), without)


def test_inner_modules_of_other_types_are_called(reference_only: None) -> None:
    class Shifted(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Doubled(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    for name, inner in (("bert", Shifted(32)), ("llama", Doubled())):
        model = build(name)
        for module in list(model.modules()):
            for child in ("LayerNorm", "act_fn"):
                if hasattr(module, child):
                    setattr(module, child, inner)
        expected = logits(model)
        with use_kernels(model):
            assert_same(logits(model), expected)


def test_autocast_on_the_cpu_leaves_dtypes_as_they_were(reference_only: None) -> None:
    model = build("bert")
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]

    def dtypes() -> list[torch.dtype]:
        seen: list[torch.dtype] = []
        layers = [*model.bert.encoder.layer, model.cls.predictions.transform]
        handles = [layer.register_forward_hook(lambda *args: seen.append(args[-1].dtype)) for layer in layers]
        with torch.autocast("cpu", torch.bfloat16):
            logits(model)
        for handle in handles:
            handle.remove()
        return seen

    assert norms
    expected = dtypes()
    with use_kernels(model):
        assert dtypes() == expected
