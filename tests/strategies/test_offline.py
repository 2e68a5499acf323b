"""Plans for clusters known by name: nothing is run, and the model may be larger than this machine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lightning_hetu import cli
from lightning_hetu.planning import HybridPlan, format_bytes
from lightning_hetu.planning.osdp import OSDPPlan
from lightning_hetu.strategies._offline import OfflinePlan, Target, comparison

RECIPE = str(Path(__file__).parents[2] / "recipes" / "gpt_auto.yaml")


def plan(folder: Path, *words: str) -> None:
    """The command ``plan`` on a text of its own."""
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(20000)), encoding="utf-8")
    cli.run(
        [
            *("plan", "--config", RECIPE, "--data.path", str(text), "--data.cache_dir", str(folder / "tokens")),
            *("--trainer.logger.save_dir", str(folder / "runs"), *words),
        ]
    )


LARGE = (
    *("--trainer.precision", "bf16-mixed", "--model.vocab_size", "50257", "--model.max_seq_len", "2048"),
    *("--model.num_layers", "32", "--model.num_heads", "64", "--model.dim", "8192", "--data.seq_len", "2048"),
    *("--data.batch_size", "64"),
)


def test_a_model_larger_than_this_machine_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """26 billion parameters, of which not one is made."""
    out = tmp_path / "plan.json"
    files = ("--out", str(out), "--picture", str(tmp_path / "plan.svg"))
    plan(tmp_path, *LARGE, "--cluster", "2x8xH100-80GB", *files, "--explain", "true")
    text = capsys.readouterr().out
    assert "hybrid-parallel plan for 16 devices" in text
    assert "alternatives" in text
    assert "bytes at the fullest moment" in text and "seconds of one microbatch" in text
    found = HybridPlan.load(out)
    assert "16 devices" in (tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert found.world_size == 16 and found.global_batch_size == 64
    assert found.prediction is not None and max(found.prediction.stage_memory) <= 0.9 * 80e9
    (line,) = [line for line in text.splitlines() if line.startswith("2x8xH100-80GB: ")]
    utilization = float(line.split("utilization ")[1].split("%")[0]) / 100
    # 6 operations per parameter and token; per layer, width, token and key 4 in forward and 10 in FlashAttention's
    # backward, for the half of the keys that a causal layer sees
    parameters = 32 * 12 * 8192**2 + 50257 * 8192
    operations = (6 * parameters + 14 / 2 * 32 * 8192 * 2048) * 2048 * 64
    assert utilization == pytest.approx(operations / found.prediction.iteration_time / (16 * 989e12), rel=0.005)
    assert 0.3 < utilization < 0.6


def test_clusters_and_budgets_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(tmp_path, "--compare", "[8xA100-80GB, 4xH100-80GB@1GiB, 2xTITAN-RTX-24GB@1MiB]")
    lines = [line for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert lines[0].split(" | ")[0].strip() == "cluster"
    rows = {line.split(" | ")[0].strip(): line for line in lines[1:]}
    assert set(rows) == {"8xA100-80GB", "4xH100-80GB", "2xTITAN-RTX-24GB"}
    assert "1 GiB" in rows["4xH100-80GB"] and format_bytes(72e9) in rows["8xA100-80GB"]
    assert "none fits: smallest feasible memory_budget is" in rows["2xTITAN-RTX-24GB"]


def test_targets_are_read() -> None:
    assert Target.parse("8xA100-80GB") == Target("8xA100-80GB", 72 * 10**9)
    assert Target.parse("8xA100-80GB", "40GB") == Target("8xA100-80GB", 40 * 10**9)
    assert Target.parse("8xA100-80GB @ 30GB", "40GB") == Target("8xA100-80GB", 30 * 10**9)
    with pytest.raises(ValueError, match="memory_budget='much'"):
        Target.parse("8xA100-80GB@much")
    with pytest.raises(ValueError, match="H100-80GB"):
        Target.parse("8xV100")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cluster", "8xV100"), "V100"),
        (("--memory_budget", "1GiB"), "memory_budget=1GiB: expected with cluster"),
        (("--picture", "plan.jpg"), "picture='plan.jpg': expected a name that ends in"),
        (("--trainer.strategy.pins", "{tq: 2}"), "pin 'tq' is unknown"),
        (("--trainer.strategy.pins", "{sp: [0]}"), "sp=0: expected an integer of at least 1"),
        (("--cluster", "2xA100-80GB", "--memory_budget", "1MiB"), "the smallest feasible memory_budget is"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, *words)


def test_the_fastest_is_first() -> None:
    """A target without a plan comes last, with what it lacks."""

    def item(name: str, seconds: float | None) -> OfflinePlan:
        found = None
        if seconds is not None:
            data = HybridPlan.uniform("dp2-zero3", num_layers=2, global_batch_size=4).to_dict()
            prediction = {"iteration_time": seconds, "stage_times": [seconds], "stage_memory": [1 << 20]}
            found = HybridPlan.from_json(json.dumps({**data, "prediction": prediction}))
        return OfflinePlan(Target(name, 1 << 30), found, None if found else "x; the smallest is 5.", None, 10.0, 100.0)

    items = [item("slow", 2.0), item("none", None), item("fast", 0.5)]
    table = comparison(items).splitlines()
    assert [line.split()[0] for line in table[2:]] == ["fast", "slow", "none"]
    assert table[2].split(" | ")[3].strip() == "8" and table[2].split(" | ")[5].strip() == "40.0%"
    assert "none fits: smallest is 5" in table[4]
    assert items[1].seconds == math.inf and items[1].utilization == 0.0


def test_osdp_is_planned_without_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same recipe as data parallelism decided per operator: 26 billion parameters, table, picture and JSON."""
    out, picture = tmp_path / "plan.json", tmp_path / "memory.svg"
    words = ("--strategy", "osdp", "--cluster", "8x8xH100-80GB", "--out", str(out), "--picture", str(picture))
    plan(tmp_path, *LARGE, *words, "--compare", "[8x8xH100-80GB@30GiB, 8x8xH100-80GB@8GiB]")
    text = capsys.readouterr().out
    found = OSDPPlan.load(out)
    assert text.startswith(found.explain())
    assert found.world_size == 64 and found.batch_size == 1
    assert max(point.total for point in found.points) == found.peak_memory <= 0.9 * 80e9
    assert "limit" in picture.read_text(encoding="utf-8")
    # Everything sharded needs the states, 16 bytes per parameter, over 64 devices, and the activations of a sample.
    parameters = sum(operator.count for operator in found.operators)
    assert parameters == pytest.approx(32 * 12 * 8192**2 + 2 * 50257 * 8192, rel=0.01)
    table = text[len(found.explain()) :]
    wide, tight = table.index("30 GiB"), table.index("8 GiB")
    assert "none fits: the smallest feasible memory_limit is" in table[tight:]
    assert "none fits" not in table[wide:tight]


def test_a_strategy_to_plan_for_needs_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="strategy=osdp: expected with cluster or compare"):
        plan(tmp_path, "--strategy", "osdp")
