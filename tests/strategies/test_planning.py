"""From a Trainer to a plan: ``plan="auto"``, its arguments, and what is refused."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging

from lightning_hetu.planning import HybridPlan
from lightning_hetu.strategies.auto import AutoHybridParallelStrategy
from tests.strategies._runs import MODULES, Small, loader, plan_of, train, whole


def fit(rank: int, folder: str, kind: str, strategy: dict[str, Any], trainer: dict[str, Any]) -> Any:
    """The plan that was found and what came of it, or the error."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.manual_seed(rank)
    module = MODULES[kind]()
    data = loader(**trainer.get("data", {}))
    trainer = {key: value for key, value in trainer.items() if key != "data"}
    settings = {
        "accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
        "default_root_dir": folder, **trainer,
    }  # fmt: skip
    try:
        auto = AutoHybridParallelStrategy(**strategy)
        Trainer(devices=torch.distributed.get_world_size(), strategy=auto, **settings).fit(module, data)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return {"plan": auto.plan, "weights": whole(module)}


def test_auto_plans_a_module_with_pipeline_support(ranks: Any, tmp_path: Path) -> None:
    """All ranks run the same plan, found under the budget, and it is written beside the logs."""
    options = {"memory_budget": "64MiB", "profile_cache": str(tmp_path / "cache")}
    results = ranks(4).run(fit, str(tmp_path), "gpt", options, {"logger": True})
    plans = {result["plan"].to_json() for result in results}
    assert len(plans) == 1
    plan = results[0]["plan"]
    assert max(plan.prediction.stage_memory) <= 64 << 20 and plan.global_batch_size == 16
    assert HybridPlan.load(tmp_path / "lightning_logs" / "version_0" / "plan.json").layers == plan.layers
    assert {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()} == {"model", "cluster"}
    (tmp_path / "plan.json").write_text("mine", encoding="utf-8")
    again = ranks(4).run(fit, str(tmp_path), "gpt", options, {})[0]["plan"]
    assert again == plan, "from the cache: the same plan"
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == "mine", "without a logger nothing is written"


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


class Forgetful(Small):
    """Has pipeline support and does not use it."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return next(self.parameters()).sum()


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.embedding)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        self.unfreeze_and_add_param_group(pl_module.model.embedding, optimizer)


class Loose(Small):
    """Has a weight that belongs to no part."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(()))


class Tied(Small):
    """Shares the embedding's weight with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.model.head.linear.weight = self.model.embedding.token.weight


class Repeated(Small):
    """Runs one block twice."""

    def __init__(self) -> None:
        super().__init__()
        self.model.blocks[2] = self.model.blocks[1]


class SecondOrder(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class TimeMajor(MODULES["blocks"]):  # type: ignore[misc]
    """Its blocks work on ``[time, samples, dim]``."""

    def _loss(self, batch: Any) -> torch.Tensor:
        inputs, target = batch
        inputs, target = inputs[:, :4], target[:, :4]
        hidden = self.table(inputs).transpose(0, 1)
        for layer in self.net.layers:
            hidden = layer(hidden, torch.ones(len(hidden)))
        return torch.nn.functional.cross_entropy(self.out(hidden.transpose(0, 1)).flatten(0, 1), target.flatten())


MODULES.update(loose=Loose, tied=Tied, repeated=Repeated, lbfgs=SecondOrder, time_major=TimeMajor)
MODULES["manual"] = Manual
MODULES["forgetful"] = Forgetful
STAGES = plan_of("dp2 dp2 dp2 dp2 dp2 dp2", 4, (2, 2), 2)
MIXED = plan_of("dp4 dp4 dp2-tp2 dp4 dp4 dp4", 4, (4,))
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
        ("loose", {"plan": ONE}, {}, ["'temperature'", "lies outside"]),
        ("tied", {"plan": ONE}, {}, ["token.weight", "shared parameter"]),
        ("repeated", {"plan": ONE}, {}, ["more than once", "model.blocks.0"]),
        ("lbfgs", {"plan": ONE}, {}, ["LBFGS"]),
        ("gpt", {"plan": ONE}, {"callbacks": [StochasticWeightAveraging(1e-2)]}, ["StochasticWeightAveraging"]),
        ("gpt", {"plan": STAGES}, {"callbacks": [Thaw()]}, ["Thaw", "pipeline_parallel_size=1"]),
        ("gpt", {"plan": MIXED}, {"callbacks": [Thaw()]}, ["Thaw", "max_tp=1"]),
        ("gpt", {"plan": ONE, "process_group_backend": "nccl"}, {}, ["process_group_backend='nccl'", "gloo"]),
        ("gpt", {"plan": "/"}, {}, ["plan='/'", "directory"]),
        ("time_major", {"plan": MIXED}, {}, ["[4, 4, 16]", "more than one dimension", "pin one"]),
        ("gpt", {"profile_cache": False}, {"data": {"samples": 0}}, ["no batch"]),
        ("gpt", {"plan": ONE}, {"data": {"samples": 18}, "max_steps": -1}, ["2 samples", "drop_last=True"]),
        ("gpt", {}, {"use_distributed_sampler": False}, ["use_distributed_sampler=False", "plan='auto'"]),
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


def test_finetuning_where_all_layers_are_sharded_alike(ranks: Any, tmp_path: Path) -> None:
    """Lightning's callback may then compare parameters, and what it adds to the optimizer is trained."""
    plan = plan_of("dp4-zero3 dp4-zero2 dp4-zero3 dp4-zero3 dp4-zero3 dp4-zero3", 4, (4,))
    torch.manual_seed(0)
    before = whole(MODULES["grouped"]())
    for result in ranks(4).run(fit, str(tmp_path), "grouped", {"plan": plan}, {"callbacks": [Thaw()]}):
        assert not any(torch.equal(weight, result["weights"][name]) for name, weight in before.items())


