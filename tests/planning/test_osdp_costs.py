"""Costs of OSDP's modes are those of rings, model states and counted collectives, written out by hand."""

from __future__ import annotations

import math

import pytest

from lightning_hetu.planning.cluster import ClusterSpec
from lightning_hetu.planning.osdp.costs import MemoryConstants, OperatorCosts, Option
from lightning_hetu.planning.osdp.links import HostLink, Ring
from lightning_hetu.planning.osdp.operator import Operator
from lightning_hetu.planning.osdp.overlap import SliceSeconds, SliceStep, overlapped_seconds

N, S, ALPHA, BETA, HOST = 4, 1024, 1e-5, 1e-9, 1e-10
RING = Ring(BETA, ALPHA, HOST)
MODES = ("dp", "z2", "zdp-2", "zdp", "off")


def gather(ranks: int, size: int) -> float:
    return (ranks - 1) * (ALPHA + size * BETA / ranks)


def options(operator: Operator, **settings: object) -> dict[str, Option]:
    """The options of a whole operator by mode."""
    costs = OperatorCosts(N, RING, MODES, **settings)  # type: ignore[arg-type]
    return {option.parts[0][0]: option for option in costs.options(operator)}


@pytest.mark.parametrize(("c", "r"), [(4, 4), (2, 4), (2, 2)])
def test_seconds_without_accumulation(c: int, r: int) -> None:
    """An all-reduce against gathers and a reduce-scatter, each in its own dtype."""
    found = options(Operator("w", S), gather_bytes=c, reduce_bytes=r)
    reduce = gather(N, r * S)
    host = S // N * 4 * HOST
    assert found["dp"].seconds == pytest.approx(2 * reduce, rel=1e-12)
    assert found["z2"].seconds == pytest.approx(gather(N, c * S) + reduce, rel=1e-12)
    assert found["zdp-2"].seconds == pytest.approx(gather(N, c * S) + gather(2, c * S) + reduce, rel=1e-12)
    assert found["zdp"].seconds == pytest.approx(2 * gather(N, c * S) + reduce, rel=1e-12)
    assert found["off"].seconds == pytest.approx(found["zdp"].seconds + 3 * host, rel=1e-12)


@pytest.mark.parametrize(("accumulation", "gathers", "reductions"), [("last", 3, 1), ("every", 3, 3), ("hold", 1, 1)])
def test_seconds_with_accumulation(accumulation: str, gathers: int, reductions: int) -> None:
    """Three micro-steps: gathers in each one unless held, reductions in each one or in the last."""
    found = options(Operator("w", S), micro_steps=3, accumulation=accumulation)
    one = gather(N, 4 * S)
    assert found["dp"].seconds == pytest.approx(reductions * 2 * one, rel=1e-12)
    assert found["z2"].seconds == pytest.approx((gathers + reductions) * one, rel=1e-12)
    assert found["zdp"].seconds == pytest.approx((6 + reductions) * one, rel=1e-12)


def test_states_of_adam_in_fp32() -> None:
    """16 bytes per parameter, of which sharding leaves an N-th; gathered copies count beyond the gradients."""
    found = options(Operator("w", S))
    assert found["dp"][2:6] == (4 * S, 4 * S, 8 * S, 0)
    assert found["z2"][2:6] == (S, S, 2 * S, 3 * S)
    assert found["zdp-2"][2:6] == (S, S, 2 * S, S)
    assert found["zdp"][2:6] == (S, S, 2 * S, 0)
    assert found["off"][2:6] == (0, 0, 0, 0) and found["off"].host == 4 * S
    assert [found[mode].groups for mode in MODES] == [0, 1, 1, 1, 1]
    added = options(Operator("w", S), constants=MemoryConstants(gradients_replace_gathered=False))
    assert [added[mode].memory for mode in MODES] == [20 * S, 8 * S, 6 * S, 4 * S, 0]


def test_states_with_accumulation() -> None:
    """Unreduced gradients are whole and in the reduced dtype; gathered copies and gradients are there at once."""
    last = options(Operator("w", S), micro_steps=2, gather_bytes=2, reduce_bytes=4)
    assert last["z2"][2:6] == (S, 4 * S, 2 * S, 2 * S)
    assert last["zdp"][2:6] == (S, 4 * S, 2 * S, 0)
    assert last["off"][2:6] == (0, 4 * S, 0, 0)
    every = options(Operator("w", S), micro_steps=2, gather_bytes=2, reduce_bytes=4, accumulation="every")
    assert every["zdp"][2:6] == (S, S, 2 * S, 0)


