"""FlexMoEPlacement under a Trainer: experts move, and the run is that of one process; so are checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_hetu.callbacks import DTSGateSchedule, FlexMoEPlacement, RoutingTrace
from lightning_hetu.moe.placement import load_trace
from tests._ranks import free_port
from tests.moe._training import DIM, EXPERTS, SAMPLES, Small, fit

RANKS = 4
MODULE: dict[str, Any] = {"gate": "topk", "gate_options": {"k": 2, "balance_scope": "global", "z_loss": True}}
TRAINER = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 4}
EAGER = {"slots": 2.0, "threshold": 1.0, "interval": 1, "window": 2}


def placed(callback: FlexMoEPlacement) -> list[list[list[int]]]:
    return [layer.placement.to_lists() for layer in callback._layers if layer.placement is not None]


def run(rank: int, folder: str, flex: dict[str, Any], ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    callback = FlexMoEPlacement(**flex)
    found = fit(rank, folder, ranks=ranks, callbacks=(callback,), dtype=torch.float64, **{"module": MODULE, **options})
    return {**found, "placements": placed(callback), "operations": callback.operations}


def close(found: dict[str, Any], wanted: dict[str, Any], losses: list[float]) -> None:
    assert found["losses"] == pytest.approx(losses, rel=1e-12)
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-11)


@pytest.mark.parametrize("policy", ["flexmoe", "eplb", "shadow"])
def test_a_run_with_moving_experts_is_that_of_one_process(ranks: Any, tmp_path: Path, policy: str) -> None:
    """Micro-batches, clipping, losses of gates; with every policy experts have moved."""
    module = {**MODULE, "gate_options": {**MODULE["gate_options"], "k": 1}} if policy == "shadow" else MODULE
    wanted = fit(0, str(tmp_path), module=module, trainer=TRAINER, dtype=torch.float64)
    flex = {**EAGER, "policy": policy, "max_ops": None, "split": "even" if policy == "eplb" else "flow"}
    flex["refresh"] = "step" if policy == "flexmoe" else "check"
    answers = ranks(RANKS).run(run, str(tmp_path), flex, RANKS, {"trainer": TRAINER, "module": module})
    for found in answers:
        close(found, wanted, wanted["losses"])
        assert found["placements"] == answers[0]["placements"] and found["operations"] >= 6
        assert found["logged"]["flex/balance_ratio"] >= 1.0
        assert 1.0 <= found["logged"]["flex/balance_ratio_planned"] <= found["logged"]["flex/balance_ratio"] + 0.5


def test_checkpoints_know_nothing_of_placements(ranks: Any, tmp_path: Path) -> None:
    """Saved by 4 ranks with moved experts; continued by 1, 2 and 4 with other slots, and where it was."""
    folder, half = str(tmp_path), {**TRAINER, "max_epochs": 2}
    wanted = fit(0, folder, module=MODULE, trainer=TRAINER, dtype=torch.float64)
    last = wanted["losses"][len(wanted["losses"]) // 2 :]
    first = ranks(RANKS).run(run, folder, EAGER, RANKS, {"trainer": half, "save": "half.ckpt"})
    whole = ranks(RANKS).run(run, folder, EAGER, RANKS, {"trainer": TRAINER})
    more = {"trainer": TRAINER, "checkpoint": str(tmp_path / "half.ckpt")}
    close(fit(0, folder, module=MODULE, dtype=torch.float64, **more), wanted, last)
    for size, flex in ((2, EAGER), (RANKS, {**EAGER, "slots": 3}), (RANKS, EAGER)):
        answers = ranks(size).run(run, folder, flex, size, more)
        for found in answers:
            close(found, wanted, last)
    # Resumed with the same slots, it goes on from the same placement, by the tokens of the same steps.
    assert answers[0]["placements"] == whole[0]["placements"]
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)
    state = next(value for key, value in saved["callbacks"].items() if "FlexMoEPlacement" in key)
    assert state["placements"] == first[0]["placements"] and len(state["counts"]) == EAGER["window"]
    assert saved["state_dict"]["layers.0.experts.w1"].shape[0] == EXPERTS


class Frozen(Small):
    """The experts of its first layer are not trained."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.layers[0].experts.requires_grad_(False)


