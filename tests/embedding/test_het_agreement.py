"""The cache agrees with ``replay`` on whatever events: a search for a counterexample."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_hetu.embedding import CacheRules, replay
from tests.embedding._het_reference import Driver

pytest.importorskip("hypothesis", reason="needs hypothesis; test_het_cache.py has the same with random events")

from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = 6
_bounds = st.sampled_from([0, 1, 2, 5, math.inf])
_workers = st.sampled_from("ABC")
_rows = st.integers(0, ROWS - 1)
_events = st.lists(
    st.one_of(
        st.tuples(_workers, st.just("R"), _rows),
        st.tuples(_workers, st.just("W"), _rows, st.floats(-4, 4, width=32)),
        st.tuples(_workers, st.just("F")),
    ),
    max_size=60,
)
_options = st.fixed_dictionaries(
    {
        "staleness": _bounds,
        "pull_bound": st.none() | _bounds,
        "push_bound": st.none() | _bounds,
        "on_stale": st.sampled_from(["rebase", "flush"]),
    }
)
_policies = st.sampled_from([("lru", None), ("lfu", None), ("lfu", 3), ("lfuopt", None), ("lfuopt", 7)])


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(events=_events, options=_options, policy=_policies, capacity=st.integers(0, 4))
def test_the_cache_agrees_with_replay(
    events: list[tuple[Any, ...]], options: dict[str, Any], policy: tuple[Any, int | None], capacity: int
) -> None:
    expected = replay(events, capacity=capacity, policy=policy[0], aging=policy[1], **options)
    rules = CacheRules(policy=policy[0], aging=policy[1], **options)
    assert Driver(rules, capacity, ROWS).run(events) == expected
