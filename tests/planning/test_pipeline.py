"""The closed form of a pipelined step against the simulated step, its bounds, and the best combination of choices."""

from __future__ import annotations

import itertools
import random

import pytest

from lightning_hetu.planning.dynamic_programming import StageChoice
from lightning_hetu.planning.partition import all_cuts
from lightning_hetu.planning.pipeline import PipelineForm, stage_supports
from lightning_hetu.planning.simulate import simulate_pipeline


def random_form(rng: random.Random) -> tuple[PipelineForm, list[float], list[float]]:
    stages = rng.randint(1, 6)
    form = PipelineForm(rng.randint(stages, 4 * stages), rng.choice(("1f1b", "1f1b", "gpipe")), rng.uniform(0.25, 0.4))
    return form, [rng.uniform(0.1, 1) for _ in range(stages)], [rng.uniform(0, 0.5) for _ in range(stages)]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_equal_stages_take_the_textbook_time(schedule: str) -> None:
    form = PipelineForm(8, schedule)
    assert form.step_time([3.0] * 4, [0.5] * 4) == pytest.approx((8 + 4 - 1) * 3.0 + 4 * 0.5)
    assert PipelineForm(8, schedule).step_time([3.0], [0.5]) == 8 * 3.0 + 0.5


@pytest.mark.parametrize("slow", range(4))
def test_one_slow_stage_equals_the_simulation(slow: int) -> None:
    """The textbook formula is up to 26 percent above it where an early stage is slow."""
    seconds = [3.0] * 4
    seconds[slow] = 6.0
    found = simulate_pipeline([c / 3 for c in seconds], [2 * c / 3 for c in seconds], num_microbatches=8)
    assert PipelineForm(8).step_time(seconds, [0.0] * 4) == pytest.approx(found.iteration_time, rel=1e-9)
    if slow == 0:
        assert found.iteration_time < 7 * max(seconds) + sum(seconds) - 1


def test_random_stages_are_close_to_the_simulation() -> None:
    rng = random.Random(0)
    errors = []
    for _ in range(300):
        stages = rng.randint(2, 8)
        seconds = [rng.uniform(0.7, 1.3) for _ in range(stages)]
        microbatches = rng.randint(stages, 4 * stages)
        found = simulate_pipeline([c / 3 for c in seconds], [2 * c / 3 for c in seconds], num_microbatches=microbatches)
        errors.append(PipelineForm(microbatches).step_time(seconds, [0.0] * stages) / found.iteration_time - 1)
    assert max(map(abs, errors)) <= 0.03


def test_no_stage_gets_faster_by_being_slower() -> None:
    rng = random.Random(1)
    for _ in range(500):
        form, seconds, sync = random_form(rng)
        before = form.step_time(seconds, sync)
        seconds[rng.randrange(len(seconds))] += rng.uniform(0, 1)
        assert form.step_time(seconds, sync) >= before - 1e-12


def test_bounds_are_below_the_step_and_the_largest_is_reached() -> None:
    rng = random.Random(2)
    for _ in range(300):
        form, seconds, sync = random_form(rng)
        time, stages = form.step_time(seconds, sync), len(seconds)

        def least(stage: int, weight: float) -> float:
            return weight * seconds[stage] + sync[stage]  # noqa: B023

        asked = form.demands(least, stages)
        assert max(demand.bound for demand in asked) == pytest.approx(time)
        assert form.even_weight(stages) * sum(seconds) + sum(sync) <= time * (1 + 1e-12)
        for stage in range(stages):
            supports = stage_supports(asked, least, stage)
            values = [s.constant + s.weights[0] * seconds[stage] + s.weights[1] * sync[stage] for s in supports]
            assert max(values) == pytest.approx(time)
            other = rng.uniform(0, 2)
            changed = [other if i == stage else c for i, c in enumerate(seconds)]
            floor = max(s.constant + s.weights[0] * other + s.weights[1] * sync[stage] for s in supports)
            assert floor <= form.step_time(changed, sync) * (1 + 1e-12)


def test_weights_are_derivatives() -> None:
    rng = random.Random(3)
    for _ in range(200):
        form, seconds, sync = random_form(rng)
        step = 1e-7
        weights = form.stage_weights(seconds)
        time = form.step_time(seconds, sync)
        for stage, weight in enumerate(weights):
            changed = [c + step * (i == stage) for i, c in enumerate(seconds)]
            assert (form.step_time(changed, sync) - time) / step == pytest.approx(weight, rel=1e-3)


def test_the_combination_is_the_best_of_all() -> None:
    rng = random.Random(4)
    for _ in range(100):
        form, seconds, _ = random_form(rng)
        fronts = []
        for _ in seconds:
            points = [(rng.uniform(0.5, 1.5), rng.uniform(0, 2), rng.random()) for _ in range(rng.randint(1, 4))]
            fronts.append([StageChoice((c, s), peak, (i,)) for i, (c, s, peak) in enumerate(points)])
        everything = [
            (form.step_time([p.cost[0] for p in picks], [p.cost[1] for p in picks]), max(p.peak for p in picks))
            for picks in itertools.product(*fronts)
        ]
        found = form.combine(fronts)
        assert found is not None
        assert found[0] == pytest.approx(min(everything)[0])
        assert form.step_time([p.cost[0] for p in found[1]], [p.cost[1] for p in found[1]]) == pytest.approx(found[0])
        assert form.combine(fronts, incumbent=found[0] * 0.99) is None


@pytest.mark.parametrize("seed", range(30))
def test_the_fastest_cut_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    stages = rng.randint(1, 4)
    form = PipelineForm(rng.randint(stages, 4 * stages), rng.choice(("1f1b", "gpipe")), rng.uniform(0.25, 0.4))
    blocks = [rng.choice((1.0, 3.0)) * rng.uniform(0.9, 1.1) for _ in range(rng.randint(stages, 8))]
    first, last = rng.uniform(0, 2), rng.uniform(0, 2)

    def time(cut: tuple[int, ...]) -> float:
        ends = [0, *itertools.accumulate(cut)]
        seconds = [sum(blocks[a:b]) for a, b in itertools.pairwise(ends)]
        seconds[0] += first
        seconds[-1] += last
        return form.step_time(seconds, [0.0] * stages)

    found = form.fastest_cut(blocks, first, last, stages)
    assert sum(found) == len(blocks) and min(found) >= 1
    assert time(found) == pytest.approx(min(map(time, all_cuts(len(blocks), stages))))
