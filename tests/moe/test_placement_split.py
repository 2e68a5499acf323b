"""The optimal split reaches the bound of duality, and whole tokens follow it without one being lost."""

from __future__ import annotations

import random

import numpy as np
import pytest
from test_placement import random_placement

from lightning_hetu.moe.placement import (
    Placement,
    apportion,
    balance_ratio,
    even_split,
    optimal_split,
    quotas,
)


def densest(loads: list[float], placement: Placement) -> float:
    """The largest density over all sets of ranks, relative to the mean: no split can be better balanced."""
    ranks = placement.num_ranks
    best = 0.0
    for members in range(1, 2**ranks):
        inside = [
            load
            for load, holders in zip(loads, placement.all_holders, strict=True)
            if all(members >> rank & 1 for rank in holders)
        ]
        best = max(best, sum(inside) / members.bit_count())
    return best * ranks / sum(loads)


def cases(number: int) -> list[tuple[Placement, list[float]]]:
    draw = random.Random(0)
    found = []
    for _ in range(number):
        ranks, experts = draw.randint(1, 6), draw.randint(1, 12)
        placement = random_placement(draw, experts, ranks, -(-experts // ranks) + draw.randint(0, 3))
        loads = [draw.choice([draw.expovariate(1) ** 3 * 100, float(draw.randint(0, 3))]) for _ in range(experts)]
        loads[0] += 1.0
        found.append((placement, loads))
    return found


def test_optimal_split_reaches_the_largest_density() -> None:
    for placement, loads in cases(300):
        found = optimal_split(loads, placement)
        assert found.ratio == pytest.approx(densest(loads, placement), rel=1e-9)
        assert balance_ratio(np.array(loads) @ found.fractions) == pytest.approx(found.ratio, rel=1e-9)
        assert ((found.fractions > 0) <= placement.matrix).all() and (found.fractions >= 0).all()
        assert found.fractions.sum(axis=1) == pytest.approx(np.ones(len(loads)), abs=1e-12)


def test_even_split_gives_every_holder_as_much() -> None:
    placement = Placement(((0, 1), (0, 2)))
    found = even_split([4, 2, 0], placement)
    assert found.fractions.tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    assert found.ratio == pytest.approx(4 / 3)
    assert optimal_split([4, 2, 0], placement).ratio == 1.0


def test_chains_of_replicas_carry_load_far() -> None:
    """Tokens of a full rank only get to an empty one by pushing those of the ranks in between."""
    ranks = 12
    rows = [[rank, ranks + rank] + ([ranks + rank - 1] if rank else []) for rank in range(ranks)]
    rows[-1].remove(2 * ranks - 1)
    placement = Placement.from_lists([row + [-1] * (3 - len(row)) for row in rows])
    loads = [0.0] * ranks + [1.0] * (ranks - 1)
    loads[0] = 1.0
    found = optimal_split(loads, placement)
    assert found.ratio == pytest.approx(1.0, abs=1e-9)


def test_no_tokens_are_split_evenly_and_balanced() -> None:
    placement = Placement(((0, 1), (0, -1), (-1, -1)))
    for found in (optimal_split([0, 0], placement), even_split([0, 0], placement)):
        assert found.ratio == 1.0
        assert found.fractions.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]


def test_loads_by_rank_are_summed_up() -> None:
    placement = Placement.contiguous(4, 2, 3)
    counts = np.arange(8).reshape(2, 4)
    assert optimal_split(counts, placement).ratio == optimal_split(counts.sum(axis=0), placement).ratio


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ([1, 2, -1, 0], "loads has -1"),
        ([1, 2, float("nan"), 0], "loads has nan"),
        ([1, 2, float("inf"), 0], "loads has inf"),
        ([1, 2, 3], r"loads\[3\]: expected \[4\]"),
        ([[1, 2, 3, 4]], r"loads\[1, 4\]"),
        (["a", 1, 2, 3], "expected numbers"),
    ],
)
def test_what_are_no_loads_is_refused(loads: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        optimal_split(loads, Placement.contiguous(4, 2, 3))
    assert "\n" not in str(caught.value)


def by_hand(counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The contract of apportioning, token by token: own tokens first, then ranks in order to ranks in order."""
    ranks, experts = counts.shape
    out = np.zeros((ranks, experts, ranks), dtype=int)
    for expert in range(experts):
        room = wanted[expert].tolist()
        left = counts[:, expert].tolist()
        for rank in range(ranks):
            out[rank, expert, rank] = min(left[rank], room[rank])
            left[rank] -= int(out[rank, expert, rank])
            room[rank] -= int(out[rank, expert, rank])
        for source in range(ranks):
            for _ in range(left[source]):
                target = next(rank for rank in range(ranks) if room[rank])
                out[source, expert, target] += 1
                room[target] -= 1
    return out


def test_every_token_goes_to_one_holder_its_own_rank_first() -> None:
    noise = np.random.default_rng(0)
    for placement, loads in cases(150):
        counts = noise.integers(0, 9, (placement.num_ranks, placement.num_experts))
        counts[noise.integers(placement.num_ranks)] = 0  # a rank without tokens
        fractions = optimal_split(loads, placement).fractions  # of other loads than these
        wanted = quotas(counts, fractions, placement)
        assert (wanted.sum(axis=1) == counts.sum(axis=0)).all() and ((wanted > 0) <= placement.matrix).all()
        assert (np.abs(wanted - counts.sum(axis=0)[:, None] * fractions) < 1 + 1e-9).all()
        found = apportion(counts, fractions, placement)
        assert found.dtype == np.int64 and (found == by_hand(counts, wanted)).all()


def test_remainders_go_to_the_largest_and_then_to_the_lowest_rank() -> None:
    placement = Placement(((0,), (0,), (0,)))
    assert quotas([[7], [0], [0]], [[1 / 3, 1 / 3, 1 / 3]], placement).tolist() == [[3, 2, 2]]
    assert quotas([[0], [0], [8]], [[1 / 3, 1 / 3, 1 / 3]], placement).tolist() == [[3, 3, 2]]
    assert quotas([[0], [5], [0]], [[0.25, 0.35, 0.4]], placement).tolist() == [[1, 2, 2]]
    assert quotas([[0], [0], [0]], [[1 / 3, 1 / 3, 1 / 3]], placement).tolist() == [[0, 0, 0]]


def test_quotas_of_very_many_tokens_are_complete() -> None:
    placement = Placement(((0,),) * 7)
    for tokens in (2**31 + 1, 10**12 + 3):
        counts = np.zeros((7, 1), dtype=np.int64)
        counts[3] = tokens
        assert quotas(counts, np.full((1, 7), 1 / 7), placement).sum() == tokens


@pytest.mark.parametrize(
    ("counts", "fractions", "message"),
    [
        ([[1, 2]], [[1, 0], [0, 1]], r"counts\[1, 2\]: expected \[2, 2\]"),
        ([[1, 2], [3, -4]], [[1, 0], [0, 1]], "counts has -4"),
        ([[1, 2], [3, 0.5]], [[1, 0], [0, 1]], "whole numbers"),
        ([[1, 2], [3, float("nan")]], [[1, 0], [0, 1]], "whole numbers"),
        ([[1, 2], [3, 4]], [[1, 0]], r"fractions\[1, 2\]"),
        ([[1, 2], [3, 4]], [[0, 1], [0, 1]], "0 elsewhere"),
        ([[1, 2], [3, 4]], [[1, 0], [0, 0.5]], r"fractions\[1\] sums up to 0.5"),
        ([[1, 2], [3, 4]], [[1, 0], [0, float("nan")]], "at least 0"),
    ],
)
def test_what_cannot_be_apportioned_is_refused(counts: list, fractions: list, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        apportion(counts, fractions, Placement.contiguous(2, 2))
    assert "\n" not in str(caught.value)
