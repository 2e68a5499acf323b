"""Text for language models: from files on disk to batches of tokens, without downloading anything."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hetu.data.bigram import bigram_loss
from lightning_hetu.data.corpus import read_corpus
from lightning_hetu.data.loaders import global_batches
from lightning_hetu.data.token_cache import TokenizedText, cache_key, default_cache_dir, load_or_build
from lightning_hetu.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from lightning_hetu.data.windows import TokenWindows, spread_starts, strided_starts

_Loader = DataLoader[tuple[Tensor, Tensor]]
_TOKENIZERS: dict[str, type[CharTokenizer | BPETokenizer]] = {"char": CharTokenizer, "bpe": BPETokenizer}


class TextDataModule(LightningDataModule):
    """Batches of ``(tokens, targets)``, both int64 ``[batch, seq_len]``, from plain text files.

    The last part of every file is held out for validation. Training windows come in an order that depends on ``seed``
    and the epoch only: whatever the number of devices, the same windows make up the same global batch.

    Args:
        path: A text file, a folder (every file below it) or a glob pattern such as ``books/*.txt``, in UTF-8. Default:
            the source of Python's own standard library, so that an example runs without a download. It differs between
            Python versions, and so does the loss.
        tokenizer: ``char`` makes every character a token; ``bpe`` learns byte pairs from the training text and needs
            the extra ``lightning-hetu[text]``.
        max_vocab_size: Different tokens at most. ``char`` keeps the most frequent characters, all others become one
            unknown token; ``bpe`` learns byte pairs until there are so many tokens, the 256 single bytes among them.
        vocab_multiple: The reported ``vocab_size`` is rounded up to a multiple of this, so that tensor parallelism can
            split the vocabulary.
        seq_len: Tokens per sample.
        batch_size: The GLOBAL batch size: samples per step over all devices together, as on a single device.
        stride: Tokens between the starts of neighboring training samples. Default: ``seq_len``, no overlap.
        val_fraction: Share at the end of each file that is held out.
        val_batches: Batches of one validation, spread evenly over the held-out text.
        max_bytes: Files are read in sorted order until this many bytes. ``None`` reads all.
        seed: Of the order of training samples.
        num_workers: Processes that load data, per device. 0 loads in the training process.
        cache_dir: Where tokens are kept between runs. Default: ``lightning_hetu/text`` in the user's cache folder.

    Raises:
        ValueError: If an argument is out of range. Later, when the text is read: if it is not UTF-8 text, or too short
            for one sample or one batch.
        FileNotFoundError: When the text is read, if ``path`` matches no file.
    """

    def __init__(
        self,
        path: str | None = None,
        tokenizer: Literal["char", "bpe"] = "char",
        max_vocab_size: int = 1024,
        vocab_multiple: int = 8,
        seq_len: int = 128,
        batch_size: int = 32,
        stride: int | None = None,
        val_fraction: float = 0.05,
        val_batches: int = 8,
        max_bytes: int | None = 4_000_000,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if tokenizer not in ("char", "bpe"):
            raise ValueError(f"tokenizer={tokenizer!r}: expected 'char' or 'bpe'.")
        smallest = 257 if tokenizer == "bpe" else 2
        if max_vocab_size < smallest:
            raise ValueError(f"max_vocab_size={max_vocab_size}: tokenizer={tokenizer!r} needs at least {smallest}.")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction={val_fraction}: expected a share between 0 and 1, both excluded.")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: expected zero or more.")
        sizes: dict[str, int | None] = {"vocab_multiple": vocab_multiple, "seq_len": seq_len, "batch_size": batch_size}
        sizes |= {"val_batches": val_batches, "stride": stride, "max_bytes": max_bytes}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        self.save_hyperparameters()
        self.path = path
        self.tokenizer_name = tokenizer
        self.max_vocab_size = max_vocab_size
        self.vocab_multiple = vocab_multiple
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.stride = seq_len if stride is None else stride
        self.val_fraction = val_fraction
        self.val_batches = val_batches
        self.max_bytes = max_bytes
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, rounded up to ``vocab_multiple``. Reads the text if that has not happened yet."""
        return -(-self.text.num_tokens // self.vocab_multiple) * self.vocab_multiple

    @property
    def characters_per_token(self) -> float:
        """Characters of the held-out text for each of its tokens; 1 with the ``char`` tokenizer."""
        return self.text.characters_per_token

    @cached_property
    def bigram_loss_per_character(self) -> float:
        """Nats per character that counting token pairs reaches on the validation samples: the baseline to beat."""
        rows = self.val_dataset.rows()
        return bigram_loss(self.text.train_tokens, rows, self.text.num_tokens) / self.characters_per_token

    @cached_property
    def text(self) -> TokenizedText:
        """The tokens, from the cache or newly made."""
        texts = read_corpus(self.path, self.max_bytes)
        # Each file's characters before the cut are for training, those after it for validation.
        cuts = [round(len(text) * (1 - self.val_fraction)) for text in texts]
        train = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
        val = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
        options = {
            "tokenizer": self.tokenizer_name,
            "max_vocab_size": self.max_vocab_size,
            "val_fraction": self.val_fraction,
        }
        return load_or_build(self.cache_dir, cache_key(texts, options), lambda: self._tokenize(train, val))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens, with ``encode`` and ``decode``."""
        return _TOKENIZERS[self.tokenizer_name](self.text.tokenizer)

    @cached_property
    def train_dataset(self) -> TokenWindows:
        """Training samples: windows ``stride`` tokens apart.

        Raises:
            ValueError: If they are fewer than one batch.
        """
        tokens = self.text.train_tokens
        starts = strided_starts(len(tokens), self.seq_len, self.stride)
        if len(starts) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: the training text of {len(tokens)} tokens has only {len(starts)}"
                f" samples of seq_len={self.seq_len}, {self.stride} apart. Use more text, or lower one of the three."
            )
        return TokenWindows(tokens, self.seq_len, starts)

    @cached_property
    def val_dataset(self) -> TokenWindows:
        """Validation samples: ``val_batches * batch_size`` windows spread evenly over the held-out text."""
        tokens = self._val_tokens()
        starts = spread_starts(len(tokens), self.seq_len, self.val_batches * self.batch_size)
        return TokenWindows(tokens, self.seq_len, starts)

    @cached_property
    def test_dataset(self) -> TokenWindows:
        """Test samples: the whole held-out text in neighboring windows."""
        tokens = self._val_tokens()
        return TokenWindows(tokens, self.seq_len, strided_starts(len(tokens), self.seq_len, self.seq_len))

    def prepare_data(self) -> None:
        """Tokenize and fill the cache, in one process per node; the others find it in :meth:`setup`."""
        _ = self.text

    def setup(self, stage: str) -> None:
        """Cut the samples that ``stage`` needs, so that a text too short fails here and not in the loop."""
        if stage == "fit":
            _ = self.train_dataset
        if stage in ("fit", "validate"):
            _ = self.val_dataset

    def train_dataloader(self) -> _Loader:
        """Shuffled batches; a last incomplete one is dropped."""
        return self._loader(self.train_dataset, shuffle=True, drop_last=True)

    def val_dataloader(self) -> _Loader:
        """``val_batches`` batches, the same at every validation."""
        return self._loader(self.val_dataset, shuffle=False, drop_last=True)

    def test_dataloader(self) -> _Loader:
        """The whole held-out text; a last incomplete batch is dropped if there is a complete one."""
        return self._loader(self.test_dataset, shuffle=False, drop_last=len(self.test_dataset) >= self.batch_size)

    def predict_dataloader(self) -> _Loader:
        """The same as for testing, the last batch included."""
        return self._loader(self.test_dataset, shuffle=False, drop_last=False)

    def _loader(self, dataset: TokenWindows, shuffle: bool, drop_last: bool) -> _Loader:
        return global_batches(
            dataset,
            self.trainer,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    def _val_tokens(self) -> NDArray[np.integer]:
        tokens = self.text.val_tokens
        if len(tokens) <= self.seq_len:
            raise ValueError(
                f"seq_len={self.seq_len}: the held-out text has {len(tokens)} tokens, a sample takes one more than"
                f" seq_len. Use more text, a larger val_fraction than {self.val_fraction}, or a shorter seq_len."
            )
        return tokens

    def _tokenize(self, train: list[str], val: list[str]) -> TokenizedText:
        kind = _TOKENIZERS[self.tokenizer_name]
        tokenizer = kind.train(train, self.max_vocab_size)
        train_tokens, val_tokens = (_join([tokenizer.encode(text) for text in texts]) for texts in (train, val))
        return TokenizedText(
            train_tokens=train_tokens,
            val_tokens=val_tokens,
            num_tokens=tokenizer.num_tokens,
            characters_per_token=sum(map(len, val)) / max(1, len(val_tokens)),
            tokenizer=tokenizer.to_text(),
        )


def _join(parts: list[NDArray[np.uint32]]) -> NDArray[np.integer]:
    """One array of the smallest type that holds all tokens."""
    tokens = np.concatenate(parts)
    return tokens.astype(np.uint16) if tokens.max(initial=0) < 2**16 else tokens
