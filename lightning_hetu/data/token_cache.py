"""Tokenized text on disk, so that it is made once and every process of a job reads the same.

One file per combination of text and options. It is written beside its place and renamed, so a reader sees all of it or
nothing, also when several processes write it at the same time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FORMAT = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedText:
    """A corpus as tokens.

    Args:
        train_tokens: Integers ``[n]``.
        val_tokens: Integers ``[m]``, from parts of the files that training never sees.
        num_tokens: Number of different tokens.
        characters_per_token: Characters of the validation text for each of its tokens.
        tokenizer: What the tokenizer's ``to_text`` returned.
    """

    train_tokens: NDArray[np.integer]
    val_tokens: NDArray[np.integer]
    num_tokens: int
    characters_per_token: float
    tokenizer: str


def default_cache_dir() -> Path:
    """``lightning_hetu`` in the user's cache folder: ``$XDG_CACHE_HOME``, else ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_hetu" / "text"


def cache_key(texts: Sequence[str], options: Mapping[str, Any]) -> str:
    """Hexadecimal digest of the texts and the options that tokens depend on."""
    digest = hashlib.sha256(json.dumps([_FORMAT, dict(options)], sort_keys=True).encode())
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()[:32]


def load_or_build(folder: Path, key: str, build: Callable[[], TokenizedText]) -> TokenizedText:
    """Read the file of ``key``, or build and write it; a damaged file is replaced with a warning.

    Args:
        folder: Cache folder; made if missing.
        key: What :func:`cache_key` returned.
        build: Makes the tokens.
    """
    file = folder / f"{key}.npz"
    if file.exists():
        try:
            return _read(file)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _log.warning("The token cache %s cannot be read (%s). It is built again.", file, error)
    text = build()
    _write(file, text)
    return text


def _read(file: Path) -> TokenizedText:
    with np.load(file, allow_pickle=False) as stored:
        description = json.loads(str(stored["description"]))
        return TokenizedText(train_tokens=stored["train"], val_tokens=stored["val"], **description)


def _write(file: Path, text: TokenizedText) -> None:
    description = json.dumps(
        {
            "num_tokens": text.num_tokens,
            "characters_per_token": text.characters_per_token,
            "tokenizer": text.tokenizer,
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, train=text.train_tokens, val=text.val_tokens, description=np.array(description))
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
