"""The protocol on lists of events: worked examples, computed by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from lightning_hetu.embedding import CacheRules, TraceStep, replay
from tests.embedding._het_reference import random_events


def reads(steps: list[TraceStep]) -> list[float | None]:
    return [step.value for step in steps if step.operation == "R"]


def actions(steps: list[TraceStep]) -> list[str]:
    return [" ".join(step.actions) for step in steps]


def clocks(steps: list[TraceStep]) -> list[tuple[int | None, int, int]]:
    return [(step.start_clock, step.updates, step.global_clock) for step in steps]


def read_all(rows: str, **options: Any) -> list[str]:
    """One worker reads rows 0 to 9, one for each digit."""
    return actions(replay([("A", "R", int(row)) for row in rows], staleness=0, **options))


def test_with_staleness_0_every_update_is_pushed_and_others_fetch_again() -> None:
    events = [("A", "R", 7), ("B", "R", 7), ("A", "W", 7, 1.0), ("A", "R", 7), ("B", "R", 7), ("B", "R", 7)]
    steps = replay(events, staleness=0, capacity=4, initial={7: 10.0})
    assert actions(steps) == ["miss", "miss", "push", "hit", "stale", "hit"]
    assert reads(steps) == [10, 10, 11, 11, 11]
    assert clocks(steps) == [(0, 0, 0), (0, 0, 0), (1, 0, 1), (1, 0, 1), (1, 0, 1), (1, 0, 1)]


def test_writes_stay_until_they_are_more_than_the_bound() -> None:
    events = [("A", "R", 1), *[("A", "W", 1, 1.0)] * 3, ("B", "R", 1), ("A", "W", 1, 1.0), ("B", "R", 1)]
    steps = replay(events, staleness=2, capacity=4)
    assert actions(steps) == ["miss", "local", "local", "push", "miss", "local", "hit"]
    assert clocks(steps) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (3, 0, 3), (3, 0, 3), (3, 1, 3), (3, 0, 3)]
    assert reads(steps) == [0, 3, 3]
    assert steps[5].client_clock == 4


def test_reads_see_a_copy_that_lacks_as_many_updates_as_the_bound() -> None:
    write = ("B", "W", 1, 1.0)  # B has no copy: pushed at once
    steps = replay([("A", "R", 1), write, ("A", "R", 1), write, ("A", "R", 1)], staleness=1, capacity=4)
    assert actions(steps) == ["miss", "push", "hit", "push", "stale"]
    assert reads(steps) == [0, 0, 2]


def test_own_updates_do_not_hide_those_of_others() -> None:
    """Two own and two others': comparing the global clock with the client clock would call the copy up to date."""
    events = [("A", "R", 1), *[("A", "W", 1, 1.0)] * 2, *[("B", "W", 1, 10.0)] * 3, ("A", "R", 1)]
    steps = replay(events, staleness=2, capacity=4)
    assert actions(steps)[-1] == "stale"
    assert steps[-1].global_clock - steps[0].client_clock > 2  # type: ignore[operator]
    assert steps[-1].value == 32


def test_rebase_keeps_own_updates_and_flush_pushes_them() -> None:
    events = [("A", "R", 1), ("A", "W", 1, 1.0), *[("B", "W", 1, 10.0)] * 2, ("A", "R", 1), ("C", "R", 1)]
    rebase = replay(events, staleness=1, capacity=4, on_stale="rebase")
    assert actions(rebase)[-2:] == ["stale", "miss"]
    assert clocks(rebase)[-2:] == [(2, 1, 2), (2, 0, 2)]
    assert reads(rebase) == [0, 21, 20]  # C does not see what A keeps
    flush = replay(events, staleness=1, capacity=4, on_stale="flush")
    assert actions(flush)[-2:] == ["stale push", "miss"]
    assert clocks(flush)[-2:] == [(3, 0, 3), (3, 0, 3)]
    assert reads(flush) == [0, 21, 21]


