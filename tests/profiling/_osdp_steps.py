"""Real FSDP2 steps of OSDP plans, measured; imported by the processes themselves."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_hetu.models.gpt import GPT, GPTConfig
from lightning_hetu.parallel.clip import clip_gradients_by_norm
from lightning_hetu.parallel.osdp.apply import apply_osdp, set_last_micro_step
from lightning_hetu.parallel.osdp.discover import ROOT, Unit, find_units
from lightning_hetu.planning.osdp import Operator, OperatorPlan, OSDPPlan
from lightning_hetu.planning.osdp.buckets import with_buckets
from lightning_hetu.planning.osdp.timeline import StepProfile, StepSettings, Timeline, play_step
from lightning_hetu.profiling import MemoryMeter
from lightning_hetu.profiling.operators import profile_operators
from tests.models.tiny_transformers import tiny_batch, tiny_model

Run = Callable[[nn.Module, Any], Tensor]
WIDE = {"hidden_size": 128, "intermediate_size": 512}
SAMPLES = {"mlp": 256, "uneven": 64, "gpt": 4, "bert": 8, "vit": 8}


class Case(NamedTuple):
    """A model and how it is trained: modes of its units, in turn, or by name with slices; bytes of buckets."""

    model: str
    modes: tuple[str, ...]
    micro_steps: int = 1
    accumulation: str = "last"
    half: bool = False
    clip: bool = False
    bucket: int = 0
    sliced: tuple[tuple[str, tuple[tuple[str, int], ...], str], ...] = ()


class Chain(nn.Module):
    """Linear layers with a ReLU between each two."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


def build(case: Case) -> tuple[nn.Module, Run, Any]:
    """The model, its step, and a batch."""
    torch.manual_seed(0)
    name, samples = case.model, SAMPLES[case.model]
    model: nn.Module
    if name in ("mlp", "uneven"):
        sizes = (256, 1024, 1024, 1024, 1024, 256) if name == "mlp" else (37, 911, 13, 1501, 77, 640, 640, 5)
        model = Chain(*sizes)
        batch: Any = (torch.randn(samples, sizes[0]), torch.randn(samples, sizes[-1]))

        def run(module: nn.Module, batch: Any) -> Tensor:
            return (module(batch[0]) - batch[1]).square().mean()
    elif name == "gpt":
        model = GPT(GPTConfig(vocab_size=1000, max_seq_len=64, num_layers=4, num_heads=4, dim=128))
        batch = torch.randint(1000, (samples, 64))

        def run(module: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(module(batch).flatten(0, 1), batch.flatten())
    else:
        model, batch = tiny_model(name, **WIDE), tiny_batch(name, samples)

        def run(module: nn.Module, batch: Any) -> Tensor:
            return module(**batch).loss

    def step(module: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.half):
            return run(module, batch)

    return model, step, batch


def decide(case: Case, model: nn.Module, units: Sequence[Unit], world_size: int) -> OSDPPlan:
    """The plan of a case."""
    sliced = {name: (parts, cut) for name, parts, cut in case.sliced}
    operators = []
    for number, unit in enumerate(units):
        mode = case.modes[number % len(case.modes)]
        # The unit of the whole model cannot be replicated.
        parts, cut = sliced.get(unit.name, (((mode if (mode, unit.name) != ("dp", ROOT) else "z2", 1),), ""))
        operators.append(OperatorPlan(unit.name, parts, cut=cut))
    plan = OSDPPlan(world_size, tuple(operators), micro_steps=case.micro_steps, accumulation=case.accumulation)  # type: ignore[arg-type]
    whole = [Operator(unit.name, sum(model.get_parameter(name).numel() for name in unit.parameters)) for unit in units]
    half = {unit.name for unit in units if unit.half is not None}
    return with_buckets(
        plan, whole, {op.name for op in whole}, lambda op: (2 if op.name in half else 4, 4), case.bucket
    )


def predict(case: Case, world_size: int, known: dict[Any, tuple[nn.Module, Sequence[Unit], StepProfile]]) -> Timeline:
    """The timeline of a case; ``known`` keeps the profiles of models."""
    key = case.model, case.half, case.sliced
    if key not in known:
        model, run, batch = build(case)
        cuts = {name: cut for name, _, cut in case.sliced}
        modules = {id(model.get_submodule(name)): (cut,) for name, cut in cuts.items()}
        units = find_units(model, lambda: run(model, batch))
        profile = profile_operators(
            model, units, run, batch, SAMPLES[case.model], cuts=lambda module: modules.get(id(module), ())
        )
        known[key] = model, units, profile
    model, units, profile = known[key]
    plan = decide(case, model, units, world_size)
    settings = StepSettings(world_size, case.micro_steps, plan.accumulation, batch_size=SAMPLES[case.model])
    parts = {operator.name: operator.parts for operator in plan.operators}
    return play_step(profile, parts, settings, {row.name: row.bucket for row in plan.operators if row.bucket})


def measure(rank: int, cases: Sequence[Case], steps: int) -> list[int]:
    """Peak of a training step beyond the second one, of each case.

    Least of several steps: now and then a thread of gloo frees its copy of a buffer late.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return [_measure(case, mesh, steps) for case in cases]


def _measure(case: Case, mesh: Any, steps: int) -> int:
    model, run, batch = build(case)
    units = find_units(model, lambda: run(model, batch))
    plan = decide(case, model, units, mesh.size())
    root = apply_osdp(model, units, plan, mesh)
    root.forward = lambda batch: run(root.module, batch)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-4)

    def step() -> None:
        for number in range(case.micro_steps):
            set_last_micro_step(root, plan, last=number == case.micro_steps - 1)
            loss = root(batch)
            if number == 0:
                optimizer.zero_grad()
            loss.backward()
            del loss
        if case.clip:
            clip_gradients_by_norm(root.parameters(), 1.0)
        optimizer.step()

    peaks = []
    for number in range(2 + steps):
        if number < 2:
            step()
            continue
        gc.collect()
        time.sleep(0.02)
        meter = MemoryMeter(tensors=_alive(root, optimizer, batch))
        with meter:
            step()
        peaks.append(meter.total)
    return min(peaks)


def _alive(root: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> list[Tensor]:
    gradients = [parameter.grad for parameter in root.parameters() if parameter.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [*root.parameters(), *root.buffers(), *gradients, *states, *tree_leaves(batch)]
