"""Text tables: a heading, a rule, and lines of cells under each other."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """The lines, the first of which is the heading, with cells padded to the width of their column."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [" | ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([rows[0], "-+-".join("-" * width for width in widths), *rows[1:]])