def test_frozen_parameters_cost_gathers_only() -> None:
    """No gradients, no optimizer states, and nothing is reduced."""
    found = options(Operator("w", S, trained=False, dtype_bytes=2))
    one = gather(N, 2 * S)
    assert [found[mode].seconds for mode in ("dp", "z2", "zdp")] == pytest.approx([0, one, 2 * one], rel=1e-12)
    assert found["dp"][2:6] == (2 * S, 0, 0, 2 * S)
    assert found["zdp"][2:6] == (S // 2, 0, 0, 0)
    assert found["zdp"].transient == 3 * 2 * S and found["dp"].transient == 0


def test_buffers() -> None:
    """Three copies in forward or two gathered and two reduced ones in backward; replicas have a flat buffer."""
    found = options(Operator("w", S), gather_bytes=2, reduce_bytes=4)
    assert [found[mode].transient for mode in MODES] == [8 * S, 12 * S, 12 * S, 12 * S, 12 * S]
    narrow = options(Operator("w", S), gather_bytes=4, reduce_bytes=1)
    assert narrow["zdp"].transient == 12 * S  # forward has more
    kept = options(Operator("w", S), constants=MemoryConstants(kept_copies=1))
    assert (kept["z2"].transient, kept["zdp"].transient) == (12 * S, 16 * S)


def test_measured_peaks_of_six_blocks_are_not_underestimated() -> None:
    """Peaks that FSDP2 was measured to have for six equal blocks on 4 ranks, in blocks of fp32 parameters.

    The first line is fp32, the second bf16 compute with fp32 reductions; replicated, kept gathered, sharded.
    """
    for c, measured in ((4, (26.03, 12.53, 9.51)), (2, (25.00, 9.51, 8.50))):
        costs = OperatorCosts(4, RING, gather_bytes=c, reduce_bytes=4, constants=MemoryConstants(kept_copies=1))
        for option, peak in zip(costs.options(Operator("block", 10**6)), measured, strict=True):
            predicted = (6 * option.memory + option.transient) / 4e6
            assert 0.995 * peak <= predicted <= 1.1 * peak


def test_collectives_are_counted_exactly() -> None:
    """Calls and bytes of each kind, with the padding of every parameter's first dimension."""
    operator = Operator("w", shapes=((6, 10), (6,)))
    costs = OperatorCosts(N, RING, MODES, micro_steps=3, gather_bytes=2, reduce_bytes=4)
    padded = 8 * 10 + 8
    assert costs.collectives(operator, [("dp", 1)]) == (("all_reduce", 4, 1, 4 * 66),)
    assert costs.collectives(operator, [("z2", 1)]) == (
        ("all_gather", 4, 3, 3 * 2 * padded),
        ("reduce_scatter", 4, 1, 4 * padded),
    )
    assert costs.collectives(operator, [("zdp", 1)])[0] == ("all_gather", 4, 6, 6 * 2 * padded)
    assert costs.collectives(operator, [("zdp-2", 1)])[:2] == (
        ("all_gather", 2, 3, 3 * 2 * padded),
        ("all_gather", 4, 3, 3 * 2 * padded),
    )
    # Rows 2, 2, 1, 1 of four slices are padded to 4 each.
    sliced = Operator("w", shapes=((6, 10), (6,)), cuts=("output",), max_slices=4)
    assert costs.collectives(sliced, [("zdp", 3), ("dp", 1)]) == (
        ("all_gather", 4, 18, 18 * 2 * 44),
        ("all_reduce", 4, 1, 4 * 11),
        ("reduce_scatter", 4, 3, 3 * 4 * 44),
    )
    assert OperatorCosts(1, RING).collectives(operator, [("zdp", 1)]) == ()


def test_slices_are_uneven_and_complete() -> None:
    """First slices are one feature larger; a bias goes with its rows, or whole with the first input slice."""
    shapes = ((7, 5), (7,))
    rows = Operator("w", shapes=shapes, cuts=("output",), max_slices=3).slice_shapes(3)
    assert rows == (((3, 5), (3,)), ((2, 5), (2,)), ((2, 5), (2,)))
    columns = Operator("w", shapes=shapes, cuts=("input", "output"), max_slices=2).slice_shapes(2)
    assert columns == (((7, 3), (7,)), ((7, 2),))
    assert Operator("w", 11, cuts=("output",), max_slices=4).slice_shapes(4) == (((3,),), ((3,),), ((3,),), ((2,),))
    assert Operator("w", 99, cuts=("output",), max_slices=6).slice_counts == (1, 2, 4, 6)


def test_slices_divide_buffers_and_add_latency() -> None:
    """Four equal slices: a quarter of the buffer, three more hops of latency per collective, states as before."""
    operator = Operator("w", S, cuts=("output",), max_slices=4, split_seconds=0.5)
    found = {option.parts: option for option in OperatorCosts(N, RING, ("z2", "zdp")).options(operator)}
    whole, quarter = found[("zdp", 1),], found[("zdp", 4),]
    assert (quarter.memory, quarter.transient, quarter.groups) == (whole.memory, whole.transient // 4, 4)
    assert quarter.seconds == pytest.approx(whole.seconds + 3 * 3 * 3 * ALPHA + 3 * 0.5, rel=1e-12)
    # Slices with two modes are in between, evenly.
    kept = found[("z2", 4),]
    for k in (1, 2, 3):
        mixed = found[("zdp", k), ("z2", 4 - k)]
        assert mixed.memory == kept.memory + k * (quarter.memory - kept.memory) // 4
        assert mixed.seconds == pytest.approx(kept.seconds + k * (quarter.seconds - kept.seconds) / 4, rel=1e-12)


def test_cluster_spec_gives_the_seconds() -> None:
    """A described cluster knows the same rings; the host link is added to it."""
    cluster = ClusterSpec.from_bandwidth(4, gigabytes_per_second=1, latency=ALPHA)
    operator = Operator("w", 10**6)
    ring = OperatorCosts(N, RING, MODES).options(operator)
    tables = OperatorCosts(N, HostLink(cluster, HOST), MODES).options(operator)
    assert [o.seconds for o in tables] == pytest.approx([o.seconds for o in ring], rel=1e-6)
    assert [o[2:] for o in tables] == [o[2:] for o in ring]


def test_operators_without_parameters_are_free() -> None:
    """Neither seconds nor bytes nor groups, in every mode."""
    for option in options(Operator("act", 0)).values():
        assert option[1:] == (0, 0, 0, 0, 0, 0, 0, 0)


def test_overlap_is_a_pipeline() -> None:
    """Two slices by hand: one gather ahead, one reduction behind; only what is longer counts."""
    communication = SliceSeconds(forward_gather=2.0, backward_gather=3.0, reduction=4.0)
    slices = [SliceStep(1.0, 5.0, communication), SliceStep(7.0, 6.0, communication)]
    forward = 2 + max(1, 2) + 7
    backward = 3 + max(6, 3) + max(5, 4) + 4
    assert overlapped_seconds(slices, 1, "last") == forward + backward
    without = 3 + max(6, 3) + max(5, 0)
    assert overlapped_seconds(slices, 3, "last") == 3 * forward + 2 * without + backward
    assert overlapped_seconds(slices, 3, "every") == 3 * (forward + backward)
    held = [slices[0], slices[1]._replace(kept=True)]
    assert overlapped_seconds(held, 2, "hold") == forward + (2 + 1 + 7) + without + backward
    assert overlapped_seconds([], 2, "last") == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": -2}, "parameters=-2"),
        ({}, "parameters=-1"),
        ({"parameters": 5, "shapes": ((2, 3),)}, "parameters=5: expected 6"),
        ({"parameters": 5, "max_slices": 2}, "cuts is empty"),
        ({"parameters": 5, "max_slices": 2, "cuts": ("output",), "tied": "e"}, "tied"),
        ({"shapes": ((2, 9),), "max_slices": 4, "cuts": ("output",)}, "at most 2"),
        ({"parameters": 5, "cuts": ("rows",)}, "cut 'rows'"),
        ({"parameters": 5, "activation_bytes": math.inf}, "activation_bytes=inf"),
        ({"parameters": 5, "dtype_bytes": 0}, "dtype_bytes=0"),
    ],
)
def test_operators_are_checked(fields: dict[str, object], message: str) -> None:
    """Errors name the operator, the argument and what is allowed."""
    with pytest.raises(ValueError, match=f"operator 'w'.*{message}"):
        Operator("w", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modes": ("zero3",)}, "mode 'zero3'"),
        ({"modes": ("zdp-3",)}, "mode 'zdp-3'"),
        ({"modes": ("zdp-4",)}, "mode 'zdp-4'"),
        ({"modes": ()}, "at least one mode"),
        ({"modes": ("off",), "comm": Ring(1e-9)}, "host_seconds_per_byte"),
        ({"world_size": 0}, "world_size=0"),
        ({"micro_steps": True}, "micro_steps=True"),
        ({"accumulation": "first"}, "accumulation='first'"),
        ({"optimizer_values": -1}, "optimizer_values=-1"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    """Errors name the argument and what is allowed."""
    with pytest.raises(ValueError, match=message):
        OperatorCosts(**{"world_size": 4, "comm": RING, **settings})  # type: ignore[arg-type]


def test_links_are_checked() -> None:
    """A negative bandwidth or factor is refused."""
    with pytest.raises(ValueError, match="ring.latency=-1"):
        Ring(1e-9, latency=-1)
    with pytest.raises(ValueError, match="constants.forward_copies=-1"):
        MemoryConstants(forward_copies=-1)
