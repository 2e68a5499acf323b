"""Profiles taken by several processes: collectives, equal results on every rank, errors on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_hetu.profiling import profile_cluster
from lightning_hetu.profiling._agreement import is_busy
from lightning_hetu.profiling._tracker import trace_memory
from lightning_hetu.profiling.cluster import _processes_per_host, group_shapes
from tests._ranks import RankPool
from tests.profiling import _on_ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


def test_cluster(ranks: RankPool) -> None:
    specs = ranks.run(_on_ranks.measure_cluster)
    spec = specs[0]
    assert all(other == spec for other in specs)
    measured = {(cost.op, cost.group_size, cost.consecutive) for cost in spec.collectives}
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        assert {(op, 2, True), (op, 2, False), (op, 4, True)} <= measured
    assert {("p2p", 2, False), ("p2p", 4, False)} <= measured
    for cost in spec.collectives:
        assert [size for size, _ in cost.points] == [1 << 10, 1 << 18]
        assert 0 < cost.points[0][1] <= cost.points[1][1] < 1
    assert (spec.num_devices, spec.devices_per_node, spec.overlap_slowdown) == (4, 4, None)
    assert 1 <= spec.slots <= 4
    assert spec.device_memory is not None and spec.device_memory > 1 << 26
    assert spec.device.startswith("cpu")


def test_one_process_has_nothing_to_communicate() -> None:
    spec = profile_cluster("cpu")
    assert (spec.num_devices, spec.collectives, spec.slots) == (1, (), 1)


def test_every_rank_gets_the_same_model_profile(ranks: RankPool) -> None:
    for slots, busy in ((None, [0]), (2.4, [0, 2]), (4, [0, 1, 2, 3])):
        results = ranks.run(_on_ranks.measure_model, slots)
        assert len({digest for digest, _ in results}) == 1
        assert [rank for rank, (_, measured) in enumerate(results) if measured] == busy
    assert is_busy(None, torch.device("cuda"))


def test_a_failure_on_one_rank_is_raised_on_all(ranks: RankPool) -> None:
    messages = ranks.run(_on_ranks.fail_on_one)
    assert messages[2].startswith("AttributeError: ")
    others = messages[:2] + messages[3:]
    assert all(text.startswith("RuntimeError: profiling failed on rank 2: AttributeError") for text in others)


def test_cache_is_read_and_written_by_the_first_rank(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(_on_ranks.use_cache, str(tmp_path))
    assert len({result["key"] for result in results}) == len({result["message"] for result in results}) == 1
    assert "is corrupt" in results[0]["message"]
    assert [result["files"] for result in results] == [1, 0, 0, 0]
    assert all((result["empty"], result["filled"], result["same"]) == (1, 0, True) for result in results)


def test_memory_under_tensor_parallelism_is_that_of_a_real_run(ranks: RankPool) -> None:
    real = ranks.run(_on_ranks.measure_tensor_parallel)[0]
    for role, (kept, forward, backward) in real.items():
        case = _on_ranks.gpt_part(role)
        memory = trace_memory(case, case.batch)[2]
        assert memory.kept == pytest.approx(kept, rel=0.05), role
        assert memory.forward_extra == pytest.approx(forward, rel=0.05), role
        if role == "embedding":  # its backward makes the gradient of the table and little else
            continue
        # The allocator also sees the newest gradient of a parameter before it is added to the one that is there.
        newest = max(parameter.nbytes for parameter in case.module.parameters()) / 2
        assert 0.95 * (backward - newest) <= memory.backward_extra <= 1.05 * backward, role


def test_one_tensor_parallel_rank_runs_on_dtensors_alone(ranks: RankPool) -> None:
    """The layers run forward and backward on DTensors of their part of the weights, and come back as they were."""
    for found in ranks.run(_on_ranks.run_one_rank):
        for role, (restored, (whole, half, quarter)) in found.items():
            assert restored, role
            for part, sizes in ((2, half), (4, quarter)):
                part = 1 if role == "embedding" else part  # a lookup costs the same in a part of the table
                assert sizes == [size // part for size in whole], role


def test_meter_sees_the_buffers_of_sharding(ranks: RankPool) -> None:
    layer = (64 * 64 + 64) * 4
    for kept, peak, gradients in ranks.run(_on_ranks.meter_sharded_step):
        assert gradients == layer  # 4 layers over 4 ranks
        # The gradients stay. Threads of the collectives free some of the buffers, and may still hold the last one.
        assert gradients <= kept <= gradients + layer
        # At least: gathered weights, the full gradient, and the buffer it is reduced from.
        assert 3 * layer <= peak <= 10 * layer


def test_numbers_of_processes() -> None:
    assert group_shapes(1) == []
    assert group_shapes(8) == [(2, True), (2, False), (4, True), (4, False), (8, True)]
    with pytest.raises(ValueError, match="6 processes: expected a power of two"):
        group_shapes(6)
    assert _processes_per_host(["a", "a", "b", "b"]) == 2
    with pytest.raises(ValueError, match="the same number on every host"):
        _processes_per_host(["a", "a", "a", "b"])
