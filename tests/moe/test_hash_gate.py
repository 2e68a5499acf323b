"""Hash gates send tokens where their tables say, and tables are as even as they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hetu.moe.gates import HashGate


def test_tables() -> None:
    assert HashGate(3, 8, table="modulo").expert_of.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    table = HashGate(3, 80, seed=5).expert_of
    assert sorted(torch.bincount(table).tolist()) == [26, 27, 27]
    assert torch.equal(table, HashGate(3, 80, seed=5).expert_of)
    assert not torch.equal(table, HashGate(3, 80, seed=6).expert_of)
    # 9 to expert 0, 7 to 1, 5 to 2, then 4 to the one with 5, 3 to the one with 7, 1 to the first one with 9
    frequencies = [1.0, 9.0, 5.0, 3.0, 7.0, 4.0, 0.0]
    balanced = HashGate(3, 7, table="balanced", frequencies=frequencies)
    assert balanced.expert_of.tolist() == [0, 0, 2, 1, 1, 2, 2]


def test_equal_frequencies_go_round_by_number() -> None:
    gate = HashGate(3, 7, table="balanced", frequencies=[2.0] * 7)
    assert gate.expert_of.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_tokens_follow_the_table_with_weight_one() -> None:
    gate = HashGate(3, 8, table="modulo", capacity_factor=1.0)
    ids = torch.tensor([[7, 1, 4], [2, 1, 0]])
    output = gate(torch.randn(2, 3, 5), ids)
    assert output.expert_ids.flatten().tolist() == [1, 1, 1, 2, 1, 0]
    assert output.position.flatten().tolist() == [0, 1, 2, 0, 3, 0]
    assert output.dropped.flatten().tolist() == [False, False, True, False, True, False]
    assert output.weights.flatten().tolist() == [1, 1, 0, 1, 0, 1]
    assert output.tokens_per_expert.tolist() == [1, 4, 1] and output.kept_per_expert.tolist() == [1, 2, 1]
    assert output.scores is None and not output.losses and not list(gate.parameters())
    assert output.weights.dtype == torch.float32
    assert gate(torch.randn(2, 3, 5).double(), ids).weights.dtype == torch.float64
    assert torch.equal(gate.route(ids.T.contiguous().T).expert_ids, output.expert_ids)


def test_no_token_is_fine() -> None:
    output = HashGate(3, 8)(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert output.expert_ids.shape == (0, 1) and output.tokens_per_expert.tolist() == [0, 0, 0]


def test_the_table_is_saved() -> None:
    gate, other = HashGate(3, 80, seed=1), HashGate(3, 80, seed=2)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.expert_of, gate.expert_of)


def test_a_gate_made_without_memory_gets_its_table_later() -> None:
    with torch.device("meta"):
        gate = HashGate(3, 80, seed=1)
    gate.to_empty(device="cpu")
    gate.reset_parameters()
    assert torch.equal(gate.expert_of, HashGate(3, 80, seed=1).expert_of)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "token_ids=None: a hash gate routes by tokens' numbers"),
        (torch.tensor([1, 8]), "token_ids has 8: expected 0 to 7; vocab_size sets it."),
        (torch.tensor([-1, 8]), "token_ids has -1: expected 0 to 7; vocab_size sets it."),
        (torch.tensor([1]), r"token_ids has shape \[1\]: expected \[2\]."),
    ],
)
def test_wrong_numbers_are_refused(ids: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashGate(3, 8)(torch.randn(2, 5), ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0: expected an integer of at least 1."),
        ({"table": "md5"}, "table='md5': expected one of 'random', 'modulo', 'balanced'."),
        ({"table": "balanced"}, "table='balanced' without frequencies:"),
        ({"frequencies": [1.0] * 8}, "table='random' with frequencies:"),
        ({"table": "balanced", "frequencies": [1.0]}, "frequencies: expected vocab_size=8 numbers, got 1."),
        ({"table": "balanced", "frequencies": [1.0] * 7 + [-2.0]}, "frequencies: expected numbers of at least 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashGate(3, **{"vocab_size": 8, **options})
