"""Shapes of which the pictures of plans are made, written as SVG or, with matplotlib, as PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

COLORS = ("#7eb0d5", "#fd7f6f", "#b2e061", "#ffb55a", "#bd7ebe", "#8bd3c7", "#ffee65", "#fdcce5")
GREY, INK, EDGE, RED = "#9aa5b1", "#222222", "#555555", "#c0392b"
_FORMATS = (".svg", ".png")


@dataclass(frozen=True)
class Box:
    """A rectangle, by its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    color: str
    hatched: bool = False
    round: float = 3


@dataclass(frozen=True)
class Words:
    """A line of text on a base line."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    size: int = 12
    bold: bool = False


@dataclass(frozen=True)
class Dashes:
    """A dashed line."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    corners: tuple[tuple[float, float], ...]
    color: str


Shape = Box | Words | Dashes | Area


@dataclass(frozen=True)
class Picture:
    """Shapes on a page of ``width`` by ``height``, with a title for those who cannot see it."""

    title: str
    width: float
    height: float
    shapes: Sequence[Shape]

    def save(self, path: str | Path) -> Path:
        """Writes an SVG or a PNG file and returns its path; PNG needs matplotlib.

        Raises:
            ValueError: If the name ends in neither.
            ImportError: If matplotlib is not there.
        """
        path = check_picture_name(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".svg":
            path.write_text(self.svg(), encoding="utf-8")
        else:
            self._save_png(path)
        return path

    def svg(self) -> str:
        """The picture as SVG text."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}"'
                f' width="{self.width:g}" height="{self.height:g}" font-family="sans-serif" fill="{INK}" role="img">',
                f"<title>{escape(self.title)}</title>",
                '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse"'
                ' patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="6" stroke="#333333" stroke-width="1"/>'
                "</pattern></defs>",
                f'<rect width="{self.width:g}" height="{self.height:g}" rx="6" fill="#ffffff" stroke="#dddddd"/>',
                *(text for shape in self.shapes for text in _as_svg(shape)),
                "</svg>\n",
            ]
        )

    def _save_png(self, path: Path) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
            from matplotlib.patches import Polygon, Rectangle
        except ImportError as error:
            raise ImportError(
                f"picture={str(path)!r} needs matplotlib: pip install matplotlib, or draw an .svg."
            ) from error
        dots = 100
        figure = Figure(figsize=(self.width / dots, self.height / dots), dpi=2 * dots)
        axes: Any = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        axes.axis("off")
        points = 72 / dots  # to a picture of 100 dots per inch, as the SVG's units
        for shape in self.shapes:
            if isinstance(shape, Words):
                axes.text(
                    shape.x, shape.y, shape.text, fontsize=shape.size * points, color=INK, va="baseline",
                    ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
                    weight="bold" if shape.bold else "normal",
                )  # fmt: skip
            elif isinstance(shape, Dashes):
                ends = [shape.x1, shape.x2], [shape.y1, shape.y2]
                axes.plot(*ends, color=RED, linewidth=2 * points, dashes=(3, 2))
            elif isinstance(shape, Area):
                axes.add_patch(Polygon(shape.corners, facecolor=shape.color, linewidth=0))
            else:
                axes.add_patch(
                    Rectangle(
                        (shape.x, shape.y), shape.width, shape.height, facecolor=shape.color, edgecolor=EDGE,
                        linewidth=points, hatch="///" if shape.hatched else None,
                    )
                )  # fmt: skip
        canvas: Any = FigureCanvasAgg(figure)
        canvas.print_png(str(path))


def check_picture_name(path: str | Path) -> Path:
    """The path, if a picture can be saved under it.

    Raises:
        ValueError: If it ends in no known format.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"picture={str(path)!r}: expected a name that ends in {' or '.join(_FORMATS)}.")
    return path


def _as_svg(shape: Shape) -> Iterator[str]:
    if isinstance(shape, Words):
        weight = "bold" if shape.bold else "normal"
        yield (
            f'<text x="{shape.x:g}" y="{shape.y:g}" text-anchor="{shape.anchor}" font-size="{shape.size}"'
            f' font-weight="{weight}">{escape(shape.text)}</text>'
        )
    elif isinstance(shape, Dashes):
        yield (
            f'<line x1="{shape.x1:g}" y1="{shape.y1:g}" x2="{shape.x2:g}" y2="{shape.y2:g}" stroke="{RED}"'
            ' stroke-width="2" stroke-dasharray="4 2"/>'
        )
    elif isinstance(shape, Area):
        corners = " ".join(f"{x:g},{y:g}" for x, y in shape.corners)
        yield f'<polygon points="{corners}" fill="{shape.color}"/>'
    else:
        size = f'width="{shape.width:g}" height="{shape.height:g}" rx="{shape.round:g}"'
        frame = f'x="{shape.x:g}" y="{shape.y:g}" {size}'
        yield f'<rect {frame} fill="{shape.color}" stroke="{EDGE}"/>'
        if shape.hatched:
            yield f'<rect {frame} fill="url(#hatch)"/>'
