"""Models used by recipes, documentation and tests."""

from lightning_hetu.models.gpt import GPT, GPTBlock, GPTConfig, GPTEmbedding, GPTHead
from lightning_hetu.models.gpt_module import GPTLightningModule

__all__ = ["GPT", "GPTBlock", "GPTConfig", "GPTEmbedding", "GPTHead", "GPTLightningModule"]