def fit_and_look_back(rank: int, folder: str) -> tuple[list[float], float, int]:
    """Fits with moving experts, and then validates what was saved before they had moved."""
    callback = FlexMoEPlacement(**{**EAGER, "slots": 3})
    first = fit(rank, folder, ranks=2, module=MODULE, kind=Frozen, trainer={"max_epochs": 1}, save="first.ckpt")
    again = fit(rank, folder, ranks=2, module=MODULE, kind=Frozen, trainer=TRAINER, callbacks=(callback,),
                validate=f"{folder}/first.ckpt")  # fmt: skip
    return first["losses"] + again["losses"], again["logged"]["val_loss"], callback.operations


def test_a_checkpoint_loads_where_experts_have_moved(ranks: Any, tmp_path: Path) -> None:
    """Into layers whose experts lie in different places, some of them frozen with several copies."""
    first = fit(0, str(tmp_path), module=MODULE, kind=Frozen, trainer={"max_epochs": 1}, save="one.ckpt")
    again = fit(0, str(tmp_path), module=MODULE, kind=Frozen, trainer=TRAINER, validate=f"{tmp_path}/one.ckpt")
    for losses, validation, operations in ranks(2).run(fit_and_look_back, str(tmp_path)):
        assert losses == pytest.approx(first["losses"] + again["losses"], rel=1e-5)
        assert validation == pytest.approx(again["logged"]["val_loss"], rel=1e-5) and operations > 0


def dry(rank: int, folder: str) -> tuple[dict[str, float], list[Any]]:
    callback = FlexMoEPlacement(**EAGER, dry_run=True)
    return fit(rank, folder, ranks=2, module=MODULE, callbacks=(callback,))["logged"], placed(callback)


def test_a_dry_run_moves_nothing(ranks: Any, tmp_path: Path) -> None:
    for logged, placements in ranks(2).run(dry, str(tmp_path)):
        assert placements == [[[0, 1, -1, -1], [2, 3, -1, -1]]] * 2
        assert logged["flex/operations"] == logged["flex/bytes_moved"] == 0
        assert logged["flex/balance_ratio_planned"] < logged["flex/balance_ratio"]


def traced(rank: int, folder: str, ranks: int) -> list[list[int]]:
    fit(rank, folder, ranks=ranks, module=MODULE, trainer={"accumulate_grad_batches": 2},
        callbacks=(RoutingTrace("trace"),))  # fmt: skip
    return []


