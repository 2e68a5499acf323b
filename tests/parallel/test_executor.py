"""A plan computes what one process computes: losses, gradients and trained weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input
from torch.nn import functional as F

from lightning_hetu.models.gpt import GPT, GPTConfig
from lightning_hetu.parallel.batch import largest_dp, local_dp, shard_rows
from lightning_hetu.parallel.build import build_stage, check_plan_fits_model, synchronize_initial_state
from lightning_hetu.parallel.clip import clip_gradients_by_norm
from lightning_hetu.parallel.executor import PipelineExecutor
from lightning_hetu.parallel.forward_build import build_forward_stage
from lightning_hetu.parallel.forward_trace import ForwardTrace
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin
from lightning_hetu.parallel.stage import HybridPipelineStage, check_split, graph_leaves
from lightning_hetu.parallel.structure import ModelStructure, find_structure
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan

VOCABULARY, LENGTH, SAMPLES, LAYERS = 32, 8, 16, 6


class Twice(nn.Module):
    """Uses one weight in two places."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.tanh(self.linear(x)))


class Model(PipelineMixin, nn.Module):
    pipeline_embedding = "model.embedding"
    pipeline_blocks = "model.blocks"
    pipeline_head = "model.head"

    def __init__(self, ignore: bool = False, frozen: int = 0, twice: int | None = None) -> None:
        super().__init__()
        self.ignore = ignore
        self.model = GPT(GPTConfig(vocab_size=VOCABULARY, max_seq_len=LENGTH, num_layers=LAYERS, num_heads=4, dim=16))
        if twice is not None:
            self.model.blocks[twice] = Twice(16)
        for layer in (self.model.embedding, *self.model.blocks)[:frozen]:
            layer.requires_grad_(False)

    def pipeline_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1).float(), target.flatten())

    def pipeline_loss_weight(self, target: Tensor) -> Tensor | None:
        return (target != -100).sum() if self.ignore else None


def plan_of(
    text: str, world: int, stages: tuple[int, ...], microbatches: int, schedule: str = "1f1b", virtual_stages: int = 1
) -> HybridPlan:
    """Embedding, blocks and head, separated by spaces."""
    rows = [LayerStrategy.parse(word) for word in text.split()]
    return HybridPlan(
        world_size=world, global_batch_size=SAMPLES, num_microbatches=microbatches, stages=stages,
        embedding=rows[0], layers=tuple(rows[1:-1]), head=rows[-1], schedule=schedule,  # type: ignore[arg-type]
        virtual_stages=virtual_stages,
    )  # fmt: skip


