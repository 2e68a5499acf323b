"""Two ways to turn text into numbers, both learned from the training text on the spot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

UNKNOWN = 0  # Token of a character that the training text does not have.


class Tokenizer(Protocol):
    """What the datamodule asks of a tokenizer."""

    @property
    def num_tokens(self) -> int:
        """Number of different tokens."""
        ...

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Tokens of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        ...

    def to_text(self) -> str:
        """Everything needed to restore the tokenizer, as text."""
        ...


class CharTokenizer:
    """One token per character; token 0 stands for every character not in the alphabet.

    Args:
        alphabet: The known characters, each once.
    """

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        codes = _codes(alphabet)
        self._table = np.full(int(codes.max(initial=0)) + 1, UNKNOWN, dtype=np.uint32)
        self._table[codes] = np.arange(1, len(alphabet) + 1, dtype=np.uint32)

    @classmethod
    def train(cls, texts: Sequence[str], max_tokens: int) -> CharTokenizer:
        """Learn the alphabet of some texts: their most frequent ``max_tokens - 1`` characters."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        frequent = sorted(counts, key=lambda character: (-counts[character], character))[: max_tokens - 1]
        return cls("".join(sorted(frequent)))

    @property
    def num_tokens(self) -> int:
        """Size of the alphabet, and one for unknown characters."""
        return len(self.alphabet) + 1

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Tokens ``[len(text)]``."""
        codes = _codes(text)
        return np.where(codes < len(self._table), self._table[np.minimum(codes, len(self._table) - 1)], UNKNOWN)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; unknown ones, and those that only pad the vocabulary, become U+FFFD."""
        known = range(1, self.num_tokens)
        return "".join(self.alphabet[token - 1] if token in known else "\N{REPLACEMENT CHARACTER}" for token in tokens)

    def to_text(self) -> str:
        """The alphabet."""
        return self.alphabet


class BPETokenizer:
    """Byte-level byte-pair encoding, by the ``tokenizers`` package; every text has an encoding.

    Args:
        serialized: JSON that :meth:`to_text` returned.
    """

    def __init__(self, serialized: str) -> None:
        self._tokenizer = _import_tokenizers().Tokenizer.from_str(serialized)

    @classmethod
    def train(cls, texts: Sequence[str], max_tokens: int) -> BPETokenizer:
        """Learn at most ``max_tokens`` tokens, the 256 bytes among them, from some texts."""
        tokenizers = _import_tokenizers()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=max_tokens,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    @property
    def num_tokens(self) -> int:
        """Number of tokens learned; fewer than asked for if the text is short."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Tokens ``[n]`` with ``n <= len(text.encode())``."""
        return np.asarray(self._tokenizer.encode(text).ids, dtype=np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        return str(self._tokenizer.decode(list(tokens)))

    def to_text(self) -> str:
        """JSON of the tokenizer."""
        return str(self._tokenizer.to_str())


def _codes(text: str) -> NDArray[np.uint32]:
    """Unicode code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tokenizer='bpe' needs the package `tokenizers`: pip install 'lightning-hetu[text]', or tokenizer='char'."
        ) from error
    return tokenizers