def test_the_two_bounds_may_differ() -> None:
    events = [("A", "R", 1), ("A", "W", 1, 1.0), ("B", "W", 1, 1.0), ("A", "R", 1)]
    assert actions(replay(events, staleness=9, capacity=4, push_bound=0)) == ["miss", "push", "push", "hit"]
    assert actions(replay(events, staleness=9, capacity=4, pull_bound=0)) == ["miss", "local", "push", "stale"]


def test_without_a_bound_only_evictions_and_flushes_push() -> None:
    events = [("A", "R", 1), *[("A", "W", 1, 1.0)] * 500, ("B", "R", 1), ("A", "F"), ("B", "R", 1), ("C", "R", 1)]
    steps = replay(events, staleness=math.inf, capacity=1)
    assert set(actions(steps)[1:501]) == {"local"}
    assert actions(steps)[501:] == ["miss", "push:1", "hit", "miss"]
    assert reads(steps) == [0, 0, 0, 500]


def test_an_evicted_update_goes_with_the_next_write() -> None:
    events = [("A", "R", 1), ("A", "W", 1, 1.0), ("A", "R", 2), ("B", "R", 1), ("A", "W", 2, 1.0), ("C", "R", 1)]
    steps = replay(events, staleness=5, capacity=1)
    assert actions(steps) == ["miss", "local", "miss evict:1", "miss", "write_back:1 local", "miss"]
    assert reads(steps) == [0, 0, 0, 1]


def test_an_evicted_update_goes_before_the_next_read() -> None:
    events = [("A", "R", 1), ("A", "W", 1, 1.0), ("A", "R", 2), ("A", "R", 1)]
    steps = replay(events, staleness=5, capacity=1)
    assert actions(steps)[-1] == "write_back:1 miss evict:2"
    assert steps[-1].value == 1 and clocks(steps)[-1] == (1, 0, 1)


def test_an_evicted_row_that_is_written_again_is_one_message() -> None:
    events = [("A", "R", 1), ("A", "W", 1, 1.0), ("A", "R", 2), ("A", "W", 1, 2.0)]
    step = replay(events, staleness=5, capacity=1)[-1]
    assert step.actions == ("write_back:1", "push") and (step.start_clock, step.global_clock) == (None, 2)


def test_a_clean_row_leaves_silently() -> None:
    steps = replay([("A", "R", 1), ("A", "R", 2), ("A", "W", 2, 1.0)], staleness=5, capacity=1)
    assert actions(steps) == ["miss", "miss evict:1", "local"]


def test_without_capacity_everything_is_fetched_and_pushed() -> None:
    steps = replay([("A", "R", 1), ("A", "W", 1, 1.0), ("A", "R", 1)], staleness=100, capacity=0)
    assert actions(steps) == ["miss overflow", "push", "miss overflow"]
    assert clocks(steps) == [(None, 0, 0), (None, 0, 1), (None, 0, 1)]


def test_lru_evicts_what_was_read_longest_ago() -> None:
    assert read_all("12132", capacity=2, policy="lru") == ["miss", "miss", "hit", "miss evict:2", "miss evict:1"]


def test_writing_is_no_access() -> None:
    events = [("A", "R", 1), ("A", "R", 2), ("A", "W", 1, 1.0), ("A", "R", 3)]
    assert actions(replay(events, staleness=0, capacity=2, policy="lru"))[-1] == "miss evict:1"


def test_lfu_evicts_the_lowest_count_and_of_equals_the_one_longest_there() -> None:
    # 1 has two reads, 2 and 3 have one each: 2 came to one read first.
    assert read_all("12134", capacity=3, policy="lfu") == ["miss", "miss", "hit", "miss", "miss evict:2"]
    # 1 and 2 have two each: 2 came to two reads first, though 1 was inserted before.
    assert read_all("12213", capacity=2, policy="lfu")[-1] == "miss evict:2"
    # A row that comes back starts anew.
    assert read_all("1122234142", capacity=2, policy="lfu")[5:] == [
        "miss evict:1",
        "miss evict:3",
        "miss evict:4",
        "miss evict:1",
        "hit",
    ]