def batches(count: int, ignore: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(count):
        inputs = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
        target = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
        if ignore:
            target = target.masked_fill(torch.rand(SAMPLES, LENGTH, generator=generator) < 0.4, -100)
        out.append((inputs, target))
    return out


def train(model: Model, engine: PipelineExecutor | None, plan: HybridPlan) -> dict[str, Any]:
    """Five AdamW steps of two accumulated batches, clipped; returns losses, norms, last gradients and weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, norms = [], []
    data = iter(batches(10, model.ignore))
    for _ in range(5):
        for part in range(2):
            inputs, target = next(data)
            if engine is not None:
                dp = local_dp(plan)
                rows = shard_rows(SAMPLES, plan.num_microbatches, dp, engine.mesh.data_index(dp))
                inputs, target = inputs[rows], target[rows]
            loss = model.pipeline_step(inputs, target)
            if part == 0:
                optimizer.zero_grad()
            (loss / 2).backward()
            losses.append(loss.item())
        group = engine.mesh.pipeline.get_group() if engine is not None else None
        norms.append(clip_gradients_by_norm(model.parameters(), 0.05, group).item())
        optimizer.step()
        if engine is not None:
            engine.end_accumulation()
    gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": whole(model)}


def full(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def build(plan: HybridPlan, seed: int = 0, **options: Any) -> tuple[Model, PipelineExecutor]:
    torch.manual_seed(seed)
    model = Model(**options)
    structure = find_structure(model)
    check_plan_fits_model(plan, structure, model)
    mesh = PlanMesh(plan, "cpu")
    synchronize_initial_state(model)
    stage = build_stage(model, structure, plan, mesh)
    model._pipeline_engine = engine = PipelineExecutor(model, stage, plan, mesh, torch.device("cpu"))
    return model, engine


def compare_with_one_process(rank: int, plan: HybridPlan, options: dict[str, Any]) -> list[str]:
    """What differs by more than 1e-5 of the norm of a tensor."""
    torch.manual_seed(0)
    reference = Model(**options)
    expected = train(reference, None, plan)
    # Ranks draw different weights: rank 0's must win.
    model, engine = build(plan, seed=rank, **options)
    actual = train(model, engine, plan)
    problems = []
    for key in ("losses", "norms"):
        a, b = torch.tensor(actual[key]), torch.tensor(expected[key])
        if not torch.allclose(a, b, rtol=1e-5, atol=0):
            problems.append(f"{key}: {a.tolist()} instead of {b.tolist()}")
    for key in ("gradients", "weights"):
        for name, tensor in actual[key].items():
            error = ((tensor - expected[key][name]).norm() / expected[key][name].norm()).item()
            if not error < 1e-5:
                problems.append(f"{key} of {name}: relative error {error:.1e}")
    return problems


SMALL = "dp2-zero3 dp2 tp2 dp2-zero2-recompute tp2-recompute dp2-zero3-recompute dp2-zero2 tp2"
KEPT = SMALL.replace("zero3", "zero2")
MIXED = "dp4-zero3 dp4-ddp dp2-tp2-zero2-recompute tp4 dp4-zero3-recompute tp4-recompute dp2-tp2-zero3 dp2-tp2-ddp"


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        (plan_of(MIXED, 8, (3, 3), 4), {}),
        pytest.param(plan_of(MIXED, 8, (3, 3), 4, "gpipe"), {}, marks=pytest.mark.slow),
        (plan_of(SMALL, 4, (3, 3), 4, "gpipe"), {"ignore": True}),
        pytest.param(plan_of(MIXED.replace("zero3", "zero2"), 8, (2, 4), 4), {}, marks=pytest.mark.slow),
        pytest.param(
            plan_of("dp2 dp2-zero2 dp2 tp2 dp2-zero3 dp2 tp2-recompute tp2", 8, (1, 2, 2, 1), 4),
            {},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            plan_of("dp8 dp8-zero2 dp4-tp2-zero3 dp2-tp4-zero2 dp8-zero3 dp4-tp2 dp2-tp4 dp4-tp2", 8, (6,), 2),
            {},
            marks=pytest.mark.slow,
        ),
        (plan_of(SMALL, 4, (1, 2, 2, 1), 4, "interleaved_1f1b", 2), {"ignore": True}),
        pytest.param(plan_of(MIXED, 8, (2, 1, 2, 1), 4, "interleaved_1f1b", 2), {}, marks=pytest.mark.slow),
        (plan_of("dp1 dp1 dp1-recompute dp1 dp1-zero2 dp1 dp1-recompute dp1", 4, (1, 2, 2, 1), 8, "zero_bubble"), {}),
        pytest.param(plan_of(KEPT, 4, (1, 2, 2, 1), 4, "zero_bubble", 2), {"ignore": True}, marks=pytest.mark.slow),
        # the second stage is given an input without gradient, the third one uses a weight twice
        (
            plan_of("dp2 dp2 tp2-recompute dp2-zero2 dp2-zero2 dp2 tp2 tp2", 4, (1, 2, 2, 1), 4, "zero_bubble", 2),
            {"frozen": 2, "twice": 3},
        ),
        pytest.param(
            plan_of(MIXED.replace("zero3", "zero2"), 8, (2, 1, 1, 2), 4, "zero_bubble", 2), {}, marks=pytest.mark.slow
        ),
    ],
    ids=[
        "1f1b",
        "gpipe-on-8",
        "gpipe",
        "uneven-stages",
        "four-stages",
        "one-stage",
        "interleaved",
        "interleaved-on-8",
        "zero-bubble",
        "zero-bubble-of-several-stages",
        "zero-bubble-frozen-and-shared",
        "zero-bubble-on-8",
    ],
)
def test_training_equals_one_process(ranks: Any, plan: HybridPlan, options: dict[str, Any]) -> None:
    """Loss, norm, gradients and weights after 5 AdamW steps equal one process's to fp32 rounding."""
    for rank, problems in enumerate(ranks(plan.world_size).run(compare_with_one_process, plan, options)):
        assert not problems, f"rank {rank}: {problems}"


def gradients_in_bf16(rank: int, plan: HybridPlan) -> float:
    torch.manual_seed(0)
    reference = Model()
    inputs, target = batches(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        reference.pipeline_step(inputs, target).backward()
    model, engine = build(plan)
    dp = local_dp(plan)
    rows = shard_rows(SAMPLES, plan.num_microbatches, dp, engine.mesh.data_index(dp))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.pipeline_step(inputs[rows], target[rows])
    loss.backward()
    errors = [
        (full(p.grad) - reference.get_parameter(name).grad).norm() / reference.get_parameter(name).grad.norm()
        for name, p in model.named_parameters()
    ]
    return max(errors).item()


def test_autocast_reaches_the_stages(ranks: Any) -> None:
    """Under bf16 autocast gradients equal those of one process under bf16 autocast, to bf16 rounding."""
    for error in ranks(8).run(gradients_in_bf16, plan_of(MIXED, 8, (3, 3), 4)):
        assert 0 < error < 0.05


def evaluate_odd_batches(rank: int, plan: HybridPlan) -> list[tuple[float, float, float]]:
    finest = largest_dp(plan)
    torch.manual_seed(0)
    reference = Model()
    model, engine = build(plan)
    model.eval()
    out = []
    for samples in (16, 12, 4, 8):
        inputs, target = torch.randint(
            VOCABULARY, (2, samples, LENGTH), generator=torch.Generator().manual_seed(samples)
        )
        dp = local_dp(plan)
        micro = max(m for m in range(1, plan.num_microbatches + 1) if samples % (m * finest) == 0)
        rows = shard_rows(samples, micro, dp, engine.mesh.data_index(dp))
        with torch.inference_mode():
            loss = model.pipeline_step(inputs[rows], target[rows]).item()
            output = model.pipeline_forward(inputs[rows])
            expected = reference.pipeline_forward(inputs)
            head_rows = shard_rows(samples, micro, plan.head.dp, engine.mesh.data_index(plan.head.dp))
            out.append(
                (
                    loss,
                    reference.pipeline_loss(expected, target).item(),
                    (output - expected[head_rows]).abs().max().item(),
                )
            )
    return out


@pytest.mark.parametrize(
    "plan",
    [plan_of(MIXED, 8, (3, 3), 4), plan_of(SMALL, 4, (1, 2, 2, 1), 4, "interleaved_1f1b", 2)],
    ids=["1f1b", "interleaved"],
)
def test_evaluation_of_any_batch_size(ranks: Any, plan: HybridPlan) -> None:
    """Losses and outputs without gradients are exact, also when the batch changes its size."""
    for rows in ranks(plan.world_size).run(evaluate_odd_batches, plan):
        for loss, expected, difference in rows:
            assert loss == pytest.approx(expected, rel=1e-6)
            assert difference < 1e-5


def outputs_after_training_step(rank: int, plan: HybridPlan) -> tuple[bool, Any, Any]:
    model, engine = build(plan)
    inputs, target = batches(1)[0]
    dp = local_dp(plan)
    rows = shard_rows(SAMPLES, plan.num_microbatches, dp, engine.mesh.data_index(dp))
    model.pipeline_step(inputs[rows], target[rows])
    without = model.pipeline_outputs()
    model.pipeline_step(inputs[rows], target[rows], keep_outputs=True)
    kept = model.pipeline_outputs()
    return engine.mesh.is_last_stage, without, None if kept is None else tuple(kept.shape)


@pytest.mark.parametrize(
    "plan",
    [plan_of(MIXED, 8, (3, 3), 4), plan_of(KEPT, 4, (1, 2, 2, 1), 4, "zero_bubble", 2)],
    ids=["1f1b", "zero-bubble"],
)
def test_outputs_are_kept_on_request(ranks: Any, plan: HybridPlan) -> None:
    """``pipeline_outputs`` is the head's output in the last stage, and only if it was asked for."""
    for last, without, kept in ranks(plan.world_size).run(outputs_after_training_step, plan):
        assert without is None
        assert kept == ((SAMPLES // plan.head.dp, LENGTH, VOCABULARY) if last else None)


def build_error(rank: int, plan: HybridPlan) -> str:
    try:
        build(plan)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (plan_of("dp2 dp2 dp2 dp2 dp2 dp2 dp2 dp2", 4, (3, 3), 2), ["world_size=4", "8 devices"]),
        (plan_of("dp8 dp8 dp8 dp8 dp8 dp8", 8, (4,), 2), ["4 entries", "6 blocks"]),
        (plan_of("dp8 dp2-tp2-cp2 dp8 dp8 dp8 dp8 dp8 dp8", 8, (6,), 2), ["layers[0]", "cp goes with sp"]),
        (plan_of("dp8 dp8 dp8 dp8 dp8 dp8 dp8 dp8-recompute", 8, (6,), 2), ["plan.head", "only blocks"]),
    ],
)
def test_plans_that_cannot_run_are_refused(ranks: Any, plan: HybridPlan, words: list[str]) -> None:
    """A plan for another world or model is refused in one line that names the field."""
    for message in ranks(8).run(build_error, plan):
        assert message and "\n" not in message
        assert all(word in message for word in words), message


def parts_of_backward(rank: int, plan: HybridPlan) -> tuple[list[tuple[int, str]], list[int]]:
    model, engine = build(plan)
    inputs, target = batches(1)[0]
    dp = local_dp(plan)
    rows = shard_rows(SAMPLES, plan.num_microbatches, dp, engine.mesh.data_index(dp))
    model.pipeline_step(inputs[rows], target[rows])  # finds out about shapes
    parts: list[tuple[int, str]] = []
    runs = [0] * LAYERS
    whole = HybridPipelineStage.backward_maybe_with_nosync

    def watch(stage: HybridPipelineStage, kind: str, *args: Any, **kwargs: Any) -> Any:
        parts.append((stage.stage_index, kind))
        return whole(stage, kind, *args, **kwargs)

    def count(index: int, *_: Any) -> None:
        runs[index] += 1

    for name, block in model.model.blocks.named_children():
        next(part for part in block.modules() if isinstance(part, nn.Linear)).register_forward_hook(
            partial(count, int(name))
        )
    HybridPipelineStage.backward_maybe_with_nosync = watch  # type: ignore[assignment]
    try:
        model.pipeline_step(inputs[rows], target[rows])
    finally:
        HybridPipelineStage.backward_maybe_with_nosync = whole  # type: ignore[method-assign]
    return parts, runs


def test_zero_bubble_splits_backwards(ranks: Any) -> None:
    """Behind the first stage a backward has two parts, apart in time; a recomputed forward still runs only twice."""
    plan = plan_of("dp2 dp2 dp2 tp2 dp2-zero2 dp2 dp2-recompute dp2", 4, (1, 1, 2, 2), 4, "zero_bubble", 2)
    (first, first_runs), _, (second, second_runs), _ = ranks(4).run(parts_of_backward, plan)
    assert first_runs == [4, 0, 4, 4, 0, 0]
    assert second_runs == [0, 4, 0, 0, 4, 8]
    assert [kind for stage, kind in first if stage == 0] == ["full"] * 4
    for stage, parts in ((2, first), (1, second), (3, second)):
        kinds = [kind for index, kind in parts if index == stage]
        assert kinds.count("input") == kinds.count("weight") == 4, kinds
    split = [part for part in second if part[0] == 3]
    assert split[:3] == [(3, "input"), (3, "input"), (3, "weight")]


def test_backwards_that_cannot_be_split_are_refused() -> None:
    """A layer that detaches its input would silently lose its gradients under zero bubble."""
    weights, start = nn.Linear(4, 4), torch.zeros(2, 4, requires_grad=True)
    for hidden, lost in ((start, False), (start.detach(), True)):
        output = weights(torch.tanh(hidden))
        leaves = graph_leaves([output])
        assert leaves == set(weights.parameters()) | (set() if lost else {start})
        _, groups = stage_backward_input([output], [torch.ones(2, 4)], [start], weights.parameters())
        if not lost:
            check_split(groups, set(weights.parameters()))
            continue
        with pytest.raises(ValueError, match=r"^schedule='zero_bubble': .*detaches its input.*'1f1b'\.$"):
            check_split(groups, set(weights.parameters()))


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zero_bubble"])
def test_models_that_run_their_own_forward_have_simple_schedules(schedule: str) -> None:
    """Schedules of several stages per rank or of split backwards are refused in one line."""
    model = nn.Module()
    model.net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    structure = ModelStructure(tuple(f"net.{i}" for i in range(6)), model="net", trace=ForwardTrace((), {}))
    plan = plan_of("dp1 dp1 dp1 dp1 dp1 dp1 dp1 dp1", 2, (1, 2, 2, 1), 4, schedule, 2)
    with pytest.raises(ValueError, match=f"^plan.schedule='{schedule}': .*own forward.*'1f1b'.*"):
        build_forward_stage(model, structure, plan, mesh=None)  # type: ignore[arg-type]
