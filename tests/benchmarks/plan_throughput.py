"""Compares predicted throughput on described clusters with published measurements of the same plans.

    python -m tests.benchmarks.plan_throughput docs/numbers/plan_throughput.json

The published figures are those of MPT models in github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md
(commit 061f2c7): fully sharded data parallelism, most of them with recomputation. Their blocks are those of our GPT but
for ALiBi in place of learned positions. Nothing was fitted to them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_hetu.models import GPTLightningModule
from lightning_hetu.parallel.structure import find_structure
from lightning_hetu.planning import HybridPlan, cluster_preset, evaluate, search
from lightning_hetu.profiling import estimate_model

VOCABULARY = 50368
SIZES = {
    "1b": (24, 2048, 16),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}
"""Blocks, width and heads."""


@dataclass(frozen=True)
class Published:
    """One row of the published tables."""

    model: str
    sequence: int
    cluster: str
    tokens_per_second: int  # per device
    microbatch: int  # per device
    accumulation: int
    recompute: bool
    precision: str = "bf16-mixed"


ROWS = (
    Published("1b", 2048, "8xH100-80GB", 45455, 14, 1, False),
    Published("7b", 2048, "8xH100-80GB", 10643, 6, 1, False),
    Published("7b", 8192, "8xH100-80GB", 6935, 8, 2, True),
    Published("13b", 2048, "2x8xH100-80GB", 4767, 2, 1, False),
    Published("13b", 4096, "8xH100-80GB", 4717, 10, 3, True),
    Published("30b", 2048, "2x8xH100-80GB", 2263, 10, 3, True),
    Published("30b", 2048, "4x8xH100-80GB", 2308, 14, 3, True),
    Published("70b", 2048, "8x8xH100-80GB", 1039, 8, 4, True),
    Published("13b", 2048, "8xA100-80GB", 2262, 2, 3, False),
    Published("13b", 4096, "8xA100-80GB", 2060, 10, 3, True),
    Published("30b", 2048, "8xA100-80GB", 916, 3, 21, True),
    Published("70b", 2048, "8x8xA100-80GB", 410, 8, 4, True, "bf16-true"),
)


def predicted(row: Published) -> dict[str, Any]:
    """Tokens per second and device of the published plan, and of the best plan of the same batch."""
    layers, width, heads = SIZES[row.model]
    with torch.device("meta"):
        module = GPTLightningModule(VOCABULARY, max_seq_len=row.sequence, num_layers=layers, num_heads=heads, dim=width)
        tokens = torch.zeros(row.microbatch, row.sequence, dtype=torch.int64)
    if row.precision == "bf16-true":
        module.bfloat16()
    cluster = cluster_preset(row.cluster)
    profile = estimate_model(
        module, find_structure(module), tokens, tokens, device=cluster.device, precision=row.precision, max_tp=8
    )  # fmt: skip
    devices = cluster.num_devices
    batch = row.microbatch * row.accumulation * devices
    same = HybridPlan.uniform(
        f"dp{devices}-zero3" + "-recompute" * row.recompute,
        num_layers=layers,
        global_batch_size=batch,
        num_microbatches=row.accumulation,
    )
    there = evaluate(same, profile, cluster)
    best = search(profile, cluster, memory_budget="76GB", global_batch_size=batch, alternatives=False)
    assert best.prediction is not None
    rate = batch * row.sequence / devices
    return {
        "predicted_tokens_per_second": rate / there.iteration_time,
        "predicted_memory_bytes": max(there.stage_memory),
        "best_tokens_per_second": rate / best.prediction.iteration_time,
        "best_plan": f"pp{best.pipeline_parallel_size}, {best.num_microbatches} microbatches, "
        + ", ".join(dict.fromkeys(str(layer) for layer in best.layers)),
    }


def main(target: str) -> None:
    """Writes the table as JSON, and prints it."""
    found = []
    print("model | sequence | cluster       | published | predicted | ratio | best plan")
    for row in ROWS:
        values = predicted(row)
        found.append({**asdict(row), **values})
        ours = values["predicted_tokens_per_second"]
        print(
            f"{row.model:5} | {row.sequence:8} | {row.cluster:13} | {row.tokens_per_second:9} | {ours:9.0f} |"
            f" {ours / row.tokens_per_second:5.2f} | {values['best_tokens_per_second']:.0f}: {values['best_plan']}",
            flush=True,
        )
    note = "tokens per second and device; published by MosaicML (llm-foundry), predicted without any device"
    Path(target).write_text(json.dumps({"note": note, "rows": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
