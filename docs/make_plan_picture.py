"""Draws a plan file as an SVG picture: a row per stage, a cell per layer, and the memory of the stage.

    python docs/make_plan_picture.py docs/numbers/plan_gpt_auto.json docs/images/plan.svg

Cells of one color have one strategy, and hatched ones are recomputed. The bar beside a stage is its predicted peak
memory; the dashed line is the budget.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

from lightning_hetu.planning import HybridPlan, LayerStrategy, format_bytes
from lightning_hetu.planning.explain import describe
from lightning_hetu.planning.units import format_seconds

_COLORS = ("#7eb0d5", "#fd7f6f", "#b2e061", "#ffb55a", "#bd7ebe", "#8bd3c7", "#ffee65", "#fdcce5")
_LEFT, _CELLS, _GAP, _BAR, _MARGIN = 76, 420, 24, 170, 14
_ROW, _HEIGHT, _TOP = 46, 32, 44
_WIDTH = _LEFT + _CELLS + _GAP + _BAR + _MARGIN
_LABEL_WIDTH = 26


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, weight: str = "normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def _cell(x: float, y: float, width: float, height: float, color: str, *, hatched: bool) -> list[str]:
    frame = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"'
    shapes = [f'<rect {frame} fill="{color}" stroke="#555555"/>']
    return [*shapes, f'<rect {frame} fill="url(#recompute)"/>'] if hatched else shapes


def _stage(plan: HybridPlan, stage: int, y: float, colors: dict[LayerStrategy, str]) -> list[str]:
    """The cells of one stage, all stages to the same scale."""
    first, last = plan.stage_bounds[stage]
    rows = [(str(index), plan.layers[index]) for index in range(first, last)]
    if stage == 0:
        rows.insert(0, ("emb", plan.embedding))
    if stage == plan.pipeline_parallel_size - 1:
        rows.append(("head", plan.head))
    # Embedding and head are cells too, so the fullest stage has at most its blocks and two more.
    width = _CELLS / (max(plan.stages) + (2 if plan.pipeline_parallel_size == 1 else 1))
    shapes = [_text(_MARGIN, y + _HEIGHT / 2 + 4, f"stage {stage}", weight="bold")]
    for position, (name, strategy) in enumerate(rows):
        x = _LEFT + position * width
        shapes += _cell(x, y, width - 3, _HEIGHT, colors[strategy], hatched=strategy.recompute)
        if width >= _LABEL_WIDTH:
            shapes.append(_text(x + (width - 3) / 2, y + _HEIGHT / 2 + 4, name, anchor="middle"))
    return shapes


def _memory(used: int, budget: int | None, longest: int, y: float) -> list[str]:
    """A bar of predicted memory; all bars of a plan are to the same scale."""
    x, scale = _LEFT + _CELLS + _GAP, (_BAR - 10) / max(longest, 1)
    words = format_bytes(used) + (f" of {format_bytes(budget)}" if budget else "")
    shapes = [
        f'<rect x="{x}" y="{y + 16}" width="{used * scale:g}" height="14" fill="#9aa5b1" stroke="#555555"/>',
        _text(x, y + 10, words, size=11),
    ]
    if budget:
        edge = x + budget * scale
        shapes.append(
            f'<line x1="{edge:g}" y1="{y + 12}" x2="{edge:g}" y2="{y + 34}" stroke="#c0392b" stroke-width="2"'
            ' stroke-dasharray="4 2"/>'
        )
    return shapes


def draw(plan: HybridPlan) -> str:
    """The picture of a plan as SVG text."""
    strategies = list(dict.fromkeys(strategy for _, strategy in plan.rows()))
    colors = {strategy: _COLORS[index % len(_COLORS)] for index, strategy in enumerate(strategies)}
    title = f"{plan.world_size} devices, {plan.num_microbatches} microbatches of {plan.microbatch_size} samples"
    if plan.prediction is not None:
        title += f", predicted step {format_seconds(plan.prediction.iteration_time)}"
    shapes = [_text(_MARGIN, 24, title, size=13)]
    if plan.prediction is not None:
        shapes.append(_text(_LEFT + _CELLS + _GAP, 24, "peak memory per device", size=13))
    for stage in range(plan.pipeline_parallel_size):
        y = _TOP + stage * _ROW
        shapes += _stage(plan, stage, y, colors)
        if plan.prediction is not None:
            budget = plan.prediction.memory_budget
            longest = max(*plan.prediction.stage_memory, budget or 0)
            shapes += _memory(plan.prediction.stage_memory[stage], budget, longest, y)
    x, y = float(_LEFT), _TOP + plan.pipeline_parallel_size * _ROW + 4
    for strategy in strategies:
        words = describe(strategy)
        if x > _LEFT and x + 30 + 7 * len(words) > _WIDTH:
            x, y = float(_LEFT), y + 22
        shapes += _cell(x, y, 16, 14, colors[strategy], hatched=strategy.recompute)
        shapes.append(_text(x + 22, y + 12, words))
        x += 40 + 7 * len(words)
    height = y + 30
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}"'
            f' height="{height}" font-family="sans-serif" fill="#222222" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><pattern id="recompute" width="6" height="6" patternUnits="userSpaceOnUse"'
            ' patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="6" stroke="#333333" stroke-width="1"/>'
            "</pattern></defs>",
            f'<rect width="{_WIDTH}" height="{height}" rx="6" fill="#ffffff" stroke="#dddddd"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def main(source: str, target: str) -> None:
    """Reads a plan file and writes its picture."""
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(draw(HybridPlan.load(source)), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python docs/make_plan_picture.py PLAN.json PICTURE.svg")
    main(*sys.argv[1:])
