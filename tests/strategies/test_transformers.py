"""Models of Hugging Face transformers train under ``hetu_auto`` as under a plain Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hetu.parallel.consolidate import consolidate
from tests.strategies._runs import T5, Llama, plan_of, train
from tests.strategies.test_auto import same

pytest.importorskip("transformers")

LLAMA_4 = plan_of("dp2-zero2 dp2-zero3 tp2-recompute dp2 dp2-zero2 dp2-zero2", 4, (3, 1), 4)
LLAMA_8 = plan_of("dp4-zero3 dp4 dp2-tp2-zero2 dp4-zero2-recompute dp2-tp2-zero3 dp4-zero3", 8, (1, 3), 2)
LLAMA_FLAT = plan_of("dp4 dp4-zero3 dp2-tp2-zero2 dp4-recompute dp4-zero2 dp4", 4, (4,), 2)
T5_4 = plan_of("dp2 dp2-zero3 dp2 dp2-zero2 dp2-recompute dp2", 4, (3, 1), 4)
T5_8 = plan_of("dp4-zero2 dp4-zero3 dp4 dp4-zero2 dp4-recompute dp4-zero2", 8, (1, 3), 2)


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        pytest.param("llama", LLAMA_4, id="llama-4", marks=pytest.mark.slow),
        pytest.param("llama", LLAMA_8, id="llama-8"),
        pytest.param("t5", T5_4, id="t5-4"),
        pytest.param("t5", T5_8, id="t5-8", marks=pytest.mark.slow),
    ],
)
def test_fit_equals_plain_trainer(ranks: Any, tmp_path: Any, kind: str, plan: Any) -> None:
    """Two uneven stages: losses, weights, metrics, validation and test are those of one device."""
    options = {"module": kind, "gradient_clip_val": 0.5, "max_epochs": 1, "accumulate_grad_batches": 2}
    expected = train(0, str(tmp_path / "one"), None, options)
    for actual in ranks(plan.world_size).run(train, str(tmp_path / "many"), plan, options):
        same(actual, expected, 2e-5)
        assert actual["weights"].keys() <= expected["weights"].keys()


@pytest.mark.parametrize("kind", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_planned_and_trained(ranks: Any, tmp_path: Any, kind: str) -> None:
    """Profiled, planned under a budget that one stage does not fit, and trained as on one device."""
    options = {"module": kind, "max_epochs": 1, "limit_train_batches": 3, "evaluate": False}
    expected = train(0, str(tmp_path / "one"), None, options)
    strategy = {
        "memory_budget": "8MiB",
        "profile_cache": str(tmp_path / "cache"),
        "pins": {"pipeline_parallel_size": 2},
    }
    for actual in ranks(4).run(train, str(tmp_path / "many"), "auto", {**options, "strategy": strategy}):
        assert actual["plan"].pipeline_parallel_size == 2
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def test_a_model_that_cannot_be_cut_runs_in_one_stage(ranks: Any, tmp_path: Any) -> None:
    """It is refused for more, and trained as on one device without."""
    options = {"module": "skipping", "max_epochs": 1}
    expected = train(0, str(tmp_path / "one"), None, options)
    plan = plan_of("dp4 dp4-zero3 dp4 dp4-zero2 dp4", 4, (3,))
    for actual in ranks(4).run(train, str(tmp_path / "many"), plan, options):
        same(actual, expected)
    with pytest.raises(RuntimeError, match="plan has 2 stages and 2 microbatches"):
        ranks(4).run(train, str(tmp_path / "two"), plan_of("dp2 dp2 dp2 dp2 dp2", 4, (2, 1), 2), options)


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_half_precision_follows_one_device(ranks: Any, tmp_path: Any, precision: str) -> None:
    """To the rounding of bfloat16."""
    options = {"module": "llama", "max_epochs": 1, "evaluate": False, "precision": precision}
    expected = train(0, str(tmp_path / "one"), None, options)
    for actual in ranks(4).run(train, str(tmp_path / "many"), LLAMA_4, options):
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "wide", "others", "module"),
    [
        pytest.param("llama", LLAMA_8, [LLAMA_4, LLAMA_FLAT], Llama, marks=pytest.mark.slow),
        ("t5", T5_8, [T5_4, plan_of("dp2 dp2 dp2 dp2 dp2 dp2", 4, (2, 2), 2)], T5),
    ],
)
def test_resume_under_any_plan(ranks: Any, tmp_path: Any, kind: str, wide: Any, others: Any, module: Any) -> None:
    """Saved on 8, resumed on 4 under other plans, consolidated, resumed on one, and read by ``from_pretrained``."""
    options = {"module": kind, "evaluate": False, "shuffle": False, "max_epochs": 2, "limit_train_batches": 3}
    whole = ranks(8).run(train, str(tmp_path / "eight"), wide, options)[0]
    saved = tmp_path / "eight" / "epoch=0.ckpt"
    resumed = {**options, "ckpt_path": str(saved)}
    for index, plan in enumerate(others):
        actual = ranks(4).run(train, str(tmp_path / f"other{index}"), plan, resumed)[0]
        assert actual["losses"] == pytest.approx(whole["losses"][3:], rel=1e-5)
    one_file = consolidate(saved, tmp_path / "one.ckpt")
    plain = train(0, str(tmp_path / "plain"), None, {**options, "ckpt_path": str(one_file)})
    assert plain["losses"] == pytest.approx(whole["losses"][3:], rel=1e-5)
    # and back: a plain checkpoint continues on 4
    more = {**options, "max_epochs": 3, "ckpt_path": str(tmp_path / "plain" / "epoch=1.ckpt")}
    back = ranks(4).run(train, str(tmp_path / "back"), others[0], more)[0]
    assert back["losses"] == pytest.approx(train(0, str(tmp_path / "on-one"), None, more)["losses"], rel=1e-5)
    # the weights, as transformers itself reads them
    loaded = module()
    loaded.load_state_dict(torch.load(one_file, weights_only=False)["state_dict"])
    loaded.save_pretrained(tmp_path / "pretrained")
    again = type(loaded.model).from_pretrained(tmp_path / "pretrained")
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
