r"""Validation loss over steps and training FLOPs: gates with equal FLOPs per token at the end, and dense networks.

    python -m tests.benchmarks.moe_gates --out docs/numbers/moe_gates.json --picture docs/images/moe_gates.svg

The model and the text are those of `recipes/moe_gpt_switch.yaml` and `recipes/moe_gpt_dts.yaml`, the schedule is that
of the latter stretched to the length of the runs, in one process with a global batch of 32 samples: experts that are
spread over ranks give the same losses and weights. The gates are Switch (arXiv 2101.03961), GShard (arXiv 2006.16668)
with two experts of half the width, of which there are twice as many, and DTS (arXiv 2112.14397). A dense network has
the width of one expert, a wide one that of all. All have the same batches in the same order by seed, the same learning
rate, and the same held-out samples. Runs that are in the file already are not made again.

`--seeds`, `--dts`, `--learning-rate` and `--balance` are for finding settings, which is done on seeds that are not
reported.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from itertools import count, islice, pairwise, product
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hetu.callbacks import DTSGateSchedule
from lightning_hetu.data import TextDataModule
from lightning_hetu.models import MoEGPTLightningModule
from lightning_hetu.moe import MoELayer
from lightning_hetu.planning.drawing import Area, Box, Picture, Shape, Words

WORDS, LENGTH, LAYERS, HEADS, DIM, BATCH = 128, 64, 2, 4, 64, 32
GATES: dict[str, dict[str, Any]] = {
    "dense": {"gate": "switch", "num_experts": 1, "mlp_ratio": 2.0},
    "switch": {"gate": "switch", "num_experts": 8, "mlp_ratio": 2.0},
    "gshard": {"gate": "gshard", "num_experts": 16, "mlp_ratio": 1.0},
    "dts": {"gate": "dts", "num_experts": 8, "mlp_ratio": 2.0},
    "wide": {"gate": "switch", "num_experts": 1, "mlp_ratio": 16.0},
}
"""One expert with weight 1 is a dense network; ``wide`` has as many parameters as the experts, and uses all of them."""
COLORS = {"dense": "#9aa5b1", "switch": "#2f6f9f", "gshard": "#4a9a4a", "dts": "#d9822b", "wide": "#8e5ea2"}

Point = tuple[float, float]


@dataclass(frozen=True)
class Setup:
    """What all runs of a file have in common.

    Args:
        steps: Optimizer steps of a run.
        every: Steps between two evaluations.
        val_batches: Held-out batches of an evaluation, spread over the held-out text.
        learning_rate: Highest learning rate; it falls along half a cosine.
        balance: Coefficient of the balance loss.
        dts: Arguments of :class:`DTSGateSchedule`.
    """

    steps: int
    every: int
    val_batches: int
    learning_rate: float
    balance: float
    dts: dict[str, Any] = field(default_factory=dict)


FULL = Setup(
    steps=800,
    every=25,
    val_batches=16,
    learning_rate=5e-3,
    balance=1e-3,
    dts={"diversify_step": 100, "start_step": 100, "steps": 300, "tau_start": 2.0, "tau_end": 0.2, "hard_step": 500},
)
SMALL = replace(
    FULL,
    steps=20,
    every=5,
    val_batches=2,
    dts={**FULL.dts, "diversify_step": 4, "start_step": 4, "steps": 6, "hard_step": 14},
)


def forward_flops(gate: str, active: float) -> float:
    """FLOPs of one token's forward pass, two for each multiplication with a weight or in attention.

    Attention has four products of D x D and, over the (L + 1) / 2 tokens that are seen on average, two of D; the router
    has D x E; each expert a token goes to has two of D x F, since its activation is GELU; the head has D x V.

    Args:
        gate: Name of the gate.
        active: Experts per token, mean over layers.
    """
    experts, hidden = GATES[gate]["num_experts"], GATES[gate]["mlp_ratio"] * DIM
    attention = 4 * DIM * DIM + DIM * (LENGTH + 1)
    return 2 * (LAYERS * (attention + DIM * experts + active * 2 * DIM * hidden) + DIM * WORDS)


def train(gate: str, seed: int, setup: Setup) -> dict[str, Any]:
    """One run, and its curve; a backward pass counts twice a forward pass.

    A bare loop, without a Trainer: a third of a step's time is then left out. What a step does is what the recipes do.
    """
    torch.manual_seed(seed)
    data = TextDataModule(
        batch_size=BATCH, seq_len=LENGTH, max_vocab_size=WORDS, val_batches=setup.val_batches, seed=seed
    )
    model = MoEGPTLightningModule(
        WORDS, LENGTH, LAYERS, HEADS, DIM, learning_rate=setup.learning_rate, total_steps=setup.steps,
        moe_coefficients={"balance": setup.balance}, **GATES[gate],
    )  # fmt: skip
    layers = [layer for layer in model.modules() if isinstance(layer, MoELayer)]
    schedule = DTSGateSchedule(**setup.dts) if gate == "dts" else None
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]  # type: ignore[index]
    held_out = list(data.val_dataloader())
    curve: dict[str, list[float]] = {"step": [], "flops": [], "val_loss": [], "active": []}
    flops, recent, start = 0.0, [], time.perf_counter()
    for step, (tokens, targets) in enumerate(islice(endless(data), setup.steps)):
        if schedule is not None:
            trainer: Any = SimpleNamespace(global_step=step, optimizers=[optimizer])
            schedule.on_train_batch_start(trainer, model, (tokens, targets), step)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) + model.moe_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        recent.append(
            mean(float(layer.last.tokens_per_expert.sum()) / tokens.numel() for layer in layers if layer.last)
        )
        flops += 3 * tokens.numel() * forward_flops(gate, recent[-1])
        if (step + 1) % setup.every == 0:
            curve["step"].append(step + 1)
            curve["flops"].append(float(f"{flops:.5g}"))
            curve["val_loss"].append(round(evaluate(model, held_out), 4))
            curve["active"].append(round(mean(recent), 3))
            recent = []
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = round(time.perf_counter() - start, 1)
    return {"gate": gate, "seed": seed, "parameters": parameters, "seconds": seconds, **curve}


def endless(data: TextDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches, epoch after epoch."""
    loader = data.train_dataloader()
    for epoch in count():
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from loader


