"""DTS gates go from many experts per token to one, and are Switch gates at the end, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hetu.moe.gates import DTSGate, SwitchGate
from tests.moe._gate_reference import Expected, admit, balance, best, compare, compare_gradients, is_valid, softmax, z

NUM_EXPERTS = 5


def logits_of(case: str, tokens: int = 10) -> Tensor:
    logits = 2 * torch.randn(tokens, NUM_EXPERTS, dtype=torch.float64)
    if case == "ties":
        return logits.sign()
    if case == "all equal":
        return torch.zeros_like(logits)
    if case == "broken rows":
        logits[1, 2], logits[3], logits[7, 0] = torch.nan, -torch.inf, torch.inf
    return logits


def soft(
    logits: Tensor, tau: float, threshold: float, least: int, most: int, tempered: bool, capacity: int
) -> Expected:
    """Soft routing without noise, in loops."""
    nothing = torch.zeros((), dtype=torch.float64)
    ids, weights, counted = [], [], []
    for row in logits:
        chosen: list[int] = []
        scores = softmax(list(row))
        if is_valid(row):
            sharp = softmax(list(row / tau))
            order = best(sharp, NUM_EXPERTS)
            above = [e for e in order if sharp[e].item() > threshold]
            chosen = order[: min(max(len(above), least), most)]
            scores = sharp if tempered else scores
        ids.append(chosen + [-1] * (most - len(chosen)))
        weights.append([scores[e] for e in chosen] + [nothing] * (most - len(chosen)))
        counted.append([scores[e] if e in chosen else nothing for e in range(NUM_EXPERTS)] if chosen else None)
    losses = {"balance": balance(ids, counted, NUM_EXPERTS, NUM_EXPERTS), "z": z(logits)}
    expected = Expected(ids, weights, losses)
    admit(expected, capacity)
    return expected


@pytest.mark.parametrize("case", ["random", "ties", "all equal", "broken rows", "no token", "one token"])
@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize(
    ("tau", "threshold", "least", "most"),
    [(1.0, 0.001, 1, 5), (0.5, 0.15, 1, 5), (0.3, 0.9, 1, 5), (2.0, 0.2, 2, 3), (0.7, 0.0, 1, 2)],
)
def test_soft_routing_is_that_of_loops(
    tau: float, threshold: float, least: int, most: int, tempered: bool, case: str
) -> None:
    for factor, capacity in ((None, 10**9), (0.0, 0), (0.5, -1)):
        gate = DTSGate(
            3,
            NUM_EXPERTS,
            tau=tau,
            threshold=threshold,
            noise="none",
            min_active=least,
            max_active=most,
            weight="tempered" if tempered else "softmax",
            z_loss=True,
            capacity_factor=factor,
        )
        logits = logits_of(case, {"no token": 0, "one token": 1}.get(case, 10)).requires_grad_()
        copy = logits.detach().clone().requires_grad_()
        # The buffer is float32, and so is the temperature.
        rounded = torch.tensor(tau).double().item()
        room = -(-len(logits) * most // (2 * NUM_EXPERTS)) if capacity < 0 else capacity
        output, expected = gate.route(logits), soft(copy, rounded, threshold, least, most, tempered, room)
        compare(output, expected, NUM_EXPERTS)
        compare_gradients(output, expected, logits, copy)
        used = [sum(e >= 0 for e in ids) for ids in expected.ids]
        used = [number for number in used if number]
        assert output.metrics["mean_active"].item() == pytest.approx(sum(used) / max(len(used), 1))
        assert output.metrics["frac_single"].item() == pytest.approx(used.count(1) / max(len(used), 1))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"capacity_factor": 0.7, "z_loss": True},
    {"capacity_factor": 0.7, "capacity_rounding": "hetu", "batch_prioritized": True},
    {"capacity_factor": 0.0},
    {"force_balanced": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", ["random", "ties", "all equal", "broken rows"])
def test_hard_is_switch_bit_for_bit(case: str, options: dict[str, Any]) -> None:
    gate = DTSGate(3, NUM_EXPERTS, tau=0.4, **options)
    gate.set_hard(True)
    switch = SwitchGate(3, NUM_EXPERTS, **options)
    for dtype in (torch.float32, torch.bfloat16):
        logits = logits_of(case).to(dtype)
        pair = [logits.clone().requires_grad_() for _ in range(2)]
        ours, theirs = gate.route(pair[0]), switch.route(pair[1])
        for name in ("expert_ids", "weights", "scores", "position", "dropped", "tokens_per_expert", "kept_per_expert"):
            assert getattr(ours, name) is getattr(theirs, name) is None or torch.equal(
                getattr(ours, name), getattr(theirs, name)
            )
        assert ours.losses.keys() == theirs.losses.keys() and ours.capacity == theirs.capacity
        assert all(torch.equal(ours.losses[name], theirs.losses[name]) for name in theirs.losses)
        for output in (ours, theirs):
            (output.weights.square().sum() + sum(output.losses.values())).backward()
        assert pair[0].grad is not None and pair[1].grad is not None and torch.equal(pair[0].grad, pair[1].grad)


def test_evaluation_is_without_noise_or_top_one() -> None:
    logits = torch.randn(12, NUM_EXPERTS)
    noisy = DTSGate(3, NUM_EXPERTS, threshold=0.2)
    quiet = DTSGate(3, NUM_EXPERTS, threshold=0.2, noise="none")
    assert not torch.equal(noisy.route(logits).expert_ids, noisy.route(logits).expert_ids)
    assert torch.equal(noisy.eval().route(logits).expert_ids, quiet.route(logits).expert_ids)
    top1 = DTSGate(3, NUM_EXPERTS, eval_mode="top1").eval().route(logits)
    assert torch.equal(top1.expert_ids, SwitchGate(3, NUM_EXPERTS).route(logits).expert_ids)


def test_noise_makes_the_first_expert_a_sample_of_the_softmax() -> None:
    gate = DTSGate(3, 3, tau=0.7)
    logits = torch.tensor([0.0, 1.0, -1.0])
    first = gate.route(logits.expand(6000, 3)).expert_ids[:, 0]
    chance = logits.softmax(0)
    shares = torch.bincount(first, minlength=3) / 6000
    assert ((shares - chance).abs() < 4 * (chance * (1 - chance) / 6000).sqrt()).all()


def test_fewer_experts_are_active_as_the_temperature_falls() -> None:
    logits = torch.randn(400, 8)
    gate = DTSGate(3, 8, noise="none")
    active = []
    for tau in (10.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.001):
        gate.set_tau(tau)
        active.append(gate.route(logits).metrics["mean_active"].item())
    assert active[0] == 8 and active == sorted(active, reverse=True) and active[-1] < 1.1
    assert active[1] > active[3] > active[5]


def test_a_token_keeps_its_best_expert_whatever_the_threshold() -> None:
    output = DTSGate(3, 4, tau=5.0, threshold=0.9, noise="none").route(torch.tensor([[0.0, 0.3, 0.3, 0.1]]))
    assert output.expert_ids.tolist() == [[1, -1, -1, -1]]


def test_single_sends_every_token_to_expert_zero() -> None:
    gate = DTSGate(3, 4, phase="single", capacity_factor=1.0, z_loss=True)
    x = torch.randn(6, 3)
    x[2, 0] = torch.nan
    output = gate(x)
    assert output.expert_ids.flatten().tolist() == [0, 0, -1, 0, 0, 0]
    assert output.weights.flatten().tolist() == [1, 1, 0, 1, 1, 1] and not output.dropped.any()
    assert {name: loss.item() for name, loss in output.losses.items()} == {"balance": 0, "z": 0}
    sum(output.losses.values()).backward()
    assert gate.weight.grad is not None and not gate.weight.grad.any()
    gate.set_phase("soft")
    assert gate(x).expert_ids.shape == (6, 4)


def test_capacity_follows_the_average_of_active_experts() -> None:
    gate = DTSGate(3, 4, threshold=0.0, noise="none", capacity_factor=1.0, average_decay=0.5)
    logits = torch.randn(8, 4)
    assert gate.route(logits).capacity == 8 and not gate.route(logits).dropped.any()
    gate.update_average(torch.tensor(2.0))
    assert gate.average_active.item() == 3.0 and gate.route(logits).capacity == 6
    gate.update_average(1.0)
    output = gate.route(logits)
    assert gate.average_active.item() == 2.0 and output.capacity == 4
    assert output.kept_per_expert.tolist() == [4] * 4 and output.tokens_per_expert.tolist() == [8] * 4
    other = DTSGate(3, 4)
    other.load_state_dict(gate.state_dict())
    assert other.average_active.item() == 2.0


def test_forward_changes_no_state() -> None:
    gate = DTSGate(3, 4, capacity_factor=1.0)
    before = {name: value.clone() for name, value in [*gate.named_buffers(), *gate.named_parameters()]}
    gate(torch.randn(8, 3))
    for name, value in [*gate.named_buffers(), *gate.named_parameters()]:
        assert torch.equal(value, before[name])


def test_the_temperature_is_float32_and_not_saved() -> None:
    gate = DTSGate(3, 4, tau=1.7).bfloat16()
    assert gate.tau.dtype == gate.average_active.dtype == torch.float32 and gate.tau.shape == ()
    assert sorted(gate.state_dict()) == ["average_active", "weight"]
    with torch.device("meta"):
        made_later = DTSGate(3, 4, tau=1.7, max_active=3)
    made_later.to_empty(device="cpu").reset_parameters()
    assert made_later.tau.item() == torch.tensor(1.7).item() and made_later.average_active.item() == 3.0


def test_hard_is_a_state_that_can_be_left() -> None:
    gate = DTSGate(3, 4)
    assert not gate.hard
    gate.set_hard(True)
    assert gate.hard and gate.phase == "hard"
    gate.set_hard(False)
    assert not gate.hard and gate.phase == "soft"
    with pytest.raises(ValueError, match="phase='dense': expected one of"):
        gate.set_phase("dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tau=-1.0: expected a number above 0."):
        gate.set_tau(-1.0)
