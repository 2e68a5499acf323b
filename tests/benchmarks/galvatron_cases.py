"""Compares our search with the official engine on the official profiles: cost of the plan found, and time to find it.

    python -m tests.benchmarks.galvatron_cases docs/numbers/galvatron_cases.json

Both plans are priced with ``cost_model="galvatron3"``. The engine's plans, predictions and run times are those recorded
in ``tests/planning/official_plans.json``, which also says how they were made; our side is run here. Times are processor
seconds of one thread, from reading the profiles to the plan, the median of several runs for ours.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # one thread; before numpy is imported
    os.environ[_name] = "1"

import numpy as np  # noqa: E402

from lightning_hetu.planning import (  # noqa: E402
    HybridPlan,
    NoFeasiblePlanError,
    evaluate,
    read_galvatron_plan,
    search,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "planning"))
from galvatron_cases import CASES, RECORD, Case  # noqa: E402

RUNS = 5


def timed_search(case: Case) -> tuple[HybridPlan | None, float, float]:
    """Our plan (``None`` if none fits), and the processor and clock seconds from files to plan."""
    start, clock = time.process_time(), time.perf_counter()
    profile, cluster = case.load()
    plan = None
    try:
        plan = search(
            profile,
            cluster,
            memory_budget=case.budget,
            global_batch_size=case.batch,
            cost_model="galvatron3",
            alternatives=False,
        )
    except NoFeasiblePlanError:
        pass
    return plan, time.process_time() - start, time.perf_counter() - clock


def official_price(case: Case) -> float | None:
    """Seconds per step of the engine's plan under our model."""
    if case.plan is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(case.plan))
        plan = read_galvatron_plan(path, world_size=case.devices)
    return evaluate(plan, *case.load(), "galvatron3").iteration_time


def describe(plan: HybridPlan) -> dict[str, Any]:
    """The plan in few words; runs of equal layers count once."""
    runs = [[str(strategy), len(list(run))] for strategy, run in groupby(plan.layers)]
    return {
        "stages": list(plan.stages),
        "num_microbatches": plan.num_microbatches,
        "layers": ", ".join(f"{count} x {name}" for name, count in runs),
        "vocabulary": str(plan.embedding),
    }


def compare(case: Case) -> dict[str, Any]:
    """One row of the table."""
    runs = [timed_search(case) for _ in range(RUNS)]
    plan = runs[0][0]
    seconds = statistics.median(run[1] for run in runs)
    ours = None if plan is None or plan.prediction is None else plan.prediction.iteration_time
    theirs = official_price(case)
    return {
        "engine": case.engine,
        "model": case.model,
        "devices": case.devices,
        "memory_gib": case.memory_gib,
        "batch": case.batch,
        "official_prediction": case.iteration_time,
        "official_cost": theirs,
        "our_cost": ours,
        "official_seconds": case.seconds,
        "our_seconds": round(seconds, 4),
        "our_elapsed": round(statistics.median(run[2] for run in runs), 4),
        "speedup": round(case.seconds / seconds, 1),
        "no_worse": (ours is None and theirs is None)
        or (ours is not None and (theirs is None or ours <= theirs * (1 + 1e-12))),
        "our_plan": None if plan is None else describe(plan),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def cost(value: float | None) -> str:
        return "none fits" if value is None else f"{value:.4f} s"

    lines = ["| case | official plan | our plan | official search | ours | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['model']}, {row['devices']} x {row['memory_gib']} GB | {cost(row['official_cost'])} |"
            f" {cost(row['our_cost'])} | {row['official_seconds']:.1f} s | {row['our_seconds']:.2f} s |"
            f" {row['speedup']:.0f} |"
        )
    return "\n".join(lines)


def main(output: Path) -> None:
    """Runs all cases, prints the tables and writes the rows."""
    rows = []
    for case in CASES:
        rows.append(compare(case))
        row = rows[-1]
        print(case.name, row["official_cost"], row["our_cost"], row["our_seconds"], row["speedup"], flush=True)
    report = {
        "machine": f"{platform.machine()} CPU, one thread",
        "versions": f"Python {platform.python_version()}, numpy {np.__version__}",
        "date": date.today().isoformat(),
        "engines": RECORD["engines"],
        "rows": rows,
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for engine in RECORD["engines"]:
        chosen = [row for row in rows if row["engine"] == engine]
        print(f"\nengine {engine}\n\n{table(chosen)}")
    print(
        f"\nplans that cost more than the official one: {[r['model'] for r in rows if not r['no_worse']] or 'none'};"
        f" least ratio of search times: {min(row['speedup'] for row in rows):.1f}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
