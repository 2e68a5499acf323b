"""What the official engine finds is reproduced to the MB and matched or beaten; plan files survive a round trip."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lightning_hetu.planning import (
    GalvatronCostModel,
    HybridPlan,
    LayerStrategy,
    NoFeasiblePlanError,
    evaluate,
    read_galvatron_plan,
    search,
    write_galvatron_plan,
)
from lightning_hetu.planning.enumeration import powers_of_two

sys.path.insert(0, str(Path(__file__).parent))
from galvatron_cases import CASES, DATA, Case  # noqa: E402

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no official profiles in {DATA}; set HETU_GALVATRON_PROFILES to their folder"
)
MIB = 2**20
ROUNDING = 1e-12
SAME_TIME = 1e-8
"""The two fit lines through the measured times with different least-squares routines."""


def official_plan(case: Case, folder: Path) -> HybridPlan:
    """The plan the engine wrote, read from a file as it wrote it."""
    path = folder / f"galvatron_config_{case.model}_1nodes_{case.devices}gpus_per_node_{case.memory_gib}GB_bf16.json"
    path.write_text(json.dumps(case.plan))
    return read_galvatron_plan(path)


@cache
def our_plan(model: str, devices: int, budget: str, batch: int) -> HybridPlan | None:
    """What our search finds, once for both engines; ``None`` if nothing fits."""
    case = next(case for case in CASES if (case.model, case.devices) == (model, devices))
    arguments = {"memory_budget": budget, "global_batch_size": batch, "cost_model": "galvatron3"}
    try:
        return search(*case.load(), alternatives=False, **arguments)  # type: ignore[arg-type]
    except NoFeasiblePlanError:
        return None


@needs_data
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_our_plan_costs_no_more_than_the_official_one(case: Case, tmp_path: Path) -> None:
    """Under the compatible model; where the engine finds nothing, neither do we, and our plan can be handed to it."""
    ours = our_plan(case.model, case.devices, case.budget, case.batch)
    if case.plan is None:
        assert ours is None
        return
    assert ours is not None and ours.prediction is not None
    theirs = evaluate(official_plan(case, tmp_path), *case.load(), "galvatron3")
    assert ours.prediction.iteration_time <= theirs.iteration_time * (1 + ROUNDING)
    assert max(ours.prediction.stage_memory) <= case.memory_gib * 2**30
    path = write_galvatron_plan(ours, tmp_path / "ours.json")
    assert read_galvatron_plan(path) == replace(ours, prediction=None)


@needs_data
@pytest.mark.parametrize("case", [case for case in CASES if case.engine == "3" and case.plan], ids=lambda c: c.name)
def test_the_plan_of_release_3_gets_the_figures_of_release_3(case: Case, tmp_path: Path) -> None:
    """Its time, and its memory to the MB."""
    profile, cluster = case.load()
    # The engine counts changes of the layout when it searches, but not in the time it reports.
    model = GalvatronCostModel(profile, reshard_scale=0.0)
    ours = evaluate(official_plan(case, tmp_path), profile, cluster, model, memory_budget=case.budget)
    assert ours.iteration_time == pytest.approx(case.iteration_time, rel=SAME_TIME)
    assert tuple(size // MIB for size in ours.stage_memory) == case.memory_mib


@needs_data
@pytest.mark.parametrize("name", ["llama2-7b-8x16GB-3", "llama2-7b-4x36GB-3"])
def test_our_plan_costs_no_more_at_the_official_price_of_a_changed_layout(name: str, tmp_path: Path) -> None:
    """Where our plan changes the layout between layers, the 105 times higher price of the engine is tried as well."""
    case = next(case for case in CASES if case.name == name)
    profile, cluster = case.load()
    model = GalvatronCostModel(profile, reshard_scale=1e-7)
    arguments = {"memory_budget": case.budget, "global_batch_size": case.batch, "cost_model": model}
    ours = search(profile, cluster, alternatives=False, **arguments)  # type: ignore[arg-type]
    assert ours.prediction is not None
    theirs = evaluate(official_plan(case, tmp_path), profile, cluster, model)
    assert ours.prediction.iteration_time <= theirs.iteration_time * (1 + ROUNDING)


def random_plan(rng: random.Random) -> HybridPlan:
    """Any plan the format can say: uneven stages, mixed strategies, strided ranks, context parallelism."""
    stages = tuple(rng.randint(1, 4) for _ in range(rng.choice([1, 2, 4])))
    devices = rng.choice([1, 2, 4, 8, 16])
    plain = rng.choice(["ddp", "zero2"])

    def strategy() -> LayerStrategy:
        tp = rng.choice(powers_of_two(devices))
        cp = rng.choice(powers_of_two(devices // tp))
        dp = devices // tp // cp
        kind = rng.choice([plain if dp > 1 else "ddp", "zero3"])
        shape = {"sp": tp} if rng.random() < 0.4 else {"tp": tp}
        return LayerStrategy(dp=dp, cp=cp, dp_type=kind, **shape)

    def layer() -> LayerStrategy:
        return replace(strategy(), recompute=rng.random() < 0.5, tp_consecutive=rng.random() < 0.7)

    vocab = strategy()
    microbatches = rng.choice([1, 2, 4, 8])
    schedule = rng.choice(["1f1b", "gpipe"]) if microbatches >= len(stages) else "gpipe"
    return HybridPlan(
        world_size=devices * len(stages),
        global_batch_size=microbatches * devices * rng.randint(1, 3),
        num_microbatches=microbatches,
        stages=stages,
        layers=tuple(layer() for _ in range(sum(stages))),
        embedding=vocab,
        head=vocab,
        schedule=schedule,
    )


def test_random_plans_are_accepted_back_unchanged(tmp_path: Path) -> None:
    """Written and read again, a plan is the same, whatever it mixes; a second time, the file is the same."""
    rng = random.Random(3)
    seen = set()
    for _ in range(300):
        plan = random_plan(rng)
        path = write_galvatron_plan(plan, tmp_path / "plan.json")
        assert read_galvatron_plan(path) == plan
        text = path.read_text()
        assert write_galvatron_plan(read_galvatron_plan(path), path).read_text() == text
        seen |= {("sp", row.sp > 1) for row in plan.layers} | {("strided", row.tp_consecutive) for row in plan.layers}
        seen |= {("cp", plan.embedding.cp > 1), ("vsp", plan.embedding.sp > 1), ("vtp", plan.embedding.tp > 1)}
        seen |= {("sharded", plan.embedding.dp_type == "zero3"), ("schedule", plan.schedule)}
        seen |= {("even", len(set(plan.stages)) == 1)}
    assert len(seen) == 16  # both values of each


def test_the_number_of_devices_comes_from_the_file_before_its_name(tmp_path: Path) -> None:
    """What is given counts most, then the file's own entry, then its name."""
    plan = HybridPlan.uniform("dp4", num_layers=2, global_batch_size=8)
    path = write_galvatron_plan(plan, tmp_path / "galvatron_config_x_2nodes_8gpus_per_node.json")
    assert read_galvatron_plan(path).world_size == 4
    assert read_galvatron_plan(path, world_size=8).layers[0].dp == 8
    data = json.loads(path.read_text())
    del data["world_size"]
    path.write_text(json.dumps({**data, "global_bsz": 16}))
    assert read_galvatron_plan(path).world_size == 16