class Normed(MODULES["blocks"]):  # type: ignore[misc]
    """Counts its batches in batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)


def one_after_another(rank: int, folder: str) -> dict[str, Any]:
    """Calls of one Trainer in an order that is less usual."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    settings = {
        "accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
        "devices": torch.distributed.get_world_size(),
    }  # fmt: skip
    out: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(strategy=AutoHybridParallelStrategy(plan=ONE), **settings)
        first, second = MODULES["gpt"](), MODULES["gpt"]()
        trainer.fit(first, loader())
        before = whole(second)
        trainer.fit_loop.epoch_loop.max_steps = 4
        trainer.fit(second, loader())
        out["trained"] = sum(not torch.equal(before[name], value) for name, value in whole(second).items())
        staged = Trainer(strategy=AutoHybridParallelStrategy(plan=STAGES), **settings)
        grouped = MODULES["grouped"]()
        staged.validate(grouped, loader(32), verbose=False)
        staged.fit(grouped, loader())
        staged.fit_loop.epoch_loop.max_steps = 4
        staged.fit(grouped, loader())
        out["steps"] = staged.global_step
        out["validated"] = trainer.validate(second, loader(32), verbose=False)[0]["val_loss"]
        fresh = Trainer(strategy=AutoHybridParallelStrategy(profile_cache=False), **settings)
        module = MODULES["gpt"]()
        fresh.validate(module, loader(32), verbose=False)
        try:
            fresh.fit(module, loader())
        except ValueError as error:
            out["refused"] = str(error)
        Trainer(strategy=AutoHybridParallelStrategy(plan=ONE), **settings).fit(Normed(), loader(), loader(32))
        other = plan_of("dp4 dp4 dp4 dp4 dp4 dp4", 4, (4,), batch=32)
        Trainer(strategy=AutoHybridParallelStrategy(plan=other), **settings).fit(MODULES["gpt"](), loader())
    out["warnings"] = [str(item.message) for item in caught]
    return out


def test_calls_in_another_order(ranks: Any, tmp_path: Path) -> None:
    """A second module on the same Trainer trains; fitting what was set up for evaluation is refused; warnings come."""
    results = ranks(4).run(one_after_another, str(tmp_path))
    for result in results:
        assert result["trained"] == len(list(MODULES["gpt"]().parameters()))
        assert result["validated"] == pytest.approx(results[0]["validated"], rel=1e-6) and result["steps"] == 4
        assert "set up for evaluation" in result["refused"]
    told = " ".join(results[0]["warnings"])
    assert "batch normalization" in told
    assert "batch_size is 16" in told and "global batch of 32" in told
