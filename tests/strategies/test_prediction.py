"""The memory that plans are searched under is the memory they take. (Times are compared in tests/benchmarks.)"""

from __future__ import annotations

from typing import Any

import pytest

from lightning_hetu.planning import HetuConstants, evaluate, search
from tests.benchmarks.plan_accuracy import SETUPS, measure, profiles

SETUP = SETUPS["cpu"]
PLANS = SETUP.plans


@pytest.fixture(scope="module")
def profiled(ranks: Any) -> Any:
    return ranks(4).run(profiles, SETUP, timeout=300)[0]


def check(ranks: Any, profiled: Any, plan: Any, accumulate: int = 1) -> None:
    profile, cluster = profiled
    constants = HetuConstants(accumulates=accumulate > 1)
    predicted = evaluate(plan, profile, cluster, constants=constants).stage_memory
    _, measured = ranks(4).run(measure, SETUP, plan, 3, accumulate, timeout=300)[0]
    for stage, (expected, actual) in enumerate(zip(predicted, measured, strict=True)):
        assert expected == pytest.approx(actual, rel=0.10), f"stage {stage}: predicted {expected}, measured {actual}"


@pytest.mark.parametrize("name", ["pp2 x dp2, mixed", "cut sequences"])
def test_peak_memory_is_predicted_to_10_percent(ranks: Any, profiled: Any, name: str) -> None:
    """Every stage's peak in a real training step is within 10 % of the prediction."""
    check(ranks, profiled, PLANS[name])


def test_gradients_of_earlier_batches_count(ranks: Any, profiled: Any) -> None:
    """Gradient accumulation keeps one more set of gradients, and the prediction has it."""
    check(ranks, profiled, PLANS["pp2 x dp2, mixed"], accumulate=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PLANS))
def test_peak_memory_of_all_plans(ranks: Any, profiled: Any, name: str) -> None:
    """The same for every plan of the benchmark."""
    check(ranks, profiled, PLANS[name])


def test_the_plan_of_the_recipe_fits_and_mixes(ranks: Any, profiled: Any) -> None:
    """Under the recipe's budget the plan has stages or tensor parallelism and layers of different kinds, and fits."""
    profile, cluster = profiled
    plan = search(profile, cluster, memory_budget="17MiB", global_batch_size=32)
    assert plan.pipeline_parallel_size > 1 or max(layer.tp for layer in plan.layers) > 1
    assert len(set(plan.layers)) >= 2
    check(ranks, profiled, plan)
