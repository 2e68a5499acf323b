"""Rows in an SQLite database: durable, open to inspection by any tool, and much slower than memory.

It shows what an adapter to an existing database takes; another one changes the statements. Rows go through Python one
by one, so it suits small tables and serving, not the inner loop of a large run.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_hetu.embedding.row_store import InitialRows, check_rows

_ROWS_PER_QUERY = 500
"""Below 999, the number of parameters of a statement that every build of SQLite takes."""


class SqliteRowStore:
    """Rows of one table ``embedding_rows(row, clock, contents)``; those never written are not in it.

    Everything since the last :meth:`flush` is one transaction: after a crash, the database is as the flush left it.

    Args:
        path: The database file; ``:memory:`` for none.
        num_rows: Rows.
        width: Numbers per row.
        initial: First contents of rows; zeros by default.
        dtype: Type of the numbers.

    Raises:
        ValueError: If a size is not positive, or the database has rows of another size or type.
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
        for name, size in (("num_rows", num_rows), ("width", width)):
            if size < 1:
                raise ValueError(f"{name}={size}: expected at least 1.")
        self.num_rows, self.width, self.dtype = num_rows, width, dtype
        self._initial = initial
        self._database = sqlite3.connect(path)
        shape = (num_rows, width, str(dtype))
        self._database.executescript(
            "CREATE TABLE IF NOT EXISTS embedding_shape (num_rows INTEGER, width INTEGER, dtype TEXT);"
            "CREATE TABLE IF NOT EXISTS embedding_rows"
            " (row INTEGER PRIMARY KEY, clock INTEGER NOT NULL, contents BLOB NOT NULL);"
        )
        found = self._database.execute("SELECT num_rows, width, dtype FROM embedding_shape").fetchone()
        if found is None:
            self._database.execute("INSERT INTO embedding_shape VALUES (?, ?, ?)", shape)
            self._database.commit()
        elif found != shape:
            self._database.close()
            raise ValueError(f"path={os.fspath(path)!r} holds rows of {found}, expected {shape}: use another file.")

    def get(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Contents ``[n, width]`` and clocks ``[n]`` int32 of rows."""
        found = self._select("row, clock, contents", rows)
        numbers = rows.tolist()
        contents = self._first_contents(rows)
        written = [index for index, row in enumerate(numbers) if row in found]
        if written:
            blobs = b"".join(found[numbers[index]][1] for index in written)
            contents[written] = torch.frombuffer(bytearray(blobs), dtype=self.dtype).view(-1, self.width)
        return contents, torch.tensor([found[row][0] if row in found else 0 for row in numbers], dtype=torch.int32)

    def clocks(self, rows: Tensor) -> Tensor:
        """Clocks ``[n]`` int32 without reading the rows."""
        found = self._select("row, clock", rows)
        return torch.tensor([found[row][0] if row in found else 0 for row in rows.tolist()], dtype=torch.int32)

    def put(self, rows: Tensor, contents: Tensor, updates: Tensor) -> None:
        """Replaces contents ``[n, width]`` and advances the clocks by ``updates`` ``[n]`` int32."""
        check_rows(rows, self.num_rows)
        self._database.executemany(
            "INSERT INTO embedding_rows VALUES (?, ?, ?) ON CONFLICT (row)"
            " DO UPDATE SET clock = clock + excluded.clock, contents = excluded.contents",
            zip(rows.tolist(), updates.tolist(), map(_to_bytes, contents.to(self.dtype)), strict=True),
        )

    def add(self, rows: Tensor, changes: Tensor, updates: Tensor) -> None:
        """Adds ``changes`` ``[n, width]`` to the contents and ``updates`` ``[n]`` int32 to the clocks."""
        self.put(rows, self.get(rows)[0].add_(changes), updates)

    def iterate(self, batch_rows: int = 65536) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows that were ever written, in order, with contents and clocks, at most ``batch_rows`` at a time."""
        last = -1
        while True:
            query = "SELECT row FROM embedding_rows WHERE row > ? ORDER BY row LIMIT ?"
            rows = torch.tensor(
                [row for (row,) in self._database.execute(query, (last, batch_rows))], dtype=torch.int64
            )
            if not rows.numel():
                return
            last = int(rows[-1])
            yield rows, *self.get(rows)

    def flush(self) -> None:
        """Commits."""
        self._database.commit()

    def close(self) -> None:
        """Commits and lets go of the file; the store cannot be used behind it."""
        self._database.commit()
        self._database.close()

    def _first_contents(self, rows: Tensor) -> Tensor:
        if self._initial is None:
            return torch.zeros(rows.numel(), self.width, dtype=self.dtype)
        return self._initial(rows).to(self.dtype, copy=True)

    def _select(self, columns: str, rows: Tensor) -> dict[int, tuple]:
        """The other columns by row, of rows that were written."""
        check_rows(rows, self.num_rows)
        found = {}
        for some in rows.split(_ROWS_PER_QUERY):
            marks = ", ".join("?" * some.numel())
            query = f"SELECT {columns} FROM embedding_rows WHERE row IN ({marks})"
            found.update({row: rest for row, *rest in self._database.execute(query, some.tolist())})
        return found


def _to_bytes(row: Tensor) -> bytes:
    return row.contiguous().view(torch.uint8).numpy().tobytes()
