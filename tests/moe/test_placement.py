"""Placements hold what they say, operations change what they say, and the way between two placements can be walked."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from lightning_hetu.moe.placement import Expand, Migrate, Operation, Placement, Shrink
from lightning_hetu.moe.placement.transition import num_missing, relabel, transition


def random_placement(draw: random.Random, experts: int, ranks: int, slots: int) -> Placement:
    """Every expert once, and then replicas in some of the slots that are left."""
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for expert in range(experts):
        draw.choice([row for row in rows if len(row) < slots]).append(expert)
    for _ in range(draw.randrange(ranks * slots)):
        expert, row = draw.randrange(experts), draw.choice(rows)
        if len(row) < slots and expert not in row:
            row.append(expert)
    for row in rows:
        row += [-1] * (slots - len(row))
        draw.shuffle(row)
    return Placement.from_lists(rows)


def test_contiguous_blocks_as_the_layer_has_them() -> None:
    assert Placement.contiguous(4, 2).slots == ((0, 1), (2, 3))
    assert Placement.contiguous(4, 2, 3).slots == ((0, 1, -1), (2, 3, -1))
    assert Placement.contiguous(5, 2).slots == ((0, 1, -1), (2, 3, 4))
    assert Placement.contiguous(1, 3).slots == ((-1,), (-1,), (0,))


def test_what_is_where() -> None:
    placement = Placement(((0, -1, 2), (1, 2, -1), (-1, 0, 3)))
    assert (placement.num_ranks, placement.num_slots, placement.num_experts) == (3, 3, 4)
    assert [placement.holders(expert) for expert in range(4)] == [(0, 2), (1,), (0, 1), (2,)]
    assert placement.slot_of(2, 0) == 1 and placement.holds(2, 0) and not placement.holds(1, 0)
    assert not placement.holds(0, -1)
    assert [placement.num_free(rank) for rank in range(3)] == [1, 1, 1]
    assert placement.matrix.tolist() == [[rank in placement.holders(e) for rank in range(3)] for e in range(4)]
    with pytest.raises(ValueError, match="expert=1 is not on rank=0"):
        placement.slot_of(0, 1)


def test_equal_placements_are_one_key_and_go_through_json() -> None:
    placement = Placement.contiguous(6, 3, 4)
    again = Placement.from_lists(json.loads(json.dumps(placement.to_lists())))
    assert again == placement and {placement: 1}[again] == 1
    with pytest.raises(AttributeError):
        placement.slots = ()  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        placement.matrix[0, 0] = False


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ((), "as many on every rank"),
        (((),), "as many on every rank"),
        (((0, 1), (2,)), "as many on every rank"),
        (((0, 0),), "at most once"),
        (((0, 2),), "each of 0 to 2"),
        (((-1, -1),), "each of 0"),
        (((0, -2),), "each of 0"),
        (((0.5, 1),), "whole numbers"),
    ],
)
def test_what_is_no_placement_is_refused(slots: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Placement(slots)
    assert "\n" not in str(caught.value)


def test_too_few_slots_are_refused() -> None:
    for arguments in ((4, 2, 1), (0, 2), (2, 0)):
        with pytest.raises(ValueError, match="expected at least|need at least"):
            Placement.contiguous(*arguments)


def test_operations_change_what_they_say() -> None:
    start = Placement(((0, 1, -1), (2, -1, -1)))
    expanded = start.apply(Expand(0, 0, 1))
    assert expanded.slots == ((0, 1, -1), (2, 0, -1)) and start.slots == ((0, 1, -1), (2, -1, -1))
    assert expanded.apply(Shrink(0, 0)).slots == ((-1, 1, -1), (2, 0, -1))
    assert start.apply(Migrate(1, 0, 1)).slots == ((0, -1, -1), (2, 1, -1))
    assert start.apply(Migrate(1, 0, 1, other=2)).slots == ((0, 2, -1), (1, -1, -1))
    assert start.apply(Expand(0, 0, 1), Shrink(0, 0)).slots == ((-1, 1, -1), (2, 0, -1))
    assert start.apply() == start


@pytest.mark.parametrize(
    "operation",
    [
        Expand(2, 0, 1),  # not at the source
        Expand(0, 0, 1),  # there already
        Expand(1, 0, 1),  # no room
        Expand(1, 0, 2),  # no such rank
        Expand(-1, 0, 1),
        Shrink(1, 0),  # the last one
        Shrink(2, 0),
        Shrink(0, 3),
        Migrate(1, 0, 1),  # no room
        Migrate(0, 0, 1),  # there already
        Migrate(1, 0, 1, other=0),  # both would be on one rank
        Migrate(1, 0, 1, other=1),
        Migrate(1, 0, 1, other=-1),
    ],
)
def test_operations_that_cannot_be_are_refused(operation: Operation) -> None:
    with pytest.raises(ValueError, match=str(operation).split(":")[0]) as caught:
        Placement(((0, 1, -1), (2, 0, 3))).apply(operation)
    assert "\n" not in str(caught.value)


def test_copies_are_what_is_sent() -> None:
    assert Expand(3, 0, 2).copies == ((3, 0, 2),)
    assert Shrink(3, 0).copies == ()
    assert Migrate(3, 0, 2).copies == ((3, 0, 2),)
    assert Migrate(3, 0, 2, other=5).copies == ((3, 0, 2), (5, 2, 0))


def test_every_placement_is_reached_from_every_other() -> None:
    """Each step is allowed when its turn comes (``apply`` says so), also where all slots are taken."""
    draw = random.Random(0)
    for _ in range(400):
        ranks, experts = draw.randint(1, 5), draw.randint(1, 9)
        slots = -(-experts // ranks) + draw.randint(0, 2)
        start, end = (random_placement(draw, experts, ranks, slots) for _ in range(2))
        target = [[expert for expert in row if expert >= 0] for row in end.slots]
        ways = transition(start, target, draw.choice([None, 2]))
        after = start.apply(*ways)
        assert after.all_holders == end.all_holders
        # Nothing is sent in vain, but for exchanges, which send back what lost its place.
        sent = sum(len(operation.copies) for operation in ways)
        swaps = sum(isinstance(operation, Migrate) and operation.other is not None for operation in ways)
        assert num_missing(start, target) <= sent <= num_missing(start, target) + swaps


def test_copies_come_from_the_same_node_where_they_can() -> None:
    start = Placement(((0, -1), (1, -1), (2, -1), (0, 3)))
    assert transition(start, [[0], [1], [2, 0], [0, 3]], ranks_per_node=2) == [Expand(0, 3, 2)]
    assert transition(start, [[0], [1], [2, 0], [0, 3]]) == [Expand(0, 0, 2)]


def test_renamed_ranks_keep_experts_where_they_are() -> None:
    draw = random.Random(1)
    start = random_placement(draw, 6, 3, 3)
    target = [[expert for expert in row if expert >= 0] for row in start.slots]
    for order in itertools.permutations(range(3)):
        assert num_missing(start, relabel(start, [target[rank] for rank in order])) == 0
