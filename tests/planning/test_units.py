"""Sizes are read as people write them."""

from __future__ import annotations

import pytest

from lightning_hetu.planning import format_bytes, parse_bytes
from lightning_hetu.planning.units import format_seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (1.5e9, 1_500_000_000),
        ("7", 7),
        ("20GiB", 20 * 2**30),
        ("36GB", 36 * 10**9),
        (" 512 mib ", 512 * 2**20),
        ("0.5KB", 500),
        ("1.5TiB", 3 * 2**39),
        ("10b", 10),
    ],
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    """GB is 10**9 and GiB is 2**30, in any case and with or without a space."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("value", ["", "GiB", "-1GiB", "1 GiBs", "1e9", 0, -5, True, float("nan"), float("inf"), None])
def test_other_values_are_errors(value: object) -> None:
    """The error names argument and value on one line."""
    with pytest.raises(ValueError, match="budget=") as error:
        parse_bytes(value, name="budget")  # type: ignore[arg-type]
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


def test_sizes_and_durations_are_written_for_people() -> None:
    """Four digits and the unit that fits."""
    assert [format_bytes(n) for n in (0, 1023, 2**20, 20.25 * 2**30, 1000 * 2**30, 5000 * 2**40)] == [
        "0 B",
        "1023 B",
        "1 MiB",
        "20.25 GiB",
        "1000 GiB",
        "5000 TiB",
    ]
    assert [format_seconds(t) for t in (12.3456, 0.0123456, 1.5e-5, 0)] == ["12.35 s", "12.35 ms", "15 us", "0 us"]
