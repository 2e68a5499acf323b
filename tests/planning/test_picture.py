"""Pictures of plans: every layer has its cell, in both formats."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lightning_hetu.planning import HybridPlan, save_picture
from lightning_hetu.planning.picture import svg

PLAN = Path(__file__).parents[2] / "docs" / "numbers" / "plan_gpt_auto.json"


def test_the_picture_in_the_docs_is_that_of_its_plan() -> None:
    plan = HybridPlan.load(PLAN)
    shown = (PLAN.parents[1] / "images" / "plan.svg").read_text(encoding="utf-8")
    assert svg(plan) == shown


def test_every_layer_has_a_cell() -> None:
    plan = HybridPlan.load(PLAN)
    text = svg(plan)
    ElementTree.fromstring(text)
    recomputed = sum(strategy.recompute for _, strategy in plan.rows())
    in_legend = len({strategy for _, strategy in plan.rows() if strategy.recompute})
    assert text.count("url(#hatch)") == recomputed + in_legend
    for name in ("emb", "head", *map(str, range(plan.num_layers))):
        assert f">{name}</text>" in text
    assert text.count("stroke-dasharray") == plan.pipeline_parallel_size


def test_many_layers_and_no_prediction_are_drawn(tmp_path: Path) -> None:
    plan = HybridPlan.uniform("dp2-tp2-zero3", num_layers=96, global_batch_size=64, num_microbatches=8, stages=4)
    text = save_picture(plan, tmp_path / "folder" / "plan.svg").read_text(encoding="utf-8")
    widths = [float(width) for width in re.findall(r'<rect x="[^"]*" y="[^"]*" width="([^"]*)"', text)]
    assert len(widths) == 96 + 2 + 1 and min(widths) > 0
    assert "peak memory" not in text


def test_png_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = save_picture(HybridPlan.load(PLAN), tmp_path / "plan.PNG")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a name that ends in \.svg or \.png"):
        save_picture(HybridPlan.load(PLAN), tmp_path / "plan.pdf")
