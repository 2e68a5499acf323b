"""Our cost model follows its formulas, and what was measured of the executor's building blocks."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from lightning_hetu.planning import (
    ClusterSpec,
    HetuConstants,
    HybridPlan,
    LayerProfile,
    ModelProfile,
    evaluate,
    memory_breakdown,
    time_breakdown,
)
from lightning_hetu.planning.breakdown import breakdown
from lightning_hetu.planning.units import format_bytes, format_seconds

MIB = 2**20
NOTHING = LayerProfile("nothing", 0, tp_degrees=(1, 2, 4))
BANDWIDTH, LATENCY = 1e9, 1e-4


def cluster(num_devices: int = 4, **kwargs: object) -> ClusterSpec:
    return ClusterSpec.from_bandwidth(
        num_devices, gigabytes_per_second=BANDWIDTH / 1e9, latency=LATENCY, **{"overlap_slowdown": None, **kwargs}
    )


def blocks(layer: LayerProfile, count: int = 6, precision: str = "32-true") -> ModelProfile:
    return ModelProfile((layer,), (0,) * count, NOTHING, NOTHING, precision)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strategy", "mixed", "measured"),
    [
        # Storage traces of 6 equal blocks on 4 ranks with AdamW, in sizes of one block: the fullest phase of a step.
        ("dp4-ddp", False, 26.03),
        ("dp4-zero2", False, 12.53),
        ("dp4-zero3", False, 9.51),
        ("dp4-ddp", True, 25.00),
        ("dp4-zero2", True, 9.51),
        ("dp4-zero3", True, 8.50),
    ],
)
def test_peaks_agree_with_traces_of_fsdp2(strategy: str, mixed: bool, measured: float) -> None:
    """Within three percent of what FSDP2 of torch 2.13 allocates; mixed is FSDP's own bf16 with fp32 reduction."""
    profile = blocks(LayerProfile("block", MIB), precision="bf16-mixed" if mixed else "32-true")
    plan = HybridPlan.uniform(strategy, num_layers=6, global_batch_size=4)
    constants = HetuConstants(gathered_ratio=0.5 if mixed else 1.0)
    peak = evaluate(plan, profile, cluster(), constants=constants).stage_memory[0]
    assert peak / MIB == pytest.approx(measured, rel=0.03)


def test_the_peak_moves_with_what_is_large() -> None:
    """Large activations peak in the last row's backward, large states after all activations are gone."""
    states = LayerProfile("block", 8 * MIB)
    activations = replace(states, activation_bytes={1: 40 * MIB})
    plan = HybridPlan.uniform("dp4-zero3", num_layers=4, global_batch_size=4)
    late = memory_breakdown(plan, blocks(states, 4), cluster())
    early = memory_breakdown(plan, blocks(activations, 4), cluster())
    # One block's gradient is missing: its backward is still running.
    assert late["gradients"] == 3 * 2 * MIB and late["activations"] == 0
    assert early["gradients"] == 0 and early["activations"] == 4 * 40 * MIB


def test_recompute_keeps_the_boundary_and_pays_one_layer_at_a_time() -> None:
    """Inputs of all layers are held, what is inside only of the one in backward; forward is paid twice."""
    layer = LayerProfile(
        "block", 4, forward_time=((1, 1e-3),), activation_bytes={1: 10 * MIB}, boundary_bytes=MIB, backward_ratio=2
    )
    plain = HybridPlan.uniform("dp1", num_layers=4, global_batch_size=2)
    recomputed = HybridPlan.uniform("dp1-recompute", num_layers=4, global_batch_size=2)
    one = cluster(1)
    a, b = (memory_breakdown(plan, blocks(layer, 4), one) for plan in (plain, recomputed))
    assert a["activations"] == 4 * 20 * MIB and b["activations"] == 4 * 2 * MIB
    assert b["transient"] - a["transient"] == 18 * MIB
    times = [evaluate(plan, blocks(layer, 4), one).iteration_time for plan in (plain, recomputed)]
    assert times == pytest.approx([4 * 2e-3 * 3, 4 * 2e-3 * 4])


def test_microbatches_in_flight_are_held() -> None:
    """Under 1f1b stage ``i`` of P holds ``min(P - i, m)`` microbatches, under gpipe all of them."""
    layer = LayerProfile("block", 4, activation_bytes={1: MIB})
    plan = HybridPlan.uniform("dp1", num_layers=4, global_batch_size=8, num_microbatches=8, stages=4)
    held = [memory_breakdown(plan, blocks(layer, 4), cluster(), stage)["activations"] for stage in range(4)]
    assert held == [4 * MIB, 3 * MIB, 2 * MIB, MIB]
    gpipe = replace(plan, schedule="gpipe")
    assert [memory_breakdown(gpipe, blocks(layer, 4), cluster(), s)["activations"] for s in range(4)] == [8 * MIB] * 4


