"""Draws an OSDP plan: the memory over one step by category under the line of the limit, and what each mode holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_hetu.planning.drawing import COLORS, EDGE, Area, Box, Dashes, Picture, Shape, Words
from lightning_hetu.planning.osdp.plan import OSDPPlan
from lightning_hetu.planning.osdp.timeline import CATEGORIES, Point
from lightning_hetu.planning.units import format_bytes, format_seconds

_LEFT, _CHART, _RIGHT = 84, 580, 20
_TOP, _HEIGHT = 44, 240
_WIDTH = _LEFT + _CHART + _RIGHT
_TICKS = 4


def save_memory_picture(plan: OSDPPlan, path: str | Path) -> Path:
    """Draws a plan as an SVG or a PNG file and returns its path; PNG needs matplotlib.

    Raises:
        ValueError: If the name ends in neither, or the plan does not know its memory over a step.
        ImportError: If matplotlib is not there.
    """
    return memory_picture(plan).save(path)


def memory_picture(plan: OSDPPlan) -> Picture:
    """The memory over one step.

    Raises:
        ValueError: If the plan was made without a profile of the model's step.
    """
    if not plan.points:
        raise ValueError("plan.points is empty: only a plan made with a profile of a step knows its memory over it.")
    top = max(plan.peak_memory, plan.memory_limit or 0) * 1.05
    shapes: list[Shape] = [Words(14, 24, _title(plan), size=13)]
    shapes += _axis(top)
    shapes += _areas(plan.points, top)
    y = float(_TOP + _HEIGHT)
    shapes += [Words(x, y + 18, text, anchor="middle", size=11) for x, text in _phases(plan.points)]
    if plan.memory_limit is not None:
        line = _y(plan.memory_limit, top)
        shapes.append(Dashes(_LEFT, line, _LEFT + _CHART, line))
        shapes.append(Words(_LEFT + 4, line - 5, f"limit {format_bytes(plan.memory_limit)}", size=11))
    x, y = float(_LEFT), y + 34
    for category, color in zip(CATEGORIES, COLORS, strict=False):
        if x + 30 + 7 * len(category) > _WIDTH:
            x, y = float(_LEFT), y + 22
        shapes += [Box(x, y, 16, 14, color), Words(x + 22, y + 12, category)]
        x += 40 + 7 * len(category)
    y += 40
    for mode, count, share in _modes(plan):
        shapes.append(Words(_LEFT - 8, y, mode, anchor="end"))
        shapes.append(Box(_LEFT, y - 11, max(share * (_CHART - 220), 1.0), 14, EDGE, round=0))
        shapes.append(Words(_LEFT + share * (_CHART - 220) + 8, y, f"{share:.1%} of parameters, {count}", size=11))
        y += 20
    return Picture(_title(plan), _WIDTH, y + 4, shapes)


def _title(plan: OSDPPlan) -> str:
    ranks = plan.world_size
    return (
        f"memory of one step on each of {ranks} rank{'s' * (ranks > 1)}: at most {format_bytes(plan.peak_memory)},"
        f" predicted step {format_seconds(plan.seconds)}"
    )


def _y(size: float, top: float) -> float:
    return _TOP + _HEIGHT * (1 - size / top)


def _axis(top: float) -> list[Shape]:
    shapes: list[Shape] = []
    for tick in range(_TICKS + 1):
        size = top * tick / _TICKS
        shapes.append(Words(_LEFT - 8, _y(size, top) + 4, format_bytes(int(size)), anchor="end", size=11))
    return shapes


def _areas(points: Sequence[Point], top: float) -> list[Shape]:
    """A band per category, one on top of the other."""
    step = _CHART / len(points)
    below = [0.0] * len(points)
    shapes: list[Shape] = []
    for category, color in zip(range(len(CATEGORIES)), COLORS, strict=False):
        above = [low + point.memory[category] for low, point in zip(below, points, strict=True)]
        if above != below:
            edge = [(_LEFT + (i + j) * step, _y(size, top)) for i, size in enumerate(above) for j in (0, 1)]
            back = [(_LEFT + (i + j) * step, _y(size, top)) for i, size in enumerate(below) for j in (0, 1)]
            shapes.append(Area((*edge, *reversed(back)), color))
        below = above
    return shapes


def _phases(points: Sequence[Point]) -> list[tuple[float, str]]:
    """Where the names of the phases stand: in the middle of their points, whose labels begin with them."""
    step = _CHART / len(points)
    runs: list[tuple[str, int, int]] = []
    for index, point in enumerate(points):
        phase = point.label.split(":")[0]
        if runs and runs[-1][0] == phase:
            runs[-1] = (phase, runs[-1][1], index + 1)
        else:
            runs.append((phase, index, index + 1))
    wide = [(phase, first, last) for phase, first, last in runs if (last - first) * step >= 7 * len(phase)]
    return [(_LEFT + (first + last) / 2 * step, phase) for phase, first, last in wide]


def _modes(plan: OSDPPlan) -> list[tuple[str, str, float]]:
    """Every mode with how many operators have it and the share of parameters in them."""
    whole = sum(operator.count for operator in plan.operators) or 1
    counts: dict[str, list[float]] = {}
    for operator in plan.operators:
        for mode, slices in operator.parts:
            row = counts.setdefault(mode, [0, 0.0])
            row[0] += 1
            row[1] += operator.count * slices / operator.slices
    return [
        (mode, f"{int(number)} operator{'s' * (number > 1)}", parameters / whole)
        for mode, (number, parameters) in sorted(counts.items())
    ]
