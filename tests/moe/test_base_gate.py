"""BASE gates share tokens out evenly, near the best way there is, and interpolate between tokens and experts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_hetu.moe.gates import BASEGate
from lightning_hetu.moe.gates._auction import _Auction, balanced_assignment


def total(scores: Tensor, owner: Tensor) -> float:
    return scores.double().gather(1, owner.unsqueeze(1)).sum().item()


def brute_force(scores: Tensor) -> float:
    """Largest sum over all assignments with loads that differ by at most one."""
    tokens, experts = scores.shape
    fair = {tokens // experts, -(-tokens // experts)}
    return max(
        sum(scores[t, e].item() for t, e in enumerate(choice))
        for choice in itertools.product(range(experts), repeat=tokens)
        if {choice.count(e) for e in range(experts)} <= fair
    )


def hungarian(cost: list[list[float]]) -> float:
    """Smallest cost of a perfect matching of an n x n matrix: shortest augmenting paths with potentials, O(n^3)."""
    n = len(cost)
    row_price, column_price = [0.0] * (n + 1), [0.0] * (n + 1)
    row_of = [0] * (n + 1)  # rows and columns count from 1; 0 is none
    for row in range(1, n + 1):
        row_of[0], column = row, 0
        slack, came_from, used = [math.inf] * (n + 1), [0] * (n + 1), [False] * (n + 1)
        while row_of[column]:
            used[column] = True
            here, step, following = row_of[column], math.inf, 0
            for j in range(1, n + 1):
                if used[j]:
                    continue
                reduced = cost[here - 1][j - 1] - row_price[here] - column_price[j]
                if reduced < slack[j]:
                    slack[j], came_from[j] = reduced, column
                if slack[j] < step:
                    step, following = slack[j], j
            for j in range(n + 1):
                if used[j]:
                    row_price[row_of[j]] += step
                    column_price[j] -= step
                else:
                    slack[j] -= step
            column = following
        while column:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    return sum(cost[row_of[j] - 1][j - 1] for j in range(1, n + 1))


def best_total(scores: Tensor) -> float:
    """Largest sum, by a matching of tokens and fillers with places, the first of each expert the fillers' only one."""
    tokens, experts = scores.shape
    places = -(-tokens // experts)
    high = scores.max().item()
    rows = [[high - value for value in row for _ in range(places)] for row in scores.double().tolist()]
    forbidden = 1e6 * (1 + high - scores.min().item())
    rows += [[0.0 if i % places == 0 else forbidden for i in range(len(rows[0]))]] * (places * experts - tokens)
    return tokens * high - hungarian(rows)


def bound(scores: Tensor) -> float:
    return len(scores) * (scores.max() - scores.min()).item() / 50 + 1e-5


def assert_even(owner: Tensor, experts: int) -> None:
    loads = torch.bincount(owner, minlength=experts)
    assert len(loads) == experts and loads.max() - loads.min() <= 1


@pytest.mark.parametrize(("tokens", "experts"), [(6, 3), (7, 3), (8, 3), (1, 3), (2, 3), (5, 2), (6, 4)])
def test_small_cases_are_near_the_best_of_all_assignments(tokens: int, experts: int) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(tokens, experts, generator=generator)
        if seed == 3:
            scores = scores.sign()
        owner = balanced_assignment(scores)
        assert_even(owner, experts)
        best = brute_force(scores)
        assert best - bound(scores) <= total(scores, owner) <= best + 1e-5
        assert best_total(scores) == pytest.approx(best, abs=1e-5)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda scores: scores,
    "one expert preferred": lambda scores: 0.1 * scores + torch.linspace(3, 0, scores.shape[1]),
    "five kinds of tokens": lambda scores: scores[torch.arange(len(scores)) % 5],
    "ties": lambda scores: scores.sign(),
    "tiny range": lambda scores: 1000 + 1e-3 * scores,
    "large range": lambda scores: 1e30 * scores.double(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "experts"), [(40, 4), (42, 8), (47, 8), (33, 16)])
def test_assignments_are_even_and_near_the_optimum(tokens: int, experts: int, kind: str) -> None:
    scores = KINDS[kind](torch.randn(tokens, experts))
    owner = balanced_assignment(scores)
    assert_even(owner, experts)
    assert torch.equal(owner, balanced_assignment(scores.clone()))
    best = best_total(scores)
    slack = 1e-6 * tokens * scores.abs().max().item()
    assert best - bound(scores) - slack <= total(scores, owner) <= best + slack


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_many_assignments_are_even_and_near_the_optimum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for kind in KINDS.values():
        for _ in range(12):
            tokens, experts = (
                int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 60), (2, 20))
            )
            scores = kind(torch.randn(tokens, experts, generator=generator))
            owner = balanced_assignment(scores)
            assert_even(owner, experts)
            assert (
                best_total(scores) - total(scores, owner) <= bound(scores) + 1e-6 * tokens * scores.abs().max().item()
            )


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(21, 4),
        torch.full((21, 4), torch.nan),
        torch.full((21, 4), torch.inf),
        torch.full((21, 4), -torch.inf),
        torch.randn(21, 4).index_fill(0, torch.tensor([2, 5]), torch.nan),
        torch.randn(21, 4).index_fill(1, torch.tensor([2]), torch.inf),
        torch.randn(21, 4).index_fill(1, torch.tensor([2]), -torch.inf),
        torch.full((21, 4), 3e38) * torch.tensor([1.0, -1.0, 1.0, -1.0]),
        torch.full((21, 4), 1e-44) * torch.tensor([1.0, 0.0, 2.0, 0.0]),
    ],
    ids=["ties", "nan", "inf", "-inf", "nan rows", "inf column", "-inf column", "largest range", "smallest range"],
)
def test_the_auction_ends_whatever_the_scores(scores: Tensor) -> None:
    assert_even(balanced_assignment(scores), 4)


