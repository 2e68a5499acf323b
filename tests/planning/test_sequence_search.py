"""Ulysses and context parallelism in strategies, prices, memory and the search; Megatron's next to them."""

from __future__ import annotations

import itertools
import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lightning_hetu.planning import (
    ClusterSpec,
    HetuConstants,
    HetuCostModel,
    HybridPlan,
    LayerProfile,
    LayerStrategy,
    ModelProfile,
    NoFeasiblePlanError,
    Pins,
    diff,
    evaluate,
    layer_strategies,
    read_galvatron_plan,
    search,
    simulate,
    write_galvatron_plan,
)
from lightning_hetu.planning.breakdown import breakdown
from lightning_hetu.planning.cost_model import CATEGORIES, Setting, stage_report
from lightning_hetu.planning.enumeration import without_needless_cuts
from lightning_hetu.planning.plan import Schedule

sys.path.insert(0, str(Path(__file__).parent))
from helpers import MIB, random_cluster, random_model  # noqa: E402

BLOCK = LayerProfile(
    "block",
    parameter_bytes=8 * MIB,
    tp_parameter_bytes=8 * MIB,
    forward_time=((1, 8e-3),),
    activation_bytes={1: 64 * MIB, 2: 60 * MIB},  # tensor parallelism cuts little of them
    boundary_bytes=4 * MIB,
    forward_transient={1: 4 * MIB},
    backward_transient={1: 8 * MIB},
    tp_degrees=(1, 2, 4),
    sequence_degrees=(2, 4),
    ulysses_degrees=(2, 4),
    context_degrees=(2, 4),
)
ENDS = LayerProfile("ends", MIB, MIB, ((1, 1e-4),), boundary_bytes=4 * MIB, tp_degrees=(1, 2, 4))
ACTIVATIONS = CATEGORIES.index("activations")


def profile_of(block: LayerProfile = BLOCK, layers: int = 4) -> ModelProfile:
    return ModelProfile((block,), (0,) * layers, ENDS, ENDS)


def cluster(size: int = 4, speed: float = 100, **kwargs: object) -> ClusterSpec:
    return ClusterSpec.from_bandwidth(size, gigabytes_per_second=speed, latency=1e-6, **kwargs)  # type: ignore[arg-type]


def with_degrees(profile: ModelProfile, rng: random.Random, *, megatron: bool = False) -> ModelProfile:
    """The same model whose blocks can cut their sequence; its activations between layers are all of one size."""
    size = profile.layer_types[0].boundary_bytes
    blocks = []
    for block in profile.layer_types:
        changes: dict[str, object] = {
            "ulysses_degrees": rng.choice(((2,), (2, 4), ())),
            "context_degrees": rng.choice(((2,), (2, 4), ())),
        }
        if megatron:
            changes["sequence_degrees"] = block.tp_degrees[1:]
        blocks.append(replace(block, boundary_bytes=size, **changes))  # type: ignore[arg-type]
    ends = (replace(end, boundary_bytes=size, tp_degrees=(1, 2, 4, 8)) for end in (profile.embedding, profile.head))
    return replace(profile, layer_types=tuple(blocks), **dict(zip(("embedding", "head"), ends, strict=True)))


def random_links(rng: random.Random, num_devices: int) -> ClusterSpec:
    """Fast ones in half of the cases: there cutting sequences pays."""
    return random_cluster(rng, num_devices) if rng.random() < 0.5 else cluster(num_devices, 200)


def without_degrees(profile: ModelProfile) -> ModelProfile:
    """The same model whose blocks cannot."""
    nothing = {"ulysses_degrees": (), "context_degrees": (), "sequence_degrees": ()}
    return replace(profile, layer_types=tuple(replace(block, **nothing) for block in profile.layer_types))


# ---- what may be chosen ---------------------------------------------------------------------------------------------


def test_degrees_of_a_profile() -> None:
    """They survive JSON, older files have none, and only integers above 1 are degrees."""
    profile = profile_of(replace(BLOCK, ulysses_degrees=(4, 2, 2)))
    assert profile.layer_types[0].ulysses_degrees == (2, 4)
    data = json.loads(json.dumps(profile.to_dict()))
    assert ModelProfile.from_dict(data) == profile
    for layer in (*data["layer_types"], data["embedding"], data["head"]):
        del layer["ulysses_degrees"], layer["context_degrees"]
    older = ModelProfile.from_dict(data).layer_types[0]
    assert older.ulysses_degrees == older.context_degrees == ()
    assert asdict(older) == asdict(replace(BLOCK, ulysses_degrees=(), context_degrees=()))
    for name in ("ulysses_degrees", "context_degrees"):
        for wrong in ((1,), (True,), (2.0,), (2, 0)):
            with pytest.raises(ValueError, match=rf"layer 'block': {name}=\[.*\]: expected integers of at least 2"):
                replace(BLOCK, **{name: wrong})


