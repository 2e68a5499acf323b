"""Tiny models of Hugging Face transformers, built from configurations, and batches for them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

TEXT = 16
VOCABULARY = 96
_TEXT_CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


def tiny_model(kind: str, **options: Any) -> nn.Module:
    """A model of 5 or 6 blocks, without dropout."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    grouped = {"num_key_value_heads": 2, "use_cache": False}
    settings: dict[str, tuple[str, str, dict[str, Any]]] = {
        "llama": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT_CONFIG, **grouped}),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_TEXT_CONFIG, **grouped}),
        "qwen3": (
            "Qwen3ForCausalLM", "Qwen3Config", {**_TEXT_CONFIG, **grouped, "head_dim": 8, "tie_word_embeddings": True},
        ),
        "qwen3-moe": (
            "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
            {**_TEXT_CONFIG, **grouped, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
             "moe_intermediate_size": 16},
        ),
        "gpt2": (
            "GPT2LMHeadModel", "GPT2Config",
            {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, "use_cache": False,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
        ),
        "bert": (
            "BertForMaskedLM", "BertConfig",
            {**_TEXT_CONFIG, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        ),
        "t5": (
            "T5ForConditionalGeneration", "T5Config",
            {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4,
             "decoder_start_token_id": 0, "dropout_rate": 0.0, "use_cache": False},
        ),
        "bart": (
            "BartForConditionalGeneration", "BartConfig",
            {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "max_position_embeddings": 64, "dropout": 0.0, "decoder_start_token_id": 0, "pad_token_id": 1,
             "bos_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": None, "use_cache": False},
        ),
        "vit": (
            "ViTForImageClassification", "ViTConfig",
            {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 64,
             "image_size": 16, "patch_size": 4, "num_labels": 7, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0},
        ),
        "swin": (
            "SwinForImageClassification", "SwinConfig",
            {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2, 2], "num_heads": [2, 2, 4],
             "window_size": 4, "num_labels": 7, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
             "drop_path_rate": 0.0},
        ),
    }  # fmt: skip
    model, config, values = settings[kind]
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**{**values, **options}))
    return built


def tiny_batch(kind: str, samples: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs and labels; text is padded to different lengths, and labels of padding are ignored."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("vit", "swin"):
        size = 16 if kind == "vit" else 32
        return {
            "pixel_values": torch.randn(samples, 3, size, size, generator=generator),
            "labels": torch.randint(7, (samples,), generator=generator),
        }
    tokens = torch.randint(3, VOCABULARY, (samples, TEXT), generator=generator)
    length = torch.randint(TEXT // 2, TEXT + 1, (samples, 1), generator=generator)
    mask = (torch.arange(TEXT) < length).long()
    answers = kind in ("t5", "bart")  # shorter than what they answer to
    labels = torch.randint(3, VOCABULARY, (samples, TEXT // 2), generator=generator) if answers else tokens
    ignored = torch.arange(TEXT // 2) >= length // 2 if answers else mask == 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels.masked_fill(ignored, -100)}
