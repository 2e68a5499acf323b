"""The baseline a language model has to beat: how well the previous token alone predicts the next one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bigram_loss(
    train_tokens: NDArray[np.integer],
    val_tokens: NDArray[np.integer],
    vocab_size: int,
    smoothing: float = 0.1,
) -> float:
    """Cross entropy of validation text under token pairs counted in training text.

    The probability of ``b`` after ``a`` is ``(count(a, b) + smoothing) / (count(a) + smoothing * vocab_size)``.
    Memory grows with the number of different pairs, not with ``vocab_size`` squared.

    Args:
        train_tokens: Integers ``[n]``, the text that is counted.
        val_tokens: Integers ``[m]``, or ``[windows, m]``; pairs do not reach across windows.
        vocab_size: Number of different tokens.
        smoothing: Added to every count, so that unseen pairs keep some probability.

    Returns:
        Nats per predicted token.

    Raises:
        ValueError: If either text has no pair, ``vocab_size`` is too small, or ``smoothing`` is not positive.
    """
    if smoothing <= 0:
        raise ValueError(f"smoothing={smoothing}: expected a positive number, unseen pairs need some probability.")
    for name, tokens in (("train_tokens", train_tokens), ("val_tokens", val_tokens)):
        if tokens.size == 0 or tokens.shape[-1] < 2:
            raise ValueError(f"{name} of shape {list(tokens.shape)}: expected at least one pair of tokens.")
        if tokens.max() >= vocab_size:
            raise ValueError(f"{name} contains {tokens.max()}: vocab_size={vocab_size} allows 0 to {vocab_size - 1}.")
    first, second = val_tokens[..., :-1].ravel(), val_tokens[..., 1:].ravel()
    first_counts = np.bincount(train_tokens[:-1], minlength=vocab_size)
    pairs, pair_counts = np.unique(_pair_numbers(train_tokens[:-1], train_tokens[1:], vocab_size), return_counts=True)
    wanted = _pair_numbers(first, second, vocab_size)
    places = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    counts = np.where(pairs[places] == wanted, pair_counts[places], 0)
    probabilities = (counts + smoothing) / (first_counts[first] + smoothing * vocab_size)
    return float(-np.log(probabilities).mean())


def _pair_numbers(first: NDArray[np.integer], second: NDArray[np.integer], vocab_size: int) -> NDArray[np.int64]:
    """One number per pair of tokens."""
    return first.astype(np.int64) * vocab_size + second
