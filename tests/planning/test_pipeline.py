"""The closed form of a pipelined step against the simulated step, its bounds, and the best combination of choices."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from lightning_hetu.planning.partition import all_cuts
from lightning_hetu.planning.pipeline import PipelineForm, StageTimes, Weights, stage_supports
from lightning_hetu.planning.simulate import simulate_pipeline
from lightning_hetu.planning.stage_tables import StageChoice


def random_stages(rng: random.Random, count: int) -> list[StageTimes]:
    """Forward and backward of any ratio; once-per-step work in some, and optimizers in half of the cases."""
    once = rng.choice((0.0, 0.3, 2.0))
    step = rng.choice((0.0, 0.2))
    return [
        StageTimes(
            rng.uniform(0.1, 1),
            rng.uniform(0.1, 2),
            rng.choice((0.0, once)) * rng.random(),
            rng.choice((0.0, once)) * rng.random(),
            step * rng.random(),
        )
        for _ in range(count)
    ]


def random_form(rng: random.Random) -> tuple[PipelineForm, list[StageTimes]]:
    stages = rng.randint(1, 6)
    form = PipelineForm(rng.randint(stages, 4 * stages), rng.choice(("1f1b", "1f1b", "gpipe")))
    return form, random_stages(rng, stages)


def weighted(stage: StageTimes, weights: Weights) -> float:
    return sum(weight * seconds for weight, seconds in zip(weights, stage, strict=True))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_equal_stages_take_the_textbook_time(schedule: str) -> None:
    form = PipelineForm(8, schedule)
    assert form.step_time([StageTimes(1.0, 2.0)] * 4) == pytest.approx((8 + 4 - 1) * 3.0)
    assert form.step_time([StageTimes(1.0, 2.0, 0.25, 0.5, 0.125)]) == 8 * 3.0 + 0.875


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_closed_form_is_the_simulated_time(schedule: str) -> None:
    """For any ratio of forward to backward in each stage, and any work once per step that others wait for."""
    rng = random.Random(f"simulated {schedule}")
    for _ in range(300):
        size = rng.randint(1, 9)
        microbatches = rng.randint(size if schedule == "1f1b" else 1, 3 * size)
        stages = [stage._replace(optimizer=0.0) for stage in random_stages(rng, size)]
        f, b, gather, reduce, _ = map(list, zip(*stages, strict=True))
        found = simulate_pipeline(
            f, b, num_microbatches=microbatches, schedule=schedule, gather_seconds=gather, reduce_seconds=reduce
        )
        assert PipelineForm(microbatches, schedule).step_time(stages) == pytest.approx(found.iteration_time, rel=1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_longest_optimizer_comes_on_top(schedule: str) -> None:
    """It is the whole truth in the first stage, which is done last, and elsewhere too much by less than itself."""
    rng = random.Random(f"optimizer {schedule}")
    for _ in range(100):
        size = rng.randint(1, 6)
        stages = random_stages(rng, size)
        f, b, gather, reduce, optimizer = map(list, zip(*stages, strict=True))
        arguments = {"num_microbatches": 2 * size, "schedule": schedule}
        arguments |= {"gather_seconds": gather, "reduce_seconds": reduce}
        predicted = PipelineForm(2 * size, schedule).step_time(stages)
        found = simulate_pipeline(f, b, sync_seconds=optimizer, **arguments).iteration_time
        assert -1e-9 <= predicted - found <= max(optimizer) + 1e-9
        largest = [max(optimizer)] * size
        found = simulate_pipeline(f, b, sync_seconds=largest, **arguments).iteration_time
        assert found == pytest.approx(predicted, rel=1e-9)


def test_the_textbook_time_is_too_long_where_an_early_stage_is_slow() -> None:
    stages = [StageTimes(2.0, 4.0), *[StageTimes(1.0, 2.0)] * 3]
    assert PipelineForm(8).step_time(stages) < 7 * 6.0 + 15.0 - 1


def test_many_combinations_at_once_take_what_each_takes() -> None:
    rng = random.Random(5)
    for schedule in ("1f1b", "gpipe"):
        form = PipelineForm(7, schedule)
        many = [random_stages(rng, 4) for _ in range(20)]
        assert form.step_times(np.array(many)).tolist() == pytest.approx([form.step_time(stages) for stages in many])


def test_no_stage_gets_faster_by_being_slower() -> None:
    rng = random.Random(1)
    for _ in range(500):
        form, stages = random_form(rng)
        before = form.step_time(stages)
        stage, field = rng.randrange(len(stages)), rng.choice(StageTimes._fields)
        stages[stage] = stages[stage]._replace(**{field: getattr(stages[stage], field) + rng.uniform(0, 1)})
        assert form.step_time(stages) >= before - 1e-12


def test_bounds_are_below_the_step() -> None:
    """Those from all times, from the times of one stage, from seconds in each direction, and wherever the cuts are."""
    rng = random.Random(2)
    reached = 0
    for _ in range(400):
        form, stages = random_form(rng)
        time, count = form.step_time(stages), len(stages)
        most = time * (1 + 1e-12)

        def least(stage: int, weights: Weights) -> float:
            return weighted(stages[stage], weights)  # noqa: B023

        asked = form.demands(least, count)
        bound = max(demand.bound for demand in asked)
        assert bound <= most
        optimizer = max(stage.optimizer for stage in stages)
        reached += bound + optimizer >= time * (1 - 1e-9)
        even = zip(stages, form.even_weights(count), strict=True)
        assert sum(weighted(stage, weights) for stage, weights in even) <= most
        directions = [s.forward for s in stages], [s.backward for s in stages]
        assert form.time_bound([s.seconds for s in stages], *directions) <= most
        for stage in range(count):
            supports = stage_supports(asked, least, stage)
            values = [s.constant + weighted(stages[stage], s.weights) for s in supports]
            assert max(values) == pytest.approx(bound)
            other = random_stages(rng, 1)[0]
            changed = [other if i == stage else s for i, s in enumerate(stages)]
            floor = max(s.constant + weighted(other, s.weights) for s in supports)
            assert floor <= form.step_time(changed) * (1 + 1e-12)
    assert reached > 200


def test_bounds_are_reached_by_equal_stages() -> None:
    for stages, rounds, schedule in ((1, 3, "1f1b"), (4, 5, "1f1b"), (4, 12, "1f1b"), (8, 9, "1f1b"), (4, 6, "gpipe")):
        form, same = PipelineForm(rounds, schedule), [StageTimes(1.0, 2.0)] * stages
        time = form.step_time(same)
        demands = form.demands(lambda stage, weights: weighted(same[0], weights), stages)  # noqa: B023
        assert max(demand.bound for demand in demands) == pytest.approx(time)
        assert sum(weighted(same[0], weights) for weights in form.even_weights(stages)) == pytest.approx(time)
        assert form.time_bound([3.0] * stages, [1.0] * stages, [2.0] * stages) == pytest.approx(time)


def test_what_a_choice_is_compared_by_decides() -> None:
    """A choice for a stage that is worse in none of it never makes a longer step."""
    rng = random.Random(6)
    compared = 0
    for _ in range(3000):
        form, stages = random_form(rng)
        stage = rng.randrange(len(stages))
        old, new = stages[stage], StageTimes(*(time * rng.uniform(0.7, 1.05) for time in stages[stage]))
        columns = form.comparison(stage, len(stages))
        if np.all(np.array(new) @ columns <= np.array(old) @ columns):
            compared += new.forward > old.forward or new.backward > old.backward
            changed = [new if i == stage else other for i, other in enumerate(stages)]
            assert form.step_time(changed) <= form.step_time(stages) * (1 + 1e-12)
    assert compared > 20


def test_weights_are_derivatives() -> None:
    rng = random.Random(3)
    for _ in range(200):
        form, stages = random_form(rng)
        step = 1e-7
        weights = form.stage_weights(stages)
        time = form.step_time(stages)
        for stage, weight in enumerate(weights):
            old = stages[stage]
            factor = 1 + step / old.seconds
            new = old._replace(forward=old.forward * factor, backward=old.backward * factor)
            changed = [new if i == stage else other for i, other in enumerate(stages)]
            assert (form.step_time(changed) - time) / step == pytest.approx(weight, rel=1e-3, abs=1e-6)


def test_infinite_stages_are_the_ones_to_relieve() -> None:
    stages = [StageTimes(1.0, 2.0), StageTimes(np.inf, np.inf), StageTimes(3.0, 4.0)]
    assert PipelineForm(4).stage_weights(stages) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("first", range(0, 120, 30))
def test_the_combination_is_the_best_of_all(first: int) -> None:
    longer_than_bound = 0
    for seed in range(first, first + 30):
        rng = random.Random(seed)
        form, stages = random_form(rng)
        fronts = []
        for _ in stages:
            points = random_stages(rng, rng.randint(1, 4))
            fronts.append([StageChoice(tuple(times), rng.random(), (i,)) for i, times in enumerate(points)])
        picks = list(itertools.product(*fronts))
        times = form.step_times(np.array([[choice.cost for choice in pick] for pick in picks]))
        found = form.combine(fronts)
        assert found is not None
        assert found[0] == pytest.approx(times.min())
        assert form.step_time([choice.cost for choice in found[1]]) == pytest.approx(found[0])
        assert form.combine(fronts, incumbent=found[0] * 0.99) is None
        again = form.combine(fronts, incumbent=found[0])
        assert again is not None and again[0] == found[0]
        chosen = form.demands(lambda i, weights: weighted(StageTimes(*found[1][i].cost), weights), len(stages))  # noqa: B023
        longer_than_bound += max(demand.bound for demand in chosen) < found[0] * 0.999
    assert longer_than_bound >= 3


@pytest.mark.parametrize("seed", range(30))
def test_the_fastest_cut_is_the_best_of_all(seed: int) -> None:
    """Exactly by what its stages ask for, and close to it by the time of a step."""
    rng = random.Random(seed)
    stages = rng.randint(1, 4)
    form = PipelineForm(rng.randint(stages, 4 * stages), rng.choice(("1f1b", "gpipe")))
    kinds = [StageTimes(1.0, rng.uniform(1.5, 2.5)), StageTimes(3.0, rng.uniform(4.5, 9))]
    blocks = [StageTimes(*(time * rng.uniform(0.9, 1.1) for time in rng.choice(kinds))) for _ in range(stages + 4)]
    first, last = (StageTimes(rng.uniform(0, 2), rng.uniform(0, 4)) for _ in range(2))

    def of(cut: tuple[int, ...]) -> list[StageTimes]:
        ends = [0, *itertools.accumulate(cut)]
        rows = [blocks[a:b] for a, b in itertools.pairwise(ends)]
        rows[0], rows[-1] = [first, *rows[0]], [*rows[-1], last]
        return [StageTimes(*map(sum, zip(*row, strict=True))) for row in rows]

    def asked(cut: tuple[int, ...]) -> float:
        found = of(cut)
        return max(demand.bound for demand in form.demands(lambda i, weights: weighted(found[i], weights), stages))

    cuts = list(all_cuts(len(blocks), stages))
    found = form.fastest_cut(blocks, first, last, stages)
    assert sum(found) == len(blocks) and min(found) >= 1
    assert asked(found) == pytest.approx(min(map(asked, cuts)))
    assert form.step_time(of(found)) <= min(form.step_time(of(cut)) for cut in cuts) * 1.05
