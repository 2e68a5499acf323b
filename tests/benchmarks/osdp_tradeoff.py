r"""The trade-off of OSDP: memory limit against step time, on a link that is slowed down on purpose.

    python -m tests.benchmarks.osdp_tradeoff --out docs/numbers/osdp_tradeoff.json \
        --picture docs/images/osdp_tradeoff.svg

Processes of one machine exchange data faster than they compute. So every collective first sleeps for as long as a ring
over the described link would take; the same link is what plans are made for. Beside OSDP's plan for each limit run
FSDP2 with everything sharded (each operator a group, as in the plans), and torch's DistributedDataParallel, whose
buckets sleep alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_hetu.models import GPTLightningModule
from lightning_hetu.parallel.osdp.apply import apply_osdp, set_last_micro_step
from lightning_hetu.parallel.osdp.discover import Unit, find_units
from lightning_hetu.parallel.osdp.split import cuts_of
from lightning_hetu.planning.drawing import Area, Box, Dashes, Picture, Shape, Words
from lightning_hetu.planning.osdp import CallOverhead, OSDPInfeasibleError, OSDPPlan, Ring, solve
from lightning_hetu.planning.osdp.links import CollectiveSeconds
from lightning_hetu.planning.osdp.timeline import StepProfile
from lightning_hetu.planning.units import format_bytes
from lightning_hetu.profiling import MemoryMeter
from lightning_hetu.profiling.fsdp2_probe import call_overhead
from lightning_hetu.profiling.operators import profile_operators
from lightning_hetu.profiling.step_time import StepSeconds, time_step
from lightning_hetu.strategies._osdp_planner import with_seconds
from tests._ranks import RankPool

RANKS, ACCUMULATE, BATCH, LENGTH, WORDS = 2, 3, 2, 32, 256
LINK = Ring(seconds_per_byte=5e-8, latency=5e-4)
"""20 MB/s: communication takes longer than computation, and much longer than gloo itself."""
LIMITS = 8


def make_model() -> GPTLightningModule:
    torch.manual_seed(0)
    return GPTLightningModule(vocab_size=WORDS, max_seq_len=LENGTH, num_layers=4, num_heads=4, dim=384)


def batch_of(step: int) -> Tensor:
    return torch.randint(0, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def run(module: Any, batch: Tensor) -> Tensor:
    return module.pipeline_step(batch, batch)  # type: ignore[no-any-return]


def find(model: nn.Module) -> tuple[Unit, ...]:
    with torch.no_grad():
        return find_units(model, lambda: run(model, batch_of(0)))


def profile(model: nn.Module, seconds: StepSeconds) -> StepProfile:
    found = profile_operators(model, find(model), run, batch_of(0), BATCH, cuts=cuts_of, max_slices=4)
    return with_seconds(found, seconds)


def plan(found: StepProfile, limit: int | None, comm: CollectiveSeconds) -> OSDPPlan:
    return solve(
        found.operators, limit, world_size=RANKS, comm=comm, batch_size=BATCH, micro_steps=ACCUMULATE, profile=found
    )


def uniform(found: StepProfile, comm: CollectiveSeconds, *modes: str) -> OSDPPlan:
    """The modes in turn, whatever they cost."""
    rows = []
    for index, operator in enumerate(found.operators):
        wanted = modes[index % len(modes)]
        wanted = "z2" if wanted in operator.excluded else wanted
        excluded = tuple(mode for mode in ("dp", "z2", "zdp") if mode != wanted)
        rows.append(replace(operator, max_slices=1, excluded=excluded))
    return plan(replace(found, operators=tuple(rows)), None, comm)


@contextmanager
def slowed() -> Iterator[None]:
    """Every collective takes the time of the link first."""
    import torch.distributed as dist

    names = {
        "all_gather": ("all_gather_single", "all_gather_into_tensor"),
        "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
        "all_reduce": ("all_reduce",),
    }
    before = {name: getattr(dist, name) for of in names.values() for name in of if hasattr(dist, name)}

    def slow(kind: Any, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
            time.sleep(LINK.seconds(kind, RANKS, max(x.numel() * x.element_size() for x in tensors)))
            return collective(*args, **options)

        return call

    for kind, of in names.items():
        for name in of:
            if name in before:
                setattr(dist, name, slow(kind, before[name]))
    try:
        yield
    finally:
        for name, collective in before.items():
            setattr(dist, name, collective)


def measure(rank: int, plans: list[OSDPPlan | None], steps: int) -> list[tuple[float, int]]:
    """Median seconds of an optimizer step, and peak bytes, of each plan; ``None`` is DistributedDataParallel."""
    return [_measure(item, steps) for item in plans]


def _measure(item: OSDPPlan | None, steps: int) -> tuple[float, int]:
    import torch.distributed as dist

    model = make_model()
    if item is None:
        root: nn.Module = nn.parallel.DistributedDataParallel(_Step(model))

        def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations, and wants none or its own
            buffer = bucket.buffer()
            time.sleep(LINK.seconds("all_reduce", RANKS, buffer.numel() * buffer.element_size()))
            return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0] / RANKS)

        root.register_comm_hook(None, hook)  # type: ignore[operator]
    else:
        root = apply_osdp(_Step(model).model, find(model), item, init_device_mesh("cpu", (RANKS,)))  # type: ignore
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-4)

    def optimizer_step() -> None:
        for micro in range(ACCUMULATE):
            last = micro == ACCUMULATE - 1
            if item is None:
                root.require_backward_grad_sync = last  # type: ignore[assignment]
                loss = root(batch_of(micro))
            else:
                set_last_micro_step(root, item, last=last)
                loss = _through(root, batch_of(micro))
            (loss / ACCUMULATE).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = []
    for step in range(steps + 2):
        dist.barrier()
        start = time.perf_counter()
        if item is None:
            optimizer_step()
        else:
            with slowed():
                optimizer_step()
        took = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        if step >= 2:
            seconds.append(float(took))
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    with MemoryMeter("cpu", tensors=[*root.parameters(), *root.buffers(), *states]) as meter:
        optimizer_step()
    # The meter does not know the buckets that DistributedDataParallel has had from the start.
    buckets = sum(parameter.nbytes for parameter in root.parameters()) if item is None else 0
    return median(seconds), meter.total + buckets


class _Step(nn.Module):
    """Forward is the step of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Tensor:
        return run(self.model, batch)


