"""All stores of rows do the same, and those on disk find their rows again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_hetu.embedding import MmapRowStore, RowStore, SqliteRowStore, TensorRowStore

NUM_ROWS, WIDTH = 700, 3
Make = Callable[..., RowStore]


def first_contents(rows: Tensor) -> Tensor:
    return rows[:, None] + torch.tensor([0.0, 0.25, 0.5])


@pytest.fixture(params=["tensor", "mmap", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    kinds: dict[str, Make] = {
        "tensor": TensorRowStore,
        "mmap": lambda *size, **options: MmapRowStore(tmp_path / "rows", *size, **options),
        "sqlite": lambda *size, **options: SqliteRowStore(tmp_path / "rows", *size, **options),
    }
    return kinds[request.param]


def counts(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_rows_begin_as_they_were_made(make: Make) -> None:
    rows = torch.tensor([5, 0, 699])
    contents, clocks = make(NUM_ROWS, WIDTH).get(rows)
    assert torch.equal(contents, torch.zeros(3, WIDTH)) and torch.equal(clocks, counts(0, 0, 0))


def test_what_is_written_is_read(make: Make) -> None:
    store = make(NUM_ROWS, WIDTH, initial=first_contents)
    store.put(torch.tensor([9, 4]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), counts(2, 0))
    store.add(torch.tensor([4, 6]), torch.ones(2, WIDTH), counts(1, 5))
    store.add(torch.tensor([6]), torch.ones(1, WIDTH), counts(1))
    rows = torch.tensor([4, 5, 6, 9])
    contents, clocks = store.get(rows)
    assert contents.tolist() == [[5, 6, 7], [5, 5.25, 5.5], [8, 8.25, 8.5], [1, 2, 3]]
    assert torch.equal(clocks, counts(1, 0, 6, 2)) and torch.equal(store.clocks(rows), clocks)
    assert clocks.dtype == torch.int32


def test_rows_without_updates_keep_what_was_written(make: Make) -> None:
    """As when a checkpoint is loaded whose rows were never updated."""
    store = make(NUM_ROWS, WIDTH, initial=first_contents)
    store.put(torch.tensor([3]), torch.zeros(1, WIDTH), counts(0))
    contents, clocks = store.get(torch.tensor([3]))
    assert contents.tolist() == [[0, 0, 0]] and clocks.tolist() == [0]


def test_what_is_read_is_a_copy(make: Make) -> None:
    store = make(NUM_ROWS, WIDTH)
    store.add(torch.tensor([1]), torch.ones(1, WIDTH), counts(1))
    contents, clocks = store.get(torch.tensor([1]))
    contents.zero_()
    clocks.zero_()
    assert store.get(torch.tensor([1]))[0].tolist() == [[1, 1, 1]] and store.clocks(torch.tensor([1])).item() == 1


def test_many_random_operations_agree_with_a_dictionary(make: Make) -> None:
    store = make(NUM_ROWS, WIDTH, initial=first_contents)
    expected = {row: first_contents(torch.tensor([row]))[0] for row in range(NUM_ROWS)}
    clocks = dict.fromkeys(range(NUM_ROWS), 0)
    for step in range(12):
        rows = torch.randperm(NUM_ROWS)[: 600 if step == 3 else 20]  # more than one query of SQLite
        values, updates = torch.randn(len(rows), WIDTH), torch.randint(0, 4, (len(rows),), dtype=torch.int32)
        (store.put if step % 3 == 0 else store.add)(rows, values, updates)
        for row, value, update in zip(rows.tolist(), values, updates.tolist(), strict=True):
            expected[row] = value if step % 3 == 0 else expected[row] + value
            clocks[row] += update
    contents, found = store.get(torch.arange(NUM_ROWS))
    assert torch.equal(contents, torch.stack(list(expected.values())))
    assert found.tolist() == list(clocks.values())


@pytest.mark.parametrize("batch_rows", [1, 2, 100, 10_000])
def test_iterating_gives_rows_that_were_written_in_order(make: Make, batch_rows: int) -> None:
    store = make(NUM_ROWS, WIDTH, initial=first_contents)
    assert list(store.iterate()) == []
    rows = torch.tensor([650, 3, 2, 400])
    store.add(rows, torch.zeros(4, WIDTH), counts(4, 3, 2, 1))
    batches = list(store.iterate(batch_rows))
    assert all(1 <= len(batch[0]) <= batch_rows for batch in batches)
    found, contents, clocks = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert found.tolist() == [2, 3, 400, 650] and clocks.tolist() == [2, 3, 1, 4]
    assert torch.equal(contents, first_contents(found))


def test_no_rows_are_no_work(make: Make) -> None:
    store = make(NUM_ROWS, WIDTH, initial=first_contents)
    none = torch.empty(0, dtype=torch.int64)
    store.add(none, torch.empty(0, WIDTH), counts())
    contents, clocks = store.get(none)
    assert contents.shape == (0, WIDTH) and clocks.shape == (0,) and store.clocks(none).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_numbers_keep_their_type(make: Make, dtype: torch.dtype) -> None:
    store = make(NUM_ROWS, WIDTH, dtype=dtype)
    values = torch.tensor([[1 / 3, -2.5, 1e20]], dtype=torch.float64).to(dtype)
    store.put(torch.tensor([1]), values, counts(1))
    assert torch.equal(store.get(torch.tensor([1]))[0], values) and store.get(torch.tensor([1]))[0].dtype == dtype


def test_rows_out_of_range_are_refused(make: Make) -> None:
    store = make(NUM_ROWS, WIDTH)
    for row in (-1, NUM_ROWS):
        for use in (
            store.get,
            store.clocks,
            lambda rows: store.put(rows, torch.zeros(1, WIDTH), counts(1)),
            lambda rows: store.add(rows, torch.zeros(1, WIDTH), counts(1)),
        ):
            with pytest.raises(IndexError, match=f"rows from {row} to {row}: the store has rows 0 to 699"):
                use(torch.tensor([row]))


@pytest.mark.parametrize("size", [(0, 3), (3, 0)])
def test_empty_stores_are_refused(make: Make, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"(num_rows|width)=0: expected at least 1"):
        make(*size)


@pytest.mark.parametrize("kind", [MmapRowStore, SqliteRowStore])
def test_a_store_on_disk_finds_its_rows_again(kind: type[MmapRowStore | SqliteRowStore], tmp_path: Path) -> None:
    store = kind(tmp_path / "rows", NUM_ROWS, WIDTH, initial=first_contents)
    store.add(torch.tensor([8]), torch.ones(1, WIDTH), counts(3))
    store.flush()
    again = kind(tmp_path / "rows", NUM_ROWS, WIDTH, initial=first_contents)
    contents, clocks = again.get(torch.tensor([8, 9]))
    assert contents.tolist() == [[9, 9.25, 9.5], [9, 9.25, 9.5]] and clocks.tolist() == [3, 0]
    for size, dtype in (((NUM_ROWS, 4), torch.float32), ((9, WIDTH), torch.float32), ((NUM_ROWS, WIDTH), torch.half)):
        with pytest.raises(ValueError, match="use another file"):
            kind(tmp_path / "rows", *size, dtype=dtype)


def test_sqlite_returns_to_the_last_flush(tmp_path: Path) -> None:
    store = SqliteRowStore(tmp_path / "rows", NUM_ROWS, WIDTH)
    store.add(torch.tensor([1]), torch.ones(1, WIDTH), counts(1))
    store.flush()
    store.add(torch.tensor([1, 2]), torch.ones(2, WIDTH), counts(1, 1))
    assert store.clocks(torch.tensor([1, 2])).tolist() == [2, 1]
    other = SqliteRowStore(tmp_path / "rows", NUM_ROWS, WIDTH)  # sees what would be there after a crash
    assert other.clocks(torch.tensor([1, 2])).tolist() == [1, 0]
    store.close()
    assert other.clocks(torch.tensor([1, 2])).tolist() == [2, 1]


def test_a_mapped_file_takes_the_room_of_what_was_written(tmp_path: Path) -> None:
    store = MmapRowStore(tmp_path / "rows", 1_000_000, 64)
    store.add(torch.tensor([999_999]), torch.ones(1, 64), counts(1))
    store.flush()
    status = os.stat(tmp_path / "rows")
    assert status.st_size > 256_000_000 and status.st_blocks * 512 < 1_000_000


def test_a_file_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not rows")
    with pytest.raises(ValueError, match="holds something else, expected"):
        MmapRowStore(tmp_path / "notes", NUM_ROWS, WIDTH)
    assert (tmp_path / "notes").read_text() == "not rows"
