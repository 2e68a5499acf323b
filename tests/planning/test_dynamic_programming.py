"""The dynamic program equals trying every choice."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from lightning_hetu.planning import solve
from lightning_hetu.planning.dynamic_programming import fastest_choice, least_peak, solve_stage
from lightning_hetu.planning.label_bounds import TimeBounds
from lightning_hetu.planning.pareto import non_dominated
from lightning_hetu.planning.stage_tables import RowTable, Support


def every_choice(time: np.ndarray, memory: np.ndarray, reshard: np.ndarray, budget: float, peak: np.ndarray) -> float:
    """Least total time over all choices that fit."""
    layers, strategies = time.shape
    best = np.inf
    for choice in itertools.product(range(strategies), repeat=layers):
        used = sum(memory[i, s] for i, s in enumerate(choice)) + max(peak[i, s] for i, s in enumerate(choice))
        if used <= budget:
            total = sum(time[i, s] for i, s in enumerate(choice))
            total += sum(reshard[i, a, b] for i, (a, b) in enumerate(itertools.pairwise(choice)))
            best = min(best, total)
    return best


def random_instance(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, np.ndarray]:
    """Whole numbers, so that sums are exact; repeated layers, free relayouts and impossible entries occur."""
    layers, strategies = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    time = rng.integers(0, 50, (layers, strategies)).astype(float)
    memory = rng.integers(0, 30, (layers, strategies)).astype(float)
    reshard = rng.integers(0, 12, (max(layers - 1, 0), strategies, strategies)).astype(float)
    peak = rng.integers(0, 25, (layers, strategies)).astype(float)
    if rng.random() < 0.3:
        time[:], memory[:], peak[:] = time[0], memory[0], peak[0]
    if rng.random() < 0.3:
        reshard[:] = 0
    if rng.random() < 0.3:
        peak[:] = 0
    if rng.random() < 0.2:
        time[int(rng.integers(layers)), 0] = np.inf
    low = memory.min(axis=1).sum()
    budget = float(rng.integers(int(low) - 3, int(memory.max(axis=1).sum()) + 30))
    return time, memory, reshard, budget, peak


def test_500_random_instances_equal_every_choice() -> None:
    """Total time is that of brute force, and the choice has that time and fits."""
    rng = np.random.default_rng(7)
    infeasible = 0
    for _ in range(500):
        time, memory, reshard, budget, peak = random_instance(rng)
        expected = every_choice(time, memory, reshard, budget, peak)
        total, choice = solve(time, memory, reshard, budget, backward_peak=peak)
        assert total == expected
        if choice is None:
            infeasible += 1
            continue
        one = every_choice(
            *(np.take_along_axis(table, np.array(choice)[:, None], axis=1) for table in (time, memory)),
            np.array([[[reshard[i, a, b]]] for i, (a, b) in enumerate(itertools.pairwise(choice))]).reshape(-1, 1, 1),
            budget,
            np.take_along_axis(peak, np.array(choice)[:, None], axis=1),
        )
        assert one == total
    assert 50 < infeasible < 250


def random_rows(rng: random.Random, layers: int, strategies: int) -> list[RowTable]:
    """Rows whose phases differ: after backward, a row may keep less or more than after forward."""
    rows = []
    for _ in range(layers):
        held = np.array([float(rng.randint(0, 30)) for _ in range(strategies)])
        rows.append(
            RowTable(
                held=held,
                released=np.array([float(rng.randint(0, 30)) for _ in range(strategies)]),
                working=held + np.array([float(rng.randint(0, 20)) for _ in range(strategies)]),
                step=np.array([float(rng.randint(0, 40)) for _ in range(strategies)]),
                cost=np.array([[float(rng.randint(0, 20)), float(rng.randint(0, 20))] for _ in range(strategies)]),
            )
        )
    return rows


def phases(rows: list[RowTable], choice: tuple[int, ...]) -> float:
    """The fullest phase, as the module's documentation defines it."""
    held = [row.held[s] for row, s in zip(rows, choice, strict=True)]
    released = [row.released[s] for row, s in zip(rows, choice, strict=True)]
    peaks = [
        sum(held[:r]) + row.working[s] + sum(released[r + 1 :])
        for r, (row, s) in enumerate(zip(rows, choice, strict=True))
    ]
    return max(*peaks, sum(row.step[s] for row, s in zip(rows, choice, strict=True)))


