"""Predicted against measured: step time and peak memory of several plans of the recipe's model, side by side.

    python -m tests.benchmarks.plan_accuracy --out docs/numbers/plan_accuracy_cpu.json

All plans run on the same processes in turns, so that noise of the machine meets all of them. Prints a table, and
whether the predicted order of step times holds for all pairs that differ by more than 25 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from datetime import date
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetu.callbacks import PlanMonitor
from lightning_hetu.models import GPTLightningModule
from lightning_hetu.planning import ClusterSpec, HybridPlan, ModelProfile, evaluate, format_bytes, memory_breakdown
from lightning_hetu.strategies._planner import PlanRequest, make_profiles
from lightning_hetu.strategies.auto import AutoHybridParallelStrategy
from tests._ranks import RankPool
from tests.strategies._runs import plan_of

# The model and the batch of recipes/gpt_auto.yaml.
MODEL = {"vocab_size": 128, "max_seq_len": 128, "num_layers": 6, "num_heads": 4, "dim": 128}
BATCH, LENGTH, WORLD = 32, 128, 4

PLANS = {
    "ddp": plan_of("dp4 " * 7 + "dp4", 4, (6,), 1, BATCH),
    "zero3, 2 microbatches": plan_of("dp4-zero3 " * 7 + "dp4-zero3", 4, (6,), 2, BATCH),
    "pp2 x dp2": plan_of("dp2 " * 7 + "dp2", 4, (3, 3), 8, BATCH),
    "pp2 x dp2, mixed": plan_of(
        "dp2-zero2 dp2-recompute dp2 dp2-zero2 dp2-zero3-recompute dp2 tp2 dp2-zero3", 4, (3, 3), 4, BATCH
    ),
    "tp4": plan_of("dp4-zero3 " + "tp4 " * 6 + "dp4-zero3", 4, (6,), 1, BATCH),
    "tp2 x dp2, recompute": plan_of("dp4-zero2 " + "dp2-tp2-zero2-recompute " * 6 + "dp4", 4, (6,), 2, BATCH),
    "pp4": plan_of("dp1 " * 7 + "dp1", 4, (1, 1, 2, 2), 8, BATCH),
    "zero2, recompute": plan_of("dp4-zero2 " + "dp4-zero2-recompute " * 6 + "dp4-zero2", 4, (6,), 4, BATCH),
}


def data() -> DataLoader[Any]:
    tokens = torch.randint(MODEL["vocab_size"], (BATCH * 64, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), batch_size=BATCH)


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def trainer_for(strategy: AutoHybridParallelStrategy, steps: int, callbacks: list[Any], accumulate: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=os.environ.get("TMPDIR", "/tmp"),
    )


class _ProfileOnly(AutoHybridParallelStrategy):
    """Keeps the profiles and goes on with a plan that needs none."""

    profiles: tuple[ModelProfile, ClusterSpec]

    def _parallelize(self, trainer: Trainer, module: LightningModule) -> None:
        from lightning_hetu.parallel.structure import find_structure

        request = PlanRequest("auto", None, None, {}, False)
        self.profiles = make_profiles(request, trainer, module, find_structure(module), self)[:2]
        super()._parallelize(trainer, module)


def profiles(rank: int) -> tuple[ModelProfile, ClusterSpec]:
    quiet()
    strategy = _ProfileOnly(plan=PLANS["ddp"])
    trainer_for(strategy, 1, []).fit(GPTLightningModule(**MODEL), data())
    return strategy.profiles


def measure(rank: int, plan: HybridPlan, steps: int, accumulate: int = 1) -> tuple[list[float], list[int]]:
    quiet()
    torch.manual_seed(0)
    # The last batch of the third step, in which the gradients of the others are there.
    monitor = PlanMonitor(memory_step=3 * accumulate - 1, warmup=3 * accumulate)
    trainer = trainer_for(AutoHybridParallelStrategy(plan=plan), steps, [monitor], accumulate)
    trainer.fit(GPTLightningModule(**MODEL), data())
    return monitor.step_times, monitor.stage_memory


def run(names: Sequence[str], steps: int, rounds: int) -> dict[str, Any]:
    pool = RankPool(WORLD)
    profile, cluster = pool.run(profiles, timeout=300)[0]
    times: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[int]] = {}
    for _ in range(rounds):
        for name in names:
            seconds, memory[name] = pool.run(measure, PLANS[name], steps, timeout=600)[0]
            times[name] += seconds
    pool.close()
    rows = []
    for name in names:
        predicted = evaluate(PLANS[name], profile, cluster)
        rows.append(
            {
                "plan": name,
                "predicted_ms": predicted.iteration_time * 1e3,
                "measured_ms": median(times[name]) * 1e3,
                "predicted_bytes": list(predicted.stage_memory),
                "measured_bytes": memory[name],
                "breakdown": [
                    memory_breakdown(PLANS[name], profile, cluster, stage) for stage in range(len(PLANS[name].stages))
                ],
            }
        )
    wrong = [
        (a["plan"], b["plan"])
        for a, b in combinations(rows, 2)
        if max(a["measured_ms"], b["measured_ms"]) > 1.25 * min(a["measured_ms"], b["measured_ms"])
        and (a["measured_ms"] < b["measured_ms"]) != (a["predicted_ms"] < b["predicted_ms"])
    ]
    errors = [p / m - 1 for row in rows for p, m in zip(row["predicted_bytes"], row["measured_bytes"], strict=True)]
    return {
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {WORLD} gloo processes",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": "python -m tests.benchmarks.plan_accuracy",
        "rows": rows,
        "pairs_in_wrong_order": wrong,
        "largest_memory_error": max(errors, key=abs),
        "profile": profile.to_dict(),
        "cluster": cluster.to_dict(),
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'plan':24s} {'predicted':>12s} {'measured':>12s}   memory predicted / measured per stage"]
    for row in result["rows"]:
        memory = ", ".join(
            f"{format_bytes(p)} / {format_bytes(m)} ({(p / m - 1) * 100:+.1f}%)"
            for p, m in zip(row["predicted_bytes"], row["measured_bytes"], strict=True)
        )
        lines.append(f"{row['plan']:24s} {row['predicted_ms']:9.1f} ms {row['measured_ms']:9.1f} ms   {memory}")
    lines.append(f"pairs in the wrong order: {result['pairs_in_wrong_order'] or 'none'}")
    lines.append(f"largest memory error: {result['largest_memory_error'] * 100:+.1f} %")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = run(options.plans, options.steps, options.rounds)
    sys.stdout.write(table(result) + "\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
