"""Plans survive JSON, refuse contradictions, and can be read by people."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_hetu.planning import (
    ClusterSpec,
    HybridPlan,
    LayerProfile,
    LayerStrategy,
    ModelProfile,
    diff,
    search,
    write_galvatron_plan,
)

LAYER = LayerProfile(
    "block",
    parameter_bytes=2**24,
    tp_parameter_bytes=2**24,
    forward_time=((1, 1e-3),),
    activation_bytes={1: 2**22},
    boundary_bytes=2**18,
    tp_degrees=(1, 2),
)
PROFILE = ModelProfile((LAYER,), (0,) * 6, replace(LAYER, name="embedding"), replace(LAYER, name="head"))
CLUSTER = ClusterSpec.from_bandwidth(4, gigabytes_per_second=10)


def mixed_plan() -> HybridPlan:
    return HybridPlan(
        world_size=8,
        global_batch_size=16,
        num_microbatches=4,
        stages=(3, 2),
        layers=tuple(
            LayerStrategy.parse(text)
            for text in ("dp4-zero3", "dp4-zero3", "dp2-tp2-zero2-recompute", "tp4", "dp2-sp2-zero3")
        ),
        embedding=LayerStrategy(dp=4, dp_type="ddp"),
        head=LayerStrategy(dp=2, tp=2, dp_type="zero2"),
    )


def test_a_searched_plan_survives_json(tmp_path: Path) -> None:
    """Everything is read back, prediction and alternatives included, from text and from a file."""
    plan = search(PROFILE, CLUSTER, memory_budget="200MiB", global_batch_size=8)
    assert plan.prediction is not None and plan.rejected
    assert HybridPlan.from_json(plan.to_json()) == plan
    assert HybridPlan.load(plan.save(tmp_path / "deep" / "plan.json")) == plan


def test_a_plan_by_hand_survives_json() -> None:
    """Every kind of strategy is read back; fields of a strategy may be given one by one."""
    plan = mixed_plan()
    assert HybridPlan.from_json(plan.to_json()) == plan
    data = plan.to_dict()
    data["layers"][0] = {"dp": 4, "dp_type": "zero3"}
    assert HybridPlan.from_dict(data) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "plan.version=2"),
        ({"world_size": None}, "plan.world_size=None"),
        ({"world_size": True}, "plan.world_size=True"),
        ({"global_batch_size": 18}, "plan.global_batch_size=18 is not divisible"),
        ({"num_microbatches": 1}, "fewer than 2 stages"),
        ({"stages": [4, 2]}, "holds 6 blocks, but plan.layers has 5"),
        ({"stages": [5, 0]}, "at least one block"),
        ({"stages": 2}, "malformed"),
        ({"schedule": "zb"}, "plan.schedule='zb'"),
        ({"embedding": "dp8"}, "plan.embedding=dp8-ddp uses 8 devices, but a stage has 4"),
        ({"head": "dp2-tp2-what"}, "unknown part 'what'"),
        ({"layers": ["dp4", "dp4", "dp4", "dp4", 4]}, "expected text such as"),
        ({"layers": ["dp4", "dp4", "dp4", "dp4", {"dq": 4}]}, "has no field 'dq'"),
        ({"layers": ["dp4", "dp4", "dp4", "dp4", "tp2-sp2"]}, "exclude each other"),
        ({"num_microbatches": 8}, "cannot be split over dp=4"),
        ({"prediction": {"time": 1}}, "malformed"),
        ({"prediction": 5}, "malformed"),
        ({"rejected": [5]}, "malformed"),
        ({"colour": "red"}, "unknown colour"),
        ({"virtual_stages": 0}, "plan.virtual_stages=0"),
        ({"virtual_stages": "2"}, "plan.virtual_stages='2'"),
        ({"virtual_stages": 3}, "plan.stages has 2 entries: expected a multiple of plan.virtual_stages=3"),
        ({"stages": [3, 1, 1], "virtual_stages": 3}, "plan.virtual_stages=3: schedule='1f1b' has one stage per rank"),
        ({"schedule": "gpipe", "virtual_stages": 2}, "plan.virtual_stages=2: schedule='gpipe' has one stage per rank"),
        ({"schedule": "interleaved_1f1b"}, "plan.virtual_stages=1: schedule='interleaved_1f1b' needs at least 2"),
        ({"schedule": "interleaved_1f1b", "virtual_stages": 2}, "expected at least 2 ranks"),
        ({"schedule": "zero_bubble", "stages": [5]}, "expected at least 2 ranks"),
        ({"schedule": "zero_bubble"}, r"plan.layers\[0\]=dp4-zero3: schedule='zero_bubble' .* zero2 or ddp"),
    ],
)
def test_malformed_plans_are_one_line_errors(change: dict[str, Any], message: str) -> None:
    """A plan file that was edited by hand is checked; the error names what is wrong."""
    data = {**mixed_plan().to_dict(), **change}
    with pytest.raises(ValueError, match=message) as error:
        HybridPlan.from_json(json.dumps(data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zero_bubble"])
def test_several_stages_per_rank(schedule: Any, tmp_path: Path) -> None:
    """Stages go round the ranks; files say so, older ones need not."""
    plan = HybridPlan.uniform(
        "dp2", num_layers=8, global_batch_size=8, num_microbatches=4, stages=4, schedule=schedule, virtual_stages=2
    )
    assert (plan.world_size, plan.pipeline_parallel_size, plan.devices_per_stage) == (4, 2, 2)
    assert [list(plan.stages_of_rank(rank)) for rank in range(2)] == [[0, 2], [1, 3]]
    assert plan.stage_bounds == ((0, 2), (2, 4), (4, 6), (6, 8))
    assert HybridPlan.load(plan.save(tmp_path / "plan.json")) == plan
    assert "virtual_stages" not in mixed_plan().to_dict()
    text = plan.explain()
    assert f"4 stages of 2 blocks, 2 per rank, schedule {schedule}" in text
    assert "no prediction: written by hand" in text
    table = [line.split("|")[1].strip() for line in text.splitlines() if "|" in line]
    assert table == ["stage", "0", "0", "1", "2", "3", "3"]
    with pytest.raises(ValueError, match="plan.schedule=.*: the format has 1f1b and gpipe"):
        write_galvatron_plan(plan, tmp_path / "galvatron.json")
    with pytest.raises(ValueError, match="plan.num_microbatches=1: expected a multiple of 2 pipeline ranks"):
        replace(plan, num_microbatches=1)
    with pytest.raises(ValueError, match="plan.world_size=3 is not divisible by 2 pipeline ranks"):
        replace(plan, world_size=3)
    with pytest.raises(ValueError, match=r"uses 4 devices, but a stage has 2 .*4 stages, 2 per rank\)"):
        replace(plan, head=LayerStrategy(dp=4))


def test_missing_fields_and_broken_files_are_named(tmp_path: Path) -> None:
    """What lacks, what is no JSON and what is no plan says so, with the file's name."""
    data = mixed_plan().to_dict()
    del data["layers"]
    with pytest.raises(ValueError, match="the plan lacks layers"):
        HybridPlan.from_dict(data)
    with pytest.raises(ValueError, match="the plan is not JSON"):
        HybridPlan.from_json("{")
    with pytest.raises(ValueError, match="got list"):
        HybridPlan.from_json("[]")
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="plan.json"):
        HybridPlan.load(path)