def _through(root: Any, batch: Tensor) -> Tensor:
    """Calls the step of the model through the root's forward, as Lightning does."""
    model = root.module
    forward = model.forward
    model.forward = lambda values: run(model, values)
    try:
        return root(batch)  # type: ignore[no-any-return]
    finally:
        model.forward = forward


def time_model(rank: int) -> tuple[StepSeconds, float]:
    """Seconds of a step without communication, and what every collective takes without the link."""
    seconds = time_step(make_model(), run, batch_of(0), torch.device("cpu"), repeats=5)
    return seconds, call_overhead(init_device_mesh("cpu", (RANKS,)), Ring(0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args()
    pool = RankPool(RANKS)
    seconds, overheads = zip(*pool.run(time_model), strict=True)
    comm = CallOverhead(LINK, max(overheads))
    found = profile(make_model(), StepSeconds(*map(max, zip(*seconds, strict=True))))
    fastest, smallest = plan(found, None, comm), _smallest(found, comm)
    largest = max(fastest.peak_memory, uniform(found, comm, "dp").peak_memory)
    limits = [smallest + (largest - smallest) * i // (LIMITS - 1) for i in range(LIMITS)]
    curve = [plan(found, limit, comm) for limit in limits]
    fixed = {
        "all sharded (FSDP2)": uniform(found, comm, "zdp"),
        "all gathered once (ZeRO-2)": uniform(found, comm, "z2"),
        "all replicated": uniform(found, comm, "dp"),
        "every other operator sharded": uniform(found, comm, "zdp", "dp"),
        "one third each": uniform(found, comm, "zdp", "z2", "dp"),
    }
    results = pool.run(measure, [*curve, *fixed.values(), None], options.steps, timeout=1800)
    measured = [(max(r[i][0] for r in results), max(r[i][1] for r in results)) for i in range(len(results[0]))]
    pool.close()
    rows = [
        {"limit": limit, **_row(item, *value)}
        for limit, item, value in zip(limits, curve, measured[:LIMITS], strict=True)
    ]
    others = {name: _row(item, *value) for (name, item), value in zip(fixed.items(), measured[LIMITS:-1], strict=True)}
    others["DistributedDataParallel"] = {"measured_seconds": measured[-1][0], "measured_bytes": measured[-1][1]}
    report = {
        "device": f"{platform.machine()} CPU, {RANKS} gloo processes, every collective slowed to"
        f" {1 / LINK.seconds_per_byte / 1e6:g} MB/s and {LINK.latency * 1e6:g} us per hop",
        "torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat(),
        "micro_steps": ACCUMULATE, "seconds_per_call": comm.seconds_per_call, "osdp": rows, "others": others,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.picture is not None:
        draw(report).save(options.picture)
    print(table(report))


def _smallest(found: StepProfile, comm: CollectiveSeconds) -> int:
    try:
        return plan(found, 1, comm).peak_memory
    except OSDPInfeasibleError as error:
        return error.smallest_feasible_limit


def _row(item: OSDPPlan, seconds: float, size: int) -> dict[str, Any]:
    return {
        "plan": item.in_short,
        "predicted_seconds": item.seconds,
        "measured_seconds": seconds,
        "predicted_bytes": item.peak_memory,
        "measured_bytes": size,
    }


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| plan | limit | step predicted | step measured | memory predicted | memory measured |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in [("OSDP", row) for row in report["osdp"]] + list(report["others"].items()):
        limit = format_bytes(row["limit"]) if "limit" in row else ""
        predicted = [
            f"{row['predicted_seconds'] * 1e3:.0f} ms" if "predicted_seconds" in row else "",
            format_bytes(row["predicted_bytes"]) if "predicted_bytes" in row else "",
        ]
        lines.append(
            f"| {name} | {limit} | {predicted[0]} | {row['measured_seconds'] * 1e3:.0f} ms | {predicted[1]} |"
            f" {format_bytes(row['measured_bytes'])} |"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any]) -> Picture:
    """Limit against measured step time; the dashed lines are the two extremes."""
    left, top, width, height = 80, 40, 520, 240
    rows = report["osdp"]
    slow = report["others"]["all sharded (FSDP2)"]["measured_seconds"]
    fast = report["others"]["DistributedDataParallel"]["measured_seconds"]
    least, most = rows[0]["limit"], rows[-1]["limit"]
    high = 1.08 * max(slow, *(row["measured_seconds"] for row in rows))

    def place(limit: float, seconds: float) -> tuple[float, float]:
        return left + width * (limit - least) / (most - least), top + height * (1 - seconds / high)

    shapes: list[Shape] = [Words(14, 24, "OSDP: step time under a memory limit", size=13)]
    for seconds in (0.0, high / 2, high):
        shapes.append(Words(left - 8, place(least, seconds)[1] + 4, f"{seconds * 1e3:.0f} ms", anchor="end", size=11))
    points = [place(row["limit"], row["measured_seconds"]) for row in rows]
    floor = [(x, float(top + height)) for x, _ in reversed(points)]
    shapes.append(Area((*points, *floor), "#d9e8f3"))
    for name, seconds in (("FSDP2, all sharded", slow), ("DistributedDataParallel", fast)):
        y = place(least, seconds)[1]
        shapes += [Dashes(left, y, left + width, y), Words(left + width - 4, y - 5, name, anchor="end", size=11)]
    shapes += [Box(x - 4, y - 4, 8, 8, "#2f6f9f") for x, y in points]
    for limit in (least, (least + most) // 2, most):
        shapes.append(Words(place(limit, 0)[0], top + height + 20, format_bytes(limit), anchor="middle", size=11))
    return Picture("OSDP: step time under a memory limit", left + width + 40, top + height + 36, shapes)


if __name__ == "__main__":
    main()
