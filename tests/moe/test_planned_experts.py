"""Under hetu_auto the dense part follows the plan and experts are shared out beside it; all is as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_hetu.parallel.consolidate import consolidate
from tests.moe._training import EXPERTS, fit

RANKS = 4
MODULE = {"gate": "topk", "gate_options": {"k": 2, "balance_scope": "global", "z_loss": True}}
TRAINER = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 2}
PLANS = (
    ("dp4-zero3", None),
    ("dp4-zero2", 2),
    ("dp4", 2),
    ("dp4-zero3-recompute", None),
    ("dp4-zero3", 1),
)
"""How blocks are laid out, and how many ranks share out the experts."""


def run(
    rank: int, folder: str, cases: list[tuple[str, int | None]], trainer: dict[str, Any], options: dict[str, Any]
) -> list[dict[str, Any]]:
    from lightning_hetu import AutoHybridParallelStrategy, HybridPlan

    answers = []
    for text, size in cases:
        outside = text.removesuffix("-recompute")
        plan = HybridPlan.uniform(text, num_layers=2, global_batch_size=16, embedding=outside, head=outside)
        given = {
            "module": {**MODULE, "expert_parallel": size},
            "trainer": {**trainer, "strategy": AutoHybridParallelStrategy(plan)},
        }
        answers.append(fit(rank, folder, ranks=RANKS, **given, **options))
    return answers


def test_every_plan_trains_as_one_process(ranks: Any, tmp_path: Path) -> None:
    """Losses of all steps, with two micro-batches per step and clipping: a wrong gradient would show in the next."""
    wanted = fit(0, str(tmp_path), module=MODULE, trainer=TRAINER)
    for answers in ranks(RANKS).run(run, str(tmp_path), list(PLANS), TRAINER, {}):
        for (_, size), found in zip(PLANS, answers, strict=True):
            assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
            assert found["share"] == (EXPERTS // (size or RANKS))
            assert found["logged"]["moe/active"] == 2.0
            assert found["logged"]["moe/load_max_over_mean"] == pytest.approx(
                wanted["logged"]["moe/load_max_over_mean"]
            )


def test_checkpoints_know_of_all_experts(ranks: Any, tmp_path: Path) -> None:
    """From 4 to 2 x 2, to experts as any parameter, to one process, and back; moments included."""
    folder, half = str(tmp_path), {"max_epochs": 1}
    whole = fit(0, folder, module=MODULE, trainer=TRAINER)["losses"]
    batches = len(whole) // 2
    ranks(RANKS).run(run, folder, [("dp4-zero3", None)], {**TRAINER, **half}, {"save": "four.ckpt"})
    four = str(tmp_path / "four.ckpt")
    for answers in ranks(RANKS).run(run, folder, [("dp4", 2), ("dp4-zero3", 1)], TRAINER, {"checkpoint": four}):
        for found in answers:
            assert found["losses"] == pytest.approx(whole[batches:], rel=1e-5)
    one_file = consolidate(four, tmp_path / "consolidated.ckpt")
    assert fit(0, folder, module=MODULE, trainer=TRAINER, checkpoint=str(one_file))["losses"] == pytest.approx(
        whole[batches:], rel=1e-5
    )
    fit(0, folder, module=MODULE, trainer={**TRAINER, **half}, save="one.ckpt")
    one = {"checkpoint": str(tmp_path / "one.ckpt")}
    for answers in ranks(RANKS).run(run, folder, [("dp4-zero2", None)], TRAINER, one):
        assert answers[0]["losses"] == pytest.approx(whole[batches:], rel=1e-5)
