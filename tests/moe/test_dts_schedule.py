"""The schedule of DTS gates is a function of the optimizer step; runs are resumed exactly, and end as Switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_hetu.callbacks.dts_gate_schedule import DTSGateSchedule, GateState
from lightning_hetu.moe.diversify import diversify
from lightning_hetu.moe.layer import MoELayer
from tests.moe._training import fit

RANKS = 4
DTS = {"gate": "dts", "gate_options": {"balance_scope": "global", "noise": "none"}}


@pytest.mark.parametrize(("mode", "half"), [("linear", 1.25), ("exp", 1.0), ("cosine", 1.25), ("constant", 2.0)])
def test_temperature_falls_as_said(mode: Any, half: float) -> None:
    """From the start value to the end value, and then it stays."""
    schedule = DTSGateSchedule(10, 2.0, 0.5, mode, start_step=3)
    found = [schedule.at(step).tau for step in range(20)]
    assert found[:4] == [2.0] * 4
    assert found[8] == pytest.approx(half)
    last = 2.0 if mode == "constant" else 0.5
    assert found[13:] == pytest.approx([last] * 7)
    assert all(a >= b for a, b in zip(found, found[1:], strict=False))


def test_phases_come_in_order() -> None:
    schedule = DTSGateSchedule(10, hard_step=7, diversify_step=3)
    assert [schedule.at(step).phase for step in range(9)] == ["single"] * 3 + ["soft"] * 4 + ["hard"] * 2
    assert DTSGateSchedule(10).at(10**6).phase == "soft"
    assert DTSGateSchedule(1, hard_step=0).at(0) == GateState("hard", 2.0)


def test_gates_follow_the_optimizer_step(tmp_path: Path) -> None:
    """With two micro-batches per step both see the same temperature; an evaluation sees the last one."""
    schedule = DTSGateSchedule(4, 2.0, 0.5, "linear", hard_step=5)
    found = fit(
        0, str(tmp_path), module=DTS, callbacks=(schedule,),
        trainer={"accumulate_grad_batches": 2, "max_epochs": 3},
    )  # fmt: skip
    expected = [(state.phase, state.tau) for state in map(schedule.at, range(6)) for _ in range(2)]
    assert found["gates"] == [(phase, pytest.approx(tau)) for phase, tau in expected]
    assert found["logged"]["dts/mean_active"] == 1.0 and found["logged"]["dts/frac_single"] == 1.0
    assert found["logged"]["dts/tau"] == pytest.approx(0.5)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_goes_on_exactly(tmp_path: Path, stop: int) -> None:
    """Stopped before and after the experts were made different: the same losses and weights, bit for bit."""

    def run(epochs: int, **options: Any) -> dict[str, Any]:
        schedule = DTSGateSchedule(8, diversify_step=6, hard_step=10, moments="copy")
        return fit(0, str(tmp_path), module=DTS, trainer={"max_epochs": epochs}, callbacks=(schedule,), **options)

    whole = run(3)
    run(stop, save="a.ckpt")
    rest = run(3, checkpoint=str(tmp_path / "a.ckpt"))
    assert rest["losses"] == whole["losses"][4 * stop :]
    assert [phase for phase, _ in whole["gates"]] == ["single"] * 6 + ["soft"] * 4 + ["hard"] * 2
    assert all(torch.equal(rest["weights"][name], weight) for name, weight in whole["weights"].items())


def run(rank: int, folder: str) -> dict[str, Any]:
    return fit(rank, folder, ranks=RANKS, **dense_to_sparse())


def dense_to_sparse() -> dict[str, Any]:
    schedule = DTSGateSchedule(8, 3.0, 0.05, diversify_step=2, hard_step=10)
    return {"module": DTS, "trainer": {"max_epochs": 3}, "callbacks": (schedule,)}


def test_ranks_go_from_dense_to_sparse_as_one_process_does(ranks: Any, tmp_path: Path) -> None:
    """One expert, copies of it with the same noise wherever they are, fewer per token, and one in the end."""
    wanted = fit(0, str(tmp_path), **dense_to_sparse())
    for found in ranks(RANKS).run(run, str(tmp_path)):
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        for name, weight in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4)


def layer_of(seed: int, **options: Any) -> MoELayer:
    torch.manual_seed(seed)
    return MoELayer(6, 8, 4, **options).double()


def test_copies_without_noise_change_nothing() -> None:
    """With weights that sum to one, all experts being copies, the layer gives what its first expert gave."""
    layer = layer_of(0, gate="dts", gate_options={"weight": "tempered", "threshold": 0.0, "noise": "none"})
    x = torch.randn(7, 6, dtype=torch.float64)
    layer.gate.set_phase("single")
    before = layer(x)
    diversify(layer, amount=0.0)
    layer.gate.set_phase("soft")
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    assert layer.last is not None and layer.last.metrics["mean_active"] == 4


@pytest.mark.parametrize("how", ["noise", "mask", "drop"])
def test_copies_are_changed_as_said(how: Any) -> None:
    """Expert 0 stays; the others differ from it and from each other, in all entries or in the share asked for."""
    layer = layer_of(0)
    first = layer.experts.w1[0].detach().clone()
    diversify(layer, how=how, amount=0.25, seed=3)
    assert torch.equal(layer.experts.w1[0], first)
    changed = (layer.experts.w1[1:] != first).double().mean(dim=(1, 2))
    assert (changed == 1).all() if how == "noise" else ((0.02 < changed) & (changed < 0.6)).all()
    assert not torch.equal(layer.experts.w1[1], layer.experts.w1[2])
    if how == "mask":
        assert (layer.experts.w1[1:][layer.experts.w1[1:] != first] == 0).all()
    again = layer_of(0)
    diversify(again, how=how, amount=0.25, seed=3)
    assert torch.equal(again.experts.w2, layer.experts.w2)


@pytest.mark.parametrize("moments", ["copy", "zero"])
def test_moments_follow(moments: Any) -> None:
    layer = layer_of(0)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(20, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[layer.experts.w1]
    first = state["exp_avg"][0].clone()
    diversify(layer, optimizers=[optimizer], moments=moments)
    wanted = first.expand_as(state["exp_avg"]) if moments == "copy" else torch.zeros_like(state["exp_avg"])
    assert first.any() and torch.equal(state["exp_avg"], wanted)


class NoGate(LightningModule):
    pass


def test_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NoGate has no DTSGate; build its layers with gate='dts'"):
        DTSGateSchedule(3).setup(None, NoGate(), "fit")  # type: ignore[arg-type]
    for options, message in (
        ({"steps": 0}, "steps=0: expected an integer of at least 1"),
        ({"steps": 2, "tau_end": 0.0}, "tau_end=0.0: expected a number above 0"),
        ({"steps": 2, "mode": "step"}, "mode='step': expected one of linear, exp, cosine, constant"),
        ({"steps": 2, "hard_step": 2, "diversify_step": 3}, "hard_step=2: expected at least diversify_step=3"),
        ({"steps": 2, "diversity": "flip"}, "diversity='flip': expected one of noise, mask, drop"),
    ):
        with pytest.raises(ValueError, match=message):
            DTSGateSchedule(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="amount=2: expected 0 to 1"):
        diversify(layer_of(0), how="mask", amount=2)
