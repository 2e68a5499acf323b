"""``python -m hetu_kernels.bench``: time every operator and its peers on one GPU, against what that GPU can do."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import torch

from hetu_kernels._common import bench_plot, config
from hetu_kernels._common.bench import CudaMeter, Meter, Settings, measure_limits
from hetu_kernels._common.bench_report import Report, Row, goals, table, versions
from hetu_kernels._common.bench_run import DeviceLostError, run_benchmark
from hetu_kernels._common.device import MODE_VARIABLE, interpreting, mode
from hetu_kernels._common.registry import op_names, op_spec, ops_in_folder

_TABLES = Path(__file__).parent / "tables"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print the table and write what was asked for.

    Returns:
        1 if one of ours fails, 2 for wrong arguments, 130 if interrupted, 0 otherwise.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        if options.goals:
            print(goals(op_spec(name) for name in options.ops or op_names()))
            return 0
        if options.plot and not bench_plot.can_plot():
            raise ValueError(bench_plot.MISSING)
        if options.from_json:
            report = Report.load(options.from_json)
        else:
            report = _run(options, f"python -m hetu_kernels.bench {shlex.join(given)}".strip())
        print(table(report))
        for file in bench_plot.plot(report, options.plot, options.plot_format) if options.plot else ():
            print(f"wrote {file}", file=sys.stderr)
    except DeviceLostError as error:
        print(f"error: the device does not answer after {error}; --resume goes on with the rest", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = f"; {options.json} has what was measured, --resume goes on from there" if options.json else ""
        print(f"error: interrupted{kept}", file=sys.stderr)
        return 130
    ours = [row for row in report.rows if row.failed]
    for row in ours:
        print(f"failed: {row.op}, {row.benchmark}, {row.pass_}: {row.reason}", file=sys.stderr)
    return 1 if ours else 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m hetu_kernels.bench", description=__doc__)
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="op",
        help=f"operators, or folders of them such as moe; default all: {', '.join(op_names())}",
    )
    parser.add_argument("--peers", action="store_true", help="all peers; otherwise ours and torch eager")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, after every benchmark")
    parser.add_argument("--resume", action="store_true", help="leave out what --json has already")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing: print and plot that report")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw a bar chart per operator there")
    parser.add_argument("--plot-format", choices=bench_plot.FORMATS, default="svg")
    parser.add_argument("--device", help="cuda, cuda:1, ..., or cpu (with --tiny); default: what there is")
    parser.add_argument("--tiny", action="store_true", help="call everything once at tiny shapes, to see that it runs")
    parser.add_argument("--rep", type=float, default=Settings.rep_ms, metavar="MS", help="per measurement, default 200")
    parser.add_argument("--tune", action="store_true", help="tune configurations that the tables have not yet")
    parser.add_argument("--tables", type=Path, default=_TABLES, metavar="FOLDER", help="where --tune writes them")
    parser.add_argument("--goals", action="store_true", help="print what each operator should reach, and stop")
    return parser


def _meter(options: argparse.Namespace) -> Meter:
    """The device, or an error that says how to go on without it."""
    if options.device is None:
        options.device = "cuda"
        if not torch.cuda.is_available() and not options.tune:
            options.device, options.tiny = "cpu", True
            print("no GPU: every benchmark is called at its tiny shape, and times say little", file=sys.stderr)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise ValueError(f"--device {options.device}: expected cuda, cuda:<number> or cpu") from None
    if device.type == "cpu":
        if not options.tiny:
            raise ValueError("--device cpu: only with --tiny; full shapes are made for GPUs")
        if options.tune:
            raise ValueError("--tune: needs a GPU, not --device cpu")
        return Meter()
    if device.type != "cuda":
        raise ValueError(f"--device {options.device}: expected cuda, cuda:<number> or cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device {options.device}: torch finds no GPU; --device cpu --tiny calls every benchmark once at its "
            "tiny shape, to see that all of it runs (its times mean nothing)"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {options.device}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    if interpreting():
        raise ValueError("TRITON_INTERPRET is set: kernels would be interpreted; unset it")
    if mode() == "reference":
        raise ValueError(f"{MODE_VARIABLE}=reference: the reference would be compared with itself; unset it")
    os.environ[MODE_VARIABLE] = "triton"  # an operator that falls back to its reference fails instead
    return CudaMeter(device)


def _run(options: argparse.Namespace, command: str) -> Report:
    if options.resume and options.json is None:
        raise ValueError("--resume: needs --json, the report to go on with")
    if options.rep <= 0:
        raise ValueError(f"--rep {options.rep:g}: expected milliseconds above 0")
    names = dict.fromkeys(op for name in options.ops or op_names() for op in ops_in_folder(name) or (name,))
    work = [(spec, benchmark) for spec in map(op_spec, names) for benchmark in spec.benchmarks()]
    meter = _meter(options)
    if options.tune:
        os.environ[config.AUTOTUNE_VARIABLE] = "1"
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(options.json.parent, os.W_OK):
            raise ValueError(f"--json {options.json}: the folder cannot be written to")
    report = _start(options, meter)
    settings = Settings.once() if options.tiny else Settings(rep_ms=options.rep)
    report.command = command
    report.date = datetime.now(UTC).isoformat(timespec="seconds")
    report.limits = limits = measure_limits(meter, settings)
    started = time.monotonic()
    for number, (spec, benchmark) in enumerate(work, 1):
        if report.finished(spec.name, benchmark.name):
            continue
        seconds = int(time.monotonic() - started)
        at = f"[{number}/{len(work)}, {seconds // 60}:{seconds % 60:02}]"
        print(f"{at} {spec.name}, {benchmark.name}", file=sys.stderr, flush=True)
        broken = report.broken(spec.name, benchmark.name)
        rows: list[Row] = []
        try:
            rows = run_benchmark(spec, benchmark, meter, limits, settings, peers=options.peers, leave_out=broken)
        except DeviceLostError as error:
            rows = [error.row]
            raise
        finally:
            report.rows += rows
            if options.json is not None and rows:
                report.save(options.json)
        if options.tune:
            _write_tables(options.tables)
    if options.json is not None:
        report.save(options.json)
    return report


def _start(options: argparse.Namespace, meter: Meter) -> Report:
    """An empty report, or the one to go on with."""
    new = Report(meter.name, meter.arch, versions(), options.tiny, options.peers)
    if not options.resume or not options.json.is_file():
        return new
    old = Report.load(options.json)
    for what in ("device", "arch", "versions", "tiny", "peers"):
        was, now = getattr(old, what), getattr(new, what)
        if was != now:
            raise ValueError(f"--resume: {options.json} has {what}={was}, this run has {now}: start a new report")
    return old


def _write_tables(folder: Path) -> None:
    """Add what has been tuned to the table of its architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    for arch, entries in config.tuned_so_far().items():
        file = folder / f"{arch}.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**known, **entries}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
