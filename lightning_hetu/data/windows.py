"""Cutting one long row of tokens into samples."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset


class TokenWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a token array, each with the same window one token later as its target.

    Args:
        tokens: Integers ``[n]``.
        seq_len: Tokens per window.
        starts: Position of each window's first token, integers ``[windows]``.
    """

    def __init__(self, tokens: NDArray[np.integer], seq_len: int, starts: NDArray[np.integer]) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """``(tokens, targets)``, both int64 ``[seq_len]``."""
        window = torch.from_numpy(self.rows(np.array([index]))[0].astype(np.int64))
        return window[:-1], window[1:]

    def rows(self, indices: NDArray[np.integer] | None = None) -> NDArray[np.integer]:
        """Whole windows, target included.

        Args:
            indices: Which; all of them by default.

        Returns:
            Integers ``[windows, seq_len + 1]``.
        """
        starts = self.starts if indices is None else self.starts[indices]
        return self.tokens[starts[:, None] + np.arange(self.seq_len + 1)]


def strided_starts(num_tokens: int, seq_len: int, stride: int) -> NDArray[np.int64]:
    """Starts of every ``stride``-th window that fits, its last target included."""
    return np.arange(0, max(0, num_tokens - seq_len), stride, dtype=np.int64)


def spread_starts(num_tokens: int, seq_len: int, count: int) -> NDArray[np.int64]:
    """Starts of exactly ``count`` windows spread evenly; they overlap if the text is short."""
    return np.linspace(0, num_tokens - seq_len - 1, count).astype(np.int64)