def test_only_replicated_layers_accumulate_full_gradients() -> None:
    """With microbatches, sharded layers keep gradient shards; told otherwise, they keep full gradients as well."""
    profile = blocks(LayerProfile("block", 8 * MIB), 4)
    late = HetuConstants(reduce_every_microbatch=False)
    expected = {"dp4-ddp": (32, 32), "dp4-zero2": (8, 32), "dp4-zero3": (8, 32)}
    for strategy, sizes in expected.items():
        plan = HybridPlan.uniform(strategy, num_layers=4, global_batch_size=8, num_microbatches=2)
        found = [memory_breakdown(plan, profile, cluster(), constants=c)["gradients"] / MIB for c in (None, late)]
        assert found == list(sizes)


def test_buffers_of_reductions_linger_over_the_next_backward() -> None:
    """A row that reduces leaves a buffer of its size to the next one's backward, which has gradients of its own."""
    layer = LayerProfile("block", 8 * MIB, activation_bytes={1: 40 * MIB}, boundary_bytes=MIB)
    made = replace(layer, backward_gradients={1: 2 * MIB})
    bare = HetuConstants(zero3_forward_gather=0, zero2_forward_gather=0, zero3_backward_gather=0)
    for strategy, microbatches, extra in (("dp4-zero3", 2, 10), ("dp4-zero2", 1, 10), ("dp4-ddp", 2, 8)):
        plan = HybridPlan.uniform(strategy, num_layers=4, global_batch_size=8, num_microbatches=microbatches)
        # The gradients of a ddp row are there since the first microbatch.
        peaks = [
            memory_breakdown(plan, blocks(profile, 4), cluster(), constants=constants)["transient"] / MIB
            for profile, constants in ((made, bare), (layer, replace(bare, lingering_reduce=0.0)))
        ]
        assert peaks[0] - peaks[1] == extra, strategy
    # In a pipeline a ddp row reduces when the other microbatches are gone.
    plan = HybridPlan.uniform("dp2-ddp", num_layers=4, global_batch_size=16, num_microbatches=4, stages=2)
    assert memory_breakdown(plan, blocks(made, 4), cluster(), 0)["transient"] == 0


def test_accumulation_keeps_one_more_set_of_gradients() -> None:
    """Shards with pipeline support, full gradients without, and none beyond those in the optimizer's step."""
    profile = blocks(LayerProfile("block", 8 * MIB, activation_bytes={1: 40 * MIB}), 4)
    plain = replace(profile, pipeline=False, microbatches=False)
    plan = HybridPlan.uniform("dp4-zero3", num_layers=4, global_batch_size=4)
    for model, extra in ((profile, 4 * 2), (plain, 4 * 8)):
        peaks = [
            evaluate(plan, model, cluster(), constants=HetuConstants(accumulates=a)).stage_memory[0]
            for a in (False, True)
        ]
        assert peaks[1] - peaks[0] == extra * MIB


def test_a_table_in_first_and_last_stage_has_a_copy_in_each() -> None:
    """In one stage it is there once; in two its gradients are added up once per step."""
    table = LayerProfile("table", 8 * MIB)
    profile = replace(blocks(LayerProfile("block", MIB), 4), embedding=table, head=table)
    tied = replace(profile, tied_bytes=8 * MIB)
    one = HybridPlan.uniform("dp4-ddp", num_layers=4, global_batch_size=4)
    parameters = [memory_breakdown(one, model, cluster())["parameters"] / MIB for model in (profile, tied)]
    assert parameters == [8 + 4 + 8, 8 + 4]
    for strategy, shards in (("dp2-ddp", 1), ("dp2-zero2", 2)):
        two = HybridPlan.uniform(strategy, num_layers=4, global_batch_size=8, num_microbatches=2, stages=2)
        found = [[memory_breakdown(two, model, cluster(), stage) for stage in (0, 1)] for model in (profile, tied)]
        assert found[0] == found[1]
        seconds = [evaluate(two, model, cluster()).iteration_time for model in (profile, tied)]
        assert seconds[1] - seconds[0] == pytest.approx(ring(2, 2, 8 * MIB / shards))
    with pytest.raises(ValueError, match="profile.tied_bytes="):
        replace(profile, tied_bytes=9 * MIB)


