"""``AutoHybridParallelStrategy`` trains what a plain Trainer trains, with everything Lightning does around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.strategies._runs import Thawing, plan_of, train

PIPELINE = plan_of("dp2-zero3 dp2 tp2 dp2-zero2-recompute dp2-zero3 tp2", 4, (2, 2), 4)
FLAT = plan_of("dp4-zero3 dp4 tp4 dp4-zero2-recompute dp2-tp2-zero3 dp2-tp2", 4, (4,), 2)
DEEP = plan_of("dp1 dp1 dp1-recompute dp1 dp1 dp1", 4, (1, 1, 1, 1), 4)
INTERLEAVED = replace(PIPELINE, stages=(1, 1, 1, 1), schedule="interleaved_1f1b", virtual_stages=2)
ZERO_BUBBLE = plan_of("dp2-zero2 dp2 tp2 dp2-zero2-recompute dp2-zero2 tp2", 4, (2, 2), 4)
ZERO_BUBBLE = replace(ZERO_BUBBLE, schedule="zero_bubble")
PLAIN_MIXED = plan_of("dp2-tp2-zero2 dp4-zero3 dp2-tp2 tp4-recompute dp4 dp2-tp2-zero2", 4, (4,))
PLAIN_DP = plan_of("dp4 dp4 dp4-zero2 dp4-zero3 dp4-zero3-recompute dp4", 4, (4,))


def same(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert actual["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert actual["metrics"] == pytest.approx(expected["metrics"], rel=tolerance)
    assert actual["step"] == expected["step"]
    assert actual["best"] == expected["best"]
    for name, weight in actual["weights"].items():
        error = (weight - expected["weights"][name]).norm() / expected["weights"][name].norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"
    for key in ("test", "validate"):
        if key in expected:
            assert actual[key][0] == pytest.approx(expected[key][0], rel=tolerance)


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        pytest.param(PIPELINE, {}, marks=pytest.mark.slow),
        (PIPELINE, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
        (INTERLEAVED, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
        pytest.param(INTERLEAVED, {"module": "grouped", "module_options": {"frozen": 1}}, marks=pytest.mark.slow),
        pytest.param(ZERO_BUBBLE, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, marks=pytest.mark.slow),
        (FLAT, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}),
        (DEEP, {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}),
        (PIPELINE, {"module": "grouped", "gradient_clip_val": 0.05}),
        (DEEP, {"module": "grouped", "module_options": {"frozen": 2}}),
        (PIPELINE, {"module": "stepwise"}),
        pytest.param(PIPELINE, {"module": "captured"}, marks=pytest.mark.slow),
        (PLAIN_MIXED, {"module": "blocks", "gradient_clip_val": 0.05}),
        (PLAIN_DP, {"module": "blocks", "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    ],
    ids=[
        "pipeline",
        "pipeline-accumulate-clip",
        "interleaved-accumulate-clip",
        "interleaved-frozen-stage",
        "zero-bubble-accumulate-clip",
        "flat-accumulate-clip",
        "deep-clip-value",
        "groups-of-all-stages",
        "frozen-stages",
        "one-cycle-and-empty-groups",
        "optimizer-with-a-list",
        "plain",
        "plain-accumulate",
    ],
)
def test_fit_equals_plain_trainer(ranks: Any, tmp_path: Any, plan: Any, options: dict[str, Any]) -> None:
    """Losses, weights, metrics, validation, test and the best checkpoint are those of one device."""
    expected = train(0, str(tmp_path / "one"), None, options)
    for actual in ranks(4).run(train, str(tmp_path / "many"), plan, options):
        same(actual, expected)


def test_predict_gives_the_rows_of_the_rank(ranks: Any, tmp_path: Any) -> None:
    """Every rank gets predictions for its own part of every batch, in every pipeline stage."""
    expected = train(0, str(tmp_path / "one"), None, {"max_epochs": 1})
    results = ranks(4).run(train, str(tmp_path / "many"), FLAT, {"max_epochs": 1})
    # dp=2 halves of each of the 2 microbatches of a batch of 16
    rows = [[*range(0, 4), *range(8, 12)], [*range(4, 8), *range(12, 16)]]
    for rank, actual in enumerate(results):
        assert actual["predicted"] == [(8, 16), (8, 16)]
        torch.testing.assert_close(actual["prediction"], expected["prediction"][rows[rank // 2]], rtol=1e-4, atol=1e-4)


def test_bf16_mixed_follows_one_device(ranks: Any, tmp_path: Any) -> None:
    """Under ``precision="bf16-mixed"`` losses follow those of one device under bf16-mixed."""
    options = {"precision": "bf16-mixed", "evaluate": False}
    expected = train(0, str(tmp_path / "one"), None, options)
    for actual in ranks(4).run(train, str(tmp_path / "many"), PIPELINE, options):
        assert actual["losses"] == pytest.approx(expected["losses"], rel=5e-3)


def test_resume_under_any_plan(ranks: Any, tmp_path: Any) -> None:
    """Saved on 8 ranks, resumed on 4 under another plan, on 2, and on one under a plain Trainer: the same losses."""
    from lightning_hetu.parallel.consolidate import consolidate

    options = {"evaluate": False, "shuffle": False, "gradient_clip_val": 0.05}
    wide = plan_of("dp4-zero3 dp2-tp2 dp4-zero2 tp4 dp4-zero3-recompute dp2-tp2", 8, (2, 2), 2)
    whole = ranks(8).run(train, str(tmp_path / "eight"), wide, options)[0]
    assert len(whole["losses"]) == 12
    saved = tmp_path / "eight" / "epoch=0.ckpt"
    resumed = {**options, "ckpt_path": str(saved)}
    two = plan_of("dp1 dp1 dp1 dp1 dp1 dp1", 2, (1, 3), 2)
    for world, plan in ((4, PIPELINE), (4, FLAT), (4, INTERLEAVED), (2, two)):
        actual = ranks(world).run(train, str(tmp_path / f"{world}-{len(plan.stages)}"), plan, resumed)[0]
        assert actual["losses"] == pytest.approx(whole["losses"][6:], rel=1e-5)
    # in mid-epoch, where the loader must go on with the fifth batch of the shuffled order
    middle = {**options, "shuffle": True, "max_epochs": -1, "val_check_interval": 4}
    unbroken = ranks(4).run(train, str(tmp_path / "unbroken"), PIPELINE, {**middle, "max_steps": 9})[0]
    ranks(4).run(train, str(tmp_path / "half"), PIPELINE, {**middle, "max_steps": 4, "save": True})
    go_on = {**middle, "max_steps": 9, "ckpt_path": str(tmp_path / "half" / "end.ckpt")}
    rest = ranks(4).run(train, str(tmp_path / "rest"), FLAT, go_on)[0]
    assert rest["losses"][:2] == pytest.approx(unbroken["losses"][4:6], rel=1e-5)
    one_file = consolidate(saved, tmp_path / "one.ckpt")
    plain = train(0, str(tmp_path / "plain"), None, {**options, "ckpt_path": str(one_file)})
    assert plain["losses"] == pytest.approx(whole["losses"][6:], rel=1e-5)
    # and back: a plain checkpoint continues on 4 ranks
    options["ckpt_path"] = str(tmp_path / "plain" / "epoch=1.ckpt")
    options["max_epochs"] = 3
    back = ranks(4).run(train, str(tmp_path / "back"), PIPELINE, options)[0]
    on_one = train(0, str(tmp_path / "on-one"), None, options)
    assert len(back["losses"]) == 6
    assert back["losses"] == pytest.approx(on_one["losses"], rel=1e-5)


@pytest.mark.parametrize("module", [pytest.param("grouped", marks=pytest.mark.slow), "stepwise"])
def test_resume_with_groups_of_all_stages(ranks: Any, tmp_path: Any, module: str) -> None:
    """Groups in another order than the model, empty ones and stages that train nothing resume anywhere."""
    from lightning_hetu.parallel.consolidate import consolidate

    options = {"module": module, "module_options": {"frozen": 2}, "evaluate": False, "shuffle": False}
    many = ranks(4).run(train, str(tmp_path / "many"), DEEP, options)[0]
    saved = tmp_path / "many" / "epoch=0.ckpt"
    one_file = consolidate(saved, tmp_path / "one.ckpt")
    folder = ranks(4).run(train, str(tmp_path / "folder"), PIPELINE, {**options, "ckpt_path": str(saved)})[0]
    assert folder["losses"] == pytest.approx(many["losses"][6:], rel=1e-5)
    options["ckpt_path"] = str(one_file)
    plain = train(0, str(tmp_path / "plain"), None, options)
    again = ranks(4).run(train, str(tmp_path / "again"), DEEP, options)[0]
    for resumed in (plain, again):
        assert resumed["losses"] == pytest.approx(many["losses"][6:], rel=1e-5)


def test_groups_that_a_callback_adds(ranks: Any, tmp_path: Any) -> None:
    """They train as on one device, and are resumed under another plan and on one device where they are added again."""
    from lightning_hetu.parallel.consolidate import consolidate

    options = {"module": "grouped", "callbacks": [Thawing()], "max_epochs": 3, "limit_train_batches": 2}
    options |= {"evaluate": False, "shuffle": False}
    expected = train(0, str(tmp_path / "one"), None, options)
    many = ranks(4).run(train, str(tmp_path / "many"), PIPELINE, options)
    for actual in many:
        same(actual, expected)
    saved = tmp_path / "many" / "epoch=1.ckpt"
    one_file = consolidate(saved, tmp_path / "one.ckpt")
    options |= {"callbacks": [Thawing(resumes=True)], "ckpt_path": str(saved)}
    resumed = ranks(4).run(train, str(tmp_path / "flat"), FLAT, options)[0]
    plain = train(0, str(tmp_path / "plain"), None, {**options, "ckpt_path": str(one_file)})
    for actual in (resumed, plain):
        assert actual["losses"] == pytest.approx(expected["losses"][4:], rel=1e-5)
    with pytest.raises(RuntimeError, match="other parameter groups"):
        ranks(4).run(train, str(tmp_path / "frozen"), FLAT, {**options, "callbacks": []})