@torch.no_grad()
def evaluate(model: MoEGPTLightningModule, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Nats per token over held-out batches of equal size."""
    model.eval()
    loss = mean(float(F.cross_entropy(model(x).flatten(0, 1), y.flatten())) for x, y in batches)
    model.train()
    return loss


def compare(runs: Sequence[dict[str, Any]], gate: str) -> list[dict[str, Any]]:
    """By seed, where a gate first reaches Switch's final loss; ratios are Switch's whole run over that part of its."""
    of = {(run["gate"], run["seed"]): run for run in runs}
    rows = []
    for seed in sorted(seed for name, seed in of if name == gate and ("switch", seed) in of):
        run, switch = of[gate, seed], of["switch", seed]
        target = switch["val_loss"][-1]
        row = {"seed": seed, "switch_final": target, "final": run["val_loss"][-1]}
        at = next((index for index, loss in enumerate(run["val_loss"]) if loss <= target), None)
        if at is not None:
            row |= {
                "step": run["step"][at],
                "active": run["active"][at],
                "steps_ratio": round(switch["step"][-1] / run["step"][at], 3),
                "flops_ratio": round(switch["flops"][-1] / run["flops"][at], 3),
                "stays": all(loss <= target for loss in run["val_loss"][at:]),
            }
        rows.append(row)
    return rows


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By gate, figures of the ends of its runs: means over seeds, and how far losses are apart."""
    found = {}
    for gate in GATES:
        mine = [run for run in runs if run["gate"] == gate]
        if mine:
            losses = [run["val_loss"][-1] for run in mine]
            found[gate] = {
                "parameters": mine[0]["parameters"],
                "flops": mean(run["flops"][-1] for run in mine),
                "val_loss": round(mean(losses), 4),
                "least": min(losses),
                "most": max(losses),
                "active": round(mean(run["active"][-1] for run in mine), 3),
            }
    return found


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| gate | parameters | training FLOPs | final validation loss | over seeds |", "|---|---|---|---|---|"]
    for gate, row in report["final"].items():
        lines.append(
            f"| `{gate}` | {row['parameters']:,} | {row['flops']:.3g} | {row['val_loss']:.3f} |"
            f" {row['least']:.3f} to {row['most']:.3f} |"
        )
    lines += [
        "",
        "| gate | seed | Switch's final loss | reached at step | ratio of steps | ratio of FLOPs | active then |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for gate, rows in report["against_switch"].items():
        for row in rows:
            reached = (
                f"{row['step']} | {row['steps_ratio']:.2f} | {row['flops_ratio']:.2f} | {row['active']:.2f}"
                if "step" in row
                else "never | | | "
            )
            lines.append(f"| `{gate}` | {row['seed']} | {row['switch_final']:.3f} | {reached} |")
    return "\n".join(lines)


def draw(report: dict[str, Any]) -> Picture:
    """Loss over steps and over FLOPs: means over seeds as lines, all seeds as bands."""
    gates = [gate for gate in GATES if any(run["gate"] == gate for run in report["runs"])]
    curves = {gate: [run for run in report["runs"] if run["gate"] == gate] for gate in gates}
    losses = [loss for run in report["runs"] for loss in run["val_loss"]]
    low, high = min(losses) - 0.02, min(max(losses), min(losses) + 1.0)
    shapes: list[Shape] = [Words(14, 24, "Validation loss over steps and over FLOPs", size=13, bold=True)]
    for number, gate in enumerate(gates):
        shapes += [Box(400 + 90 * number, 15, 12, 10, COLORS[gate]), Words(417 + 90 * number, 24, gate, size=11)]
    for left, axis, title in ((60, "step", "optimizer steps"), (450, "flops", "training FLOPs")):
        shapes += _panel(left, axis, title, curves, low, high)
    return Picture("Validation loss over steps and over FLOPs", 820, 340, shapes)


def _panel(
    left: int, axis: str, title: str, curves: dict[str, list[dict[str, Any]]], low: float, high: float
) -> Iterator[Shape]:
    top, width, height = 45, 340, 245
    # The wide network takes so many FLOPs that nothing else could be seen.
    right = max(run[axis][-1] for gate, runs in curves.items() for run in runs if gate != "wide" or axis == "step")

    def place(x: float, loss: float) -> Point:
        return left + width * x / right, top + height * (high - loss) / (high - low)

    for part in range(5):
        loss, x = low + (high - low) * part / 4, right * part / 4
        yield Words(left - 6, place(0, loss)[1] + 4, f"{loss:.2f}", anchor="end", size=10)
        label = f"{x:.0f}" if axis == "step" else f"{x:.1e}"
        yield Words(place(x, low)[0], top + height + 16, label, anchor="middle", size=10)
    yield Words(left + width / 2, top + height + 34, title, anchor="middle", size=11)
    for gate, runs in curves.items():
        rows = list(zip(*(zip(run[axis], run["val_loss"], strict=True) for run in runs), strict=True))
        rows = [row for row in rows if max(loss for _, loss in row) <= high and max(x for x, _ in row) <= right]
        middle = [mean(x for x, _ in row) for row in rows]
        upper = [place(x, max(loss for _, loss in row)) for x, row in zip(middle, rows, strict=True)]
        lower = [place(x, min(loss for _, loss in row)) for x, row in zip(middle, rows, strict=True)]
        yield Area((*upper, *reversed(lower)), COLORS[gate] + "40")
        line = [place(x, mean(loss for _, loss in row)) for x, row in zip(middle, rows, strict=True)]
        for start, end in pairwise(line):
            yield _stroke(start, end, COLORS[gate])


def _stroke(start: Point, end: Point, color: str, width: float = 2.0) -> Area:
    """A straight line as a polygon."""
    across, down = end[0] - start[0], end[1] - start[1]
    scale = width / 2 / max(math.hypot(across, down), 1e-9)
    x, y = -down * scale, across * scale
    corners = (
        (start[0] + x, start[1] + y),
        (end[0] + x, end[1] + y),
        (end[0] - x, end[1] - y),
        (start[0] - x, start[1] - y),
    )
    return Area(corners, color)


def conditions(setup: Setup) -> dict[str, Any]:
    """What a run depends on besides its gate and seed; the version of Python decides the text."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": {"dim": DIM, "layers": LAYERS, "heads": HEADS, "sequence": LENGTH, "batch": BATCH, "gates": GATES},
        "setup": asdict(setup),
    }


def load(path: Path, setup: Setup) -> list[dict[str, Any]]:
    """The runs of the file.

    Raises:
        ValueError: If they were made under other conditions.
    """
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    for name, value in conditions(setup).items():
        if report.get(name) != value:
            raise ValueError(f"out={path}: its runs have {name}={report.get(name)}, not {value}; take another file.")
    return list(report["runs"])


def save(path: Path, setup: Setup, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes what is there so far."""
    report = {
        "device": f"{platform.machine()} CPU, one process, one thread",
        "date": date.today().isoformat(),
        **conditions(setup),
        "final": summarize(runs),
        "against_switch": {gate: compare(runs, gate) for gate in ("dts", "wide")},
        "runs": runs,
    }
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(report, indent=2))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--gates", nargs="+", default=list(GATES), choices=list(GATES))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--balance", type=float)
    parser.add_argument("--dts", type=json.loads, help="arguments of DTSGateSchedule, as JSON")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("steps", "learning_rate", "balance", "dts")}
    setup = replace(SMALL if options.small else FULL, **{name: x for name, x in given.items() if x is not None})
    torch.set_num_threads(1)  # sums of several threads would depend on their number
    runs = load(options.out, setup)
    made = {(run["gate"], run["seed"]) for run in runs}
    for seed, gate in product(options.seeds, options.gates):
        if (gate, seed) not in made:
            runs.append(train(gate, seed, setup))
            print(f"{gate}, seed {seed}: {runs[-1]['val_loss'][-1]:.4f} after {runs[-1]['seconds']:.0f} s", flush=True)
            save(options.out, setup, runs)
    report = save(options.out, setup, runs)
    if options.picture is not None:
        draw(report).save(options.picture)
    print(table(report))


if __name__ == "__main__":
    main()
