"""Draws a plan: a row per stage, a cell per layer, and the memory of the stage.

Cells of one color have one strategy, and hatched ones are recomputed. The bar beside a stage is its predicted peak
memory; the dashed line is the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_hetu.planning.drawing import COLORS, GREY, Box, Dashes, Picture, Shape, Words
from lightning_hetu.planning.explain import describe
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan
from lightning_hetu.planning.units import format_bytes, format_seconds

_LEFT, _CELLS, _GAP, _BAR, _MARGIN = 76, 420, 24, 170, 14
_ROW, _HEIGHT, _TOP = 46, 32, 44
_WIDTH = _LEFT + _CELLS + _GAP + _BAR + _MARGIN
_LABEL_WIDTH = 26


def save_picture(plan: HybridPlan, path: str | Path) -> Path:
    """Draws a plan as an SVG or a PNG file and returns its path; PNG needs matplotlib.

    Raises:
        ValueError: If the name ends in neither.
        ImportError: If matplotlib is not there.
    """
    return picture(plan).save(path)


def svg(plan: HybridPlan) -> str:
    """The picture of a plan as SVG text."""
    return picture(plan).svg()


def picture(plan: HybridPlan) -> Picture:
    """The picture of a plan."""
    shapes, height = _shapes(plan)
    return Picture(_title(plan), _WIDTH, height, shapes)


def _title(plan: HybridPlan) -> str:
    count = plan.num_microbatches
    title = f"{plan.world_size} devices, {count} microbatch{'es' * (count > 1)} of {plan.microbatch_size} samples"
    if plan.prediction is not None:
        title += f", predicted step {format_seconds(plan.prediction.iteration_time)}"
    return title


def _shapes(plan: HybridPlan) -> tuple[list[Shape], float]:
    """All shapes of a picture, and its height."""
    strategies = list(dict.fromkeys(strategy for _, strategy in plan.rows()))
    colors = {strategy: COLORS[index % len(COLORS)] for index, strategy in enumerate(strategies)}
    shapes: list[Shape] = [Words(_MARGIN, 24, _title(plan), size=13)]
    if plan.prediction is not None:
        shapes.append(Words(_LEFT + _CELLS + _GAP, 24, "peak memory per device", size=13))
    for stage in range(len(plan.stages)):
        y = float(_TOP + stage * _ROW)
        shapes += _stage(plan, stage, y, colors)
        if plan.prediction is not None:
            budget = plan.prediction.memory_budget
            longest = max(*plan.prediction.stage_memory, budget or 0)
            shapes += _memory(plan.prediction.stage_memory[stage], budget, longest, y)
    x, y = float(_LEFT), float(_TOP + len(plan.stages) * _ROW + 4)
    for strategy in strategies:
        words = describe(strategy)
        if x > _LEFT and x + 30 + 7 * len(words) > _WIDTH:
            x, y = float(_LEFT), y + 22
        shapes.append(Box(x, y, 16, 14, colors[strategy], strategy.recompute))
        shapes.append(Words(x + 22, y + 12, words))
        x += 40 + 7 * len(words)
    return shapes, y + 30


def _stage(plan: HybridPlan, stage: int, y: float, colors: dict[LayerStrategy, str]) -> list[Shape]:
    """The cells of one stage, all stages to the same scale."""
    first, last = plan.stage_bounds[stage]
    rows = [(str(index), plan.layers[index]) for index in range(first, last)]
    if stage == 0:
        rows.insert(0, ("emb", plan.embedding))
    if stage == len(plan.stages) - 1:
        rows.append(("head", plan.head))
    # Embedding and head are cells too, so the fullest stage has at most its blocks and two more.
    width = _CELLS / (max(plan.stages) + (2 if len(plan.stages) == 1 else 1))
    gap = min(3.0, width / 4)
    shapes: list[Shape] = [Words(_MARGIN, y + _HEIGHT / 2 + 4, f"stage {stage}", bold=True)]
    for position, (name, strategy) in enumerate(rows):
        x = _LEFT + position * width
        shapes.append(Box(x, y, width - gap, _HEIGHT, colors[strategy], strategy.recompute))
        if width >= _LABEL_WIDTH:
            shapes.append(Words(x + (width - gap) / 2, y + _HEIGHT / 2 + 4, name, anchor="middle"))
    return shapes


def _memory(used: int, budget: int | None, longest: int, y: float) -> Sequence[Shape]:
    """A bar of predicted memory; all bars of a plan are to the same scale."""
    x, scale = _LEFT + _CELLS + _GAP, (_BAR - 10) / max(longest, 1)
    words = format_bytes(used) + (f" of {format_bytes(budget)}" if budget else "")
    shapes: list[Shape] = [Box(x, y + 16, used * scale, 14, GREY, round=0), Words(x, y + 10, words, size=11)]
    if budget:
        shapes.append(Dashes(x + budget * scale, y + 12, x + budget * scale, y + 34))
    return shapes
