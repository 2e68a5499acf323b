"""One stage or two: what the formulas say at the ends, and where they cross."""

from __future__ import annotations

import pytest

from lightning_hetu.planning.all_to_all import one_stage_seconds, two_stage_seconds, two_stages_are_faster
from lightning_hetu.planning.topology import Link

INSIDE, BETWEEN = Link(300e9, 1e-6), Link(25e9, 2e-5)


def test_times_are_those_of_their_messages() -> None:
    """Four nodes of eight: 24 messages over the network, or 7 inside and 3 over the network."""
    inside, between = Link(1e3, 1.0), Link(1e2, 100.0)
    assert one_stage_seconds(3200, 4, 8, inside, between) == 24 * 100 + 24 * 100 * 1e-2
    assert two_stage_seconds(3200, 4, 8, inside, between) == pytest.approx(7 + 2.8 + 3 * 100 + 2400 * 1e-2)


def test_small_messages_take_two_stages() -> None:
    """Where latency counts they win, where bandwidth counts they lose, and in between they cross once."""
    choices = [two_stages_are_faster(2.0**i, 8, 8, INSIDE, BETWEEN) for i in range(10, 40)]
    assert choices[0] and not choices[-1]
    assert sum(a != b for a, b in zip(choices, choices[1:], strict=False)) == 1


@pytest.mark.parametrize(("nodes", "local"), [(1, 8), (8, 1)])
def test_one_stage_where_there_is_one_kind_of_link(nodes: int, local: int) -> None:
    assert not two_stages_are_faster(1.0, nodes, local, INSIDE, BETWEEN)
