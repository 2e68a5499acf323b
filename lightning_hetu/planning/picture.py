"""Draws a plan: a row per stage, a cell per layer, and the memory of the stage.

Cells of one color have one strategy, and hatched ones are recomputed. The bar beside a stage is its predicted peak
memory; the dashed line is the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from lightning_hetu.planning.explain import describe
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan
from lightning_hetu.planning.units import format_bytes, format_seconds

_COLORS = ("#7eb0d5", "#fd7f6f", "#b2e061", "#ffb55a", "#bd7ebe", "#8bd3c7", "#ffee65", "#fdcce5")
_GREY, _INK, _EDGE, _RED = "#9aa5b1", "#222222", "#555555", "#c0392b"
_LEFT, _CELLS, _GAP, _BAR, _MARGIN = 76, 420, 24, 170, 14
_ROW, _HEIGHT, _TOP = 46, 32, 44
_WIDTH = _LEFT + _CELLS + _GAP + _BAR + _MARGIN
_LABEL_WIDTH = 26
_FORMATS = (".svg", ".png")


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float
    color: str
    hatched: bool = False
    round: float = 3


@dataclass(frozen=True)
class _Words:
    x: float
    y: float
    text: str
    anchor: Literal["start", "middle"] = "start"
    size: int = 12
    bold: bool = False


@dataclass(frozen=True)
class _Dashes:
    """A vertical dashed line."""

    x: float
    top: float
    bottom: float


_Shape = _Box | _Words | _Dashes


def check_picture_name(path: str | Path) -> Path:
    """The path, if a picture can be saved under it.

    Raises:
        ValueError: If it ends in no known format.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"picture={str(path)!r}: expected a name that ends in {' or '.join(_FORMATS)}.")
    return path


def save_picture(plan: HybridPlan, path: str | Path) -> Path:
    """Draws a plan as an SVG or a PNG file and returns its path; PNG needs matplotlib.

    Raises:
        ValueError: If the name ends in neither.
        ImportError: If matplotlib is not there.
    """
    path = check_picture_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".svg":
        path.write_text(svg(plan), encoding="utf-8")
    else:
        _save_png(plan, path)
    return path


def svg(plan: HybridPlan) -> str:
    """The picture of a plan as SVG text."""
    shapes, height = _shapes(plan)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}"'
            f' height="{height:g}" font-family="sans-serif" fill="{_INK}" role="img">',
            f"<title>{escape(_title(plan))}</title>",
            '<defs><pattern id="recompute" width="6" height="6" patternUnits="userSpaceOnUse"'
            ' patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="6" stroke="#333333" stroke-width="1"/>'
            "</pattern></defs>",
            f'<rect width="{_WIDTH}" height="{height:g}" rx="6" fill="#ffffff" stroke="#dddddd"/>',
            *(text for shape in shapes for text in _as_svg(shape)),
            "</svg>\n",
        ]
    )


def _as_svg(shape: _Shape) -> Iterator[str]:
    if isinstance(shape, _Words):
        weight = "bold" if shape.bold else "normal"
        yield (
            f'<text x="{shape.x:g}" y="{shape.y:g}" text-anchor="{shape.anchor}" font-size="{shape.size}"'
            f' font-weight="{weight}">{escape(shape.text)}</text>'
        )
    elif isinstance(shape, _Dashes):
        yield (
            f'<line x1="{shape.x:g}" y1="{shape.top:g}" x2="{shape.x:g}" y2="{shape.bottom:g}" stroke="{_RED}"'
            ' stroke-width="2" stroke-dasharray="4 2"/>'
        )
    else:
        size = f'width="{shape.width:g}" height="{shape.height:g}" rx="{shape.round:g}"'
        frame = f'x="{shape.x:g}" y="{shape.y:g}" {size}'
        yield f'<rect {frame} fill="{shape.color}" stroke="{_EDGE}"/>'
        if shape.hatched:
            yield f'<rect {frame} fill="url(#recompute)"/>'


def _save_png(plan: HybridPlan, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError(
            f"picture={str(path)!r} needs matplotlib: pip install matplotlib, or draw an .svg."
        ) from error
    shapes, height = _shapes(plan)
    dots = 100
    figure = Figure(figsize=(_WIDTH / dots, height / dots), dpi=2 * dots)
    axes: Any = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")
    points = 72 / dots  # to a picture of 100 dots per inch, as the SVG's units
    for shape in shapes:
        if isinstance(shape, _Words):
            axes.text(
                shape.x, shape.y, shape.text, fontsize=shape.size * points, color=_INK,
                ha="left" if shape.anchor == "start" else "center", va="baseline",
                weight="bold" if shape.bold else "normal",
            )  # fmt: skip
        elif isinstance(shape, _Dashes):
            axes.plot([shape.x, shape.x], [shape.top, shape.bottom], color=_RED, linewidth=2 * points, dashes=(3, 2))
        else:
            axes.add_patch(
                Rectangle(
                    (shape.x, shape.y), shape.width, shape.height, facecolor=shape.color, edgecolor=_EDGE,
                    linewidth=points, hatch="///" if shape.hatched else None,
                )
            )  # fmt: skip
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(str(path))


# ---- what is where --------------------------------------------------------------------------------------------------


def _title(plan: HybridPlan) -> str:
    count = plan.num_microbatches
    title = f"{plan.world_size} devices, {count} microbatch{'es' * (count > 1)} of {plan.microbatch_size} samples"
    if plan.prediction is not None:
        title += f", predicted step {format_seconds(plan.prediction.iteration_time)}"
    return title


def _shapes(plan: HybridPlan) -> tuple[list[_Shape], float]:
    """All shapes of a picture, and its height."""
    strategies = list(dict.fromkeys(strategy for _, strategy in plan.rows()))
    colors = {strategy: _COLORS[index % len(_COLORS)] for index, strategy in enumerate(strategies)}
    shapes: list[_Shape] = [_Words(_MARGIN, 24, _title(plan), size=13)]
    if plan.prediction is not None:
        shapes.append(_Words(_LEFT + _CELLS + _GAP, 24, "peak memory per device", size=13))
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
        shapes.append(_Box(x, y, 16, 14, colors[strategy], strategy.recompute))
        shapes.append(_Words(x + 22, y + 12, words))
        x += 40 + 7 * len(words)
    return shapes, y + 30


def _stage(plan: HybridPlan, stage: int, y: float, colors: dict[LayerStrategy, str]) -> list[_Shape]:
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
    shapes: list[_Shape] = [_Words(_MARGIN, y + _HEIGHT / 2 + 4, f"stage {stage}", bold=True)]
    for position, (name, strategy) in enumerate(rows):
        x = _LEFT + position * width
        shapes.append(_Box(x, y, width - gap, _HEIGHT, colors[strategy], strategy.recompute))
        if width >= _LABEL_WIDTH:
            shapes.append(_Words(x + (width - gap) / 2, y + _HEIGHT / 2 + 4, name, anchor="middle"))
    return shapes


def _memory(used: int, budget: int | None, longest: int, y: float) -> Sequence[_Shape]:
    """A bar of predicted memory; all bars of a plan are to the same scale."""
    x, scale = _LEFT + _CELLS + _GAP, (_BAR - 10) / max(longest, 1)
    words = format_bytes(used) + (f" of {format_bytes(budget)}" if budget else "")
    shapes: list[_Shape] = [_Box(x, y + 16, used * scale, 14, _GREY, round=0), _Words(x, y + 10, words, size=11)]
    if budget:
        shapes.append(_Dashes(x + budget * scale, y + 12, y + 34))
    return shapes
