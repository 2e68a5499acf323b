"""The LightningModule around models of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hetu.models import TransformersModule
from lightning_hetu.models.transformers_module import build_transformer

pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "max_position_embeddings": 16,
}  # fmt: skip


def tokens(samples: int = 3, length: int = 8) -> Tensor:
    return torch.randint(48, (samples, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"architecture": "LamaForCausalLM"}, ValueError, "architecture='LamaForCausalLM': expected a model class"),
        ({"architecture": "LlamaConfig"}, ValueError, "architecture='LlamaConfig': expected a model class"),
        ({"config": {"hiden_size": 3}}, ValueError, r"config.hiden_size=3: .* Did you mean 'hidden_size'\?"),
        ({"config": {}, "pretrained": "x"}, ValueError, "give one of them"),
        ({"pretrained": "no/such/folder"}, FileNotFoundError, "pretrained='no/such/folder'"),
        ({"config": SIZES, "learning_rate": 0.0}, ValueError, "learning_rate=0.0"),
        ({"config": SIZES, "warmup_steps": -1}, ValueError, "warmup_steps=-1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        TransformersModule(**options)


def test_pairs_of_tokens_give_the_model_own_loss() -> None:
    """A batch of tokens and next tokens costs what the model itself computes from labels."""
    module = TransformersModule("LlamaForCausalLM", SIZES)
    text = tokens()
    own = module.model(input_ids=text, labels=text).loss
    pair = module.pipeline_step({"input_ids": text[:, :-1]}, text[:, 1:])
    torch.testing.assert_close(pair, own, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("architecture", "counted"), [("LlamaForCausalLM", 4), ("GPT2LMHeadModel", 4), ("BertForMaskedLM", 5)]
)
def test_ignored_labels_weigh_nothing(architecture: str, counted: int) -> None:
    """The weight is the number of terms in the model's mean: models that shift labels leave the first one out."""
    module = TransformersModule(architecture, {"vocab_size": 48, "hidden_size": 24, "num_attention_heads": 2})
    labels = torch.tensor([[5, -100, 6, 7, -100], [-100, 8, 9, -100, -100]])
    labels[0, 0] = 5
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": labels}
    assert int(module.pipeline_loss_weight(batch)) == counted  # type: ignore[arg-type]
    output = module.eval().model(**batch)
    shifts = counted == 4
    logits, target = (output.logits[:, :-1], labels[:, 1:]) if shifts else (output.logits, labels)
    total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(module.pipeline_loss(output, batch) * counted, total, rtol=1e-5, atol=0)


def test_classes_and_numbers_as_labels() -> None:
    """Class labels count one each; labels to regress on have no weight."""
    module = TransformersModule("ViTForImageClassification", {"hidden_size": 12, "num_hidden_layers": 2})
    assert int(module.pipeline_loss_weight({"labels": torch.tensor([1, 2, 3])})) == 3  # type: ignore[arg-type]
    assert module.pipeline_loss_weight({"labels": torch.ones(3)}) is None


def test_saved_and_read_by_transformers(tmp_path: Any) -> None:
    """``save_pretrained`` writes what ``from_pretrained`` reads, and ``pretrained`` starts from it."""
    module = TransformersModule("LlamaForCausalLM", {**SIZES, "tie_word_embeddings": True})
    module.save_pretrained(tmp_path / "model")
    again = TransformersModule("LlamaForCausalLM", pretrained=str(tmp_path / "model"))
    for name, weight in module.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert again.model.config.use_cache is False
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight


def test_an_encoder_decoder_keeps_no_cache() -> None:
    """Its parts have configurations of their own."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    model = build_transformer("T5ForConditionalGeneration", sizes)
    text = tokens()
    assert model(input_ids=text, labels=text).past_key_values is None
