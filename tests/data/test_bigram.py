"""The bigram baseline is the smoothed conditional entropy it says it is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_hetu.data import bigram_loss


def counted_loss(train: np.ndarray, rows: np.ndarray, vocab_size: int, smoothing: float) -> float:
    counts = np.full((vocab_size, vocab_size), smoothing)
    for first, second in zip(train[:-1], train[1:], strict=True):
        counts[first, second] += 1
    probabilities = counts / counts.sum(1, keepdims=True)
    losses = [-math.log(probabilities[a, b]) for row in rows for a, b in zip(row[:-1], row[1:], strict=True)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_equals_counting_by_hand(smoothing: float) -> None:
    generator = np.random.default_rng(0)
    train = generator.integers(0, 7, 50, dtype=np.uint16)
    rows = generator.integers(0, 7, (4, 9), dtype=np.uint16)
    assert bigram_loss(train, rows, 7, smoothing) == pytest.approx(counted_loss(train, rows, 7, smoothing))
    assert bigram_loss(train, rows[0], 7, smoothing) == pytest.approx(counted_loss(train, rows[:1], 7, smoothing))


def test_unseen_tokens_cost_the_uniform_loss() -> None:
    assert bigram_loss(np.array([0, 0, 0]), np.array([3, 2, 3]), 4) == pytest.approx(math.log(4))


def test_pair_numbers_do_not_overflow_small_integers() -> None:
    train = np.array([60_000, 60_001] * 10, dtype=np.uint16)
    assert bigram_loss(train, train, 65_000, smoothing=1e-9) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("train", "val", "smoothing", "words"),
    [
        ([1], [0, 1], 1.0, "train_tokens"),
        ([0, 1], [], 1.0, "val_tokens"),
        ([0, 5], [0, 1], 1.0, "train_tokens contains 5"),
        ([0, 1], [0, 1], 0.0, "smoothing=0.0"),
    ],
)
def test_bad_inputs_are_named(train: list[int], val: list[int], smoothing: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bigram_loss(np.array(train, dtype=np.int64), np.array(val, dtype=np.int64), 4, smoothing)