@pytest.mark.parametrize("seed", range(60))
def test_phases_and_two_criteria_equal_every_choice(seed: int) -> None:
    """The front over two criteria, and the least peak, are those of brute force under the model of phases."""
    rng = random.Random(seed)
    layers, strategies = rng.randint(1, 4), rng.randint(1, 4)
    rows = random_rows(rng, layers, strategies)
    relayouts = [
        np.array([[float(rng.randint(0, 9)) for _ in range(strategies)] for _ in range(strategies)])
        for _ in range(layers - 1)
    ]
    choices = list(itertools.product(range(strategies), repeat=layers))
    peaks = {choice: phases(rows, choice) for choice in choices}
    assert least_peak(rows, relayouts) == min(peaks.values())

    budget = sorted(peaks.values())[rng.randrange(len(peaks))]

    def cost(choice: tuple[int, ...]) -> tuple[float, float]:
        total = np.sum([row.cost[s] for row, s in zip(rows, choice, strict=True)], axis=0)
        moves = sum(m[a, b] for m, (a, b) in zip(relayouts, itertools.pairwise(choice), strict=True))
        return float(total[0] + moves), float(total[1])

    feasible = {cost(choice) for choice in choices if peaks[choice] <= budget}
    front = {a for a in feasible if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in feasible)}
    supports = [Support((2.0, 1.0)), Support((1.0, 0.0), 3.0)]
    found = solve_stage(rows, relayouts, budget, supports)
    assert front <= {choice.cost for choice in found} <= feasible
    for choice in found:
        assert cost(choice.options) == choice.cost and peaks[choice.options] == choice.peak <= budget

    def time(point: tuple[float, float]) -> float:
        return max(2 * point[0] + point[1], point[0] + 3)

    # Pruning against a known plan keeps every plan that is at least as fast.
    known = sorted(map(time, feasible))[rng.randrange(len(feasible))]
    pruned = solve_stage(rows, relayouts, budget, supports, incumbent=known)
    assert min(time(choice.cost) for choice in pruned) == min(map(time, feasible))


def test_a_limit_on_labels_still_gives_a_plan_that_fits() -> None:
    """Above the limit the optimum may be missed, but not the budget; the result stays near."""
    rng = random.Random(1)
    rows = random_rows(rng, 12, 4)
    relayouts = [np.zeros((4, 4)) for _ in range(11)]
    rows = [RowTable(r.held, r.released, r.working, r.step, r.cost[:, :1]) for r in rows]
    budget = least_peak(rows, relayouts) * 1.3
    exact = solve_stage(rows, relayouts, budget, [Support((1.0,))])[0]
    rough = solve_stage(rows, relayouts, budget, [Support((1.0,))], limit=8)[0]
    assert phases(rows, rough.options) == rough.peak <= budget
    assert exact.cost[0] <= rough.cost[0] <= exact.cost[0] * 1.5


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_non_dominated_points_are_those_of_the_definition(columns: int) -> None:
    """No kept point is beaten, every dropped one is, and of equal points one is kept."""
    rng = np.random.default_rng(columns)
    for _ in range(20):
        points = rng.integers(0, 6, (int(rng.integers(1, 400)), columns)).astype(float)
        kept = points[non_dominated(points)]
        assert len(np.unique(kept, axis=0)) == len(kept)
        expected = {tuple(p) for p in points if not np.any(np.all(points <= p, axis=1) & np.any(points < p, axis=1))}
        assert {tuple(p) for p in kept} == expected