def test_shapes_on_offer() -> None:
    """Each kind alone, the two together only beyond what Ulysses alone can, and never next to tensor parallelism."""

    def shapes(devices: int, ulysses: tuple[int, ...], context: tuple[int, ...]) -> list[str]:
        found = layer_strategies(devices, tp_degrees=(1, 2), ulysses_degrees=ulysses, context_degrees=context)
        assert all(s.num_devices == devices and (s.tp == 1 or s.sequence_degree == 1) for s in found)
        assert len(set(found)) == len(found)
        cut = [s for s in found if s.sequence_degree > 1]
        # Weights have copies on the ranks of a sequence: all types of data parallelism, even where dp is 1.
        assert len(cut) % 6 == 0
        return [str(s).removesuffix("-ddp") for s in cut if s.dp_type == "ddp" and not s.recompute]

    assert shapes(4, (), ()) == []
    assert shapes(4, (2, 4), ()) == ["dp2-sp2", "sp4"]
    assert shapes(4, (), (2, 8)) == ["dp2-cp2"]
    assert shapes(8, (2,), (2, 4)) == ["dp4-sp2", "dp4-cp2", "dp2-sp2-cp2", "dp2-cp4", "sp2-cp4"]
    assert shapes(16, (2, 4), (2, 4)) == ["dp8-sp2", "dp8-cp2", "dp4-sp4", "dp4-cp4", "dp2-sp4-cp2", "sp4-cp4"]


def test_the_set_stays_small() -> None:
    """Less than three times as many for a stage of 64 devices, whatever the degrees."""
    tp = (1, 2, 4, 8)
    today = len(layer_strategies(64, tp_degrees=tp, sequence_degrees=tp))
    for ulysses, context in itertools.product(((), (2, 4, 8), (2, 4, 8, 16, 32, 64)), repeat=2):
        found = layer_strategies(
            64, tp_degrees=tp, sequence_degrees=tp, ulysses_degrees=ulysses, context_degrees=context
        )
        assert len(found) < 3 * today


def test_embedding_and_head_keep_whole_sequences() -> None:
    """Their profiles may say what they like."""
    ends = replace(ENDS, ulysses_degrees=(2, 4), context_degrees=(2, 4))
    model = HetuCostModel(replace(profile_of(), embedding=ends, head=ends), cluster())
    setting = Setting(4, 4, 1, (4,))
    for row in (0, 5):
        assert all(s.sequence_degree == 1 for s in model.strategies(row, setting))
    assert {(s.sp, s.cp) for s in model.strategies(1, setting)} == {(1, 1), (2, 1), (4, 1), (1, 2), (1, 4)}


def test_sequences_are_cut_where_the_batch_cannot_be() -> None:
    """A pinned degree is not replaced by data parallelism, which its pin rules out."""
    model = HetuCostModel(profile_of(), cluster())

    def cut(batch: int, **pins: object) -> set[str]:
        options = Pins.parse(pins, 4).options(model, 1, Setting(4, batch, 1, (4,)))
        plain = [s for s in options if s.dp_type == "ddp" and not s.recompute]
        return {str(s).replace("-ddp", "") for s in plain if s.sequence_degree > 1 or s.sequence_parallel}

    assert cut(4) == cut(8) == set()
    assert cut(2) == cut(6) == {"dp2-sp2", "dp2-cp2", "dp2-tp2-sequence"}
    assert cut(1) == {"sp4", "cp4", "tp4-sequence"}
    assert cut(4, sp=2) == {"dp2-sp2"} and cut(4, sp=[2, 4]) == {"dp2-sp2"}
    assert cut(4, cp=4) == {"cp4"}
    assert cut(4, sequence_parallel=True) == {"dp2-tp2-sequence"}
    assert cut(4, sequence_parallel=True, tp=4) == {"tp4-sequence"}
    assert cut(4, dp=1) == {"sp4", "cp4", "tp4-sequence"}
    assert cut(1, sp=1, cp=1, sequence_parallel=False) == set()
    other = [LayerStrategy(dp=2, sp=2), LayerStrategy(dp=4, dp_type="zero3"), LayerStrategy(dp=4, recompute=True)]
    assert without_needless_cuts(other) == other


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"sp": 0}, "sp=0: expected an integer of at least 1"),
        ({"cp": "2"}, "cp='2': expected an integer"),
        ({"sequence_parallel": 1}, "sequence_parallel=1: expected true or false"),
        ({"sp": 8}, "sp=8: blocks can have 1, 2, 4; .* scaled_dot_product_attention"),
        ({"tp": 8}, "tp=8: blocks can have 1, 2, 4; a tensor_parallel_plan gives it more"),
        ({"sp": 2, "tp": 2}, "tp=2 with sp=2: no block has both"),
        ({"sp": 2, "cp": 2}, "sp=2 with cp=2: pin layers to have both, for example layers: sp2-cp2-zero2"),
    ],
)
def test_wrong_pins_are_named(pins: dict[str, object], message: str) -> None:
    """One line with the pin and what is allowed."""
    with pytest.raises(ValueError, match=message) as error:
        search(profile_of(), cluster(), memory_budget="1TiB", global_batch_size=4, **pins)
    assert "\n" not in str(error.value)


