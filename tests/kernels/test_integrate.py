"""``use_kernels``: models compute the same with kernels as without, and can be given their own modules back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetu_kernels.integrate import use_kernels
from hetu_kernels.integrate.attention import padded_attention
from lightning_hetu.models.gpt import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 64}


def llama(**changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, **changes
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(**changes: Any) -> nn.Module:
    config = transformers.GPT2Config(vocab_size=97, n_layer=2, n_positions=64, n_embd=32, n_head=4, **changes)
    return transformers.GPT2LMHeadModel(config)


def bert(**changes: Any) -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_attention_heads=4, pad_token_id=0, **changes
    )
    return transformers.BertForMaskedLM(config)


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}
WITHOUT_DROPOUT = {
    "llama": {},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "bert": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
}


def build(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](**{**WITHOUT_DROPOUT[name], **changes})


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Loss, logits and gradients of one training step."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return out.loss.detach(), None if out.logits is None else out.logits.detach(), grads


def batch(side: str | None = None) -> dict[str, Tensor]:
    ids = torch.randint(1, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    made = {"input_ids": ids, "labels": ids.clone()}
    if side is not None:
        mask = torch.ones(3, 11, dtype=torch.long)
        mask[1, slice(7, None) if side == "right" else slice(0, 4)] = 0
        made["labels"] = ids.masked_fill(mask == 0, -100)
        made["attention_mask"] = mask
    return made


@pytest.fixture
def gpt() -> Iterator[GPT]:
    torch.manual_seed(0)
    yield GPT(GPTConfig(vocab_size=61, max_seq_len=24, num_layers=2, num_heads=2, dim=32))


@pytest.mark.interpret
def test_the_projects_gpt_computes_the_same(gpt: GPT) -> None:
    tokens = torch.randint(61, (2, 20))
    expected = gpt(tokens)
    gradient = torch.autograd.grad(expected.square().mean(), list(gpt.parameters()))
    integration = use_kernels(gpt)
    assert integration.replaced["blocks.0.attention"] == "varlen_attention"
    assert integration.replaced["blocks.1.mlp.activation"] == "bias_gelu"
    assert integration.replaced["head.norm"] == "add_rms_norm"
    logits = gpt(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(logits.square().mean(), list(gpt.parameters()))
    for one, other in zip(ours, gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    integration.undo()
    assert torch.equal(gpt(tokens), expected)
    assert type(gpt.head.norm) is nn.RMSNorm
    assert "attention_function" not in vars(gpt.blocks[0].attention)


@pytest.mark.interpret
@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", list(MODELS))
def test_transformers_models_compute_the_same(name: str, side: str | None) -> None:
    """Loss, logits where there are tokens, and every gradient."""
    model, inputs = build(name), batch(side)
    if side == "left" and name != "bert":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    loss, logits, grads = step(model, **inputs)
    with use_kernels(model) as integration:
        kinds = set(integration.replaced.values())
        ours, our_logits, our_grads = step(model, **inputs)
    expected = {"llama": {"swiglu", "add_rms_norm"}, "gpt2": {"bias_gelu", "add_layer_norm"}}
    assert kinds == {"varlen_attention", *expected.get(name, {"bias_gelu", "add_layer_norm"})}
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    seen = inputs.get("attention_mask", torch.ones(3, 11)).bool()
    torch.testing.assert_close(our_logits[seen], logits[seen], rtol=1e-4, atol=1e-5)
    assert our_grads.keys() == grads.keys()
    for key in grads:
        torch.testing.assert_close(
            our_grads[key], grads[key], rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", list(MODELS))
def test_undo_restores_every_module(name: str) -> None:
    model, inputs = build(name), batch()
    types = [type(module) for module in model.modules()]
    attention = model.config._attn_implementation
    before, keys = step(model, **inputs), list(model.state_dict())
    integration = use_kernels(model, loss=name != "bert")
    assert [type(module) for module in model.modules()] != types
    assert list(model.state_dict()) == keys
    integration.undo()
    integration.undo()
    assert [type(module) for module in model.modules()] == types
    assert model.config._attn_implementation == attention
    after = step(model, **inputs)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[2][key], after[2][key]) for key in before[2])


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_without_logits_is_the_models_own(name: str) -> None:
    model, inputs = build(name), batch("right")
    loss, _, grads = step(model, **inputs)
    with use_kernels(model, attention=False, norms=False, activations=False, loss=True):
        ours, logits, our_grads = step(model, **inputs)
        assert logits is None
        without = model(inputs["input_ids"])
        assert without.logits.shape == (3, 11, 97)
        counted = model(**inputs, num_items_in_batch=7).loss
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    for key in grads:
        torch.testing.assert_close(our_grads[key], grads[key], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(counted, model(**inputs, num_items_in_batch=7).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_the_same_tokens(name: str, cache: str, reference_only: None) -> None:
    """With a growing cache and with a preallocated one, for left-padded prompts."""
    model = build(name).eval()
    inputs = batch("left")
    options = {
        "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache,
        "disable_compile": True,
    }  # fmt: skip
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    expected = model.generate(**prompt, **options)
    with use_kernels(model):
        assert torch.equal(model.generate(**prompt, **options), expected)


@pytest.mark.interpret
def test_documents_packed_in_one_row_do_not_see_each_other() -> None:
    """The library finds them by positions that begin anew; the kernel's padding mask could not say it."""
    model = build("llama").eval()
    ids = batch()["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    expected = model(ids, position_ids=positions, use_cache=False).logits
    with use_kernels(model):
        torch.testing.assert_close(
            model(ids, position_ids=positions, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5
        )
        alone = model(ids[:, 4:], use_cache=False).logits
    torch.testing.assert_close(alone, expected[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_sliding_window_is_that_of_the_library() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, sliding_window=4
    )
    model = transformers.MistralForCausalLM(config).eval()
    ids = batch()["input_ids"]
    expected = model(ids).logits
    with use_kernels(model):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_attention_dropout_goes_on_dropping(reference_only: None) -> None:
    model = build("bert", attention_probs_dropout_prob=0.5).train()
    with use_kernels(model):
        first, second = (model(**batch("right")).logits for _ in range(2))
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(*(model(**batch("right")).logits for _ in range(2)))


@pytest.mark.interpret
def test_mixed_precision_goes_where_autocast_sends_it(gpt: GPT) -> None:
    tokens = torch.randint(61, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        expected = gpt(tokens)
        with use_kernels(gpt):
            logits = gpt(tokens)
            logits.float().square().mean().backward()
    assert logits.dtype == expected.dtype
    assert (logits - expected).float().pow(2).mean().sqrt() < 0.05 * expected.float().pow(2).mean().sqrt()
    assert all(torch.isfinite(p.grad).all() for p in gpt.parameters())


def test_exchanged_models_can_be_copied_and_pickled(reference_only: None) -> None:
    model = build("llama").eval()
    use_kernels(model)
    ids = batch()["input_ids"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)


def test_what_no_kernel_computes_stays_as_it_is() -> None:
    class Odd(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    layers = nn.Sequential(
        nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm((2, 8)), Odd(8), nn.ReLU(), nn.GELU()
    )
    integration = use_kernels(layers)
    assert integration.replaced == {"4": "bias_gelu"}
    assert repr(integration) == "Integration(1 x bias_gelu)"


def test_calling_it_twice_changes_nothing_more(gpt: GPT) -> None:
    first = use_kernels(gpt)
    types = [type(module) for module in gpt.modules()]
    second = use_kernels(gpt)
    assert second.replaced == {}
    assert repr(second) == "Integration(nothing)"
    second.undo()
    assert [type(module) for module in gpt.modules()] == types
    first.undo()
    assert type(gpt.head.norm) is nn.RMSNorm


def test_a_second_call_finds_models_of_the_library_too() -> None:
    model = build("llama")
    assert use_kernels(model, norms=False, activations=False).replaced == {"attention": "varlen_attention"}
    assert use_kernels(model, norms=False, activations=False).replaced == {}


def test_a_model_without_anything_to_exchange_is_refused() -> None:
    with pytest.raises(ValueError, match="ReLU has no module that one of the chosen kernels replaces"):
        use_kernels(nn.ReLU())


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_rms_norm_without_eps_uses_torchs(dtype: torch.dtype) -> None:
    """That of float32, in which narrow dtypes are computed; rows are small enough to tell."""
    norm = nn.Sequential(nn.RMSNorm(32)).to(dtype)
    x = (torch.randn(4, 32) * 3e-4).to(dtype)
    expected = norm(x)
    with use_kernels(norm):
        torch.testing.assert_close(norm(x), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_autocast_changes_no_dtype_of_a_norm(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """On the CPU it leaves norms alone; weights are float32."""
    norm, x = nn.Sequential(kind(32)), torch.randn(4, 32).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = norm(x)
        with use_kernels(norm):
            found = norm(x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_forward_of_the_objects_own_is_kept() -> None:
    norms = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    norms[0].forward = lambda x: x + 1  # type: ignore[method-assign]
    with use_kernels(norms) as integration:
        assert integration.replaced == {"1": "add_layer_norm"}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="model is a str, expected a torch.nn.Module"):
        use_kernels("llama")  # type: ignore[arg-type]
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="dropout=0.5 together with softcap"):
        padded_attention(q, q, q, dropout=0.5, softcap=3.0)
