"""From a Trainer to a plan: ``plan="auto"``, its arguments, and what is refused."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_hetu.models import GPTLightningModule
from lightning_hetu.planning import HybridPlan
from lightning_hetu.strategies.auto import AutoHybridParallelStrategy
from tests.strategies._runs import MODULES, loader, plan_of, train, whole


def fit(rank: int, folder: str, kind: str, strategy: dict[str, Any], trainer: dict[str, Any]) -> Any:
    """The plan that was found and what came of it, or the error."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(rank)
    module = MODULES[kind]()
    settings = {
        "accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
        "default_root_dir": folder, **trainer,
    }  # fmt: skip
    try:
        auto = AutoHybridParallelStrategy(**strategy)
        Trainer(devices=torch.distributed.get_world_size(), strategy=auto, **settings).fit(module, loader())
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return {"plan": auto.plan, "weights": whole(module)}


def test_auto_plans_a_module_with_pipeline_support(ranks: Any, tmp_path: Path) -> None:
    """All ranks run the same plan, found under the budget, and it is written beside the logs."""
    options = {"memory_budget": "64MiB", "profile_cache": str(tmp_path / "cache")}
    results = ranks(4).run(fit, str(tmp_path), "gpt", options, {})
    plans = {result["plan"].to_json() for result in results}
    assert len(plans) == 1
    plan = results[0]["plan"]
    assert max(plan.prediction.stage_memory) <= 64 << 20 and plan.global_batch_size == 16
    assert HybridPlan.load(tmp_path / "plan.json").layers == plan.layers
    assert {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()} == {"model", "cluster"}
    again = ranks(4).run(fit, str(tmp_path), "gpt", options, {})[0]["plan"]
    assert again == plan, "from the cache: the same plan"


def test_auto_plans_any_module(ranks: Any, tmp_path: Path) -> None:
    """A module without the mixin is planned as one stage, and trains the same weights as on one device."""
    options = {"memory_budget": "64MiB", "profile_cache": False}
    expected = train(0, str(tmp_path / "one"), None, {"module": "blocks", "evaluate": False})
    for result in ranks(4).run(
        train, str(tmp_path), "auto", {"module": "blocks", "evaluate": False, "strategy": options}
    ):
        assert result["plan"].pipeline_parallel_size == 1 and result["plan"].num_microbatches == 1
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def test_pins_are_kept(ranks: Any, tmp_path: Path) -> None:
    """What is pinned stays as it is; the rest is searched."""
    pins = {"pipeline_parallel_size": 2, "num_microbatches": 4, "dp_type": "zero3"}
    options = {"memory_budget": "64MiB", "profile_cache": False, "pins": pins}
    plan = ranks(4).run(fit, str(tmp_path), "gpt", options, {})[0]["plan"]
    assert (plan.pipeline_parallel_size, plan.num_microbatches) == (2, 4)
    assert {row.dp_type for _, row in plan.rows() if row.dp > 1} == {"zero3"}


class Manual(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Forgetful(GPTLightningModule):
    """Has pipeline support and does not use it."""

    def __init__(self) -> None:
        super().__init__(vocab_size=32, max_seq_len=16, num_layers=4, num_heads=4, dim=32)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return next(self.parameters()).sum()


MODULES["manual"] = Manual
MODULES["forgetful"] = Forgetful
ONE = plan_of("dp4 dp4 dp4 dp4 dp4 dp4", 4, (4,))


@pytest.mark.parametrize(
    ("kind", "strategy", "trainer", "words"),
    [
        ("gpt", {"memory_budget": "10KiB", "profile_cache": False}, {}, ["memory_budget", "smallest"]),
        ("gpt", {"memory_budget": "20 potatoes"}, {}, ["memory_budget", "20 potatoes"]),
        ("gpt", {"memory_budget": -1}, {}, ["memory_budget", "-1"]),
        ("gpt", {"plan": 7}, {}, ["plan=7", "expected"]),
        ("gpt", {"plan": "/nowhere/plan.json"}, {}, ["/nowhere/plan.json"]),
        ("gpt", {"pins": {"stagez": 2}, "profile_cache": False}, {}, ["stagez", "expected one of"]),
        ("gpt", {"blocks": "model.layers"}, {}, ["blocks='model.layers'", "model.blocks"]),
        (
            "blocks",
            {"plan": plan_of("dp2 dp2 dp2 dp2 dp2 dp2", 4, (2, 2), 2)},
            {},
            ["no pipeline support", "PipelineMixin"],
        ),
        ("forgetful", {"plan": ONE}, {}, ["Forgetful.training_step", "pipeline_step"]),
        ("forgetful", {"profile_cache": False}, {}, ["Forgetful.training_step", "pipeline_step"]),
        ("manual", {"plan": ONE}, {}, ["automatic_optimization"]),
    ],
)
def test_what_cannot_be_is_one_line(
    ranks: Any, tmp_path: Path, kind: str, strategy: Any, trainer: Any, words: list[str]
) -> None:
    """Every rank ends with the same line, which names the argument and the value."""
    for message in ranks(4).run(fit, str(tmp_path), kind, strategy, trainer):
        assert isinstance(message, str), "it was accepted"
        assert "\n" not in message
        assert all(word in message for word in words), message