def test_pinned_degrees_are_those_of_the_plan() -> None:
    """Of all blocks, whatever else is faster."""
    for pins in ({"sp": 2}, {"cp": 4}, {"sequence_parallel": True, "tp": 2}):
        plan = search(profile_of(), cluster(), memory_budget="1TiB", global_batch_size=4, **pins)
        assert all(getattr(layer, name) == value for layer in plan.layers for name, value in pins.items())


# ---- what it costs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("sp", "cp"), [(4, 1), (1, 4), (2, 2), (2, 4)])
def test_exchanges_are_counted(sp: int, cp: int, recompute: bool) -> None:
    """A gather each way, four all-to-alls, keys and values round the ring, and their gradients all the way."""
    links = cluster(16, 1, overlap_slowdown=None)
    model = HetuCostModel(profile_of(), links)
    dp, samples = 16 // (sp * cp), 32
    strategy = LayerStrategy(dp=dp, sp=sp, cp=cp, recompute=recompute)
    found = model.row_cost(1, 0, strategy, Setting(16, samples, 1, (4,)))
    whole, rate, latency = samples // dp * BLOCK.boundary_bytes, 1e9, 1e-6
    part = whole / (sp * cp)
    gather = (sp * cp - 1) * (latency + part / rate)
    exchange = 4 * (sp - 1) * (latency + part / sp / rate)
    one_round = latency + 2 * part / rate
    rounds = (cp - 1) + (cp - 1 if recompute else 0) + (cp - 1 + cp if cp > 1 else 0)
    expected = 2 * gather + (3 if recompute else 2) * exchange + rounds * one_round
    assert found.parts["sequence_parallel"] == pytest.approx(expected)
    assert found.parts["tensor_parallel"] == 0
    per_microbatch = sum(seconds for name, seconds in found.parts.items() if not name.endswith("_per_step"))
    assert found.seconds == pytest.approx(per_microbatch)
    # Gradients are summed over all ranks with copies of the weights.
    assert found.parts["gradient_reduce_per_step"] == pytest.approx(
        links.seconds("all_reduce", 16, BLOCK.parameter_bytes)
    )


def test_rings_go_between_groups_of_ulysses() -> None:
    """Ranks of a ring are ``sp`` apart: across nodes where Ulysses fills one."""
    calls: list[tuple[str, int, int]] = []

    class Links(ClusterSpec):
        def seconds(self, op: str, group_size: int, num_bytes: float, **where: int) -> float:  # type: ignore[override]
            calls.append((op, group_size, where.get("stride", 1)))
            return 1.0 if group_size > 1 else 0.0

    model = HetuCostModel(profile_of(), Links(16, 4))
    forward, backward = model.sequence_times(1, LayerStrategy(dp=1, sp=4, cp=4), Setting(16, 1, 1, (4,)))
    assert calls == [("all_gather", 16, 1), ("all_to_all", 4, 1), ("all_gather", 4, 4)]
    assert (forward, backward) == (1 + 4 + 1, pytest.approx(1 + 4 + 1 + 4 / 3))


