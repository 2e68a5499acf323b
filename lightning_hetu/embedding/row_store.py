"""Where an owner keeps its rows: in memory, or in a mapped file that may be larger than memory.

A store holds ``num_rows`` rows of ``width`` numbers each, the values of the embedding and behind them what its
optimizer keeps, and the global clock of each row, below 2^31. A row that was never written has the value that
``initial`` computes from its number, so creating a store of any size costs nothing: memory and file are sparse until
they are used.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

InitialRows = Callable[[Tensor], Tensor]
"""Gives rows ``[n]`` int64 their first contents ``[n, width]``; must depend on nothing but the row."""

_HEADER_BYTES = 4096
"""Room for the description of a file; a page, so that what follows is aligned."""


class RowStore(Protocol):
    """What an owner needs of a store. Rows in a call are distinct, ``[n]`` int64 from 0 to ``num_rows - 1``.

    Attributes:
        num_rows: Rows.
        width: Numbers per row.
        dtype: Their type.
    """

    num_rows: int
    width: int
    dtype: torch.dtype

    def get(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Contents ``[n, width]`` and clocks ``[n]`` int32 of rows; copies."""

    def clocks(self, rows: Tensor) -> Tensor:
        """Clocks ``[n]`` int32 without reading the rows."""

    def put(self, rows: Tensor, contents: Tensor, updates: Tensor) -> None:
        """Replaces contents ``[n, width]`` and advances the clocks by ``updates`` ``[n]`` int32."""

    def add(self, rows: Tensor, changes: Tensor, updates: Tensor) -> None:
        """Adds ``changes`` ``[n, width]`` to the contents and ``updates`` ``[n]`` int32 to the clocks."""

    def iterate(self, batch_rows: int = 65536) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows that were ever written, in order, with contents and clocks, at most ``batch_rows`` at a time."""

    def flush(self) -> None:
        """Makes everything so far durable, where the store can."""


def check_rows(rows: Tensor, num_rows: int) -> None:
    """Refuses rows that are not there; not on a GPU, which would have to wait for the answer.

    Args:
        rows: ``[n]`` int64.
        num_rows: Rows of the store.

    Raises:
        IndexError: If a row is out of range.
    """
    if rows.device.type == "cpu" and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
        raise IndexError(f"rows from {int(rows.min())} to {int(rows.max())}: the store has rows 0 to {num_rows - 1}.")


class TensorRowStore:
    """Rows in memory, on any device.

    Args:
        num_rows: Rows.
        width: Numbers per row.
        initial: First contents of rows; zeros by default.
        dtype: Type of the numbers.
        device: Where the rows are.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        initial: InitialRows | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, size in (("num_rows", num_rows), ("width", width)):
            if size < 1:
                raise ValueError(f"{name}={size}: expected at least 1.")
        self.num_rows, self.width, self.dtype = num_rows, width, dtype
        self._initial = initial
        self._marks, self._contents = self._allocate(torch.device(device))

    def _allocate(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Zeroed marks ``[num_rows]`` int32, which are a row's clock plus 1 or 0 if unwritten, and contents."""
        marks = torch.zeros(self.num_rows, dtype=torch.int32, device=device)
        return marks, torch.zeros(self.num_rows, self.width, dtype=self.dtype, device=device)

    def get(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Contents ``[n, width]`` and clocks ``[n]`` int32 of rows; copies."""
        check_rows(rows, self.num_rows)
        marks, contents = self._marks[rows], self._contents[rows]
        if self._initial is not None:
            unwritten = (marks == 0).nonzero()[:, 0]
            if unwritten.numel():
                contents[unwritten] = self._initial(rows[unwritten]).to(contents)
        return contents, (marks - 1).clamp_(min=0)

    def clocks(self, rows: Tensor) -> Tensor:
        """Clocks ``[n]`` int32 without reading the rows."""
        check_rows(rows, self.num_rows)
        return (self._marks[rows] - 1).clamp_(min=0)

    def put(self, rows: Tensor, contents: Tensor, updates: Tensor) -> None:
        """Replaces contents ``[n, width]`` and advances the clocks by ``updates`` ``[n]`` int32."""
        check_rows(rows, self.num_rows)
        self._contents[rows] = contents
        self._marks[rows] = self._marks[rows].clamp(min=1) + updates

    def add(self, rows: Tensor, changes: Tensor, updates: Tensor) -> None:
        """Adds ``changes`` ``[n, width]`` to the contents and ``updates`` ``[n]`` int32 to the clocks."""
        self.put(rows, self.get(rows)[0].add_(changes), updates)

    def iterate(self, batch_rows: int = 65536) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows that were ever written, in order, with contents and clocks, at most ``batch_rows`` at a time."""
        for start in range(0, self.num_rows, batch_rows):
            rows = start + self._marks[start : start + batch_rows].nonzero()[:, 0]
            if rows.numel():
                yield rows, *self.get(rows)

    def flush(self) -> None:
        """Memory is not durable: nothing to do."""


class MmapRowStore(TensorRowStore):
    """Rows in a file that is mapped into memory: the system keeps in memory what is used.

    The file is made if it is not there, and is sparse: it takes the room of the pages that were written. The rows of an
    existing one are found again. One process at a time may use it.

    Args:
        path: The file.
        num_rows: Rows.
        width: Numbers per row.
        initial: First contents of rows; zeros by default.
        dtype: Type of the numbers.

    Raises:
        ValueError: If the file is not a store, or one of another size or type.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_rows: int,
        width: int,
        *,
        initial: InitialRows | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.path = Path(path)
        super().__init__(num_rows, width, initial=initial, dtype=dtype)

    def _allocate(self, device: torch.device) -> tuple[Tensor, Tensor]:
        shape = {"format": 1, "num_rows": self.num_rows, "width": self.width, "dtype": str(self.dtype)}
        contents_start = _HEADER_BYTES + -(-self.num_rows * 4 // _HEADER_BYTES) * _HEADER_BYTES
        num_bytes = contents_start + self.num_rows * self.width * self.dtype.itemsize
        is_new = not self.path.exists()
        with open(self.path, "w+b" if is_new else "r+b") as file:
            if is_new:
                file.truncate(num_bytes)
                file.write(json.dumps(shape).encode().ljust(_HEADER_BYTES))
                file.flush()
            elif (found := _read_header(file.read(_HEADER_BYTES))) != shape:
                raise ValueError(f"path={str(self.path)!r} holds {found}, expected {shape}: use another file.")
            self._map = mmap.mmap(file.fileno(), num_bytes)
        marks = torch.frombuffer(self._map, dtype=torch.int32, count=self.num_rows, offset=_HEADER_BYTES)
        contents = torch.frombuffer(self._map, dtype=self.dtype, offset=contents_start)
        return marks, contents.view(self.num_rows, self.width)

    def flush(self) -> None:
        """Writes changed pages to the disk, and waits for it."""
        self._map.flush()


def _read_header(header: bytes) -> object:
    try:
        return json.loads(header)
    except ValueError:
        return "something else"