def test_what_is_outside_of_the_blocks_may_be_gathered_all_the_time() -> None:
    """Where embedding and head are one unit around the blocks, zero3 keeps their copy as zero2 does."""
    table = LayerProfile("table", 8 * MIB)
    profile = replace(
        blocks(LayerProfile("block", MIB, activation_bytes={1: 40 * MIB}), 4), embedding=table, head=table
    )
    plan = HybridPlan.uniform("dp4-zero3", num_layers=4, global_batch_size=8, num_microbatches=2)
    gathered = [
        memory_breakdown(plan, replace(profile, split_vocab=split), cluster())["gathered"] / MIB
        for split in (True, False)
    ]
    assert gathered == [0, 16]


def ring(rounds: int, size: int, num_bytes: float) -> float:
    """A ring collective over the test's links."""
    return rounds * (size - 1) * (LATENCY + num_bytes / size / BANDWIDTH)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_data_parallel_communication_is_counted(microbatches: int) -> None:
    """Collectives of a step: ddp reduces once, zero2 gathers once, zero3 gathers twice a microbatch."""
    profile = blocks(LayerProfile("block", 8 * MIB), 1)
    once = {
        "dp4-ddp": ring(2, 4, 8 * MIB),
        "dp4-zero2": ring(1, 4, 8 * MIB) * (1 + microbatches),
        "dp4-zero3": ring(1, 4, 8 * MIB) * 3 * microbatches,
    }
    for strategy, seconds in once.items():
        plan = HybridPlan.uniform(strategy, num_layers=1, global_batch_size=8, num_microbatches=microbatches)
        assert evaluate(plan, profile, cluster()).iteration_time == pytest.approx(seconds)
        # Recomputation runs with the parameters gathered for backward: no further gather.
        again = replace(plan, layers=(replace(plan.layers[0], recompute=True),))
        assert evaluate(again, profile, cluster()).iteration_time == pytest.approx(seconds)


def test_tensor_parallel_communication_is_counted() -> None:
    """Four all-reduces of the boundary per block and microbatch, six with recomputation."""
    layer = LayerProfile("block", 8 * MIB, 8 * MIB, boundary_bytes=MIB, tp_degrees=(1, 2, 4))
    for text, count in (("tp4", 4), ("tp4-recompute", 6)):
        plan = HybridPlan.uniform(text, num_layers=1, global_batch_size=2, embedding="dp1-tp4", head="tp4")
        parts = time_breakdown(plan, blocks(layer, 1), cluster())
        assert parts["tensor_parallel"] >= count * ring(2, 4, 2 * MIB)
        # The rest is the embedding's all-reduce of the same size; the head's input has no size here.
        assert parts["tensor_parallel"] == pytest.approx((count + 1) * ring(2, 4, 2 * MIB))


def test_relayout_is_one_gather_in_one_direction() -> None:
    """From dp4 to dp2 the two ranks that share rows afterwards gather; back again costs the same."""
    layer = LayerProfile("block", 4, boundary_bytes=MIB, tp_degrees=(1, 2))
    plan = HybridPlan.uniform("dp4-ddp", num_layers=3, global_batch_size=4)
    plan = replace(plan, layers=(plan.layers[0], replace(plan.layers[1], dp=2, tp=2), plan.layers[2]))
    assert time_breakdown(plan, blocks(layer, 3), cluster())["relayout"] == pytest.approx(2 * ring(1, 2, 2 * MIB))


def test_processes_that_share_cores_slow_each_other_down() -> None:
    """Four processes on two cores compute at half speed; in a pipeline only those that are busy count."""
    layer = LayerProfile("block", 0, forward_time=((1, 1.0),), backward_ratio=2)
    profile = blocks(layer, 4)
    shared = cluster(4, compute_slots=2.0)
    plan = HybridPlan.uniform("dp4-ddp", num_layers=4, global_batch_size=4)
    assert evaluate(plan, profile, cluster()).iteration_time == pytest.approx(12)
    assert evaluate(plan, profile, shared).iteration_time == pytest.approx(24)
    pipeline = HybridPlan.uniform("dp1", num_layers=4, global_batch_size=4, num_microbatches=4, stages=4)
    # All compute of all devices on two cores: 4 microbatches * 4 blocks * 3 s / 2, longer than 7 rounds of 3 s.
    assert evaluate(pipeline, profile, cluster()).iteration_time == pytest.approx(21)
    assert evaluate(pipeline, profile, shared).iteration_time == pytest.approx(24)