@pytest.mark.parametrize(("text", "parts"), [("sp2", 2), ("cp2", 2), ("sp4", 4), ("sp2-cp2", 4)])
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_memory_of_a_cut_layer(text: str, parts: int, kind: str) -> None:
    """A part of the activations and never more in total than a copy of the whole layer; states as with more dp."""
    setting = Setting(parts, 2, 1, (4,))
    model = HetuCostModel(profile_of(), cluster(parts))
    alone = HetuCostModel(profile_of(), cluster(1)).row_cost(1, 0, LayerStrategy(), Setting(1, 2, 1, (4,))).memory
    cut = model.row_cost(1, 0, LayerStrategy.parse(f"{text}-{kind}"), setting).memory
    # Tables of tensor parallelism do not count: tp2 would keep 60 MiB a sample.
    assert cut.held[ACTIVATIONS] == 2 * 64 * MIB / parts
    batch = model.row_cost(1, 0, LayerStrategy.parse(f"dp{parts}-{kind}"), replace(setting, global_batch_size=4)).memory
    others = [index for index in range(len(CATEGORIES)) if CATEGORIES[index] not in ("activations", "transient")]
    for name in ("held", "released", "step"):
        assert (getattr(cut, name)[others] == getattr(batch, name)[others]).all()
    for name in ("held", "forward", "backward"):
        plain = model.row_cost(1, 0, LayerStrategy.parse(f"{text}-ddp"), setting).memory
        assert getattr(plain, name).sum() < getattr(alone, name).sum()
    again = model.row_cost(1, 0, LayerStrategy.parse(f"{text}-{kind}-recompute"), setting).memory
    assert again.held[ACTIVATIONS] == 2 * 4 * MIB / parts
    # All that was kept is there again, and the whole gradient of the output.
    extra = (again.backward - again.held)[CATEGORIES.index("transient")] - (cut.backward - cut.held)[
        CATEGORIES.index("transient")
    ]
    assert extra == 2 * (64 - 4) * MIB / parts


