"""What a benchmark reports: its rows, their JSON, and tables of them. Needs neither a GPU nor torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

OURS = "ours"
_REASON_LENGTH = 160
# Distributions that peers come from; the report tells the versions of those that are installed.
_PEER_DISTRIBUTIONS = (
    "apex", "cut-cross-entropy", "fbgemm-gpu", "flash-attn", "flash-linear-attention", "flashinfer-python",
    "liger-kernel", "scattermoe", "transformer-engine", "xformers",
)  # fmt: skip


def one_line(error: BaseException) -> str:
    """What an exception says, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):  # it only announces what it has to say
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."


@dataclass(frozen=True)
class Limits:
    """What the device can do, measured.

    Args:
        copy_gb_s: Bytes read plus bytes written per second by a copy within its memory, in 10^9.
        matmul_tflop_s: Operations per second of a large bfloat16 matrix product of random numbers, in 10^12.
    """

    copy_gb_s: float
    matmul_tflop_s: float


@dataclass(frozen=True)
class Row:
    """One line of the report: an implementation in one pass of a benchmark.

    Args:
        op: Operator.
        benchmark: Name of its benchmark.
        pass_: ``forward``, ``backward``, ``both``, ``no_grad``, or ``all`` where an implementation cannot run at all.
        implementation: ``ours`` or the name of a peer.
        ms: Median of the time.
        ms_p20: Its 20th percentile.
        ms_p80: Its 80th percentile.
        gb_s: Bytes that must be moved, in 10^9 per second.
        tflop_s: Operations that must be done, in 10^12 per second.
        bound: Which of the device's limits it is nearer to, ``memory`` or ``compute``.
        limit: That limit, in the unit of ``gb_s`` or ``tflop_s``.
        percent_of_limit: What it reaches of it.
        ratio_to_ours: Its time over ours: above 1, ours is faster.
        best_peer: Of ours only: the fastest peer that agrees with it.
        ratio_to_best: Of ours only: that peer's time over ours.
        peak_bytes: Memory above that of the arguments; in ``backward`` with what forward has kept.
        host_us: Microseconds until the call returns, with an idle device.
        config: Of ours only: configurations of matrix kernels by their names.
        agrees: Results are like ours; None where that is not known.
        reason: Why there is no time, or in what it differs from ours.
    """

    op: str
    benchmark: str
    pass_: str
    implementation: str
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    bound: str | None = None
    limit: float | None = None
    percent_of_limit: float | None = None
    ratio_to_ours: float | None = None
    best_peer: str | None = None
    ratio_to_best: float | None = None
    peak_bytes: int | None = None
    host_us: float | None = None
    config: dict[str, Any] | None = None
    agrees: bool | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers to six digits, and what there is nothing to say about is left out."""
        return {
            "pass" if name == "pass_" else name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
            if value is not None
        }

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Row:
        """The row that :meth:`to_dict` wrote."""
        return Row(**{"pass_" if name == "pass" else name: value for name, value in fields.items()})

    @property
    def failed(self) -> bool:
        """Ours, without a time."""
        return self.implementation == OURS and self.ms is None


def speeds(work: tuple[int, int], ms: float, limits: Limits) -> dict[str, Any]:
    """Bytes and operations per second, and what they are of the limit that is nearer.

    Args:
        work: Bytes and operations; 0 for what does not bound the time.
        ms: Milliseconds they took.
        limits: What the device can do.
    """
    found: dict[str, Any] = {}
    nearest = 0.0
    for amount, scale, name, bound, limit in (
        (work[0], 1e-9, "gb_s", "memory", limits.copy_gb_s),
        (work[1], 1e-12, "tflop_s", "compute", limits.matmul_tflop_s),
    ):
        if amount and ms > 0:
            found[name] = amount / (ms * 1e-3) * scale
            if found[name] / limit > nearest:
                nearest = found[name] / limit
                found.update(bound=bound, limit=limit, percent_of_limit=100 * nearest)
    return found


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Rows of one pass, with what they are to ours."""
    own = next((row for row in rows if row.implementation == OURS and row.ms), None)
    if own is None or own.ms is None:
        return list(rows)
    peers = [row for row in rows if row.implementation != OURS and row.ms is not None and row.agrees]
    best = min(peers, key=lambda row: row.ms or 0.0, default=None)
    made = [row if row.ms is None else replace(row, ratio_to_ours=row.ms / own.ms) for row in rows]
    if best is not None and best.ms is not None:
        index = next(index for index, row in enumerate(rows) if row is own)
        made[index] = replace(made[index], best_peer=best.implementation, ratio_to_best=best.ms / own.ms)
    return made


