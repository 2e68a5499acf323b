"""The knapsack of OSDP equals trying every choice."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from lightning_hetu.planning.osdp.solver import Item, Solution, least_memory, solve_knapsack

Key = tuple[float, int, int]


def key_of(items: list[Item], options: tuple[int, ...]) -> Key:
    """Seconds, bytes and gather groups of a choice, in the order in which they count."""
    chosen = list(zip(items, options, strict=True))
    memory = sum(item.memory[i] for item, i in chosen) + max(item.transient[i] for item, i in chosen)
    return sum(item.seconds[i] for item, i in chosen), memory, sum(item.groups[i] for item, i in chosen)


def best_of_all(items: list[Item], capacity: int | None) -> Key | None:
    """The best choice by brute force, or ``None`` if nothing fits."""
    choices = itertools.product(*(range(len(item.seconds)) for item in items))
    keys = (key_of(items, options) for options in choices)
    return min((key for key in keys if capacity is None or key[1] <= capacity), default=None)


def random_instance(rng: random.Random) -> tuple[list[Item], int | None]:
    """Whole numbers, so that sums are exact; equal items, free options and options twice occur, and no room at all."""
    scale = rng.choice((3, 8, 40, 1000))
    items: list[Item] = []
    for _ in range(rng.randint(1, 6)):
        if items and rng.random() < 0.3:
            items.append(rng.choice(items))
            continue
        options = rng.randint(1, 5)
        columns = [[rng.randint(0, scale) for _ in range(options)] for _ in range(3)] + [
            [rng.randint(0, 3) for _ in range(options)]
        ]
        if rng.random() < 0.15:
            columns[0] = [0] * options
        if rng.random() < 0.2:
            columns[2] = [0] * options
        if options > 1 and rng.random() < 0.2:
            for column in columns:
                column[-1] = column[0]
        seconds, memory, transient, groups = columns
        items.append(Item(tuple(map(float, seconds)), tuple(memory), tuple(transient), tuple(groups)))
    least, _ = least_memory(items)
    most = sum(max(item.memory) for item in items) + scale
    return items, rng.choice((least - 1, least, rng.randint(least, most), rng.randint(least, most), None))


def check_against_brute_force(seed: int, count: int) -> None:
    rng = random.Random(seed)
    infeasible = 0
    for _ in range(count):
        items, capacity = random_instance(rng)
        expected = best_of_all(items, capacity)
        if expected is None:
            infeasible += 1
            with pytest.raises(ValueError, match="no choice fits"):
                solve_knapsack(items, capacity)
            continue
        solution = solve_knapsack(items, capacity)
        assert key_of(items, solution.options) == expected
        assert (solution.gap, solution.proof) == (0, "complete")
    assert count // 20 < infeasible < count // 2


def test_200_random_instances_equal_every_choice() -> None:
    """Time, bytes and groups are those of brute force, and what does not fit is refused."""
    check_against_brute_force(seed=3, count=200)


@pytest.mark.slow
def test_1000_random_instances_equal_every_choice() -> None:
    """As above, with more instances."""
    check_against_brute_force(seed=4, count=1000)


def test_least_memory_is_that_of_every_choice() -> None:
    """Bytes and the transient that counts in them."""
    rng = random.Random(5)
    for _ in range(100):
        items, _ = random_instance(rng)
        choices = itertools.product(*(range(len(item.seconds)) for item in items))
        assert least_memory(items)[0] == min(key_of(items, options)[1] for options in choices)


def best_seconds(items: list[Item], capacity: int) -> float:
    """Least seconds by the recurrence over whole bytes, for each bound on the transient."""
    best = float("inf")
    for bound in {value for item in items for value in item.transient}:
        room = capacity - bound
        if room < 0:
            continue
        table = np.zeros(room + 1)
        for item in items:
            after = np.full(room + 1, np.inf)
            for seconds, memory, transient in zip(item.seconds, item.memory, item.transient, strict=True):
                if transient <= bound and memory <= room:
                    after[memory:] = np.minimum(after[memory:], table[: room + 1 - memory] + seconds)
            table = after
        best = min(best, float(table[room]))
    return best


def test_larger_instances_equal_the_recurrence() -> None:
    """Some 40 items, many of them equal, with bytes and times of all kinds of relations."""
    rng = random.Random(10)
    for _ in range(25):
        kinds = []
        for _ in range(rng.randint(2, 12)):
            memory = tuple(rng.sample(range(60), rng.randint(2, 5)))
            slope, noise = rng.choice(((0, 100), (1, 3), (2, 0)))
            seconds = tuple(float(slope * (60 - m) + rng.randint(0, noise)) for m in memory)
            kinds.append(Item(seconds, memory, tuple(rng.choice((0, 20, 35)) for _ in memory), (1,) * len(memory)))
        items = rng.choices(kinds, k=40)
        capacity = least_memory(items)[0] + rng.randint(0, 400)
        solution = solve_knapsack(items, capacity)
        assert key_of(items, solution.options)[1] <= capacity
        assert seconds_of(items, solution) == best_seconds(items, capacity)


def random_items(rng: random.Random, count: int, options: int) -> list[Item]:
    """Items with steps of bytes that save time, and a transient."""
    items = []
    for _ in range(count):
        memory = list(itertools.accumulate(rng.randint(1, 10**9) for _ in range(options)))
        seconds = list(itertools.accumulate((rng.random() for _ in range(options)), initial=0.0))[:0:-1]
        transient = tuple(rng.randint(0, 10**8) for _ in range(options))
        items.append(Item(tuple(seconds), tuple(memory), transient, (1,) * options))
    return items


def seconds_of(items: list[Item], solution: Solution) -> float:
    return key_of(items, solution.options)[0]


def test_order_of_items_does_not_matter() -> None:
    """Each item has the same option in whatever order the items come, equal ones apart."""
    rng = random.Random(6)
    items = random_items(rng, 30, 3)
    capacity = least_memory(items)[0] + 5 * 10**9
    options = solve_knapsack(items, capacity).options
    order = list(range(len(items)))
    rng.shuffle(order)
    shuffled = solve_knapsack([items[i] for i in order], capacity).options
    assert [shuffled[order.index(i)] for i in range(len(items))] == list(options)


def test_equal_items_get_options_in_order() -> None:
    """Two of four equal items fit with the fast option: the first two, which have the lower number."""
    item = Item((1.0, 2.0), (10, 4), (0, 0), (1, 1))
    assert solve_knapsack([item] * 4, 28).options == (0, 0, 1, 1)


def test_ties_are_broken_by_memory_then_groups() -> None:
    """Of equally fast options the smaller one, then the one with fewer groups, then the first one."""
    assert solve_knapsack([Item((1.0, 1.0), (5, 4), (0, 0), (0, 1))], 9).options == (1,)
    assert solve_knapsack([Item((1.0, 1.0), (4, 4), (0, 0), (1, 0))], 9).options == (1,)
    assert solve_knapsack([Item((1.0, 1.0), (4, 4), (0, 0), (1, 1))], 9).options == (0,)
    # A smaller buffer is worth groups only where it counts.
    sliced = Item((1.0, 1.0), (4, 4), (2, 8), (4, 1))
    assert solve_knapsack([sliced], 99).options == (0,)
    assert solve_knapsack([sliced, Item((0.0,), (0,), (9,), (0,))], 99).options == (1, 0)


def test_more_capacity_is_never_slower() -> None:
    """Over a sweep of capacities, times descend and the shadow price is never negative."""
    items = random_items(random.Random(7), 20, 4)
    least = least_memory(items)[0]
    times = []
    for capacity in range(least, least + 20 * 10**9, 10**9):
        solution = solve_knapsack(items, capacity)
        assert solution.proof == "complete" and solution.shadow_price >= 0
        times.append(seconds_of(items, solution))
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def test_shadow_price_is_the_slope_of_the_hull() -> None:
    """Between the corners of one item it is the time saved per byte there, and 0 behind the last corner."""
    item = Item((9.0, 5.0, 4.0), (10, 12, 20), (0, 0, 0), (0, 0, 0))
    prices = [solve_knapsack([item], capacity).shadow_price for capacity in (10, 11, 12, 19, 20, 99)]
    assert prices == [2.0, 2.0, 0.125, 0.125, 0.0, 0.0]


def test_time_limit_leaves_a_choice_with_a_certified_gap() -> None:
    """With no time at all there is a choice that fits, and the best one is within the stated gap."""
    items = random_items(random.Random(8), 40, 4)
    capacity = least_memory(items)[0] + 10**10
    best = solve_knapsack(items, capacity)
    hasty = solve_knapsack(items, capacity, time_limit=0.0)
    assert best.proof == "complete" and hasty.proof == "time limit"
    assert key_of(items, hasty.options)[1] <= capacity
    assert 0 < hasty.gap < 0.2
    assert hasty.bound <= seconds_of(items, best) <= seconds_of(items, hasty)
    assert seconds_of(items, hasty) * (1 - hasty.gap) == pytest.approx(hasty.bound, rel=1e-9)


def test_tolerance_ends_the_search_within_it() -> None:
    """A tolerated gap is not exceeded, and says so."""
    items = random_items(random.Random(9), 40, 4)
    capacity = least_memory(items)[0] + 10**10
    loose = solve_knapsack(items, capacity, tolerance=0.01)
    assert loose.gap <= 0.01
    assert loose.bound <= seconds_of(items, solve_knapsack(items, capacity)) <= seconds_of(items, loose)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000, 5000])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_many_different_items_have_a_gap_of_a_thousandth_at_most(count: int, share: float) -> None:
    """Thousands of different items are solved, or bounded within 0.1 percent."""
    items = random_items(random.Random(count), count, 3)
    least = least_memory(items)[0]
    most = sum(max(item.memory) for item in items)
    solution = solve_knapsack(items, int(least + share * (most - least)))
    assert solution.gap <= 1e-3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (((), (), (), ()), "at least 1"),
        (((1.0,), (1, 2), (0,), (0,)), "the same number"),
        (((-1.0,), (1,), (0,), (0,)), "at least 0"),
        (((float("nan"),), (1,), (0,), (0,)), "at least 0"),
    ],
)
def test_malformed_items_are_refused(columns: tuple[tuple[float, ...], ...], message: str) -> None:
    """Columns of different lengths, and numbers that are negative or none."""
    with pytest.raises(ValueError, match=message):
        Item(*columns)  # type: ignore[arg-type]