def test_lfuopt_keeps_a_row_after_ten_hits_for_good() -> None:
    ten = "1" * 11  # inserted with none, then ten hits
    assert read_all(ten + "23", capacity=1, policy="lfuopt")[-2:] == ["miss overflow", "miss overflow"]
    assert read_all(ten[1:] + "2", capacity=1, policy="lfuopt")[-1] == "miss evict:1"
    # Of others, the lowest count leaves although it was read last.
    assert read_all(ten + "2234", capacity=3, policy="lfuopt")[-1] == "miss evict:3"


def test_aging_lets_permanent_rows_go() -> None:
    options: dict[str, Any] = {"capacity": 1, "policy": "lfuopt"}
    assert read_all("1" * 11 + "2", aging=12, **options)[-1] == "miss overflow"
    assert read_all("1" * 11 + "22", aging=12, **options)[-1] == "miss evict:1"
    # Halved, the two reads of row 1 are worth the one of row 2, which is newer.
    assert read_all("1123", capacity=2, policy="lfu", aging=2)[-1] == "miss evict:1"
    assert read_all("1123", capacity=2, policy="lfu")[-1] == "miss evict:2"


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfuopt"])
@pytest.mark.parametrize("capacity", [0, 1, 3])
def test_with_staleness_0_a_read_sees_all_updates_before_it(policy: Any, capacity: int) -> None:
    events = random_events(1, 400)
    totals: dict[int, float] = {}
    for event, step in zip(events, replay(events, staleness=0, capacity=capacity, policy=policy), strict=True):
        if event[1] == "R":
            assert step.value == pytest.approx(totals.get(event[2], 0.0), abs=1e-12)
        elif event[1] == "W":
            totals[event[2]] = totals.get(event[2], 0.0) + event[3]


@pytest.mark.parametrize("on_stale", ["rebase", "flush"])
def test_clocks_stay_within_their_bounds_and_count_every_update(on_stale: Any) -> None:
    events = [*random_events(2, 600, workers="ABC"), *[(worker, "F") for worker in "ABC"], ("D", "R", 0)]
    steps = replay(events, staleness=2, capacity=3, policy="lru", on_stale=on_stale)
    for step in steps:
        assert step.updates <= 2
        if step.operation == "R" and step.start_clock is not None:
            assert 0 <= step.global_clock - step.start_clock <= 2
    written = [event for event in events if event[1] == "W" and event[2] == 0]
    assert steps[-1].global_clock == len(written)
    assert steps[-1].value == pytest.approx(sum(event[3] for event in written))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"staleness": -1}, r"staleness=-1: expected a whole number"),
        ({"staleness": 0.5}, r"staleness=0.5"),
        ({"staleness": math.nan}, r"staleness=nan"),
        ({"push_bound": -2}, r"push_bound=-2"),
        ({"capacity": -1}, r"capacity=-1: expected at least 0 rows"),
        ({"policy": "fifo"}, r"policy='fifo': expected one of lru, lfu, lfuopt"),
        ({"on_stale": "drop"}, r"on_stale='drop': expected one of rebase, flush"),
        ({"aging": 0}, r"aging=0: expected at least 1 read"),
        ({"aging": 4, "policy": "lru"}, r"aging=4: policy='lru' has no counts"),
        ({"events": [("A", "R", 1), ("A", "W", 1)]}, r"events\[1\]=\('A', 'W', 1\): expected \(worker, 'R', row\)"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"events": [], "staleness": 1, "capacity": 1}
    with pytest.raises(ValueError, match=message):
        replay(**(arguments | options))


def test_one_staleness_sets_both_bounds() -> None:
    assert (CacheRules(3).pull_limit, CacheRules(3).push_limit) == (3, 3)
    assert (CacheRules(3, pull_bound=0).pull_limit, CacheRules(3, push_bound=math.inf).push_limit) == (0, math.inf)


def test_replay_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'lightning', 'numpy']))\n"  # None: cannot be imported
        "from lightning_hetu.embedding.trace import replay\n"
        "assert replay([('A', 'R', 1)], staleness=0, capacity=1)[0].actions == ('miss',)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
