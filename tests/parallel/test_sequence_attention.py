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
from lightning_hetu.parallel.tokenwise import attention_degrees, check_tokenwise
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
        mixed = F.dropout(mixed.transpose(1, 2).flatten(2), self.drop.p, self.training)
        return x + self.drop(mixed)


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
            # learned, as relative positions are
            mask = torch.linspace(-2, 2, HEADS * length * length).view(1, HEADS, length, length) * self.slopes.sum()
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
            "dp4-zero3 dp2-sp2-zero2 sp4-zero3-recompute dp4-ddp dp2-tp2-zero3-sequence cp4-recompute sp2-cp2-zero2"
            " dp2-tp2",
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
        pytest.param(
            "llama",
            "dp4 dp2-sp2-zero2 dp2-sp2-zero3-recompute dp4-zero3 dp2-tp2-sequence dp2-sp2 dp4",
            marks=pytest.mark.slow,
        ),
        # a learned bias goes through the blocks of the encoder; those of the decoder look elsewhere, too
        ("t5", "dp4 dp4 dp2-sp2-zero2 sp4-zero3-recompute dp4 dp4-zero3 dp4 dp4"),
        pytest.param("gpt2", "dp4 sp4-zero2 dp2-sp2-zero3-recompute dp4", marks=pytest.mark.slow),
        pytest.param("vit", "dp4 sp4-zero2 dp2-sp2-zero3-recompute dp4", marks=pytest.mark.slow),
        pytest.param("bert", "dp4 dp2-sp2-zero2 dp2-sp2-zero3-recompute dp4", marks=pytest.mark.slow),
    ],
    ids=["llama", "t5", "gpt2", "vit", "bert"],
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


class Odd(Attention):
    """A block that cannot be cut, in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.hides = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        nn.init.zeros_(self.hides[1].weight), nn.init.zeros_(self.hides[1].bias)

    def forward(self, x: Tensor, angles: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.way == "counts":  # positions of its own, which a part would count from zero
            x = x + torch.arange(x.shape[1])[None, :, None]
        elif self.way == "rotates":  # from the first position on, wherever the part begins
            angles = torch.arange(x.shape[1])[None, :, None] * torch.ones(WIDTH // HEADS)
        elif self.way == "windows":
            x = x + self.query(x).unflatten(1, (2, -1)).mean(2).repeat_interleave(x.shape[1] // 2, 1)
        elif self.way == "hidden":  # behind a projection that begins with zeros
            x = x + self.hides(x.cumsum(1))
        elif self.way == "objects":
            assert x.shape[1] == 8, "8 tokens are wanted"
        elif self.way == "mixes":
            x = x.cumsum(1)
        elif self.way == "other":
            return F.scaled_dot_product_attention(x[:, None], x[:, None, ::2], x[:, None, ::2])[:, 0]
        elif self.way == "none":
            return (self.query(x) @ self.key(x).mT).softmax(-1) @ x
        elif self.way == "pools":
            return super().forward(x, angles, mask).mean(1, keepdim=True)
        elif self.way == "bias":  # as T5's first block has it
            mask = torch.zeros(1, 1, x.shape[1], x.shape[1])
        elif self.way == "flat":
            return super().forward(x[None])[0]
        return super().forward(x, angles, mask)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("rotates", ["every token by itself"]),
        ("windows", ["every token by itself"]),
        ("hidden", ["every token by itself"]),
        ("objects", ["cannot run on a part of the sequence (AssertionError: 8 tokens are wanted)"]),
        ("counts", ["every token by itself"]),
        ("mixes", ["every token by itself"]),
        ("bias", ["every token by itself"]),
        ("pools", ["every token by itself"]),
        ("other", ["attends among [1, 1, 4, 16] where it is given 8 tokens"]),
        ("none", ["calls no scaled_dot_product_attention"]),
        ("flat", ["given a tensor of shape [8, 16] first"]),
    ],
)
def test_blocks_that_cannot_be_cut_are_found(way: str, words: list[str]) -> None:
    """By running them on a part; one line says why."""
    block = Odd(way)
    shape = (8, WIDTH) if way == "flat" else (2, 8, WIDTH)
    arguments = ((torch.randn(shape),), {})
    assert attention_degrees(block, arguments, "blocks.0", 8) is None
    with pytest.raises(ValueError) as error:
        check_tokenwise(lambda args, kwargs: block(*args, **kwargs), arguments, "blocks.0", block)
    message = str(error.value)
    assert all(word in message for word in ["blocks.0", "sp", *words]) and "\n" not in message, message


@pytest.mark.parametrize(
    ("groups", "causal", "masked", "length", "expected"),
    [
        (4, True, False, 16, ((2, 4), (2, 4, 8))),
        (2, True, False, 12, ((2, 4), (2,))),  # heads of keys are repeated, pieces of the ring are equal
        (4, False, True, 16, ((2, 4), ())),  # a ring has no mask
        (4, True, False, 6, ((2,), ())),
        (4, True, False, 2, None),
    ],
)
def test_degrees_are_found(
    groups: int, causal: bool, masked: bool, length: int, expected: tuple[tuple[int, ...], tuple[int, ...]] | None
) -> None:
    """They divide the heads, and the sequence where they must; the random state is what it was."""
    block = Attention(groups, causal)
    mask = torch.zeros(1, HEADS, length, length) if masked else None
    angles = torch.arange(length)[None, :, None] * torch.ones(WIDTH // HEADS)
    before = torch.get_rng_state()
    arguments = (
        (torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(0)),),
        {"angles": angles, "mask": mask},
    )
    assert attention_degrees(block, arguments, "block", 8) == expected
    assert torch.equal(torch.get_rng_state(), before)


def refusal(rank: int, way: str, row: str) -> str:
    model = Blocks(masked=way == "masked")
    model.blocks[0] = Odd(way)
    strategy, outer = LayerStrategy.parse(row), LayerStrategy.parse("dp2")
    plan = HybridPlan(2, 4, 1, stages=(2,), embedding=outer, layers=(strategy, strategy), head=outer)
    wrapper = build_module(model, find_structure(model, "blocks"), plan, PlanMesh(plan, "cpu"))
    try:
        wrapper(torch.randn(2, 8, 3))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("way", "row", "words"),
    [
        ("mixes", "sp2", ["blocks.0", "every token by itself"]),
        ("none", "cp2-zero3-recompute", ["blocks.0", "scaled_dot_product_attention"]),
        ("masked", "cp2", ["blocks.0", "attention mask", "Use sp"]),
    ],
)
def test_wrong_plans_are_refused_in_the_first_forward(ranks: Any, way: str, row: str, words: list[str]) -> None:
    """Never computed wrongly."""
    for message in ranks(2).run(refusal, way, row):
        assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize(
    ("field", "row", "words"),
    [("embedding", "sp2", ["only the sequences of blocks"]), ("layers", "cp2-tp2", ["cp goes with sp"])],
)
def test_plans_that_cannot_be_run_are_refused(field: str, row: str, words: list[str]) -> None:
    """Before anything is changed."""
    world = LayerStrategy.parse(row).num_devices
    rows = [f"dp{world}"] * (test_executor.LAYERS + 2)
    rows[0 if field == "embedding" else 1] = row
    plan = test_executor.plan_of(" ".join(rows), world, (6,), 1)
    model = test_executor.Model()
    with pytest.raises(ValueError) as error:
        check_plan_fits_model(plan, find_structure(model), model)
    assert all(word in str(error.value) for word in [f"plan.{field}", *words]) and "\n" not in str(error.value)
