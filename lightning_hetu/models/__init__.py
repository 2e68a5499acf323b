"""Models used by recipes, documentation and tests."""

from lightning_hetu.models.gpt import GPT, GPTBlock, GPTConfig, GPTEmbedding, GPTHead
from lightning_hetu.models.gpt_module import GPTLightningModule
from lightning_hetu.models.moe_gpt import MoEGPT, MoEGPTLightningModule
from lightning_hetu.models.transformers_module import TransformersModule

__all__ = [
    "GPT",
    "GPTBlock",
    "GPTConfig",
    "GPTEmbedding",
    "GPTHead",
    "GPTLightningModule",
    "MoEGPT",
    "MoEGPTLightningModule",
    "TransformersModule",
]