@dataclass
class Report:
    """A run of the benchmark, or of several that resumed each other.

    Args:
        device: Name of the device.
        arch: Its architecture.
        versions: Of the packages that matter.
        tiny: Tiny shapes, whose times mean nothing.
        peers: All peers were asked for.
        limits: Of the device, from the latest run; a row knows the limit it was compared with.
        date: When the latest run started.
        command: How it was started.
        rows: What was measured.
    """

    device: str
    arch: str
    versions: dict[str, str]
    tiny: bool
    peers: bool
    limits: Limits | None = None
    date: str = ""
    command: str = ""
    rows: list[Row] = field(default_factory=list)

    def finished(self, op: str, benchmark: str) -> bool:
        """Whether a benchmark need not run again. The rows of one that was broken off tell of a peer only."""
        return any((row.op, row.benchmark, row.implementation) == (op, benchmark, OURS) for row in self.rows)

    def broken(self, op: str, benchmark: str) -> set[str]:
        """Peers that have failed in a benchmark."""
        return {
            row.implementation
            for row in self.rows
            if (row.op, row.benchmark) == (op, benchmark) and row.implementation != OURS and row.ms is None
        }

    def save(self, file: Path) -> None:
        """Write it as JSON, whole or not at all."""
        fields = {
            "device": self.device,
            "arch": self.arch,
            "versions": self.versions,
            "tiny": self.tiny,
            "peers": self.peers,
            "date": self.date,
            "command": self.command,
            "limits": asdict(self.limits) if self.limits else None,
            "rows": [row.to_dict() for row in self.rows],
        }
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(fields, indent=1) + "\n")
        os.replace(part, file)

    @staticmethod
    def load(file: Path) -> Report:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is no such file.
        """
        try:
            fields = json.loads(file.read_text())
            limits = fields.pop("limits")
            rows = [Row.from_dict(row) for row in fields.pop("rows")]
            return Report(**fields, limits=Limits(**limits) if limits else None, rows=rows)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is no report of hetu_kernels.bench ({one_line(error)}).") from None


def versions() -> dict[str, str]:
    """Versions of torch, triton and of the peers that are installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "lightning-hetu", *_PEER_DISTRIBUTIONS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def goals(specs: Iterable[Any]) -> str:
    """What each operator should reach, as a table in Markdown."""
    rows = [f"| `{spec.name}` | {spec.goal} |" for spec in specs]
    return "\n".join(["| operator | goal |", "|---|---|", *rows])


def table(report: Report) -> str:
    """The report as text: what it was measured on, then a table per operator."""
    packages = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [f"{report.device} ({report.arch}), {packages}, {report.date}"]
    if report.tiny:
        lines.append("tiny shapes, called once: these times mean nothing")
    if report.limits:
        limits = report.limits
        lines.append(
            f"limits: copy {limits.copy_gb_s:.4g} GB/s, bf16 matrix product {limits.matmul_tflop_s:.4g} TFLOP/s"
        )
    for op in dict.fromkeys(row.op for row in report.rows):
        lines += ["", op, _aligned([_HEADS, *(_cells(row) for row in report.rows if row.op == op)])]
    return "\n".join(lines)


_HEADS = (
    "benchmark", "pass", "implementation", "ms", "p20..p80", "GB/s", "TFLOP/s", "% of limit", "time/ours", "MiB",
    "host us", "remark",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str = ".4g") -> str:
        return "" if value is None else format(value, form)

    remarks = [row.reason or ""]
    if row.agrees is False:
        remarks.insert(0, "DISAGREES:")
    if row.ratio_to_best is not None:
        remarks.append(f"{row.ratio_to_best:.2f}x the speed of {row.best_peer}")
    spread = "" if row.ms_p20 is None or row.ms_p80 is None else f"{row.ms_p20:.4g}..{row.ms_p80:.4g}"
    return (
        row.benchmark, row.pass_, row.implementation, number(row.ms), spread, number(row.gb_s), number(row.tflop_s),
        number(row.percent_of_limit, ".1f"), number(row.ratio_to_ours, ".2f"),
        number(None if row.peak_bytes is None else row.peak_bytes / 2**20, ".1f"), number(row.host_us, ".1f"),
        " ".join(filter(None, remarks)),
    )  # fmt: skip


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
