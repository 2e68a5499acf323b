"""Checks of gates' options; every complaint names the option, its value, and what is allowed."""

from __future__ import annotations

import math
from typing import Any, get_args


def check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}.")


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """``allowed`` is a Literal type."""
    if value not in get_args(allowed):
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, get_args(allowed)))}.")


def check_number(
    name: str, value: float, least: float = 0.0, most: float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """``above`` and ``below`` exclude the two ends."""
    too_low = value <= least if above else value < least
    too_high = value >= most if below else value > most
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value) or too_low or too_high:
        low = f"above {least:g}" if above else f"at least {least:g}"
        high = "" if math.isinf(most) else f" and below {most:g}" if below else f" and at most {most:g}"
        raise ValueError(f"{name}={value!r}: expected a number {low}{high}.")


def check_at_most(name: str, value: int, limit: int, of: str) -> None:
    check_count(name, value)
    if value > limit:
        raise ValueError(f"{name}={value}: expected at most {of}={limit}; lower {name} or raise {of}.")


def check_divides(name: str, value: int, whole: int, of: str) -> None:
    check_count(name, value)
    if whole % value:
        raise ValueError(f"{name}={value}: expected a divisor of {of}={whole}.")
