"""``OSDPStrategy`` trains what a plain Trainer trains, whatever mode every operator has."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_hetu.parallel.consolidate import consolidate
from lightning_hetu.strategies.osdp import OSDPStrategy
from tests.strategies._runs import MODULES, Losses, loader, osdp_plan_of, plan_of, train
from tests.strategies.test_auto import same


@pytest.mark.parametrize(
    ("world", "modes", "options"),
    [
        (2, "dp z2 zdp", {"gradient_clip_val": 0.05}),
        (4, "zdp-2 dp zdp off z2", {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3}),
        (2, "z2 zdp dp", {"module": "blocks", "accumulate_grad_batches": 2}),
        (2, "2zdp+1z2 dp 3zdp 1zdp+2dp", {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}),
    ],
    ids=["modes", "all-modes-accumulate-clip", "plain", "slices"],
)
def test_fit_equals_plain_trainer(ranks: Any, tmp_path: Any, world: int, modes: str, options: dict[str, Any]) -> None:
    """Losses, weights, metrics, validation, test and the best checkpoint are those of one device."""
    plan = osdp_plan_of(modes, world, options.get("module", "gpt"), options.get("accumulate_grad_batches", 1))
    expected = train(0, str(tmp_path / "one"), None, options)
    for actual in ranks(world).run(train, str(tmp_path / "many"), plan, options):
        same(actual, expected)


def test_bf16_mixed_follows_one_device(ranks: Any, tmp_path: Any) -> None:
    """Products are gathered in bf16, which changes nothing that autocast does not do on one device."""
    options = {"precision": "bf16-mixed", "evaluate": False, "max_epochs": 1}
    expected = train(0, str(tmp_path / "one"), None, options)
    for actual in ranks(2).run(train, str(tmp_path / "many"), osdp_plan_of("zdp dp z2", 2), options):
        assert actual["losses"] == pytest.approx(expected["losses"], rel=5e-3)


def test_resume_under_any_plan(ranks: Any, tmp_path: Any) -> None:
    """Saved on 2 ranks, resumed on 4 under another plan, sharded alone, and on one device; and back."""
    options = {"evaluate": False, "shuffle": False, "gradient_clip_val": 0.05}
    sliced = osdp_plan_of("2zdp+1z2 dp zdp 3zdp", 2)
    whole = ranks(2).run(train, str(tmp_path / "two"), sliced, options)[0]
    resumed = {**options, "ckpt_path": str(tmp_path / "two" / "epoch=0.ckpt")}
    for world, plan in ((4, osdp_plan_of("z2 4zdp dp", 4)), (4, plan_of("dp4-zero3 dp4 dp4 dp4 dp4 dp4", 4, (4,)))):
        actual = ranks(world).run(train, str(tmp_path / f"then-{type(plan).__name__}"), plan, resumed)[0]
        assert actual["losses"] == pytest.approx(whole["losses"][6:], rel=1e-5)
    one_file = consolidate(resumed["ckpt_path"], tmp_path / "one.ckpt")
    plain = train(0, str(tmp_path / "plain"), None, {**options, "ckpt_path": str(one_file)})
    assert plain["losses"] == pytest.approx(whole["losses"][6:], rel=1e-5)
    bare = {name: value for name, value in torch.load(one_file, weights_only=False)["state_dict"].items()}
    MODULES["gpt"]().load_state_dict(bare)
    back = {**options, "max_epochs": 3, "ckpt_path": str(tmp_path / "plain" / "epoch=1.ckpt")}
    expected = train(0, str(tmp_path / "on"), None, back)["losses"]
    assert ranks(2).run(train, str(tmp_path / "back"), sliced, back)[0]["losses"] == pytest.approx(expected, rel=1e-5)


def planned(rank: int, folder: str, limits: list[Any], options: dict[str, Any]) -> list[Any]:
    """Plans for several limits, and what ends in an error."""
    found: list[Any] = []
    for limit in limits:
        strategy = {"memory_limit": limit, "profile_cache": folder, **options.get("strategy", {})}
        settings = {"osdp": True, "evaluate": False, "max_epochs": 1, **options, "strategy": strategy}
        try:
            found.append(train(rank, folder, "auto", settings))
        except ValueError as error:
            found.append(str(error))
    return found


def test_plans_within_the_limit_train_the_same(ranks: Any, tmp_path: Any) -> None:
    """The tighter the limit, the more is sharded; the losses stay those of one device; too tight is one line."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "limit_train_batches": 4}
    plain = {"evaluate": False, "max_epochs": 1, **options}
    expected = train(0, str(tmp_path / "one"), None, plain)
    first = ranks(2).run(planned, str(tmp_path / "many"), ["1GiB", "1KiB"], options)
    assert len({result[0]["plan"].fingerprint for result in first}) == 1
    wide, refused = first[0]
    assert refused == first[1][1] and "\n" not in refused
    least = int(re.search(r"the smallest feasible memory_limit is (\d+)", refused)[1])  # type: ignore[index]
    middle = (least + wide["plan"].peak_memory) // 2
    tight, between = ranks(2).run(planned, str(tmp_path / "many"), [least, middle], options)[0]
    for found in (wide, tight, between):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert tight["plan"].peak_memory <= least < between["plan"].peak_memory <= middle < wide["plan"].peak_memory
    seconds = [found["plan"].communication_seconds for found in (wide, between, tight)]
    assert seconds == sorted(set(seconds))
    modes = {mode for operator in between["plan"].operators for mode, _ in operator.parts}
    assert len(modes) > 1, "between the extremes operators differ"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_limit": "much"}, "memory_limit='much'"),
        ({"memory_limit": 0}, "memory_limit=0"),
        ({"memory_limit": 1.5}, "or a fraction of the device's memory from above 0.0 to 1.0"),
        ({"memory_limit": 1}, "memory_limit=1: expected bytes per device"),
        ({"modes": "zdp"}, "modes='zdp': expected a list, ['zdp']."),
        ({"modes": []}, "modes=[]: expected names of modes"),
        ({"modes": ["zero3"]}, "mode 'zero3': expected dp, z2, zdp, off, or zdp-k"),
        ({"max_slices": 0}, "max_slices=0: expected an integer of at least 1"),
        ({"accumulation": "never"}, "accumulation='never': expected one of auto, last, every, hold"),
        ({"plan": 3}, "plan=3: expected 'auto', the path of a plan file, or an OSDPPlan"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        OSDPStrategy(**options)
    assert "\n" not in str(error.value)


def refusals(rank: int, folder: str) -> list[str]:
    plan = osdp_plan_of("zdp", 2)
    other = replace(plan, operators=plan.operators[1:])
    cases: list[tuple[Any, dict[str, Any]]] = [
        (other, {}),
        (replace(plan, world_size=4), {}),
        ("missing.json", {}),
        ("auto", {"module": "blocks", "callbacks": [StochasticWeightAveraging(0.1)]}),
    ]
    found = []
    for item, options in cases:
        try:
            train(rank, folder, item, {"osdp": True, "evaluate": False, **options})
        except ValueError as error:
            found.append(str(error))
    return found


def test_plans_that_cannot_be_run_are_refused(ranks: Any, tmp_path: Any) -> None:
    messages = ranks(2).run(refusals, str(tmp_path))[0]
    assert [message.split(":")[0] for message in messages] == [
        "plan.operators",
        "plan.world_size=4, but 2 devices were started. Give devices=4, or plan again for 2.",
        "plan='missing.json' cannot be read",
        "StochasticWeightAveraging averages whole parameters, which no process has here",
    ]
    assert all("\n" not in message for message in messages)


def fit_again(rank: int, modes: str | None) -> list[list[float]]:
    """Losses of two fits with validations between, without checkpoints; ``modes=None`` is one device."""
    from lightning.pytorch import Trainer, seed_everything

    seed_everything(1, verbose=False)
    module, found = MODULES["gpt"](), []
    settings: dict[str, Any] = {"devices": 1}
    if modes is not None:
        strategy = OSDPStrategy(plan=osdp_plan_of(modes, 2))
        settings = {"devices": 2, "strategy": strategy}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    for _ in range(2):
        losses = Losses()
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, enable_checkpointing=False, callbacks=[losses], **quiet, **settings
        )
        if modes is not None:
            settings["strategy"] = trainer.strategy
        trainer.fit(module, loader(shuffle=False, drop_last=True), loader(32, 1))
        trainer.test(module, loader(32, 2), verbose=False)
        found.append(losses.values)
        if modes is not None:
            break
    if modes is not None:
        trainer.fit_loop.max_epochs = 2
        again = Losses()
        trainer.callbacks = [again]
        trainer.fit(module, loader(shuffle=False, drop_last=True), loader(32, 1))
        found.append(again.values)
    return found


def test_fit_again_after_evaluation(ranks: Any) -> None:
    """An evaluation leaves the real parameters in their places, not gathered copies of them."""

    first, second = fit_again(0, None)
    for modes in ("z2 dp", "zdp z2 dp"):
        found = ranks(2).run(fit_again, modes)[0]
        assert found[0] == pytest.approx(first, rel=1e-5)
        assert found[1][0] == pytest.approx(second[0], rel=1e-4), "the second fit begins with the trained weights"
        assert found[1][-1] < found[1][0]
