"""Draws what a policy did with a trace: load of experts, on how many ranks they were, and load of ranks, over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hetu.moe.placement.replay import Replay
from lightning_hetu.moe.placement.traces import check_trace
from lightning_hetu.planning.drawing import Area, Picture, Shape, Words

_LEFT, _WIDTH, _RIGHT, _TOP, _GAP = 60, 600, 130, 30, 34
_COLUMNS = 150  # steps that are drawn; of more, means
_LEVELS = 8
_WHITE, _RED, _BLUE = (255, 255, 255), (176, 24, 43), (33, 102, 172)


def save_heat_map(trace: ArrayLike, found: Replay, path: str | Path) -> Path:
    """Draws a replay as an SVG or a PNG file and returns its path; PNG needs matplotlib.

    Args:
        trace: What was replayed, ``[steps, ranks, experts]``.
        found: What came of it.
        path: Where to.

    Raises:
        ValueError: If the name ends in neither, or the replay has another number of steps.
        ImportError: If matplotlib is not there.
    """
    return heat_map(trace, found).save(path)


def heat_map(trace: ArrayLike, found: Replay) -> Picture:
    """The picture; arguments as of :func:`save_heat_map`."""
    counts = check_trace(trace).sum(axis=1).astype(np.float64)
    if len(counts) != len(found.ratios):
        raise ValueError(f"trace of {len(counts)} steps: expected the {len(found.ratios)} that were replayed.")
    loads = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-12)
    holders = np.array([[len(ranks) for ranks in placement.all_holders] for placement in found.placements])
    ranks = found.rank_loads / np.maximum(found.rank_loads.mean(axis=1, keepdims=True), 1e-12)
    panels = (
        ("tokens of experts, relative to the mean", "expert", loads, (0.0, 2.0), _RED),
        ("ranks that hold them", "expert", holders.astype(np.float64), (1.0, 2.0), _BLUE),
        ("tokens of ranks, relative to the mean", "rank", ranks, (1.0, 1.2), _RED),
    )
    title = f"{len(counts)} steps, mean balance ratio {found.mean_ratio():.3f}, {found.num_ops} operations"
    shapes: list[Shape] = [Words(_LEFT, 18, title, size=13)]
    y = float(_TOP)
    for name, row, values, scale, color in panels:
        drawn, height = _panel(values, scale, color, y + 18)
        shapes += [Words(_LEFT, y + 12, name, size=11), *drawn]
        shapes += [Words(_LEFT - 6, y + 28, f"{row} 0", anchor="end", size=10)]
        shapes += [Words(_LEFT - 6, y + 16 + height, str(values.shape[1] - 1), anchor="end", size=10)]
        y += height + _GAP
    return Picture(title, _LEFT + _WIDTH + _RIGHT, y + 4, shapes)


def _panel(
    values: NDArray[np.float64], scale: tuple[float, float], color: tuple[int, int, int], top: float
) -> tuple[list[Shape], float]:
    """A row for each column of the values, in colors of at least this scale, and what they mean; and its height."""
    low, high = scale
    means = np.stack([part.mean(axis=0) for part in np.array_split(values, min(len(values), _COLUMNS))])
    high = max(float(np.quantile(means, 0.98)), high)  # one outlier should not bleach all others
    levels = np.clip(np.round((means - low) / (high - low) * _LEVELS), 0, _LEVELS).astype(int)
    columns, rows = levels.shape
    height, width = max(160 / rows, 5.0) if rows > 8 else 14.0, _WIDTH / columns
    shapes: list[Shape] = []
    for row in range(rows):
        y = top + row * height
        for first, last in _runs(levels[:, row].tolist()):
            level = int(levels[first, row])
            shapes.append(_rectangle(_LEFT + first * width, y, (last - first) * width, height, _shade(level, color)))
    x = _LEFT + _WIDTH + 10
    for step, level in enumerate((_LEVELS, _LEVELS // 2, 0)):
        shapes.append(_rectangle(x, top + step * 16, 14, 12, _shade(level, color)))
        shapes.append(Words(x + 20, top + step * 16 + 10, f"{low + (high - low) * level / _LEVELS:.2f}", size=10))
    return shapes, rows * height


def _runs(levels: Sequence[int]) -> list[tuple[int, int]]:
    """Where runs of equal levels begin and end."""
    starts = [index for index, level in enumerate(levels) if index == 0 or level != levels[index - 1]]
    return list(zip(starts, [*starts[1:], len(levels)], strict=True))


def _rectangle(x: float, y: float, width: float, height: float, color: str) -> Area:
    return Area(((x, y), (x + width, y), (x + width, y + height), (x, y + height)), color)


def _shade(level: int, color: tuple[int, int, int]) -> str:
    """From nearly white to the color."""
    share = 0.06 + 0.94 * level / _LEVELS
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_WHITE, color, strict=True))
