"""Predicted against measured: step time and peak memory of several plans of one model, side by side.

    python -m tests.benchmarks.plan_accuracy --out docs/numbers/plan_accuracy_cpu.json
    python -m tests.benchmarks.plan_accuracy --setup gpu --out docs/numbers/plan_accuracy_gpu.json

The first is the recipe's model on four processes, the second a GPT of 1.3 billion parameters on one GPU, in bf16-mixed
and with different batches and recomputation. All plans run in turns, so that noise of the machine meets all of them.
Prints a table, and whether the predicted order of step times holds for all pairs that differ by more than 25 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Setup:
    """What is run where.

    Args:
        model: Arguments of the module.
        plans: Plans by name; the first one is used to profile.
        accelerator: Lightning's name of it.
        precision: Lightning's name of it.
    """

    model: dict[str, Any]
    plans: dict[str, HybridPlan]
    accelerator: str = "cpu"
    precision: Any = "32-true"

    @property
    def world(self) -> int:
        """Number of processes."""
        return next(iter(self.plans.values())).world_size

    @property
    def device(self) -> str:
        """The device, for the record."""
        if self.accelerator == "gpu":
            return torch.cuda.get_device_name()
        return f"{platform.machine()} CPU, {os.cpu_count()} cores, {self.world} gloo processes"

    def data(self, batch: int) -> DataLoader[Any]:
        """Random tokens."""
        vocabulary, length = self.model["vocab_size"], self.model["max_seq_len"]
        tokens = torch.randint(vocabulary, (batch * 64, length + 1), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), batch_size=batch)


def _one_device(layers: str, batch: int, microbatches: int) -> HybridPlan:
    """A plan of one device: the embedding, blocks such as ``dp1`` in equal numbers, the head."""
    kinds = layers.split()
    blocks = " ".join(kinds[index % len(kinds)] for index in range(_LARGE["num_layers"]))
    return plan_of(f"dp1 {blocks} dp1", 1, (_LARGE["num_layers"],), microbatches, batch)


_LARGE = {"vocab_size": 50304, "max_seq_len": 1024, "num_layers": 24, "num_heads": 16, "dim": 2048}
SETUPS = {
    # The model and the batch of recipes/gpt_auto.yaml.
    "cpu": Setup(
        {"vocab_size": 128, "max_seq_len": 128, "num_layers": 6, "num_heads": 4, "dim": 128},
        {
            "ddp": plan_of("dp4 " * 7 + "dp4", 4, (6,), 1, 32),
            "zero3, 2 microbatches": plan_of("dp4-zero3 " * 7 + "dp4-zero3", 4, (6,), 2, 32),
            "pp2 x dp2": plan_of("dp2 " * 7 + "dp2", 4, (3, 3), 8, 32),
            "pp2 x dp2, mixed": plan_of(
                "dp2-zero2 dp2-recompute dp2 dp2-zero2 dp2-zero3-recompute dp2 tp2 dp2-zero3", 4, (3, 3), 4, 32
            ),
            "tp4": plan_of("dp4-zero3 " + "tp4 " * 6 + "dp4-zero3", 4, (6,), 1, 32),
            "tp2 x dp2, recompute": plan_of("dp4-zero2 " + "dp2-tp2-zero2-recompute " * 6 + "dp4", 4, (6,), 2, 32),
            "pp4": plan_of("dp1 " * 7 + "dp1", 4, (1, 1, 2, 2), 8, 32),
            "cut sequences": plan_of(
                "dp4-zero3 dp2-sp2-zero2 dp2-tp2-sequence dp2-cp2-zero3 sp4-zero3 dp2-tp2-zero2-sequence-recompute"
                " dp2-sp2-recompute dp4-zero3",
                4,
                (6,),
                2,
                32,
            ),
            "zero2, recompute": plan_of("dp4-zero2 " + "dp4-zero2-recompute " * 6 + "dp4-zero2", 4, (6,), 4, 32),
        },
    ),
    "gpu": Setup(
        _LARGE,
        {
            "batch 8": _one_device("dp1", 8, 1),
            "batch 16, all recomputed": _one_device("dp1-recompute", 16, 1),
            "batch 8, every second one recomputed": _one_device("dp1 dp1-recompute", 8, 1),
            "batch 16, 4 microbatches": _one_device("dp1", 16, 4),
        },
        accelerator="gpu",
        precision="bf16-mixed",
    ),
}


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def trainer_for(
    setup: Setup, strategy: AutoHybridParallelStrategy, steps: int, callbacks: list[Any], accumulate: int = 1
) -> Trainer:
    return Trainer(
        accelerator=setup.accelerator,
        devices=setup.world,
        precision=setup.precision,
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

    def _make_plan(self, trainer: Trainer, module: LightningModule) -> HybridPlan:
        from lightning_hetu.parallel.structure import find_structure

        request = PlanRequest("auto", None, None, {}, False)
        self.profiles = make_profiles(request, trainer, module, find_structure(module), self)[:2]
        return super()._make_plan(trainer, module)


def profiles(rank: int, setup: Setup) -> tuple[ModelProfile, ClusterSpec]:
    quiet()
    plan = next(iter(setup.plans.values()))
    strategy = _ProfileOnly(plan=plan)
    trainer_for(setup, strategy, 1, []).fit(GPTLightningModule(**setup.model), setup.data(plan.global_batch_size))
    return strategy.profiles


def measure(
    rank: int, setup: Setup, plan: HybridPlan, steps: int, accumulate: int = 1
) -> tuple[list[float], list[int]]:
    quiet()
    torch.manual_seed(0)
    # The last batch of the third step, in which the gradients of the others are there.
    monitor = PlanMonitor(memory_step=3 * accumulate - 1, warmup=3 * accumulate)
    trainer = trainer_for(setup, AutoHybridParallelStrategy(plan=plan), steps, [monitor], accumulate)
    trainer.fit(GPTLightningModule(**setup.model), setup.data(plan.global_batch_size))
    return monitor.step_times, monitor.stage_memory


class _Here:
    """Runs functions in this process, as a pool of ranks runs them in its own."""

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 0.0) -> list[Any]:
        return [function(0, *args)]

    def close(self) -> None:
        """Nothing to end."""


def run(setup: Setup, names: Sequence[str], steps: int, rounds: int) -> dict[str, Any]:
    pool = RankPool(setup.world) if setup.world > 1 else _Here()
    profile, cluster = pool.run(profiles, setup, timeout=300)[0]
    times: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[int]] = {}
    for _ in range(rounds):
        for name in names:
            seconds, memory[name] = pool.run(measure, setup, setup.plans[name], steps, timeout=600)[0]
            times[name] += seconds
    pool.close()
    rows = []
    for name in names:
        predicted = evaluate(setup.plans[name], profile, cluster)
        rows.append(
            {
                "plan": name,
                "predicted_ms": predicted.iteration_time * 1e3,
                "measured_ms": median(times[name]) * 1e3,
                "predicted_bytes": list(predicted.stage_memory),
                "measured_bytes": memory[name],
                "breakdown": [
                    memory_breakdown(setup.plans[name], profile, cluster, stage)
                    for stage in range(len(setup.plans[name].stages))
                ],
            }
        )
    wrong = [
        (a["plan"], b["plan"])
        for a, b in combinations(rows, 2)
        if max(a["measured_ms"], b["measured_ms"]) > 1.25 * min(a["measured_ms"], b["measured_ms"])
        and (a["measured_ms"] < b["measured_ms"]) != (a["predicted_ms"] < b["predicted_ms"])
    ]
    slower = [row["predicted_ms"] / row["measured_ms"] - 1 for row in rows]
    errors = [p / m - 1 for row in rows for p, m in zip(row["predicted_bytes"], row["measured_bytes"], strict=True)]
    return {
        "date": date.today().isoformat(),
        "device": setup.device,
        "model": setup.model,
        "precision": setup.precision,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": " ".join(["python -m tests.benchmarks.plan_accuracy", *sys.argv[1:]]),
        "rows": rows,
        "pairs_in_wrong_order": wrong,
        "largest_memory_error": max(errors, key=abs),
        "largest_time_error": max(slower, key=abs),
        "profile": profile.to_dict(),
        "cluster": cluster.to_dict(),
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'plan':36s} {'predicted':>12s} {'measured':>12s}   memory predicted / measured per stage"]
    for row in result["rows"]:
        memory = ", ".join(
            f"{format_bytes(p)} / {format_bytes(m)} ({(p / m - 1) * 100:+.1f}%)"
            for p, m in zip(row["predicted_bytes"], row["measured_bytes"], strict=True)
        )
        lines.append(f"{row['plan']:36s} {row['predicted_ms']:9.1f} ms {row['measured_ms']:9.1f} ms   {memory}")
    lines.append(f"pairs in the wrong order: {result['pairs_in_wrong_order'] or 'none'}")
    for what in ("memory", "time"):
        lines.append(f"largest {what} error: {result[f'largest_{what}_error'] * 100:+.1f} %")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", default="cpu", choices=list(SETUPS))
    parser.add_argument("--plans", nargs="*", help="names of plans; by default all")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    setup = SETUPS[options.setup]
    unknown = [name for name in options.plans or () if name not in setup.plans]
    if unknown:
        parser.error(f"--plans {unknown[0]!r}: expected some of {', '.join(map(repr, setup.plans))}")
    result = run(setup, options.plans or list(setup.plans), options.steps, options.rounds)
    sys.stdout.write(table(result) + "\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
