"""Finding and reading text: the user's own files, or the source of Python's standard library."""

from __future__ import annotations

import codecs
import glob
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Test suites, installed packages, and tables written by programs (encodings, pydoc_data): not prose of programmers.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)


def read_corpus(path: str | None, max_bytes: int | None) -> list[str]:
    """Read text files in sorted order until ``max_bytes`` is reached; the last one is cut there.

    Args:
        path: A file, a folder (all files below it, hidden ones excepted) or a glob pattern. ``None`` reads the source
            of Python's standard library, which differs between Python versions.
        max_bytes: Upper bound of the total size; ``None`` reads everything.

    Returns:
        The text of each file, empty files left out.

    Raises:
        FileNotFoundError: If ``path`` matches no file.
        ValueError: If a file is not UTF-8 text, or there is no text at all.
    """
    texts: list[str] = []
    remaining = max_bytes if max_bytes is not None else sys.maxsize
    for file in find_files(path):
        if remaining <= 0:
            break
        content = file.read_bytes()
        text = _decode(file, content[:remaining], cut=len(content) > remaining)
        remaining -= len(content)
        if text:
            texts.append(text)
    if not texts:
        raise ValueError(f"path={path!r}: its files contain no text.")
    return texts


def find_files(path: str | None) -> list[Path]:
    """Files that ``path`` stands for (see :func:`read_corpus`), sorted.

    Raises:
        FileNotFoundError: If there is none.
    """
    if path is None:
        files = list(_standard_library_files())
        if not files:
            raise FileNotFoundError("path=None: this Python comes without the source of its standard library.")
        return files
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(root)))
        if not files:
            raise FileNotFoundError(f"path={path!r}: the folder contains no files.")
        return files
    files = sorted(Path(match) for match in glob.glob(str(root), recursive=True) if Path(match).is_file())
    if not files:
        raise FileNotFoundError(f"path={path!r}: no such file or folder, and no file matches it as a glob pattern.")
    return files


def _standard_library_files() -> Iterator[Path]:
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS and "-" not in name)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _decode(file: Path, content: bytes, cut: bool) -> str:
    try:
        # Not final: a character that the cut goes through is dropped.
        text = codecs.getincrementaldecoder("utf-8")().decode(content, final=not cut)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): leave it out with a glob in path.") from None
    if "\0" in text:
        raise ValueError(f"{file} contains zero bytes, it is not text: leave it out with a glob in path.")
    return text
