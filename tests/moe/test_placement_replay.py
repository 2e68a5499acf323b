"""Replays of drifting traces: how balanced ranks are, how long steps take, and what is printed and drawn of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_hetu.moe.placement import (
    Placement,
    PlacementCostModel,
    Replay,
    balance_ratio,
    compare,
    comparison_table,
    drifting_trace,
    load_trace,
    replay,
    save_trace,
)
from lightning_hetu.moe.placement.__main__ import main
from lightning_hetu.moe.placement.picture import save_heat_map

START = Placement.contiguous(16, 4, 6)
SKIP = 50  # steps of 200 that do not count
LIMITS = {(0.05, "even"): 1.10, (0.15, "even"): 1.25, (0.05, "flow"): 1.03, (0.15, "flow"): 1.12}
"""Mean balance ratio at most, by drift and split."""


def model() -> PlacementCostModel:
    return PlacementCostModel.for_experts(2048, 768, "4xH100-80GB")


@pytest.mark.parametrize(("drift", "split"), LIMITS)
def test_drifting_loads_stay_balanced(drift: float, split: str) -> None:
    trace = drifting_trace(drift=drift, seed=1)
    found = replay(trace, START, None, split=split)  # type: ignore[arg-type]
    assert found.mean_ratio(SKIP) <= LIMITS[drift, split]


@pytest.mark.slow
@pytest.mark.parametrize("max_ops", [None, 4, 8])
@pytest.mark.parametrize(("drift", "split"), LIMITS)
def test_drifting_loads_stay_balanced_for_many_seeds(drift: float, split: str, max_ops: int | None) -> None:
    ratios = []
    for seed in range(8):
        trace = drifting_trace(drift=drift, seed=seed)
        found = replay(trace, START, None, split=split, max_ops=max_ops)  # type: ignore[arg-type]
        ratios.append(found.mean_ratio(SKIP))
    assert np.mean(ratios) <= LIMITS[drift, split]


@pytest.mark.slow
@pytest.mark.parametrize("drift", [0.05, 0.15])
def test_steps_are_faster_than_without_and_than_with_rare_new_placements(drift: float) -> None:
    for seed in range(6):
        trace = drifting_trace(drift=drift, seed=seed, tokens=131072)
        found = compare(trace, START, model(), policies=("none", "eplb", "flexmoe"))
        static = found["none", "even"].mean_seconds()
        for split in ("even", "flow"):
            seconds = found["flexmoe", split].mean_seconds()  # type: ignore[index]
            assert seconds <= found["eplb", split].mean_seconds()  # type: ignore[index]
            # What is left of a step with all ranks equally full bounds the gain.
            assert static / seconds >= min(1.5, 0.95 * found["none", "even"].mean_ratio())


def test_a_replay_is_priced_step_by_step() -> None:
    trace = drifting_trace(steps=31, drift=0.15, seed=3, tokens=131072)
    found = replay(trace, START, model(), split="even")
    assert found.placements[0] == START and found.placements[-1] != START
    changed = [step for step in range(1, 31) if found.placements[step] != found.placements[step - 1]]
    assert changed and all(step % 5 == 0 for step in changed)
    assert [step for step in range(31) if found.adjust_seconds[step] > 0] == changed
    for step in (0, 12, 30):
        held = found.placements[step].matrix
        fractions = held / held.sum(axis=1, keepdims=True)
        loads = trace[step].sum(axis=0) @ fractions
        assert found.rank_loads[step] == pytest.approx(loads)
        assert found.ratios[step] == pytest.approx(balance_ratio(loads))
        seconds = model().step_seconds(trace[step].astype(float), fractions, found.placements[step])
        assert found.step_seconds[step] == pytest.approx(seconds.total)
    assert found.mean_seconds() == pytest.approx((found.step_seconds.sum() + found.adjust_seconds.sum()) / 31)


def test_fractions_of_the_last_check_are_kept_if_asked_for() -> None:
    trace = drifting_trace(steps=60, drift=0.15, seed=0)
    by_step, by_check = (
        replay(trace, START, None, refresh=refresh).mean_ratio(10)  # type: ignore[arg-type]
        for refresh in ("step", "check")
    )
    static = replay(trace, START, None, policy="none").mean_ratio(10)
    assert by_step < by_check < static


def test_a_threshold_and_no_operations_leave_things_as_they_are() -> None:
    trace = drifting_trace(steps=30, seed=0)
    for options in ({"threshold": 99.0}, {"max_ops": 0}, {"policy": "none"}):
        found = replay(trace, START, model(), **options)  # type: ignore[arg-type]
        assert found.num_ops == 0 and found.bytes_moved == 0 and set(found.placements) == {START}


def test_shadows_last_for_one_step() -> None:
    quiet, loud = np.full((4, 16), 20000), np.full((4, 16), 20000)
    loud[:, 5] = 400000
    found = replay(np.stack([quiet, loud, quiet]), START, model(), policy="shadow")
    assert found.placements[0] == found.placements[2] == START
    assert found.placements[1].holders(5) == (0, 1, 2, 3)
    assert found.adjust_seconds[1] > 0 and found.adjust_seconds[2] == 0


def test_traces_are_drawn_as_described() -> None:
    trace = drifting_trace(steps=7, ranks=3, experts=5, tokens=1000, seed=1)
    assert trace.shape == (7, 3, 5) and (trace.sum(axis=2) == 1000).all()
    assert (trace == drifting_trace(steps=7, ranks=3, experts=5, tokens=1000, seed=1)).all()
    assert (trace != drifting_trace(steps=7, ranks=3, experts=5, tokens=1000, seed=2)).any()
    still = drifting_trace(steps=400, drift=0.0, zipf=1.0, experts=4, tokens=1000, seed=0).sum(axis=(0, 1))
    assert sorted(still / still.max()) == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1], rel=0.02)


def test_traces_go_through_files(tmp_path: Path) -> None:
    trace = drifting_trace(steps=5, seed=0)
    path = save_trace(trace, tmp_path / "trace.npz")
    assert (load_trace(path) == trace).all()
    np.savez(tmp_path / "other.npz", something=trace)
    with pytest.raises(ValueError, match="expected an array named counts"):
        load_trace(tmp_path / "other.npz")
    for wrong in (trace[0], trace * 0.5, -trace, trace[:0]):
        with pytest.raises(ValueError, match="trace"):
            save_trace(wrong, tmp_path / "wrong.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"interval": 0}, "interval=0"), ({"window": 0}, "window=0"), ({"policy": "odd"}, "policy='odd'")],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(drifting_trace(steps=7), START, None, **options)


def replayed() -> tuple[np.ndarray, Replay]:
    trace = drifting_trace(steps=40, drift=0.15)
    return trace, replay(trace, START, None)


def test_a_heat_map_has_a_row_for_every_expert_and_rank(tmp_path: Path) -> None:
    trace, found = replayed()
    text = save_heat_map(trace, found, tmp_path / "map.svg").read_text()
    for words in ("tokens of experts", "ranks that hold them", "tokens of ranks", f"{found.num_ops} operations"):
        assert words in text
    assert text.count("<polygon") >= 16 + 16 + 4
    with pytest.raises(ValueError, match="expected the 40"):
        save_heat_map(trace[:7], found, tmp_path / "map.svg")
    with pytest.raises(ValueError, match="expected a name that ends"):
        save_heat_map(trace, found, tmp_path / "map.gif")


def test_a_heat_map_is_drawn_as_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert save_heat_map(*replayed(), tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_has_a_line_per_policy() -> None:
    trace = drifting_trace(steps=20, drift=0.15, tokens=131072)
    lines = comparison_table(compare(trace, START, model())).splitlines()
    assert [line.split("|")[0].strip() for line in lines[2:]] == [
        "none", "shadow", "eplb", "eplb", "flexmoe", "flexmoe",
    ]  # fmt: skip
    assert "1.00x" in lines[2]


def test_the_command_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_trace(drifting_trace(steps=15, ranks=2, experts=8), tmp_path / "trace.npz")
    picture = tmp_path / "map.svg"
    assert main(["--trace", str(path), "--cluster", "2xA100-40GB", "--slots", "5", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "15 steps, 8 experts on 2 ranks of 5 slots, A100-40GB" in out and "flexmoe" in out and picture.exists()


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", str(tmp_path / "none.npz")]) == 1
    assert main(["--cluster", "8xH100-80GB"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "none.npz" in lines[0] and "expected the 4 ranks" in lines[1]
