"""Sizes as people write them: ``"20GiB"`` is 20 * 2**30 bytes, ``"36GB"`` is 36 * 10**9 bytes."""

from __future__ import annotations

import math
import re

_FACTORS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_NAMES = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_bytes(value: int | float | str, *, name: str = "memory_budget") -> int:
    """Reads a positive number of bytes.

    Args:
        value: A number of bytes, or text with a unit: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB
            (powers of 1024). Fractions are rounded down to whole bytes.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: If the value is not a positive size.
    """
    size: float = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match and match.group(2).upper() in _FACTORS:
            number, unit = match.groups()
            factor = _FACTORS[unit.upper()]
            size = int(number) * factor if number.isdigit() else float(number) * factor
    if not math.isfinite(size) or size < 1:
        raise ValueError(f"{name}={value!r}: expected a positive number of bytes, or text such as '20GiB' or '512MiB'.")
    return int(size)


def format_bytes(size: float) -> str:
    """Text of a size for people, in powers of 1024 and four digits, for example ``"35.9 GiB"``."""
    size = float(size)
    for unit in _NAMES:
        if abs(size) < 1024 or unit == _NAMES[-1]:
            digits = ".4g" if abs(size) < 1000 and unit != "B" else ".0f"
            return f"{size:{digits}} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """Text of a duration for people, in four digits, for example ``"12.31 ms"``."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.4g} {unit}"
    raise AssertionError("unreachable")