def test_communication_hides_behind_computation_where_devices_overlap() -> None:
    """Overlapping is never slower than one after the other, and never faster than the longer of the two."""
    layer = LayerProfile("block", 64 * MIB, forward_time=((1, 0.02),))
    profile = blocks(layer, 2)
    for strategy in ("dp4-ddp", "dp4-zero2", "dp4-zero3"):
        plan = HybridPlan.uniform(strategy, num_layers=2, global_batch_size=4)
        apart = evaluate(plan, profile, cluster()).iteration_time
        together = evaluate(plan, profile, cluster(overlap_slowdown=1.2)).iteration_time
        compute = 2 * 0.02 * 3
        assert max(compute, apart - compute) < together < apart


def test_frozen_parameters_have_no_gradients_and_no_moments() -> None:
    """Untrained parameters cost their own bytes and their gathers only."""
    trained, frozen = (LayerProfile("block", 8 * MIB, trainable_fraction=f) for f in (1.0, 0.0))
    plan = HybridPlan.uniform("dp4-zero3", num_layers=4, global_batch_size=4)
    memory = memory_breakdown(plan, blocks(frozen, 4), cluster())
    assert memory["gradients"] == memory["optimizer"] == 0 and memory["parameters"] == 8 * MIB
    times = [evaluate(plan, blocks(layer, 4), cluster()).iteration_time for layer in (trained, frozen)]
    assert times[0] / times[1] == pytest.approx(1.5)


def test_measured_tensor_parallel_times_count() -> None:
    """Where one tensor-parallel rank was timed, that time counts, and elsewhere a part of the whole layer's."""
    points = ((1.0, 2.0), (4.0, 8.0))
    layer = LayerProfile("block", 8, forward_time=points, tp_degrees=(1, 2, 4), tp_forward_time={2: ((4.0, 6.0),)})
    assert layer.forward_seconds(4) == 8.0
    assert layer.forward_seconds(4, 2) == 6.0 and layer.forward_seconds(2, 2) == 3.0
    assert layer.forward_seconds(4, 4) == 2.0
    again = LayerProfile(**json.loads(json.dumps(asdict(layer))))
    assert again == layer


def test_runtime_overhead_is_paid_per_layer_and_microbatch() -> None:
    """Every row of a stage pays it once per microbatch, so a stage of more rows pays more."""
    block = LayerProfile("block", 8, forward_time=((1, 1.0),))
    profile = ModelProfile((block,), (0, 0), block, block)
    plain = ClusterSpec.from_bandwidth(1, gigabytes_per_second=1)
    slow = replace(plain, layer_overhead=0.25)
    plan = HybridPlan.uniform("dp1", num_layers=2, global_batch_size=4, num_microbatches=2)
    extra = evaluate(plan, profile, slow).iteration_time - evaluate(plan, profile, plain).iteration_time
    assert extra == pytest.approx(0.25 * 4 * 2)


def test_the_breakdown_adds_up_and_leaves_out_what_is_zero() -> None:
    """A column per stage; of many stages, the first and the last ones."""
    block = LayerProfile("block", 8 << 20, forward_time=((1, 0.01),), activation_bytes={1: 1 << 20})
    profile = ModelProfile((block,), (0,) * 16, block, block)
    for stages, shown in ((2, [0, 1]), (16, [0, 1, 2, 3, 12, 13, 14, 15])):
        cluster = ClusterSpec.from_bandwidth(2 * stages, gigabytes_per_second=10)
        plan = HybridPlan.uniform("dp2-zero3", num_layers=16, global_batch_size=32, num_microbatches=16, stages=stages)
        prediction = evaluate(plan, profile, cluster)
        tables = [table.splitlines() for table in breakdown(plan, profile, cluster).split("\n\n")]
        times, _, sizes = tables
        assert [cell.strip() for cell in times[0].split(" | ")][1:] == [f"stage {stage}" for stage in shown]
        totals = [cell.strip() for cell in times[-1].split(" | ")][1:]
        assert totals == [format_seconds(prediction.stage_times[stage]) for stage in shown]
        totals = [cell.strip() for cell in sizes[-1].split(" | ")][1:]
        assert totals == [format_bytes(prediction.stage_memory[stage]) for stage in shown]
        names = [line.split(" | ")[0].strip() for line in times]
        assert "parameter gather" in names and "tensor parallel" not in names