@pytest.mark.parametrize(("tokens", "experts"), [(40, 4), (42, 8), (33, 16), (3, 16), (5, 16), (100, 24)])
def test_nobody_gains_more_than_eps_elsewhere_when_the_auction_ends(tokens: int, experts: int) -> None:
    """What the bound follows from, for tokens and for fillers, of which an expert has one at most."""
    for levels in (0, 3, 10):
        scores = torch.rand(tokens, experts)
        if levels:
            scores = (scores * levels).round() / levels
        auction = _Auction(scores)
        while (auction.owner == experts).any():
            auction.round()
        profit = scores - auction.price
        kept = profit.gather(1, auction.owner[:tokens].unsqueeze(1)).squeeze(1)
        assert (profit.amax(1) - kept).max() <= auction.eps + 1e-6
        owners = auction.owner[tokens:].tolist()
        assert len(set(owners)) == len(owners) == auction.fillers
        if owners:
            paid = auction.price.clone()
            paid[owners] = torch.maximum(paid[owners], auction.bid[tokens:])
            assert (auction.bid[tokens:] - paid.min()).max() <= auction.eps + 1e-6
        assert torch.bincount(auction.owner, minlength=experts).tolist() == [auction.places] * experts
        assert auction.eps * len(auction.owner) <= tokens / 50 * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_two_fillers_never_share_an_expert(seed: int) -> None:
    """Also where they would bid the same: 6 fillers for 8 experts, and scores of three values."""
    generator = torch.Generator().manual_seed(seed)
    assert_even(balanced_assignment((2 * torch.rand(10, 8, generator=generator)).round()), 8)


def test_infinite_scores_are_the_largest_and_smallest() -> None:
    scores = torch.zeros(2, 2)
    scores[0, 1], scores[1, 1], scores[1, 0] = torch.inf, 5.0, 4.0
    assert balanced_assignment(scores).tolist() == [1, 0]
    assert balanced_assignment(-scores).tolist() == [0, 1]


def test_no_token_and_one_expert_need_no_auction() -> None:
    assert balanced_assignment(torch.empty(0, 3)).shape == (0,)
    assert balanced_assignment(torch.randn(4, 1)).tolist() == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_is_balanced_and_evaluation_greedy(dtype: torch.dtype) -> None:
    gate = BASEGate(6, 4).to(dtype)
    x = torch.randn(3, 5, 6, dtype=dtype) + 1
    scores = (
        x.reshape(15, 6).to(torch.promote_types(dtype, torch.float32))
        @ gate.weight.detach().to(torch.promote_types(dtype, torch.float32)).T
    )
    trained, evaluated = gate(x), gate.eval()(x)
    assert sorted(trained.tokens_per_expert.tolist()) == [3, 4, 4, 4]
    assert torch.equal(trained.expert_ids.flatten(), balanced_assignment(scores))
    assert torch.equal(evaluated.expert_ids.flatten(), scores.argmax(1))
    for output in (trained, evaluated):
        strength = scores.gather(1, output.expert_ids).sigmoid()
        torch.testing.assert_close(output.weights, strength)
        assert output.residual is not None
        torch.testing.assert_close(output.residual, 1 - strength.flatten())
        assert not output.losses and output.position is None and not output.dropped.any()


def test_centroids_learn_from_weights_and_residual() -> None:
    gate = BASEGate(5, 3).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    coefficients = torch.randn(2, 6, dtype=torch.float64)
    output = gate(x)
    assert output.residual is not None
    ((output.weights.flatten() * coefficients[0]).sum() + (output.residual * coefficients[1]).sum()).backward()
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for t, expert in enumerate(output.expert_ids.flatten().tolist()):
        strength = (x[t] @ gate.weight[expert].detach()).sigmoid()
        expected[expert] += (coefficients[0, t] - coefficients[1, t]) * strength * (1 - strength) * x[t]
    torch.testing.assert_close(gate.weight.grad, expected)


def test_broken_tokens_take_no_place() -> None:
    gate = BASEGate(5, 3)
    x = torch.randn(8, 5)
    x[[1, 6], 2] = torch.tensor([torch.nan, torch.inf])
    output = gate(x)
    assert output.expert_ids[[1, 6]].tolist() == [[-1], [-1]] and output.tokens_per_expert.tolist() == [2, 2, 2]
    assert output.residual is not None and not output.residual[[1, 6]].any() and not output.weights[[1, 6]].any()
    (output.weights.sum() + output.residual.square().sum()).backward()
    assert gate.weight.grad is not None and gate.weight.grad.isfinite().all()


def test_no_token_gives_centroids_a_gradient_of_zeros() -> None:
    gate = BASEGate(5, 3)
    gate(torch.empty(0, 5)).weights.sum().backward()
    assert gate.weight.grad is not None and not gate.weight.grad.any()


def test_centroids_start_orthogonal() -> None:
    weight = BASEGate(16, 4).weight.detach()
    torch.testing.assert_close(weight @ weight.T, 0.01 * torch.eye(4), atol=1e-6, rtol=0)
