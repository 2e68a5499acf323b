"""Described links cost what the alpha-beta models say, and the cost model asks for the right groups."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lightning_hetu.planning import ClusterSpec, CollectiveCost, HybridPlan, LayerProfile, ModelProfile, time_breakdown
from lightning_hetu.planning.topology import Link, Topology

MIB = 2**20
HERE, THERE = Link(100e9, 2e-6), Link(10e9, 20e-6)
"""8 devices of a node have 100 GB/s each; a node has 8 adapters of 10 GB/s."""


def topology(**options: int) -> Topology:
    return Topology(**{"devices_per_node": 8, "intra_node": HERE, "inter_node": THERE, **options})


def cluster(nodes: int = 4, **options: int) -> ClusterSpec:
    return ClusterSpec(8 * nodes, 8, overlap_slowdown=None, topology=topology(**options))


@pytest.mark.parametrize(
    ("op", "group_size", "stride", "seconds"),
    [
        # Inside a node: 3 hops of a quarter of 80 MB each; an all-reduce makes them twice.
        ("all_gather", 4, 1, 3 * (2e-6 + 0.2e-3)),
        ("reduce_scatter", 4, 2, 3 * (2e-6 + 0.2e-3)),
        ("all_reduce", 4, 2, 6 * (2e-6 + 0.2e-3)),
        ("all_to_all", 4, 1, 3 * (2e-6 + 0.2e-3)),
        ("p2p", 2, 4, 2e-6 + 0.8e-3),
        # One rank on each of four nodes, with one adapter each.
        ("all_gather", 4, 8, 3 * (20e-6 + 2e-3)),
        ("all_reduce", 4, 8, 6 * (20e-6 + 2e-3)),
        ("all_to_all", 4, 8, 3 * (20e-6 + 2e-3)),
        ("p2p", 2, 8, 20e-6 + 8e-3),
        # Two ranks on each of two nodes. By levels: 40 MB to the other node over one adapter, then 40 MB inside; as one
        # ring: 3 hops of 20 MB over two adapters, one of them across.
        ("all_gather", 4, 4, min(20e-6 + 2e-3 + 2e-6 + 0.4e-3, 20e-6 + 2 * 2e-6 + 3e-3)),
        # To one rank inside and to two across, side by side.
        ("all_to_all", 4, 4, 2e-6 + 2 * 20e-6 + 4e-3),
        # 16 neighbors fill two nodes. By levels: 5 MB to the other node over every adapter, and 7 hops of 10 MB inside;
        # as one ring: 15 hops of 5 MB over 80 of the 100 GB/s that a device has inside.
        ("all_gather", 16, 1, min(20e-6 + 0.5e-3 + 7 * (2e-6 + 0.1e-3), 20e-6 + 14 * 2e-6 + 15 * 5e6 / 80e9)),
        ("all_reduce", 16, 1, 2 * min(20e-6 + 0.5e-3 + 7 * (2e-6 + 0.1e-3), 20e-6 + 14 * 2e-6 + 15 * 5e6 / 80e9)),
    ],
)
def test_closed_forms(op: str, group_size: int, stride: int, seconds: float) -> None:
    """Hand-computed times of 80 MB."""
    assert cluster().seconds(op, group_size, 80e6, stride=stride) == pytest.approx(seconds)  # type: ignore[arg-type]


def test_ring_inside_a_node_has_the_bus_bandwidth_of_its_link() -> None:
    """The factors of nccl-tests turn the time of a large message into the bandwidth of the link."""
    for op, factor in (("all_reduce", 2 * 7 / 8), ("all_gather", 7 / 8), ("reduce_scatter", 7 / 8)):
        seconds = cluster().seconds(op, 8, 100e9)  # type: ignore[arg-type]
        assert factor * 100e9 / seconds == pytest.approx(100e9, rel=1e-3)


def test_stride_decides_which_groups_leave_the_node() -> None:
    """Two ranks with stride 8 are on two nodes of eight devices, with stride 2 or 4 on one."""
    places = topology()
    assert places.placement(2, stride=8) == (1, 2) and places.placement(2, stride=16) == (1, 2)
    assert places.placement(2, stride=4) == (2, 1) and places.placement(4, stride=2) == (4, 1)
    assert places.placement(8, stride=2) == (4, 2) and places.placement(16, stride=1) == (8, 2)
    assert places.placement(2, stride=4, first_rank=4) == (1, 2)
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"):
        inside = [cluster().seconds(op, 2, MIB, stride=stride) for stride in (1, 2, 4)]  # type: ignore[arg-type]
        assert max(inside) == min(inside) < cluster().seconds(op, 2, MIB, stride=8)  # type: ignore[arg-type]


def test_more_bytes_take_longer() -> None:
    """Time grows with the message for every operation and group shape, by at most the ratio of the sizes."""
    spec = cluster()
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"):
        for size in (2, 4, 8, 16, 32):
            for stride in (1, 2, 4, 8):
                times = [spec.seconds(op, size, n, stride=stride) for n in (1, MIB, 2 * MIB, 1 << 30)]  # type: ignore[arg-type]
                assert 0 < times[0] < times[1] < times[2] < times[3]
                assert times[2] <= 2 * times[1]
    assert spec.seconds("all_reduce", 1, MIB) == spec.seconds("all_reduce", 4, 0) == 0


def test_devices_of_a_node_share_its_adapters() -> None:
    """With one adapter for eight devices each has an eighth when all communicate, and only then."""
    own, shared = cluster(), cluster(nics_per_node=1)
    bare = [replace(spec, topology=replace(spec.topology, inter_node=Link(10e9))) for spec in (own, shared)]
    for op, size in (("all_reduce", 4), ("all_gather", 2), ("all_to_all", 4)):
        times = [spec.seconds(op, size, MIB, stride=8) for spec in bare]  # type: ignore[arg-type]
        assert times[1] == pytest.approx(8 * times[0])
        assert own.seconds(op, size, MIB) == shared.seconds(op, size, MIB)  # type: ignore[arg-type]
    # Stages of one device: of the eight devices only the last one sends to another node.
    pairs = [shared.seconds("p2p", 2, MIB, stride=stride, first_rank=8 - stride) for stride in (1, 2, 8)]
    assert [seconds - 20e-6 for seconds in pairs] == pytest.approx([MIB / 10e9, 2 * MIB / 10e9, 8 * MIB / 10e9])


def test_borders_between_nodes_cost_more_than_those_inside() -> None:
    """Of four stages on two nodes, the second and the third are on different ones."""
    layer = LayerProfile("block", 4, boundary_bytes=MIB)
    end = LayerProfile("end", 0)
    profile = ModelProfile((layer,), (0,) * 4, end, end)
    plan = HybridPlan.uniform("dp4-ddp", num_layers=4, global_batch_size=32, num_microbatches=8, stages=4)
    borders = [time_breakdown(plan, profile, cluster(2), stage)["stage_border"] for stage in range(4)]
    inside, across = 2e-6 + MIB / 100e9, 20e-6 + MIB / 10e9
    assert borders == pytest.approx([inside, inside + across, across + inside, inside])


def test_groups_of_a_layer_are_where_its_strategy_puts_them() -> None:
    """Tensor parallelism takes neighbors and data parallelism the ranks a tensor-parallel group apart."""
    layer = LayerProfile("block", 16 * MIB, 16 * MIB, boundary_bytes=MIB, tp_degrees=(1, 2, 4, 8))
    end = LayerProfile("end", 0, tp_degrees=(1, 2, 4, 8))
    profile = ModelProfile((layer,), (0,), end, end)
    spec = cluster(2)
    for tp in (2, 4, 8):
        dp = 16 // tp
        plan = HybridPlan.uniform(f"dp{dp}-tp{tp}-ddp", num_layers=1, global_batch_size=dp)
        parts = time_breakdown(plan, profile, spec)
        assert parts["gradient_reduce_per_step"] == pytest.approx(
            spec.seconds("all_reduce", dp, 16 * MIB / tp, stride=tp)
        )
        # Four in the block and one behind the embedding, all inside a node.
        assert parts["tensor_parallel"] == pytest.approx(5 * spec.seconds("all_reduce", tp, MIB))
    # The groups of two at stride 8 are the only ones that cross with one rank per node.
    assert spec.seconds("all_reduce", 2, MIB, stride=8) == pytest.approx(2 * (20e-6 + MIB / 2 / 10e9))
    # From 16 shards to 2: 8 neighbors gather. From 4 shards of 4 ranks to 2: two ranks that are 4 apart.
    for before, after, ranks, stride in (("dp16", "dp2-tp8", 8, 1), ("dp4-tp4", "dp2-tp8", 2, 4)):
        plan = HybridPlan.uniform(before, num_layers=2, global_batch_size=16)
        second = HybridPlan.uniform(after, num_layers=1, global_batch_size=16).layers[0]
        plan = replace(plan, layers=(plan.layers[0], second), head=second)
        parts = time_breakdown(plan, replace(profile, layers=(0, 0)), spec)
        assert parts["relayout"] == pytest.approx(spec.seconds("all_gather", ranks, 8 * MIB, stride=stride))


def test_measurements_come_before_descriptions() -> None:
    """A measured group shape counts; what was not measured comes from the links instead of another shape."""
    measured = CollectiveCost("all_reduce", 2, True, ((1, 7.0), (MIB, 7.0)))
    both = replace(cluster(), collectives=(measured,))
    assert both.seconds("all_reduce", 2, MIB) == 7.0
    assert both.seconds("all_reduce", 2, MIB, stride=8) == cluster().seconds("all_reduce", 2, MIB, stride=8)
    alone = ClusterSpec(32, 8, (measured,))
    assert alone.seconds("all_reduce", 2, MIB, stride=8) == alone.seconds("all_reduce", 16, MIB) == 7.0
    with pytest.raises(ValueError, match="no measurement of p2p: profile it"):
        alone.seconds("p2p", 2, MIB)
    pair = CollectiveCost("p2p", 2, False, ((1, 3.0),))
    assert replace(both, collectives=(pair,)).seconds("p2p", 2, 1, stride=1) == 3.0


def test_files() -> None:
    """A cluster with a topology survives JSON, and files without one have not changed."""
    for spec in (cluster(), cluster(nics_per_node=2), ClusterSpec.from_bandwidth(4, gigabytes_per_second=1)):
        assert ClusterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    data = ClusterSpec.from_bandwidth(4, gigabytes_per_second=1).to_dict()
    assert data["version"] == 1 and "topology" not in data
    broken = {**cluster().to_dict(), "topology": {"devices_per_node": 8}}
    with pytest.raises(ValueError, match="cluster description is malformed"):
        ClusterSpec.from_dict(broken)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"link.bytes_per_second=0, link.latency=0.0"):
        Link(0)
    with pytest.raises(ValueError, match="topology.nics_per_node=9: expected 1 to 8"):
        topology(nics_per_node=9)
    with pytest.raises(ValueError, match="topology.devices_per_node=0"):
        topology(devices_per_node=0)
    with pytest.raises(ValueError, match="cluster.topology.devices_per_node=8: expected 4"):
        ClusterSpec(8, 4, topology=topology())
