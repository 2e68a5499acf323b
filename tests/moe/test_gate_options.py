"""Options of gates do what they say: chance, biases, forced balance, evaluation, names, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hetu.moe.gates import GShardGate, SwitchGate, TopKGate, build_gate


def test_evaluation_has_a_capacity_of_its_own() -> None:
    gate = SwitchGate(3, 2, capacity_factor=1.0, eval_capacity_factor=0.5)
    to_first = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    assert gate.route(to_first).kept_per_expert.tolist() == [4, 0]
    assert gate.eval().route(to_first).kept_per_expert.tolist() == [2, 0]
    unlimited = SwitchGate(3, 2, capacity_factor=1.0, eval_capacity_factor=float("inf")).eval().route(to_first)
    assert unlimited.kept_per_expert.tolist() == [8, 0] and unlimited.position is None and unlimited.capacity is None


def test_metrics_describe_the_loads() -> None:
    logits = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 2)
    metrics = SwitchGate(3, 2, capacity_factor=1.0).route(logits).metrics
    assert {name: round(value.item(), 6) for name, value in metrics.items()} == {
        "drop_rate": 0.25,
        "load_cv": 0.5,
        "max_over_mean": 1.5,
    }
    empty = SwitchGate(3, 2, capacity_factor=1.0).route(torch.empty(0, 2)).metrics
    assert [value.item() for value in empty.values()] == [0.0, 0.0, 1.0]


def test_detached_output_has_no_graph_and_the_same_numbers() -> None:
    output = SwitchGate(3, 4)(torch.randn(5, 3))
    detached = output.detach()
    tensors = [detached.weights, detached.scores, *detached.losses.values(), *output.metrics.values()]
    assert not any(tensor.requires_grad for tensor in tensors) and output.weights.requires_grad
    assert torch.equal(detached.weights, output.weights) and torch.equal(detached.expert_ids, output.expert_ids)


def test_balance_is_one_for_even_loads_and_up_to_e_for_one_expert() -> None:
    even = 30 * torch.eye(4, dtype=torch.float64)
    assert SwitchGate(3, 4).route(even).losses["balance"].item() == pytest.approx(1.0)
    assert SwitchGate(3, 4).route(even[:1]).losses["balance"].item() == pytest.approx(4.0)
    flat = torch.zeros(8, 4)
    assert TopKGate(3, 4, k=2).route(flat).losses["balance"].item() == pytest.approx(1.0)
    assert TopKGate(3, 4, k=2, balance_scale="sum").route(flat).losses["balance"].item() == pytest.approx(2.0)
    assert build_gate("ktop1", dim=3, num_experts=4, k=2).route(flat).losses["balance"].item() == pytest.approx(2.0)


def test_a_prototype_without_softmax_spoils_its_token_only() -> None:
    logits = torch.randn(3, 4)
    logits[1, 2:] = -torch.inf
    logits.requires_grad_()
    output = build_gate("ktop1", dim=3, num_experts=4, k=2, z_loss=True).route(logits)
    assert output.expert_ids[1].tolist() == [-1, -1] and (output.expert_ids[[0, 2]] >= 0).all()
    (output.weights.sum() + sum(output.losses.values())).backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and not logits.grad[1].any()


# ---------------------------------------------------------------- chance


def test_jitter_is_for_training_and_within_its_bounds() -> None:
    gate = SwitchGate(1, 2, jitter=0.25).double()
    torch.nn.init.constant_(gate.weight, 1.0)
    gate.weight.data[1] = 0.0
    x = torch.full((4000, 1), 2.0, dtype=torch.float64)

    def factors() -> Tensor:
        scores = gate(x).scores
        return (scores[:, 0] / scores[:, 1]).log() / 2

    torch.manual_seed(1)
    first = factors()
    assert 0.75 <= first.min() < 0.76 and 1.24 < first.max() <= 1.25
    assert abs(first.mean() - 1) < 4 * 0.25 / 3**0.5 / 4000**0.5
    torch.manual_seed(1)
    assert torch.equal(factors(), first) and not torch.equal(factors(), first)
    assert torch.equal(gate.eval()(x).scores, gate(x).scores)
    torch.testing.assert_close(factors(), torch.ones(4000, dtype=torch.float64))


def test_a_sampled_second_expert_follows_the_probabilities_of_the_others() -> None:
    gate = GShardGate(3, 4, second_policy="sampling")
    logits = torch.tensor([[3.0, 1.0, 2.0, -torch.inf]])
    many = gate.route(logits.expand(6000, 4)).expert_ids
    assert (many[:, 0] == 0).all()
    shares = torch.bincount(many[:, 1], minlength=4) / 6000
    chance = logits[0, 1:].softmax(0)
    assert shares[0] == 0 and shares[3] == 0
    assert (shares[1:3] - chance[:2]).abs().max() < 4 * (chance[0] * chance[1] / 6000) ** 0.5
    assert (gate.eval().route(logits.expand(50, 4)).expert_ids == torch.tensor([0, 2])).all()


def test_a_sampled_second_expert_is_never_the_first() -> None:
    gate = GShardGate(3, 3, second_policy="sampling")
    ids = gate.route(torch.tensor([[0.0, -torch.inf, -torch.inf], [-torch.inf, -torch.inf, 5.0]])).expert_ids
    assert (ids[:, 0] != ids[:, 1]).all() and ids[:, 0].tolist() == [0, 2]


@pytest.mark.parametrize("normalize", ["before_drop", "after_drop"])
def test_a_random_second_expert_comes_with_twice_its_weight(normalize: Any) -> None:
    gate = GShardGate(3, 3, second_policy="random", normalize=normalize, capacity_factor=10.0)
    probabilities = torch.tensor([0.7, 0.1, 0.2])
    weight = 0.2 / 0.9 if normalize == "before_drop" else 0.2
    output = gate.route(probabilities.log().expand(6000, 3))
    present = output.expert_ids[:, 1] == 2
    assert abs(present.double().mean() - 2 * weight) < 4 * (2 * weight * (1 - 2 * weight) / 6000) ** 0.5
    assert (output.expert_ids[~present, 1] == -1).all() and not output.weights[~present, 1].any()
    alone = 0.7 / 0.9 if normalize == "before_drop" else 1.0
    torch.testing.assert_close(output.weights[~present, 0], torch.full_like(output.weights[~present, 0], alone))
    torch.testing.assert_close(output.weights[present, 0], torch.full_like(output.weights[present, 0], 0.7 / 0.9))
    # Who does not come takes no place.
    assert output.position is not None and output.position[present, 1].tolist() == list(range(int(present.sum())))
    assert (gate.eval().route(probabilities.log().expand(50, 3)).expert_ids[:, 1] == 2).all()
    always = gate.train().route(torch.zeros(50, 2 + 1).index_fill(1, torch.tensor([2]), -50.0)).expert_ids
    assert normalize == "after_drop" or (always == torch.tensor([0, 1])).all()


# ---------------------------------------------------------------- biases


def test_biases_choose_and_do_not_weigh() -> None:
    gate = TopKGate(3, 3, k=1, score="sigmoid", bias_balancing=0.1)
    logits = torch.tensor([[0.3, 0.2, 0.0]] * 5)
    gate.update_bias(gate.route(logits).tokens_per_expert)
    output = gate.route(logits)
    assert output.expert_ids.flatten().tolist() == [1] * 5
    torch.testing.assert_close(output.weights, logits[:, 1:2].sigmoid())
    assert gate.expert_bias is not None
    torch.testing.assert_close(gate.expert_bias, torch.tensor([-2 / 15, 1 / 15, 1 / 15]))


def test_biases_stay_for_equal_loads_and_are_saved_in_float32() -> None:
    gate = TopKGate(3, 3, bias_balancing=1e-3)
    gate.update_bias(torch.tensor([7, 7, 7]))
    assert not gate.state_dict()["expert_bias"].any()
    gate.update_bias(torch.tensor([7, 6, 7]))
    gate.bfloat16()
    assert gate.weight.dtype == torch.bfloat16 and gate.state_dict()["expert_bias"].dtype == torch.float32
    other = TopKGate(3, 3, bias_balancing=1e-3)
    other.load_state_dict(gate.state_dict())
    saved = gate.state_dict()["expert_bias"]
    assert torch.equal(other.state_dict()["expert_bias"], saved) and saved.any()
    assert "expert_bias" not in TopKGate(3, 3).state_dict()


def test_biases_even_loads_out() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(256, 8, generator=generator) + torch.linspace(2, 0, 8)
    gate = TopKGate(3, 8, k=2, score="sigmoid", bias_balancing=0.01)
    before = gate.route(logits).metrics["max_over_mean"].item()
    for _ in range(150):
        gate.update_bias(gate.route(logits).tokens_per_expert)
    assert before > 1.8 and gate.route(logits).metrics["max_over_mean"].item() < 1.15


# ---------------------------------------------------------------- forced balance


@pytest.mark.parametrize(
    ("name", "options", "slots"),
    [
        ("switch", {}, 1),
        ("gshard", {"second_policy": "random"}, 2),
        ("topk", {"k": 3}, 3),
        ("ktop1", {"k": 2}, 2),
        ("sam", {"k": 2}, 2),
        ("base", {}, 1),
        ("hash", {"vocab_size": 9}, 1),
        ("dts", {"threshold": 0.0}, 4),
        ("dts", {"phase": "hard"}, 1),
    ],
)
def test_loads_can_be_forced_to_be_even(name: str, options: dict[str, Any], slots: int) -> None:
    gate = build_gate(name, dim=5, num_experts=4, force_balanced=True, **options)
    output = gate(torch.randn(10, 5), torch.zeros(10, dtype=torch.int64))
    expected = [[(t * slots + j) % 4 for j in range(slots)] for t in range(10)]
    assert output.expert_ids.tolist() == expected
    assert (output.weights > 0).all()


# ---------------------------------------------------------------- names and refusals


def test_gates_are_built_by_name_with_their_options() -> None:
    gate = build_gate("topk", dim=5, num_experts=8, k=4, normalize="after_drop", capacity_factor=1.5, z_loss=True)
    assert isinstance(gate, TopKGate) and (gate.k, gate.normalize, gate.capacity_factor) == (4, "after_drop", 1.5)
    assert gate.weight.shape == (8, 5) and gate.z_loss


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sw1tch", {}, "gate='sw1tch': expected one of switch, gshard, topk, ktop1, sam, base, hash, dts."),
        ("switch", {"k": 2}, "k=2: gate 'switch' has no such option, but balance_group, balance_scope,"),
        ("base", {"capacity_factor": 1.0}, "capacity_factor=1.0: gate 'base' has no such option, but balance_group"),
        ("hash", {}, "vocab_size is missing: gate 'hash' needs it."),
        ("topk", {"k": 5}, "k=5: expected at most num_experts=4; lower k or raise num_experts."),
        ("topk", {"k": 0}, "k=0: expected an integer of at least 1."),
        ("topk", {"k": 1, "normalize": "before_drop"}, "normalize='before_drop' with k=1: every weight would be 1;"),
        ("topk", {"k": 3, "num_groups": 2}, "k=3: top_groups=1 have 2 experts; lower k or raise top_groups."),
        ("topk", {"num_groups": 3}, "num_groups=3: expected a divisor of num_experts=4."),
        ("topk", {"num_groups": 2, "top_groups": 3}, "top_groups=3: expected at most num_groups=2;"),
        ("topk", {"score": "tanh"}, "score='tanh': expected one of 'softmax', 'sigmoid'."),
        ("topk", {"score": "sigmoid", "z_loss": True}, "z_loss=True with score='sigmoid':"),
        ("topk", {"bias_balancing": -1.0}, "bias_balancing=-1.0: expected a number at least 0."),
        ("ktop1", {"k": 3}, "k=3: expected a divisor of num_experts=4."),
        ("sam", {"k": 3}, "k=3: expected at most num_experts / num_groups=2;"),
        ("gshard", {"second_policy": "best"}, "second_policy='best': expected one of 'top', 'sampling', 'random'."),
        ("switch", {"capacity_factor": -0.5}, "capacity_factor=-0.5: expected a number at least 0."),
        ("switch", {"eval_capacity_factor": float("nan")}, "eval_capacity_factor=nan: expected a number at least 0."),
        ("switch", {"min_capacity": -1}, "min_capacity=-1: expected an integer of at least 0."),
        ("switch", {"capacity_rounding": "up"}, "capacity_rounding='up': expected one of 'exact', 'hetu'."),
        ("switch", {"jitter": 1.0}, "jitter=1.0: expected a number at least 0 and below 1."),
        ("switch", {"balance_scope": "all"}, "balance_scope='all': expected one of 'micro', 'global'."),
        ("dts", {"tau": 0.0}, "tau=0.0: expected a number above 0."),
        ("dts", {"min_active": 3, "max_active": 2}, "min_active=3: expected at most max_active=2;"),
        ("dts", {"phase": "dense"}, "phase='dense': expected one of 'single', 'soft', 'hard'."),
    ],
)
def test_wrong_options_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_gate(name, dim=5, num_experts=4, **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_one_expert_is_too_few_for_two_choices() -> None:
    with pytest.raises(ValueError, match="choices=2: expected at most num_experts=1"):
        build_gate("gshard", dim=5, num_experts=1)
    assert build_gate("switch", dim=5, num_experts=1)(torch.randn(3, 5)).weights.flatten().tolist() == [1.0] * 3


def test_wrong_shapes_are_refused() -> None:
    gate = TopKGate(5, 4)
    with pytest.raises(ValueError, match=r"x has shape \[2, 4\]: expected a last size of dim=5."):
        gate(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"logits have shape \[2, 5\]: expected \[tokens, 4\]."):
        gate.route(torch.randn(2, 5))
    with pytest.raises(ValueError, match="bias_balancing=0.0: this gate has no biases"):
        gate.update_bias(torch.zeros(4))
    with pytest.raises(ValueError, match=r"load has shape \[3\]: expected \[4\]."):
        TopKGate(5, 4, bias_balancing=0.1).update_bias(torch.zeros(3))
