"""Megatron sequence parallelism in strategies, profiles, and the cost model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_hetu.planning import ClusterSpec, HybridPlan, layer_strategies, search
from lightning_hetu.planning.cost_model import CATEGORIES, Setting
from lightning_hetu.planning.hetu_cost import HetuCostModel
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.profile import LayerProfile, ModelProfile

MIB = 2**20
BLOCK = LayerProfile(
    "block",
    8 * MIB,
    8 * MIB,
    ((1, 1e-3),),
    activation_bytes={1: 32 * MIB, 2: 24 * MIB},
    boundary_bytes=4 * MIB,
    tp_degrees=(1, 2),
    sequence_degrees=(2,),
)
ENDS = LayerProfile("ends", MIB, MIB, ((1, 1e-4),), boundary_bytes=4 * MIB, tp_degrees=(1, 2))


def profile_of(block: LayerProfile, layers: int = 2) -> ModelProfile:
    return ModelProfile((block,), (0,) * layers, ENDS, ENDS)


def cluster(size: int = 2) -> ClusterSpec:
    return ClusterSpec.from_bandwidth(size, gigabytes_per_second=1)


def test_text_and_fields() -> None:
    """A further word; without tensor parallelism there is nobody to share the sequence."""
    strategy = LayerStrategy.parse("dp2-tp2-sequence")
    assert strategy == LayerStrategy(dp=2, tp=2, sequence_parallel=True)
    assert str(strategy) == "dp2-tp2-ddp-sequence" and LayerStrategy.parse(str(strategy)) == strategy
    recomputed = replace(strategy, recompute=True, dp_type="zero3")
    assert LayerStrategy.parse(str(recomputed)) == recomputed
    assert LayerStrategy.parse(recomputed.to_dict()) == recomputed
    older = {key: value for key, value in LayerStrategy(dp=2, tp=2).to_dict().items() if key != "sequence_parallel"}
    assert LayerStrategy.parse(older) == LayerStrategy(dp=2, tp=2)
    plan = HybridPlan.uniform("tp2-sequence", num_layers=2, global_batch_size=2, embedding="tp2", head="tp2")
    assert HybridPlan.from_dict(plan.to_dict()) == plan
    for wrong in ("dp2-sequence", "sp2-sequence"):
        with pytest.raises(ValueError, match="sequence_parallel=True with tp=1"):
            LayerStrategy.parse(wrong)
    with pytest.raises(ValueError, match="expected true or false"):
        LayerStrategy(tp=2, sequence_parallel="yes")  # type: ignore[arg-type]


def test_offered_only_on_request() -> None:
    """Blocks whose profile names the degree; never embedding or head."""
    plain = [str(s) for s in layer_strategies(4, tp_degrees=(1, 2, 4))]
    more = [str(s) for s in layer_strategies(4, tp_degrees=(1, 2, 4), sequence_degrees=(1, 2))]
    assert [text for text in more if "sequence" not in text] == plain
    assert [text for text in more if "sequence" in text and "recompute" not in text] == [
        "dp2-tp2-ddp-sequence",
        "dp2-tp2-zero2-sequence",
        "dp2-tp2-zero3-sequence",
    ]
    setting = Setting(2, 2, 1, (2,))
    profile = replace(profile_of(BLOCK), embedding=replace(ENDS, tp_degrees=(1, 2), sequence_degrees=(2,)))
    model = HetuCostModel(profile, cluster())
    assert not any(s.sequence_parallel for s in model.strategies(0, setting))
    assert sum(s.sequence_parallel for s in model.strategies(1, setting)) == 2
    off = HetuCostModel(profile_of(replace(BLOCK, sequence_degrees=())), cluster())
    assert not any(s.sequence_parallel for s in off.strategies(1, setting))
    with pytest.raises(ValueError, match=r"sequence_degrees=\[4\].*\[2\]"):
        replace(BLOCK, sequence_degrees=(4,))


def test_activations_are_cut() -> None:
    """A tp-th of what one device keeps, unless it was measured; a recomputed layer keeps a part of its input."""
    assert BLOCK.activations(2) == 24 * MIB
    assert BLOCK.activations(2, sequence_parallel=True) == 16 * MIB
    measured = replace(BLOCK, sequence_activation_bytes={2: 17 * MIB})
    assert measured.activations(2, sequence_parallel=True) == 17 * MIB
    assert ModelProfile.from_dict(profile_of(measured).to_dict()) == profile_of(measured)
    setting = Setting(2, 2, 1, (2,))
    model = HetuCostModel(profile_of(replace(BLOCK, parameter_bytes=0, tp_parameter_bytes=0)), cluster())
    rows = {
        text: model.row_cost(1, 0, LayerStrategy.parse(text), setting).memory
        for text in ("tp2", "tp2-sequence", "tp2-recompute", "tp2-recompute-sequence")
    }
    kept = {text: row.held[CATEGORIES.index("activations")] / MIB / 2 for text, row in rows.items()}  # 2 samples
    assert kept == {"tp2": 24, "tp2-sequence": 16, "tp2-recompute": 4, "tp2-recompute-sequence": 2}
    # All that was kept, what two products have gathered, and the whole input of one: as much as without it here.
    extra = {text: float((row.backward - row.held).sum()) / MIB / 2 for text, row in rows.items()}
    assert (extra["tp2-recompute"], extra["tp2-recompute-sequence"]) == (20, (16 - 2) + 2 * 2 + 2)


@pytest.mark.parametrize(
    ("tp", "text", "tables", "measured"),
    [
        # Resident memory of a GPT block of width 512, 2 x 2048 tokens in fp32, in MiB: kept, most in forward, most in
        # backward. The tables are those that the profiler gives for one device and for tp devices.
        (2, "tp2-sequence", (144.16, 16.0, 24.0), (72.1, 107.9, 101.9)),
        (4, "tp4-sequence", (144.16, 16.0, 16.0), (36.1, 70.0, 55.0)),
        (2, "tp2-sequence-recompute", (144.16, 16.0, 24.0), (4.0, None, 109.9)),
        (4, "tp4-sequence-recompute", (144.16, 16.0, 16.0), (2.0, None, 67.0)),
    ],
)
def test_memory_agrees_with_measurements(
    tp: int, text: str, tables: tuple[float, float, float], measured: tuple[float, float | None, float]
) -> None:
    """To 6 percent."""
    kept, forward, backward = (size * MIB for size in tables)
    block = LayerProfile(
        "block",
        0,
        activation_bytes={1: kept},
        boundary_bytes=8 * MIB,
        forward_transient={tp: forward},
        backward_transient={tp: backward},
        tp_degrees=(1, tp),
    )
    model = HetuCostModel(profile_of(block), cluster(tp))
    memory = model.row_cost(1, 0, LayerStrategy.parse(text), Setting(tp, 1, 1, (2,))).memory
    for vector, size in zip((memory.held, memory.forward, memory.backward), measured, strict=True):
        if size is not None:
            assert vector.sum() / MIB == pytest.approx(size, rel=0.06)


def test_sums_become_gathers_and_scatters() -> None:
    """As many bytes on a ring as the all-reduces, what is gathered again, and both borders of the layer."""
    setting = Setting(2, 2, 1, (2,))
    links = cluster()
    model = HetuCostModel(profile_of(BLOCK), links)
    message = 2 * BLOCK.boundary_bytes
    reduce, gather, scatter = (
        links.seconds(kind, 2, message) for kind in ("all_reduce", "all_gather", "reduce_scatter")
    )
    assert reduce == pytest.approx(gather + scatter)

    def seconds(text: str) -> float:
        return model.row_cost(1, 0, LayerStrategy.parse(text), setting).parts["tensor_parallel"]

    assert seconds("tp2") == pytest.approx(4 * reduce)
    assert seconds("tp2-sequence") == pytest.approx(4 * reduce + (2 + 2) * gather)
    assert seconds("tp2-sequence-recompute") == pytest.approx(6 * reduce + 2 * gather)


def test_search_takes_it_where_memory_is_short() -> None:
    """One sample cannot be shared out by data parallelism: then it is cheaper than recomputation."""
    links = ClusterSpec.from_bandwidth(2, gigabytes_per_second=100)
    profile = profile_of(BLOCK, 4)
    found = {
        budget: search(profile, links, memory_budget=f"{budget}MiB", global_batch_size=1, pipeline_parallel_size=1)
        for budget in (1000, 145)
    }
    assert not any(row.sequence_parallel for row in found[1000].layers)
    assert any(row.sequence_parallel for row in found[145].layers)
    unable = profile_of(replace(BLOCK, sequence_degrees=()), 4)
    slower = search(unable, links, memory_budget="145MiB", global_batch_size=1, pipeline_parallel_size=1)
    assert slower.prediction.iteration_time > found[145].prediction.iteration_time