def test_infinite_points_are_beaten_by_finite_ones() -> None:
    """A column that is infinite for some points does not stop the others from being compared."""
    points = np.array([[2.0, 2.0, np.inf], [1.0, 1.0, 1.0], [0.0, 2.0, np.inf], [0.0, 3.0, np.inf], [2.0, 0.0, 2.0]])
    assert non_dominated(points).tolist() == [1, 2, 4]


@pytest.mark.parametrize("seed", range(30))
def test_the_fastest_choice_and_its_bounds_equal_every_choice(seed: int) -> None:
    """The least weighted sum is that of brute force, and no bound on it is above; without limits both are equal."""
    rng = random.Random(seed)
    layers, strategies = rng.randint(1, 4), rng.randint(2, 4)
    rows = random_rows(rng, layers, strategies)
    if rng.random() < 0.5:
        rows = [rows[0]] * layers
    relayouts = [np.array([[float(rng.randint(0, 9)) for _ in range(strategies)] for _ in range(strategies)])]
    relayouts *= layers - 1
    choices = list(itertools.product(range(strategies), repeat=layers))
    peaks = {choice: phases(rows, choice) for choice in choices}
    budget = sorted(peaks.values())[rng.randrange(len(peaks))]
    weights = (2.0, 1.0)

    def seconds(choice: tuple[int, ...], *, relayout: bool) -> float:
        own = sum(float(row.cost[s] @ weights) for row, s in zip(rows, choice, strict=True))
        moves = sum(float(m[a, b]) for m, (a, b) in zip(relayouts, itertools.pairwise(choice), strict=True))
        return own + (moves if relayout else 0.0)

    fits = [choice for choice in choices if peaks[choice] <= budget]
    weighted = {
        id(row): RowTable(row.held, row.released, row.working, row.step, (row.cost @ weights)[:, None]) for row in rows
    }
    found, proven = fastest_choice([weighted[id(row)] for row in rows], relayouts, budget)
    assert proven and found is not None
    assert found.cost[0] == min(seconds(choice, relayout=True) for choice in fits)
    bounds = TimeBounds(rows)
    assert bounds.least(budget, weights) <= min(seconds(choice, relayout=False) for choice in fits) * (1 + 1e-12)
    assert bounds.least(1e9, weights) == min(seconds(choice, relayout=False) for choice in choices)


def test_one_relayout_matrix_serves_all_pairs() -> None:
    """``[S, S]`` means the same as its ``L - 1`` copies."""
    rng = np.random.default_rng(3)
    time, memory = rng.random((5, 3)), rng.random((5, 3))
    reshard = rng.random((3, 3))
    assert solve(time, memory, reshard, 2.0) == solve(time, memory, np.stack([reshard] * 4), 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": np.zeros((2, 3))}, "expected equal shapes"),
        ({"time": np.zeros(2), "memory": np.zeros(2)}, "expected equal shapes"),
        ({"reshard": np.zeros((3, 3))}, r"expected \[2, 2\]"),
        ({"reshard": -np.ones((2, 2))}, "no negative entries"),
        ({"backward_peak": np.zeros((1, 2))}, r"expected the shape of time, \[2, 2\]"),
        ({"backward_peak": -np.ones((2, 2))}, "no negative entries"),
    ],
)
def test_wrong_arrays_are_errors(change: dict[str, np.ndarray], message: str) -> None:
    """Shapes that do not agree are named."""
    arguments = {"time": np.zeros((2, 2)), "memory": np.zeros((2, 2)), "reshard": np.zeros((2, 2)), **change}
    with pytest.raises(ValueError, match=message):
        solve(**arguments, budget=1.0)  # type: ignore[arg-type]


def test_nothing_fits() -> None:
    """Too small a budget, or a layer without any strategy, has no solution."""
    zeros = np.zeros((2, 2))
    assert solve(zeros, zeros + 1, zeros, 1.5) == (np.inf, None)
    assert solve(np.array([[0.0, 0.0], [np.inf, np.inf]]), zeros, zeros, 1.0) == (np.inf, None)
    assert solve(zeros, zeros, np.full((2, 2), np.inf), 1.0) == (np.inf, None)