def test_routing_is_recorded(ranks: Any, tmp_path: Path) -> None:
    """Steps, ranks and experts; every token twice. One process sees what all ranks see together."""
    ranks(RANKS).run(traced, str(tmp_path), RANKS)
    counts = [load_trace(tmp_path / "trace" / f"layer{layer}.npz") for layer in range(2)]
    fit(0, str(tmp_path), module=MODULE, trainer={"accumulate_grad_batches": 2}, callbacks=(RoutingTrace("one"),))
    for layer, trace in enumerate(counts):
        assert trace.shape == (2, RANKS, EXPERTS) and trace.sum() == 2 * SAMPLES
        assert (trace.sum(axis=2) == 2 * SAMPLES // 2 // RANKS).all()
        one = load_trace(tmp_path / "one" / f"layer{layer}.npz")
        assert np.array_equal(one[:, 0], trace.sum(axis=1))


def profiled(rank: int, folder: str) -> tuple[list[float], Any]:
    callback = FlexMoEPlacement(**EAGER, cost_model="profile")
    return fit(rank, folder, ranks=2, module=MODULE, callbacks=(callback,))["losses"], callback._costs


def test_costs_are_measured_without_changing_the_run(ranks: Any, tmp_path: Path) -> None:
    """The same on all ranks, so that they plan the same."""
    wanted = fit(0, str(tmp_path), module=MODULE)["losses"]
    answers = ranks(2).run(profiled, str(tmp_path))
    for losses, costs in answers:
        assert losses == pytest.approx(wanted, rel=1e-5) and costs == answers[0][1]
        assert costs.token_bytes == 4 * DIM and costs.weight_bytes == 4 * 2 * DIM * 8
        assert costs.state_bytes == 3 * costs.weight_bytes


def refusals(rank: int, folder: str) -> list[str]:
    from lightning_hetu import OSDPStrategy

    messages = []
    for strategy, slots in ((OSDPStrategy(), 2.0), (None, 1)):
        options = {"trainer": {"strategy": strategy}} if strategy else {}
        try:
            fit(rank, folder, ranks=2, module=MODULE, callbacks=(FlexMoEPlacement(slots),), **options)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_runs_in_which_nothing_can_move_are_refused(ranks: Any, tmp_path: Path) -> None:
    wanted = ["FlexMoEPlacement: under OSDPStrategy experts stay where they are; use DDPStrategy."]
    wanted.append("slots=1: 4 experts on 2 ranks need at least 2.")
    assert ranks(2).run(refusals, str(tmp_path)) == [wanted] * 2
    with pytest.raises(ValueError, match="expected a MoEModuleMixin, not LightningModule"):
        FlexMoEPlacement().setup(Trainer(accelerator="cpu", logger=False), LightningModule(), "fit")


def test_one_process_has_nothing_to_move(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing to move"):
        callback = FlexMoEPlacement()
        Trainer(
            accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
        ).fit(*_module_and_data())  # fmt: skip
    assert callback.state_dict() == {}


def _module_and_data() -> tuple[Any, Any]:
    from tests.moe._training import data

    return Small(**MODULE), data(0, 1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (EMAWeightAveraging(), "FlexMoEPlacement with EMAWeightAveraging: averages of weights do not follow experts"),
        (DTSGateSchedule(steps=9, diversify_step=3), "FlexMoEPlacement with DTSGateSchedule: diversify_step does not"),
    ],
)
def test_callbacks_that_would_mix_up_experts_are_refused(other: Callback, message: str) -> None:
    callback = FlexMoEPlacement()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback, other])
    with pytest.raises(ValueError, match=message):
        callback.setup(trainer, Small(**MODULE), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0.5}, "slots=0.5: expected a number of experts, or a multiple of a rank's share from 1.0."),
        ({"slots": True}, "slots=True"),
        ({"policy": "best"}, "policy='best': expected one of flexmoe, eplb, shadow, none."),
        ({"split": "odd"}, "split='odd': expected one of even, flow."),
        ({"refresh": "never"}, "refresh='never': expected one of step, check."),
        ({"threshold": 0.9}, "threshold=0.9: expected a balance ratio of at least 1."),
        ({"interval": 0}, "interval=0: expected an integer of at least 1."),
        ({"window": 1.5}, "window=1.5: expected an integer of at least 1."),
        ({"cost_model": "guess"}, "cost_model='guess': expected 'profile', a PlacementCostModel, or null."),
        ({"max_ops": 0}, "max_ops=0: expected an integer of at least 1, or null for any number."),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        FlexMoEPlacement(**options)


def test_a_rank_killed_during_a_move_ends_the_others(ranks: Any, tmp_path: Path) -> None:
    """They end with an error inside the timeout, and the last checkpoint goes on to the same end."""
    folder, port = str(tmp_path), free_port()
    environment = {**os.environ, "MASTER_PORT": str(port), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.moe._killed", folder],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[1].returncode == 9 and processes[0].returncode not in (0, 9)
    assert "Error" in errors[0]
    wanted = fit(0, folder, module=MODULE, trainer=TRAINER, dtype=torch.float64)
    more = {"trainer": TRAINER, "checkpoint": str(tmp_path / "before.ckpt")}
    for found in ranks(2).run(run, folder, EAGER, 2, more):
        close(found, wanted, wanted["losses"][4:])
