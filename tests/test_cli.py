"""The command line: what it leaves behind, and how it fails. Every case is a real run of two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent


def config(folder: Path, **changes: Any) -> Path:
    """A small version of the recipe, on text of its own."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(3000)), encoding="utf-8")
    with (ROOT / "recipes" / "gpt_auto.yaml").open(encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    recipe["trainer"].update(
        devices=2, max_steps=4, val_check_interval=2, log_every_n_steps=1, enable_progress_bar=False
    )
    recipe["trainer"]["logger"]["init_args"].update(save_dir=str(folder / "runs"), version=0)
    strategy = recipe["trainer"]["strategy"]["init_args"]
    strategy.update(memory_budget="20MiB", profile_cache=str(folder / "profiles"))
    recipe["model"]["init_args"].update(max_seq_len=16, num_layers=4, dim=32, num_heads=2)
    recipe["data"]["init_args"].update(path=str(text), seq_len=16, batch_size=8, cache_dir=str(folder / "tokens"))
    for key, value in changes.items():
        at = recipe
        *parents, last = key.split("__")
        for parent in parents:
            at = at[parent]
        at[last] = value
    path = folder / f"config-{abs(hash(json.dumps(changes, sort_keys=True, default=str)))}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def start(*words: str | Path) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment.pop("MASTER_PORT", None)
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_hetu.cli", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def command(*words: str | Path, timeout: float = 120) -> tuple[int, str, str]:
    """Exit status, output and errors; a run that takes too long fails the test."""
    process = start(*words)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{words} did not end within {timeout} s:\n{out}\n{err}")
    return process.returncode, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    status, out, err = command("fit", "--config", config(folder))
    assert status == 0, err
    (folder / "log.txt").write_text(out + err, encoding="utf-8")
    return folder


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


def failed_with_one_line(result: tuple[int, str, str], *words: str) -> None:
    status, _, err = result
    assert status != 0
    assert len(errors(err)) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in errors(err)[0], errors(err)[0]


def test_fit_leaves_plan_metrics_picture_and_checkpoint(trained: Path) -> None:
    """A run shows its plan and leaves everything needed to look at it and to resume it."""
    run = trained / "runs" / "gpt_auto" / "version_0"
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert plan["world_size"] == 2 and plan["global_batch_size"] == 8
    assert "val_loss" in (run / "metrics.csv").read_text(encoding="utf-8").splitlines()[0]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints" / "last.ckpt" / ".metadata").is_file()
    log = (trained / "log.txt").read_text(encoding="utf-8")
    assert "hybrid-parallel plan for 2 devices" in log
    assert "bigram_loss_per_character" in log
    assert "step time: measured" in log and "peak memory per stage: measured" in log


def test_resume_validate_and_consolidate(trained: Path, tmp_path: Path) -> None:
    """The checkpoint resumes, evaluates, and becomes one file with the same weights in it."""
    checkpoint = trained / "runs" / "gpt_auto" / "version_0" / "checkpoints" / "last.ckpt"
    longer = config(trained, trainer__max_steps=6, trainer__logger__init_args__version=1)
    status, _, err = command("fit", "--config", longer, "--ckpt_path", checkpoint)
    assert status == 0, err
    rows = (trained / "runs" / "gpt_auto" / "version_1" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    step = rows[0].split(",").index("step")
    assert [int(row.split(",")[step]) for row in rows[1:]][0] == 4, "resumed at the step after the last one"
    status, out, err = command("validate", "--config", config(trained), "--ckpt_path", checkpoint)
    assert status == 0 and "val_loss" in out, err
    one = tmp_path / "model.ckpt"
    status, _, err = command("consolidate", checkpoint, one)
    assert status == 0, err
    loaded = torch.load(one, weights_only=True)
    assert loaded["global_step"] == 4
    assert {"model.embedding.token.weight", "model.blocks.3.mlp.down.weight"} <= set(loaded["state_dict"])
    failed_with_one_line(command("consolidate", checkpoint, one), str(one), "exists")


def test_plan_and_profile(trained: Path, tmp_path: Path) -> None:
    """``plan`` shows and writes the plan without training, ``profile`` writes what was measured."""
    status, out, err = command("plan", "--config", config(trained), "--out", tmp_path / "plan.json")
    assert status == 0, err
    assert "hybrid-parallel plan" in out + err
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["world_size"] == 2
    status, _, err = command("profile", "--config", config(trained), "--out", tmp_path / "profiles")
    assert status == 0, err
    assert {file.name for file in (tmp_path / "profiles").iterdir()} == {"model.json", "cluster.json"}


def test_print_config(trained: Path) -> None:
    """``--print_config`` gives a complete recipe that is valid again."""
    status, out, err = command("fit", "--config", config(trained), "--print_config")
    assert status == 0, err
    printed = yaml.safe_load(out)
    assert printed["trainer"]["strategy"]["class_path"] == "lightning_hetu.AutoHybridParallelStrategy"
    assert printed["trainer"]["strategy"]["init_args"]["plan"] == "auto"


def test_budget_too_small(trained: Path) -> None:
    """A budget that nothing fits names the smallest that would do, and that one works."""
    result = command("plan", "--config", config(trained, trainer__strategy__init_args__memory_budget="100KiB"))
    failed_with_one_line(result, "memory_budget", "100 KiB", "smallest")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("trainer__strategy__init_args__memory_budget", "potatoes", ["memory_budget='potatoes'", "20GiB"]),
        ("data__init_args__path", "/nowhere/text", ["path='/nowhere/text'"]),
        pytest.param(
            "trainer__strategy__init_args__plan",
            "/nowhere/plan.json",
            ["plan='/nowhere/plan.json'"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_options(trained: Path, option: str, value: str, words: list[str]) -> None:
    """An option that cannot be is one line for all processes, whichever of them found it."""
    failed_with_one_line(command("fit", "--config", config(trained, **{option: value})), *words)


def test_devices_do_not_match_the_plan(trained: Path) -> None:
    """A plan for another number of devices is refused."""
    plan = json.loads((trained / "runs" / "gpt_auto" / "version_0" / "plan.json").read_text(encoding="utf-8"))
    plan.update(world_size=4, stages=[4], num_microbatches=1, embedding="dp4", layers=["dp4"] * 4, head="dp4")
    plan.pop("prediction", None)
    (trained / "four.json").write_text(json.dumps(plan), encoding="utf-8")
    result = command("fit", "--config", config(trained, trainer__strategy__init_args__plan=str(trained / "four.json")))
    failed_with_one_line(result, "world_size=4", "2 devices")


def test_batch_not_divisible(trained: Path) -> None:
    """A batch that the plan's microbatches and shards do not divide is refused."""
    plan = json.loads((trained / "runs" / "gpt_auto" / "version_0" / "plan.json").read_text(encoding="utf-8"))
    plan.update(stages=[4], num_microbatches=1, embedding="dp2", layers=["dp2"] * 4, head="dp2")
    plan.pop("prediction", None)
    (trained / "dp.json").write_text(json.dumps(plan), encoding="utf-8")
    changes = {"trainer__strategy__init_args__plan": str(trained / "dp.json"), "data__init_args__batch_size": 7}
    failed_with_one_line(command("fit", "--config", config(trained, **changes)), "7 samples", "multiple of 2")


def test_unknown_block_path(trained: Path) -> None:
    """A block path that leads nowhere is answered with those that exist."""
    result = command("fit", "--config", config(trained, trainer__strategy__init_args__blocks="model.layers"))
    failed_with_one_line(result, "blocks='model.layers'", "model.blocks")


def test_corrupt_profile_cache(trained: Path) -> None:
    """A damaged file of the profile cache is named, not silently used."""
    folder = trained / "damaged"
    status, _, err = command(
        "plan", "--config", config(trained, trainer__strategy__init_args__profile_cache=str(folder))
    )
    assert status == 0, err
    for file in folder.glob("*.json"):
        file.write_bytes(file.read_bytes()[:-20])
    result = command("plan", "--config", config(trained, trainer__strategy__init_args__profile_cache=str(folder)))
    failed_with_one_line(result, str(folder), "profile_cache")


def test_truncated_checkpoint(trained: Path) -> None:
    """A checkpoint that was cut short is named with what is wrong, on fit and on consolidate."""
    checkpoint = trained / "cut.ckpt"
    shutil.copytree(trained / "runs" / "gpt_auto" / "version_0" / "checkpoints" / "last.ckpt", checkpoint)
    data = next(checkpoint.glob("__1_*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    result = command("fit", "--config", config(trained, trainer__max_steps=6), "--ckpt_path", checkpoint)
    failed_with_one_line(result, data.name, "damaged")
    failed_with_one_line(command("consolidate", checkpoint, trained / "cut-one.ckpt"), data.name, "damaged")


def running(trained: Path, **changes: Any) -> tuple[subprocess.Popen[str], int]:
    """An endless run that has begun to train, and its second process."""
    endless = config(trained, trainer__max_steps=100_000, trainer__val_check_interval=10_000, **changes)
    process = start("fit", "--config", endless)
    metrics = trained / "runs" / "gpt_auto" / "version_0" / "metrics.csv"
    metrics.unlink(missing_ok=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size > 200):
        time.sleep(0.5)
    assert metrics.exists(), "training never started"
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "stat").exists():
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == process.pid and "cli" in (entry / "cmdline").read_text():
                children.append(int(entry.name))
    assert len(children) == 1
    return process, children[0]


def ended(process: subprocess.Popen[str], worker: int) -> str:
    """What was written to the error stream, once both processes have ended by themselves."""
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the run hangs")
    assert not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text()
    return err


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_rank_ends_the_run(trained: Path, victim: int) -> None:
    """When a process is killed in mid-step the others end with one line, and soon."""
    process, worker = running(trained)
    os.kill(process.pid if victim == 0 else worker, signal.SIGKILL)
    err = ended(process, worker)
    assert process.returncode != 0
    assert "another process of this run has ended" in err


@pytest.mark.parametrize("victim", ["all", pytest.param("worker", marks=pytest.mark.slow)])
def test_sigterm_ends_the_run_in_good_order(trained: Path, tmp_path: Path, victim: str) -> None:
    """SIGTERM, to every process as a cluster sends it or to one, ends all between two batches, with a checkpoint."""
    options = {"dirpath": str(tmp_path), "save_on_exception": True}
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": options}
    process, worker = running(trained, trainer__callbacks=[checkpoint])
    os.killpg(process.pid, signal.SIGTERM) if victim == "all" else os.kill(worker, signal.SIGTERM)
    err = ended(process, worker)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err and err.count("stopped by SIGTERM") == 1, err
    (saved,) = tmp_path.glob("*.ckpt")
    done = torch.load(saved / "meta.pt", weights_only=True)["global_step"]
    resumed = config(trained, trainer__max_steps=done + 1)
    status, _, err = command("fit", "--config", resumed, "--ckpt_path", saved)
    assert status == 0, err
