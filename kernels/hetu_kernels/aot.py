"""``python -m hetu_kernels.aot``: compile every kernel for every target, without a GPU, and print what it needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hetu_kernels._common import aot
from hetu_kernels._common.device import TARGETS
from hetu_kernels._common.registry import op_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, compile, print the table and what is wrong.

    Returns:
        1 if a kernel breaks a rule, 2 for wrong arguments, 0 otherwise.
    """
    parser = argparse.ArgumentParser(prog="python -m hetu_kernels.aot", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"operators, default all: {', '.join(op_names())}")
    parser.add_argument("--target", action="append", help=f"default all: {', '.join(TARGETS)}")
    parser.add_argument("--fp-fusion", choices=("0", "1", "both"), default="1", help="multiply-add contraction")
    parser.add_argument("--all", action="store_true", help="also the slow launches and the configurations for tuning")
    parser.add_argument("--jobs", type=int, default=aot.available_jobs(), help="processes, default one per processor")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--baseline", type=Path, help="accepted spills, as JSON by triton version")
    parser.add_argument("--update-baseline", action="store_true", help="write the spills seen into the baseline")
    options = parser.parse_args(arguments)
    if options.update_baseline and options.baseline is None:
        parser.error("--update-baseline needs --baseline")

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rcompiling {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)

    try:
        rows = aot.compile_all(
            options.ops or None,
            options.target,
            fp_fusion={"0": (False,), "1": (True,), "both": (True, False)}[options.fp_fusion],
            include_slow=options.all,
            include_tuning=options.all,
            jobs=options.jobs,
            progress=progress,
        )
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    report = aot.to_json(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    baselines = json.loads(options.baseline.read_text()) if options.baseline and options.baseline.is_file() else {}
    if options.update_baseline:
        # Of one kernel with and without contraction the one that spills more: sorted, it comes last.
        baselines[report["triton"]] = dict(sorted((row.key, row.spills) for row in rows if row.spills))
        options.baseline.write_text(json.dumps(baselines, indent=1, sort_keys=True) + "\n")
    problems = [line for row in rows for line in row.problems(baselines.get(report["triton"]))]
    for line in problems:
        print(f"problem: {line}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(problems)} problems (triton {report['triton']})")
    return 1 if problems else 0


def table(rows: Sequence[aot.Resources]) -> str:
    """The report as text, one line per kernel and target."""
    heads = (
        "operator", "launch", "kernel", "target", "fusion", "warps", "registers", "spills", "shared",
        "matrix instructions",
    )  # fmt: skip
    lines = [heads]
    for row in rows:
        instructions = ", ".join(f"{count} {name}" for name, count in row.instructions.items())
        lines.append(
            (row.op, row.call, row.kernel, row.target, "yes" if row.fp_fusion else "no", str(row.num_warps),
             str(row.registers), str(row.spills), str(row.shared), instructions)
        )  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
