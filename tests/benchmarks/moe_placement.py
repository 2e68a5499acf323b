"""FlexMoE's policies on drifting traces: balance, simulated step times, and how long decisions take.

    python -m tests.benchmarks.moe_placement docs/numbers/moe_placement.json [--picture docs/images/moe_placement.svg]

Loads begin as Zipf's law with exponent 1.2 and their logarithms walk at random. Every 5 steps (``eplb``: 50) a policy
sees the mean of the last 10; the first 50 of 200 steps do not count. Step times are those of the cost model, for
experts of 2048 by 768 on a described node of H100, changes included. Decisions are timed in processor seconds of one
thread, the first one of a training, which has most to do: the fastest of several runs, and of that the median and the
largest over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # one thread; before numpy is imported
    os.environ[_name] = "1"

import numpy as np  # noqa: E402

from lightning_hetu.moe.placement import (  # noqa: E402
    Placement,
    PlacementCostModel,
    compare,
    drifting_trace,
    plan,
    replay,
)
from lightning_hetu.moe.placement.picture import save_heat_map  # noqa: E402

EXPERTS, TOKENS, SKIP, SEEDS = 16, 131072, 50, 8
TRACES = [(4, 6, 0.05), (4, 6, 0.15), (8, 4, 0.05), (8, 4, 0.15)]
"""Ranks, slots and drift."""
SIZES = [(16, 4, 6), (64, 8, 9), (64, 8, 12), (256, 64, 6), (256, 64, 8)]
RUNS = 9


def model(ranks: int) -> PlacementCostModel:
    return PlacementCostModel.for_experts(2048, 768, f"{ranks}xH100-80GB")


def balance(ranks: int, slots: int, drift: float) -> list[dict[str, Any]]:
    """A row per policy and split, over all seeds."""
    found: dict[tuple[str, str], list[tuple[float, float, float, int]]] = {}
    for seed in range(SEEDS):
        trace = drifting_trace(ranks=ranks, experts=EXPERTS, drift=drift, tokens=TOKENS, seed=seed)
        replays = compare(trace, Placement.contiguous(EXPERTS, ranks, slots), model(ranks))
        static = replays["none", "even"].mean_seconds(SKIP)
        for key, one in replays.items():
            seconds = one.mean_seconds(SKIP)
            found.setdefault(key, []).append((one.mean_ratio(SKIP), seconds, static / seconds, one.num_ops))
    rows = []
    for (policy, split), values in found.items():
        ratios, seconds, gains, ops = zip(*values, strict=True)
        rows.append(
            {
                "ranks": ranks,
                "slots": slots,
                "drift": drift,
                "policy": policy,
                "split": split,
                "mean_ratio": round(statistics.mean(ratios), 4),
                "largest_ratio": round(max(ratios), 4),
                "step_ms": round(statistics.mean(seconds) * 1e3, 3),
                "mean_gain": round(statistics.mean(gains), 3),
                "least_gain": round(min(gains), 3),
                "operations": round(statistics.mean(ops), 1),
            }
        )
    return rows


def decision(experts: int, ranks: int, slots: int, split: str, priced: bool) -> dict[str, Any]:
    """Milliseconds of one size."""
    placement = Placement.contiguous(experts, ranks, slots)
    cost_model = model(ranks) if priced else None
    times = []
    for seed in range(SEEDS):
        draw = np.random.default_rng(seed)
        loads = draw.permutation(np.arange(1, experts + 1.0) ** -1.2) * np.exp(draw.normal(0, 0.3, experts))
        counts = draw.multinomial(TOKENS, loads / loads.sum(), size=ranks)
        fastest = float("inf")
        for _ in range(RUNS):
            start = time.process_time()
            plan(counts, placement, split=split, cost_model=cost_model)  # type: ignore[arg-type]
            fastest = min(fastest, time.process_time() - start)
        times.append(fastest * 1e3)
    return {
        "experts": experts,
        "ranks": ranks,
        "slots": slots,
        "split": split,
        "cost_model": priced,
        "median_ms": round(statistics.median(times), 2),
        "largest_ms": round(max(times), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--picture", type=Path, help="heat map of the first trace with drift 0.15")
    options = parser.parse_args()
    rows = []
    for case in TRACES:
        rows += balance(*case)
        for row in rows[-6:]:
            print(*row.values(), flush=True)
    decisions = []
    for size in SIZES:
        for split in ("even", "flow"):
            for priced in (False, True):
                decisions.append(decision(*size, split, priced))
                print(*decisions[-1].values(), flush=True)
    if options.picture is not None:
        trace = drifting_trace(drift=0.15, tokens=TOKENS, seed=0)
        save_heat_map(trace, replay(trace, Placement.contiguous(EXPERTS, 4, 6), model(4)), options.picture)
    report = {
        "machine": f"{platform.machine()} CPU, one thread",
        "versions": f"Python {platform.python_version()}, numpy {np.__version__}",
        "date": date.today().isoformat(),
        "command": "python -m tests.benchmarks.moe_placement docs/numbers/moe_placement.json",
        "experts": EXPERTS,
        "tokens_per_rank": TOKENS,
        "seeds": SEEDS,
        "traces": rows,
        "decisions": decisions,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
