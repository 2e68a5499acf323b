"""Data used by recipes, documentation and tests."""

from lightning_hetu.data.bigram import bigram_loss
from lightning_hetu.data.text import TextDataModule

__all__ = ["TextDataModule", "bigram_loss"]
