"""Ulysses and context parallelism compute what one process computes, and say where they cannot be used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hetu.parallel.build import build_module, check_plan_fits_model
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.structure import find_structure
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan
from tests.parallel import test_executor, test_forward

WIDTH, HEADS = 16, 4


class Attention(nn.Module):
    """Self-attention with fewer heads of keys and values, a mask, and a rotation by position, on request."""

    def __init__(self, groups: int = HEADS, causal: bool = False) -> None:
        super().__init__()
        self.groups, self.causal = groups, causal
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, WIDTH // HEADS * groups) for _ in range(2))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, angles: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        query, key, value = (
            linear(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        if angles is not None:
            query, key = (y * angles.cos()[:, None] + y.roll(1, -1) * angles.sin()[:, None] for y in (query, key))
        mixed = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=self.causal, enable_gqa=self.groups < HEADS
        )
        return x + self.drop(mixed.transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    """Blocks that share positions and a mask."""

    def __init__(self, groups: int = HEADS, causal: bool = False, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Attention(groups, causal) for _ in range(2))
        self.masked = masked
        self.slopes = nn.Parameter(torch.linspace(0.1, 1.0, WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        hidden, length = self.table(x), x.shape[1]
        # positions have a gradient, too
        angles = (torch.arange(length).float()[:, None] * self.slopes)[None]
        mask = None
        if self.masked:
            mask = torch.linspace(-2, 2, HEADS * length * length).view(1, HEADS, length, length)
        for block in self.blocks:
            hidden = block(hidden, angles=angles, mask=mask)
        return hidden


def run(rank: int, world: int, rows: str, length: int, options: dict[str, Any]) -> list[str]:
    """What differs from one process: outputs, gradients, and outputs in evaluation."""
    torch.manual_seed(0)
    model = Blocks(**options)
    reference = copy.deepcopy(model)
    strategies = [LayerStrategy.parse(row) for row in rows.split()]
    outer = LayerStrategy(dp=world, dp_type="zero2") if strategies[0].dp == world else LayerStrategy.parse(f"dp{world}")
    samples = 2 * world
    plan = HybridPlan(world, samples, 1, stages=(2,), embedding=outer, layers=tuple(strategies), head=outer)
    mesh = PlanMesh(plan, "cpu")
    structure = find_structure(model, "blocks")
    check_plan_fits_model(plan, structure, model)
    wrapper = build_module(model, structure, plan, mesh)
    values = torch.randn(samples, length, 3, generator=torch.Generator().manual_seed(1))
    mine = slice(2 * rank, 2 * rank + 2)
    problems = []
    for training in (False, True):
        reference.train(training), wrapper.train(training)
        if training and any(row.dp > 1 for row in strategies):  # ranks draw for their own samples
            for module in (*reference.modules(), *model.modules()):
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        torch.manual_seed(2)
        expected = reference(values)
        torch.manual_seed(2)
        found = wrapper(values[mine])
        if not torch.allclose(found, expected[mine], rtol=1e-5, atol=1e-6):
            problems.append(f"output, training={training}: {(found - expected[mine]).abs().max():.1e}")
    expected.pow(2).sum().backward()
    found.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        wanted = reference.get_parameter(name).grad
        gradient = test_executor.full(parameter.grad)
        if not torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())):
            problems.append(f"gradient of {name}: {((gradient - wanted).norm() / wanted.norm()):.1e}")
    return problems


@pytest.mark.parametrize(
    ("world", "rows", "length", "options"),
    [
        (2, "sp2-zero3 sp2-zero2-recompute", 8, {"causal": True}),
        (2, "sp2-ddp sp2-zero3", 7, {"groups": 2, "causal": True}),
        (4, "sp4-zero3 dp2-sp2-zero2", 9, {"groups": 2, "masked": True}),
        (4, "sp4-zero2 sp4", 6, {"causal": True}),  # too short to be shared out
        (2, "cp2-zero3 cp2-zero2-recompute", 8, {"causal": True}),
        (2, "cp2-ddp cp2-zero3", 8, {"groups": 2}),
        (4, "cp4-zero3 dp2-cp2-zero2", 16, {"groups": 1, "causal": True}),
        (4, "sp2-cp2-zero3 sp2-cp2-recompute", 16, {"causal": True}),
        (2, "cp2-zero3 cp2", 9, {"causal": True}),  # no pieces of equal length
    ],
    ids=["ulysses", "uneven", "mask-per-head", "short", "ring", "ring-to-all", "four-in-a-ring", "both", "odd-ring"],
)
def test_blocks_equal_one_process(ranks: Any, world: int, rows: str, length: int, options: dict[str, Any]) -> None:
    """Outputs and gradients, of positions too; dropout drops what one process drops."""
    for rank, problems in enumerate(ranks(world).run(run, world, rows, length, options)):
        assert not problems, f"rank {rank}: {problems}"


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        (
            (6,),
            "dp4-zero3 dp2-sp2-zero2 sp4-zero3-recompute dp4-ddp dp2-cp2-zero3 cp4-recompute sp2-cp2-zero2 dp2-tp2",
        ),
        pytest.param((3, 3), "dp2 sp2-zero3 dp2-zero3 tp2 cp2 sp2-recompute tp2-sequence dp2", marks=pytest.mark.slow),
    ],
    ids=["one-stage", "two-stages"],
)
def test_gpt_equals_one_process(ranks: Any, stages: tuple[int, ...], text: str) -> None:
    """Losses, norms, gradients and weights next to layers of all kinds, accumulated over microbatches."""
    plan = test_executor.plan_of(text, 4, stages, 2)
    for rank, problems in enumerate(ranks(4).run(test_executor.compare_with_one_process, plan, {})):
        assert not problems, f"rank {rank}: {problems}"


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        # rotary positions are cut with the tokens; padding makes a mask
        ("llama", "dp4 dp2-sp2-zero2 dp2-sp2-zero3-recompute dp4-zero3 dp2-tp2-sequence dp2-sp2 dp4"),
        pytest.param("gpt2", "dp4 sp4-zero2 dp2-sp2-zero3-recompute dp4", marks=pytest.mark.slow),
        pytest.param("vit", "dp4 sp4-zero2 dp2-sp2-zero3-recompute dp4", marks=pytest.mark.slow),
        pytest.param("bert", "dp4 dp2-sp2-zero2 dp2-sp2-zero3-recompute dp4", marks=pytest.mark.slow),
    ],
    ids=["llama", "gpt2", "vit", "bert"],
)
def test_transformers_equal_one_process(ranks: Any, kind: str, plan: str) -> None:
    """Models that run their own forward."""
    rows = plan.split()
    count = len(find_blocks(kind))
    layers = (rows[1:-1] * count)[:count]
    full = test_forward.plan_of(" ".join([rows[0], *layers, rows[-1]]), 4, (count,), 2)
    ranks(4).run(test_forward.on_ranks, kind, full)


def find_blocks(kind: str) -> tuple[str, ...]:
    """The blocks of a tiny model of transformers."""
    return test_forward.trace_structure(test_forward.Module(kind), test_forward.batch_of(kind)).blocks