def test_batch_shards_cost_less_than_parts_of_sequences() -> None:
    """Where the batch can be cut, the same work and states take less time and no more memory."""
    rng = random.Random(7)
    for _ in range(20):
        profile, links = random_model(rng, 2), random_cluster(rng, 4)
        model = HetuCostModel(profile, links)
        setting = Setting(4, 4, 1, (2,))
        for kind, flag in itertools.product(("ddp", "zero2", "zero3"), (False, True)):
            batch = LayerStrategy(dp=4, dp_type=kind, recompute=flag)  # type: ignore[arg-type]
            for sp, cp in ((4, 1), (2, 2), (1, 4), (2, 1), (1, 2)):
                cut = replace(batch, dp=4 // (sp * cp), sp=sp, cp=cp)
                less, more = (model.row_cost(1, 0, s, setting) for s in (batch, cut))
                there_and_back = 2 * model.relayout_seconds(1, batch, cut, setting)
                assert less.sync == pytest.approx(more.sync)
                assert less.seconds + there_and_back <= more.seconds * (1 + 1e-12)
                for name in ("held", "released", "forward", "backward", "step"):
                    assert (getattr(less.memory, name) <= getattr(more.memory, name)).all()


# ---- the search -----------------------------------------------------------------------------------------------------


def every_plan(profile: ModelProfile, links: ClusterSpec, batch: int) -> list[HybridPlan]:
    """Every plan, also those that cut sequences where the batch could be cut."""
    model = HetuCostModel(profile, links)
    size, layers = links.num_devices, profile.num_layers
    found = []
    for stages in (count for count in (1, 2) if count <= min(size, layers)):
        for microbatches in (count for count in range(stages, batch + 1) if batch % count == 0):
            setting = Setting(size, batch, microbatches, (1,) * (stages - 1) + (layers - stages + 1,))
            rows = [model.strategies(row, setting) for row in range(setting.num_rows)]
            fitting = [[s for s in row if batch // microbatches % s.dp == 0] for row in rows]
            for choice in itertools.product(*fitting):
                ends = {"embedding": choice[0], "head": choice[-1]}
                found.append(HybridPlan(size, batch, microbatches, setting.stages, choice[1:-1], **ends))
    return found


def check_against_every_plan(seed: int, num_devices: int, num_layers: int, batch: int) -> bool:
    """Compares the search with all plans; whether one of its plans cuts sequences."""
    rng = random.Random(seed)
    profile = with_degrees(random_model(rng, num_layers), rng)
    links = random_links(rng, num_devices)
    predictions = [evaluate(plan, profile, links) for plan in every_plan(profile, links, batch)]
    plans = [(p.iteration_time, max(p.stage_memory)) for p in predictions]
    if not plans:
        return False
    peaks = sorted(peak for _, peak in plans)
    options: dict[str, object] = {"global_batch_size": batch, "alternatives": False, "schedule": "1f1b"}
    seen = False
    for budget in (peaks[0], peaks[len(peaks) // 20], peaks[len(peaks) // 4], peaks[-1]):
        best = min(time for time, peak in plans if peak <= budget)
        plan = search(profile, links, memory_budget=budget, **options)  # type: ignore[arg-type]
        assert plan.prediction is not None
        assert plan.prediction.iteration_time == pytest.approx(best, rel=1e-9)
        assert max(plan.prediction.stage_memory) <= budget
        seen |= any(layer.sequence_degree > 1 for layer in plan.layers)
    with pytest.raises(NoFeasiblePlanError) as error:
        search(profile, links, memory_budget=peaks[0] - 1, **options)  # type: ignore[arg-type]
    assert error.value.smallest_feasible_budget == peaks[0]
    return seen


SEEDS = {1: 6, 2: 1, 3: 4}
"""Models by batch size; the more ways to cut a batch, the more plans."""


@pytest.mark.parametrize(("num_devices", "batch"), [(2, 1), (2, 2), (2, 3), (4, 1)])
def test_tiny_models_equal_every_plan(num_devices: int, batch: int) -> None:
    """Time and smallest feasible budget are those over all plans, and some of the plans cut sequences."""
    seen = [
        check_against_every_plan(seed, num_devices, 1 + (num_devices == 2 != batch), batch)
        for seed in range(SEEDS[batch])
    ]
    assert any(seen) or batch == num_devices


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_tiny_models_equal_every_plan(seed: int) -> None:
    """The same on many more models."""
    check_against_every_plan(seed, (2, 4)[seed % 2], 1 + (seed % 4 == 0), (1, 2, 3, 4, 6)[seed % 5])


def check_never_worse(seed: int) -> bool:
    """A model that can cut sequences gets no slower plan, and needs no larger budget; whether any is better."""
    rng = random.Random(seed)
    more = with_degrees(random_model(rng, rng.randint(2, 6)), rng, megatron=True)
    less = without_degrees(more)
    links = random_links(rng, rng.choice((2, 4, 8)))
    options: dict[str, object] = {"global_batch_size": rng.choice((1, 2, 4)), "alternatives": False, "schedule": "1f1b"}
    least = []
    for profile in (more, less):
        try:
            search(profile, links, memory_budget=1, **options)  # type: ignore[arg-type]
        except NoFeasiblePlanError as error:
            least.append(error.smallest_feasible_budget)
        except ValueError:  # so few samples leave devices without work at any budget
            least.append(sys.maxsize)
    assert least[0] <= least[1]
    if least[1] == sys.maxsize:
        return least[0] < sys.maxsize
    better = least[0] < least[1]
    for factor in (1, 1.2, 2):
        times = []
        for profile in (more, less):
            plan = search(profile, links, memory_budget=int(factor * least[1]), **options)  # type: ignore[arg-type]
            assert plan.prediction is not None
            times.append(plan.prediction.iteration_time)
        assert times[0] <= times[1] * (1 + 1e-9)
        better |= times[0] < times[1] * (1 - 1e-9)
    return better


def test_more_degrees_never_make_the_plan_worse() -> None:
    """Random models and clusters; for many of them the plan becomes better."""
    assert sum(check_never_worse(seed) for seed in range(10)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 300, 20))
def test_more_degrees_never_make_many_plans_worse(first: int) -> None:
    """The same on many more models."""
    for seed in range(first, first + 20):
        check_never_worse(seed)


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"context_degrees": ()}, "Ulysses sp4 in 4 blocks"),
        ({"ulysses_degrees": ()}, "context parallel cp4 in 4 blocks"),
        ({"ulysses_degrees": (2,), "context_degrees": (2,)}, "Ulysses sp2 with context parallel cp2 in 4 blocks"),
    ],
)
def test_one_long_sample_is_cut(degrees: dict[str, tuple[int, ...]], words: str) -> None:
    """With nothing to share out by data parallelism, small weights and fast links; the plan's text says so."""
    profile = profile_of(replace(BLOCK, **degrees))
    pins = {"pipeline_parallel_size": 1, "sequence_parallel": False}
    plan = search(profile, cluster(4, 1000), memory_budget="1GiB", global_batch_size=1, **pins)
    assert plan.prediction is not None
    assert {layer.sequence_degree for layer in plan.layers} == {4}
    text = plan.explain()
    assert f"sequence cut: {words}\n" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "sequence parallel" in breakdown(plan, profile, cluster())
    whole = search(without_degrees(profile), cluster(4, 1000), memory_budget="1GiB", global_batch_size=1, **pins)
    assert whole.prediction is not None
    assert plan.prediction.iteration_time < whole.prediction.iteration_time
    assert "sequence" not in whole.explain()
    assert "sp=" in diff(whole, plan) or "cp=" in diff(whole, plan)


