"""Pictures of a benchmark's report: one horizontal bar chart per operator."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from hetu_kernels._common.bench_report import OURS, Report, Row

FORMATS = ("svg", "png")
MISSING = 'plots need matplotlib, which is not installed: pip install "lightning-hetu[plot]"'
_COLORS = ("#c44e52", "#4c72b0", "#55a868", "#8172b3", "#ccb974", "#64b5cd", "#8c8c8c")


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(report: Report, folder: Path, form: str = "svg") -> list[Path]:
    """Draw ``kernels_<op>.<form>`` for every operator of a report.

    A group of bars is a benchmark, a column a pass. Bars are percentages of the device's limit where every benchmark
    of the operator is bound by one, milliseconds otherwise.

    Args:
        report: What was measured.
        folder: Where the pictures go; made if it is not there.
        form: ``svg`` or ``png``.

    Returns:
        The files.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for op in dict.fromkeys(row.op for row in report.rows):
        rows = [row for row in report.rows if row.op == op]
        if any(row.ms is not None for row in rows):
            file = folder / f"kernels_{op}.{form}"
            _chart(report, op, rows, file)
            files.append(file)
    return files


def _chart(report: Report, op: str, rows: Sequence[Row], file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = {(row.benchmark, row.pass_, row.implementation): row for row in rows if row.ms is not None}
    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    names = sorted(dict.fromkeys(row.implementation for row in rows), key=lambda name: name != OURS)
    for (benchmark, pass_, name), without_grad in list(measured.items()):
        if pass_ == "no_grad":  # shapes of inference have no other forward
            measured.setdefault((benchmark, "forward", name), without_grad)
    passes = [pass_ for pass_ in ("forward", "backward", "both") if any(key[1] == pass_ for key in measured)]
    timed = {key[:2] for key in measured}
    percent = all(row.percent_of_limit is not None for row in measured.values())
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}
    thickness = 0.8 / len(names)
    # Without a salt and with a date, the same numbers would make another file every time.
    with matplotlib.rc_context({"svg.hashsalt": op, "font.size": 9}):
        figure = Figure(
            figsize=(2 + 3 * len(passes), 1.6 + 0.18 * len(benchmarks) * (len(names) + 1)), layout="constrained"
        )
        FigureCanvasAgg(figure)
        columns = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
        for axes, pass_ in zip(columns, passes, strict=True):
            for index, name in enumerate(names):
                for group, benchmark in enumerate(benchmarks):
                    y = group - 0.4 + (index + 0.5) * thickness
                    row = measured.get((benchmark, pass_, name))
                    if row is None:
                        if (benchmark, pass_) in timed:
                            axes.text(0, y, " not run", va="center", fontsize=6, color=colors[name])
                        continue
                    value = (row.percent_of_limit if percent else row.ms) or 0.0
                    wrong = row.agrees is False
                    axes.barh(y, value, thickness, color=colors[name], alpha=0.3 if wrong else 1.0)
                    label = f" {value:.0f} %" if percent else f" {value:.3g} ms"
                    axes.text(value, y, label + (" (disagrees)" if wrong else ""), va="center", fontsize=6)
            axes.set_title({"both": "forward and backward"}.get(pass_, pass_))
            axes.set_xlabel("% of the device's limit" if percent else "ms, shorter is better")
            axes.margins(x=0.18)
            axes.spines[["top", "right"]].set_visible(False)
        if percent:
            for axes in columns:
                axes.axvline(100, color="gray", linestyle="--", linewidth=1, zorder=0)
        columns[0].set_yticks(range(len(benchmarks)), benchmarks)
        columns[0].invert_yaxis()
        handles = [matplotlib.patches.Patch(color=color, label=name) for name, color in colors.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
        note = ", tiny shapes: these times mean nothing" if report.tiny else ""
        figure.suptitle(f"{op} on {report.device}{note}")
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
