"""``OSDPStrategy`` trains what a plain Trainer trains, whatever mode every operator has."""

from __future__ import annotations

from typing import Any

import pytest

from tests.strategies._runs import osdp_plan_of, train
from tests.strategies.test_auto import same


@pytest.mark.parametrize(
    ("world", "modes", "options"),
    [
        (2, "dp z2 zdp", {"gradient_clip_val": 0.05}),
        (4, "zdp-2 dp zdp off z2", {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3}),
        (2, "z2 zdp dp", {"module": "blocks", "accumulate_grad_batches": 2}),
    ],
    ids=["modes", "all-modes-accumulate-clip", "plain"],
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