def test_megatron_is_told_apart() -> None:
    """In the table, in the line on sequences, and in what changed."""
    plain = HybridPlan.uniform("dp2-tp2", num_layers=3, global_batch_size=2)
    other = replace(plain, layers=(LayerStrategy.parse("dp2-tp2-sequence"), *plain.layers[1:]))
    assert "sequence cut: Megatron tp2 in 1 block\n" in other.explain()
    assert "dp2 tp2 ddp sequence" in other.explain()
    assert diff(plain, other) == "replanned sequence_parallel=false -> sequence_parallel=true/false"


# ---- the simulated step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_prediction_is_the_simulated_time(schedule: Schedule) -> None:
    """Of random plans whose layers cut sequences in all ways, and no stage is busy for longer than it is charged."""
    seen = set()
    for seed in range(20):
        rng = random.Random(f"{schedule} {seed}")
        stages, size = rng.choice((2, 4)), rng.choice((2, 4))
        profile = with_degrees(random_model(rng, 6), rng, megatron=True)
        links = random_cluster(rng, stages * size)
        model = HetuCostModel(profile, links, HetuConstants(overlap_gathers=rng.random() < 0.7))
        cut = (1,) * (stages - 1) + (7 - stages,)
        setting = Setting(stages * size, 4 * 4, 4, cut)
        rows = [rng.choice(model.strategies(row, setting)) for row in range(8)]
        plan = HybridPlan(stages * size, 16, 4, cut, tuple(rows[1:-1]), rows[0], rows[-1], schedule)
        found = simulate(plan, profile, links, constants=model.constants)
        assert found.predicted_time == pytest.approx(found.iteration_time, rel=1e-9)
        for stage in range(stages):
            report = stage_report(model, plan, stage)
            assert found.busy_seconds[stage] == pytest.approx(4 * report.seconds + report.sync, rel=1e-9)
        seen |= {(s.sp > 1, s.cp > 1, s.sequence_parallel, s.recompute) for s in plan.layers}
    assert len(seen) >= 8


# ---- files of Galvatron ---------------------------------------------------------------------------------------------


def test_plan_files_of_galvatron_keep_how_sequences_are_cut(tmp_path: Path) -> None:
    """In its own columns where it has them, and in ours where it has none; others stay as they were."""
    texts = ("dp2-sp2-zero2", "sp2-cp2-zero2", "cp4-zero3", "dp2-tp2-zero2-sequence", "tp4-sequence-recompute", "sp4")
    plan = HybridPlan.uniform("dp4-zero2", num_layers=6, global_batch_size=4)
    plan = replace(plan, layers=tuple(map(LayerStrategy.parse, texts)))
    path = write_galvatron_plan(plan, tmp_path / "plan.json")
    assert read_galvatron_plan(path) == plan
    data = json.loads(path.read_text())
    columns = {name: data[name] for name in ("tp_sizes_enc", "cp_sizes_enc", "use_sp")}
    assert columns == {"tp_sizes_enc": "2,2,1,2,4,4", "cp_sizes_enc": "1,2,4,1,1,1", "use_sp": "1,1,0,0,0,1"}
    assert (data["megatron_sp_enc"], data["sharded_sp_enc"]) == ("0,0,0,1,1,0", "0,1,0,0,0,0")
    # As the release writes it: tensor parallelism without a word on sequences.
    del data["megatron_sp_enc"], data["sharded_sp_enc"]
    path.write_text(json.dumps(data))
    theirs = read_galvatron_plan(path)
    assert not any(layer.sequence_parallel for layer in theirs.layers)
    assert "megatron_sp_enc" not in write_galvatron_plan(theirs, path).read_text()
    mixed = replace(plan, layers=(*plan.layers[:5], LayerStrategy.parse("sp4-zero2")), embedding=LayerStrategy(dp=4))
    with pytest.raises(ValueError, match="ddp and zero2: the format has one type"):
        write_galvatron_plan(replace(mixed, head=mixed.embedding), path)
