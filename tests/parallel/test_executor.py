"""A plan computes what one process computes: losses, gradients and trained weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hetu.models.gpt import GPT, GPTConfig
from lightning_hetu.parallel.batch import local_dp, shard_rows
from lightning_hetu.parallel.build import build_stage, check_plan_fits_model, synchronize_initial_state
from lightning_hetu.parallel.clip import clip_gradients_by_norm
from lightning_hetu.parallel.executor import PipelineExecutor
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin
from lightning_hetu.parallel.structure import find_structure
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan

VOCABULARY, LENGTH, SAMPLES, LAYERS = 32, 8, 16, 6


class Model(PipelineMixin, nn.Module):
    pipeline_embedding = "model.embedding"
    pipeline_blocks = "model.blocks"
    pipeline_head = "model.head"

    def __init__(self, ignore: bool = False) -> None:
        super().__init__()
        self.ignore = ignore
        self.model = GPT(GPTConfig(vocab_size=VOCABULARY, max_seq_len=LENGTH, num_layers=LAYERS, num_heads=4, dim=16))

    def pipeline_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1).float(), target.flatten())

    def pipeline_loss_weight(self, target: Tensor) -> Tensor | None:
        return (target != -100).sum() if self.ignore else None


def plan_of(text: str, world: int, stages: tuple[int, ...], microbatches: int, schedule: str = "1f1b") -> HybridPlan:
    """Embedding, blocks and head, separated by spaces."""
    rows = [LayerStrategy.parse(word) for word in text.split()]
    return HybridPlan(
        world_size=world, global_batch_size=SAMPLES, num_microbatches=microbatches, stages=stages,
        embedding=rows[0], layers=tuple(rows[1:-1]), head=rows[-1], schedule=schedule,  # type: ignore[arg-type]
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


def train(model: Model, engine: PipelineExecutor | None, plan: HybridPlan, options: dict[str, Any]) -> dict[str, Any]:
    """Five AdamW steps of two accumulated batches, clipped; returns losses, norms, last gradients and weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, norms = [], []
    data = iter(batches(10, options["ignore"]))
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
    gradients = {name: full(p.grad) for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": whole(model)}


def full(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def build(plan: HybridPlan, ignore: bool = False, seed: int = 0) -> tuple[Model, PipelineExecutor]:
    torch.manual_seed(seed)
    model = Model(ignore)
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
    reference = Model(options["ignore"])
    expected = train(reference, None, plan, options)
    # Ranks draw different weights: rank 0's must win.
    model, engine = build(plan, options["ignore"], seed=rank)
    actual = train(model, engine, plan, options)
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


MIXED = "dp4-zero3 dp4-ddp dp2-tp2-zero2-recompute tp4 dp4-zero3-recompute tp4-recompute dp2-tp2-zero3 dp2-tp2-ddp"


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        (plan_of(MIXED, 8, (3, 3), 4), {}),
        (plan_of(MIXED, 8, (3, 3), 4, "gpipe"), {}),
        (plan_of(MIXED, 8, (3, 3), 2), {"ignore": True}),
        pytest.param(plan_of(MIXED.replace("zero3", "zero2"), 8, (2, 4), 4), {}, marks=pytest.mark.slow),
        pytest.param(
            plan_of("dp2 dp2-zero2 dp2 tp2 dp2-zero3 dp2 tp2-recompute tp2", 8, (1, 2, 2, 1), 4),
            {},
            marks=pytest.mark.slow,
        ),
        (plan_of("dp8 dp8-zero2 dp4-tp2-zero3 dp2-tp4-zero2 dp8-zero3 dp4-tp2 dp2-tp4 dp4-tp2", 8, (6,), 2), {}),
    ],
    ids=["1f1b", "gpipe", "ignored-targets", "uneven-stages", "four-stages", "one-stage"],
)
def test_training_equals_one_process(ranks: Any, plan: HybridPlan, options: dict[str, Any]) -> None:
    """Loss, norm, gradients and weights after 5 AdamW steps equal one process's to fp32 rounding."""
    options = {"ignore": False, **options}
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
        micro = max(m for m in range(1, plan.num_microbatches + 1) if samples % (m * 4) == 0)
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


def test_evaluation_of_any_batch_size(ranks: Any) -> None:
    """Losses and outputs without gradients are exact, also when the batch changes its size."""
    for rows in ranks(8).run(evaluate_odd_batches, plan_of(MIXED, 8, (3, 3), 4)):
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


def test_outputs_are_kept_on_request(ranks: Any) -> None:
    """``pipeline_outputs`` is the head's output in the last stage, and only if it was asked for."""
    plan = plan_of(MIXED, 8, (3, 3), 4)
    for last, without, kept in ranks(8).run(outputs_after_training_step, plan):
        assert without is None
        assert kept == ((SAMPLES // 2, LENGTH, VOCABULARY) if last else None)


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
        (plan_of("dp8 dp4-sp2 dp8 dp8 dp8 dp8 dp8 dp8", 8, (6,), 2), ["layers[0]", "sequence"]),
        (plan_of("dp8 dp8 dp8 dp8 dp8 dp8 dp8 dp8-recompute", 8, (6,), 2), ["plan.head", "only blocks"]),
    ],
)
def test_plans_that_cannot_run_are_refused(ranks: Any, plan: HybridPlan, words: list[str]) -> None:
    """A plan for another world or model is refused in one line that names the field."""
    for message in ranks(8).run(build_error, plan):
        assert message and "\n" not in message
        assert all(word in message for word in words), message
