"""Data used by recipes, documentation and tests."""

from lightning_hetu.data.bigram import bigram_loss
from lightning_hetu.data.images import GratingImagesDataModule
from lightning_hetu.data.text import TextDataModule

__all__ = ["GratingImagesDataModule", "TextDataModule", "bigram_loss"]
