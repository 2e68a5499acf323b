"""OSDP on one GPU: predicted against allocated memory of six models, and what cutting a large linear layer costs.

    python -m tests.benchmarks.osdp_gpu --out docs/numbers/osdp_gpu.json
    python -m tests.benchmarks.osdp_gpu --device cpu --small --out osdp_cpu.json

A group of one rank communicates nothing, but FSDP2 gathers, copies and frees as with many, so memory can be checked.
Models are trained in bf16-mixed; the figure is ``max_memory_allocated`` of a step beyond the second one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lightning_hetu.models.gpt import GPT, GPTConfig
from lightning_hetu.parallel.osdp.apply import apply_osdp
from lightning_hetu.parallel.osdp.discover import ROOT, Unit, find_units
from lightning_hetu.planning.osdp import OperatorPlan, OSDPPlan
from lightning_hetu.planning.osdp.fsdp2 import GLOO, NCCL
from lightning_hetu.planning.osdp.timeline import StepSettings, play_step
from lightning_hetu.planning.tables import text_table
from lightning_hetu.planning.units import format_bytes
from lightning_hetu.profiling import MemoryMeter
from lightning_hetu.profiling._measure import Stopwatch
from lightning_hetu.profiling.operators import profile_operators
from tests.models.tiny_transformers import tiny_batch, tiny_model
from tests.profiling._osdp_steps import Chain

MODES = ("zdp", "z2", "dp")


class Subject(NamedTuple):
    """A model, its step, a batch, and the number of samples in it."""

    model: nn.Module
    run: Callable[[nn.Module, Any], Tensor]
    batch: Any
    samples: int


def subjects(device: torch.device, small: bool) -> dict[str, Callable[[], Subject]]:
    """Six models, of about a billion parameters on a GPU."""
    scale = 1 if small else 16
    wide = {"hidden_size": 64 * scale, "intermediate_size": 256 * scale}
    samples = 4 if small else 16

    def chain(*sizes: int) -> Subject:
        batch = torch.randn(64 * scale, sizes[0]), torch.randn(64 * scale, sizes[-1])
        return Subject(
            Chain(*sizes), lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), batch, 64 * scale
        )

    def gpt() -> Subject:
        length = 64 if small else 1024
        shape = (
            {"num_layers": 4, "num_heads": 4, "dim": 64} if small else {"num_layers": 24, "num_heads": 16, "dim": 2048}
        )
        batch = torch.randint(512, (samples, length))

        def run(model: nn.Module, batch: Tensor) -> Tensor:
            return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

        return Subject(GPT(GPTConfig(vocab_size=512 * scale, max_seq_len=length, **shape)), run, batch, samples)

    def transformer(kind: str) -> Subject:
        run: Callable[[nn.Module, Any], Tensor] = lambda model, batch: model(**batch).loss  # noqa: E731
        return Subject(tiny_model(kind, **wide), run, tiny_batch(kind, samples), samples)

    wide_chain = [512 * scale] * 6
    uneven = [37, 911 * scale, 13, 1501 * scale, 77, 640 * scale, 5]
    makers: dict[str, Callable[[], Subject]] = {
        "mlp": lambda: chain(*wide_chain), "uneven": lambda: chain(*uneven), "gpt": gpt,
        "bert": lambda: transformer("bert"), "vit": lambda: transformer("vit"), "llama": lambda: transformer("llama"),
    }  # fmt: skip
    return makers


def memory_row(name: str, subject: Subject, modes: Sequence[str], mesh: DeviceMesh) -> dict[str, Any]:
    """Predicted and measured peak of a model whose units have these modes in turn."""
    device = _device(mesh)
    model, plain_run, batch, samples = subject

    def run(module: nn.Module, values: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return plain_run(module, values)

    with torch.no_grad():
        units = find_units(model, lambda: run(model, batch))
    plan = _plan(units, modes)
    kernels = "H100-80GB" if device.type == "cuda" else None
    profile = profile_operators(model, units, run, batch, samples, device=kernels)
    settings = StepSettings(1, batch_size=samples, runtime=NCCL if device.type == "cuda" else GLOO)
    parts = {row.name: row.parts for row in plan.operators}
    predicted = play_step(profile, parts, settings).peak
    model.to(device)
    batch = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
    root = apply_osdp(model, units, plan, mesh)
    root.forward = lambda values: run(root.module, values)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-4)

    def step() -> None:
        loss = root(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(2):
        step()
    measured = _peak(step, root, optimizer, batch, device)
    count = sum(parameter.numel() for parameter in root.parameters())
    return {
        "model": name, "modes": "+".join(modes), "parameters": count, "predicted_bytes": predicted,
        "measured_bytes": measured, "ratio": round(predicted / measured, 4),
    }  # fmt: skip


def _plan(units: Sequence[Unit], modes: Sequence[str]) -> OSDPPlan:
    rows = []
    for number, unit in enumerate(units):
        mode = modes[number % len(modes)]
        rows.append(OperatorPlan(unit.name, (("z2" if (mode, unit.name) == ("dp", ROOT) else mode, 1),)))
    return OSDPPlan(1, tuple(rows))


def _peak(
    step: Callable[[], None], root: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, device: torch.device
) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    alive: list[Tensor] = [*root.parameters(), *root.buffers()]
    alive += [parameter.grad for parameter in root.parameters() if parameter.grad is not None]
    alive += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    alive += [x for x in torch.utils._pytree.tree_leaves(batch) if isinstance(x, Tensor)]
    meter = MemoryMeter(device, tensors=alive)
    del alive
    with meter:
        step()
    return meter.total


def splitting_row(rows: int, columns: int, tokens: int, slices: int, mesh: DeviceMesh, repeats: int) -> dict[str, Any]:
    """Tokens per second of forward and backward of one linear layer, whole and in slices, in turns."""
    device = _device(mesh)
    roots = {}
    for count in (1, slices):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(rows, columns, bias=False))
        units = [Unit("0", ("0.weight",), "Linear", leaf=True)]
        plan = OSDPPlan(1, (OperatorPlan("0", (("zdp", count),), cut="output" if count > 1 else ""),))
        roots[count] = apply_osdp(model.to(device), units, plan, mesh)
    batch = torch.randn(tokens, rows, device=device, requires_grad=True)
    watch, found = Stopwatch(device), {count: [] for count in roots}  # type: ignore[var-annotated]
    for repeat in range(repeats + 3):
        for count, root in roots.items():
            root.zero_grad()
            watch.start()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = root(batch)
            out.backward(torch.ones_like(out))
            if repeat >= 3:
                found[count].append(watch.stop())
            else:
                watch.stop()
    rate = {count: tokens / median(times) for count, times in found.items()}
    return {
        "layer": f"{rows} x {columns}", "tokens": tokens, "slices": slices, "tokens_per_second": rate[slices],
        "tokens_per_second_whole": rate[1], "cost": round(1 - rate[slices] / rate[1], 4),
    }  # fmt: skip


def _device(mesh: DeviceMesh) -> torch.device:
    return torch.device(mesh.device_type, 0) if mesh.device_type == "cuda" else torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29577")
    torch.distributed.init_process_group("nccl" if options.device == "cuda" else "gloo", rank=0, world_size=1)
    mesh = init_device_mesh(options.device, (1,))
    device, rows = _device(mesh), []
    for name, make in subjects(device, options.small).items():
        for modes in (("zdp",), ("dp", "z2", "zdp")):
            torch.manual_seed(0)
            rows.append(memory_row(name, make(), modes, mesh))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    size = (512, 2048, 256) if options.small else (8192, 32768, 8192)
    splitting = [splitting_row(*size, slices, mesh, repeats=20) for slices in (2, 4, 8)]
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat(),
        "memory": rows, "splitting": splitting,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    lines = [
        (row["model"], row["modes"], format_bytes(row["predicted_bytes"]), format_bytes(row["measured_bytes"]),
         f"{row['ratio']:.3f}")
        for row in rows
    ]  # fmt: skip
    print(text_table([("model", "modes", "predicted", "measured", "ratio"), *lines]))
    print(
        text_table(
            [("layer", "slices", "cost"), *((r["layer"], str(r["slices"]), f"{r['cost']:.1%}") for r in splitting)]
        )
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