REFUSED = {
    "strided": {"tp_consecutive": False},
    "recompute": {"recompute": True},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_embedding_and_head_cannot_have_in_the_format_is_refused(change: dict[str, bool], tmp_path: Path) -> None:
    """The format has neither flag for them; a file is not written."""
    plan = HybridPlan.uniform("dp2-tp2", num_layers=2, global_batch_size=2)
    vocab = replace(plan.embedding, **change)
    with pytest.raises(ValueError, match=r"^plan.embedding=dp2-tp2-ddp-.*: the format cannot say that, .* as dp2"):
        write_galvatron_plan(replace(plan, embedding=vocab, head=vocab), tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_a_type_of_data_parallelism_over_sequence_ranks_alone_is_refused(tmp_path: Path) -> None:
    """For embedding and head without data parallelism, a file knows replicated and fully sharded states only."""
    plan = HybridPlan.uniform("sp4-zero2", num_layers=2, global_batch_size=2)
    with pytest.raises(ValueError, match=r"plan.embedding=sp4-zero2: the format cannot say that.*sp4-ddp"):
        write_galvatron_plan(plan, tmp_path / "plan.json")
    sharded = HybridPlan.uniform("sp4-zero3", num_layers=2, global_batch_size=2)
    assert read_galvatron_plan(write_galvatron_plan(sharded, tmp_path / "plan.json")) == sharded


MALFORMED = {
    "missing": ({"dp_types_enc": None}, r"entry 'dp_types_enc' is missing"),
    "short": ({"use_sp": "0,0"}, r"use_sp has 2 entries, but tp_sizes_enc has 4"),
    "text": ({"tp_sizes_enc": "1,two,1,1"}, r"tp_sizes_enc\[1\]='two': expected an integer of at least 1"),
    "empty": ({"tp_sizes_enc": ""}, r"tp_sizes_enc\[0\]='': expected"),
    "zero": ({"tp_sizes_enc": "1,0,1,1"}, r"tp_sizes_enc\[1\]=0: expected an integer of at least 1"),
    "negative": ({"tp_sizes_enc": "1,-2,1,1"}, r"tp_sizes_enc\[1\]='-2': expected"),
    "fraction": ({"chunks": 1.5}, r"chunks=1.5: expected an integer"),
    "object": ({"checkpoint": {"0": 1}}, r"checkpoint\[0\]=.*: expected 0 or 1"),
    "flag": ({"dp_types_enc": "0,1,2,0"}, r"dp_types_enc\[2\]=2: expected 0 or 1"),
    "degree": ({"tp_sizes_enc": "1,8,1,1"}, r"tp_sizes_enc\[1\]: pp_deg=2 times a degree of 8 does not divide"),
    "odd degree": ({"tp_sizes_enc": "1,3,1,1"}, r"tp_sizes_enc\[1\]: pp_deg=2 times a degree of 3 does not divide"),
    "vocab": ({"vtp": 16}, r"vtp: pp_deg=2 times a degree of 16 does not divide world_size=8"),
    "vocab zero": ({"vtp": 0}, r"vtp=0: expected an integer of at least 1"),
    "vocab flag": ({"vsp": 2}, r"vsp=2: expected 0 or 1"),
    "stages": ({"pp_deg": 4}, r"pp_deg=4, but pp_division='1,3' has 2 entries"),
    "layers": ({"pp_division": "1,4"}, r"plan.stages=\[1, 4\] holds 5 blocks, but plan.layers has 4"),
    "batch": ({"global_bsz": 9}, r"plan.global_batch_size=9 is not divisible by plan.num_microbatches=2"),
    "rounded": ({"global_bsz": 10}, r"a microbatch of 5 samples .* cannot be split over dp=4"),
    "schedule": ({"pipeline_type": "zb"}, r"pipeline_type='zb': expected one of pipedream_flush, gpipe"),
    "kind": ({"default_dp_type": "zero3"}, r"default_dp_type='zero3': expected one of ddp, zero2"),
    "experts": ({"ep_sizes_enc": "1,2,1,1"}, r"ep_sizes_enc='1,2,1,1': expert parallelism has no place"),
    "world": ({"world_size": "8"}, r"world_size='8': expected an integer of at least 1"),
}


@pytest.mark.parametrize(("change", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_are_refused_in_one_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    """The line names the file, the entry, its value and what was expected."""
    plan = HybridPlan.uniform("dp4", num_layers=4, global_batch_size=8, num_microbatches=2, stages=[1, 3])
    path = write_galvatron_plan(plan, tmp_path / "plan.json")
    assert read_galvatron_plan(path) == plan
    data = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    with pytest.raises(ValueError, match=message) as error:
        read_galvatron_plan(path)
    assert "\n" not in str(error.value) and "plan.json" in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""], ids=["cut", "list", "binary", "empty"])
def test_files_that_are_no_json_object_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    """The same for what is not even such a file."""
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.json: (not JSON|expected an object)") as error:
        read_galvatron_plan(tmp_path / "plan.json", world_size=8)
    assert "\n" not in str(error.value)
