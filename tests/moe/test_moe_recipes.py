"""The recipes with experts run, small, and log where tokens go."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lightning_hetu.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["moe_gpt_switch", "moe_gpt_dts"])
def test_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps in one process, with a validation; losses and figures are in the log."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(2000)), encoding="utf-8")
    small = {
        "trainer.devices": 1, "trainer.strategy": "auto", "trainer.max_steps": 4, "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1, "trainer.enable_progress_bar": "false", "model.dim": 16, "model.num_heads": 2,
        "model.max_seq_len": 16, "data.seq_len": 16, "data.path": text, "data.cache_dir": tmp_path / "tokens",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(RECIPES / f"{name}.yaml"), *(f"--{key}={value}" for key, value in small.items())])
    (file,) = (tmp_path / "runs" / name).glob("*/metrics.csv")
    with file.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    wanted = {"train_loss", "val_loss", "moe/active", "moe/drop_rate", "moe/load_cv", "moe/load_dead"}
    wanted |= {"dts/tau", "dts/mean_active"} if name == "moe_gpt_dts" else set()
    assert wanted <= rows[0].keys()
    for column in wanted:
        assert any(row[column] for row in rows), column