def test_the_table_shows_runs_stages_budget_and_alternatives() -> None:
    """Equal neighbors share a line; every stage has its total against the budget; lines are at most 110 wide."""
    plan = search(
        PROFILE, CLUSTER, memory_budget="250MiB", global_batch_size=8, stages=2, num_microbatches=2, schedule="1f1b"
    )
    assert plan.prediction is not None
    text = plan.explain()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0] == "hybrid-parallel plan for 4 devices: 2 stages of 4 and 2 blocks, schedule 1f1b"
    assert "8 samples in 2 microbatches of 4" in lines[1]
    assert "samples/s" in lines[2] and "budget 250 MiB per device" in lines[2]
    assert text.count("of budget)") == 2
    assert "alternatives" in text and all(item.reason.split()[0] in text for item in plan.rejected)
    shown = 0
    for line in lines:
        cells = line.split(" | ")
        name = cells[0].split()
        if name and name[0] in ("block", "blocks") and len(cells) > 2:
            first, _, last = name[1].partition("-")
            run = range(int(first), int(last or first) + 1)
            assert {str(plan.layers[i]).replace("-", " ") for i in run} == {cells[2].strip()}
            assert {plan.stage_of(i) for i in run} == {int(cells[1])}
            shown += len(run)
    assert shown == plan.num_layers


def test_a_plan_by_hand_is_explained_without_numbers() -> None:
    """Without a prediction there is no time and no memory, but the layout."""
    text = mixed_plan().explain()
    assert "written by hand" in text
    assert "blocks 0-1" in text and "dp2 tp2 zero2 recompute" in text and "memory" not in text
    assert "2 stages of 3 and 2 blocks" in text
    small = HybridPlan.uniform("dp1", num_layers=2, global_batch_size=2, stages=2, num_microbatches=2)
    assert "2 stages of 1 block," in small.explain()


def test_long_alternatives_are_wrapped() -> None:
    """No line grows beyond the table's width, whatever the alternatives say."""
    plan = search(PROFILE, CLUSTER, memory_budget="200MiB", global_batch_size=8)
    long = replace(plan.rejected[0], description="word " * 60)
    text = replace(plan, rejected=(long,)).explain()
    assert max(map(len, text.splitlines())) <= 110 and text.count("word") == 60


def test_a_diff_names_what_changed_and_nothing_else() -> None:
    """One line with the changed properties, old to new."""
    old = HybridPlan.uniform("dp2-zero3", num_layers=4, global_batch_size=8, num_microbatches=2, stages=2)
    new = HybridPlan.uniform("dp4-zero3", num_layers=4, global_batch_size=8, num_microbatches=2)
    text = diff(old, new)
    assert text == "replanned pp=2, dp=2 -> pp=1, dp=4"
    assert diff(old, old) == "the plan is unchanged"
    assert diff(old, replace(old, schedule="gpipe")) == "replanned schedule=1f1b -> schedule=gpipe"
    assert diff(old, replace(old, stages=(1, 3))) == "replanned stages=2/2 -> stages=1/3"
