"""Reads and writes plan files of the released Galvatron (PKU-DAIR/Hetu-Galvatron)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_hetu.planning.galvatron_files import read_json
from lightning_hetu.planning.layer_strategy import DataParallelType, LayerStrategy
from lightning_hetu.planning.plan import HybridPlan, Schedule

_SCHEDULES: dict[str, Schedule] = {"pipedream_flush": "1f1b", "gpipe": "gpipe"}


def read_galvatron_plan(path: str | Path, *, world_size: int | None = None) -> HybridPlan:
    """Reads a plan file of the released Galvatron.

    Args:
        path: The file.
        world_size: Devices in total. Taken from the file or from its name if not given.

    Raises:
        ValueError: If the file is not such a plan, or the number of devices is not known.
    """
    path = Path(path)
    data = read_json(path)
    if world_size is None:
        match = re.search(r"(\d+)nodes_(\d+)gpus", path.name)
        known = int(match.group(1)) * int(match.group(2)) if match else None
        world_size = data.get("world_size", known)
    if world_size is None:
        raise ValueError(f"world_size: neither {path} nor its name tells the number of devices, give it.")
    try:
        stages = int(data["pp_deg"])
        default: DataParallelType = data.get("default_dp_type", "ddp")

        def row(
            degree: int,
            *,
            ulysses: bool,
            sharded: bool,
            recompute: bool = False,
            cp: int = 1,
            near: bool = True,
        ) -> LayerStrategy:
            dp = world_size // stages // degree // cp
            kind: DataParallelType = "zero3" if sharded else default if dp > 1 else "ddp"
            shape = {"sp": degree} if ulysses else {"tp": degree}
            return LayerStrategy(dp=dp, dp_type=kind, recompute=recompute, cp=cp, tp_consecutive=near, **shape)

        degrees = _numbers(data["tp_sizes_enc"])
        ones, zeros = [1] * len(degrees), [0] * len(degrees)
        columns = zip(
            degrees,
            _numbers(data.get("use_sp", zeros)),
            _numbers(data["dp_types_enc"]),
            _numbers(data.get("checkpoint", zeros)),
            _numbers(data.get("cp_sizes_enc", ones)),
            _numbers(data.get("tp_consecutive_flags", ones)),
            strict=True,
        )
        vocab = row(
            int(data.get("vtp", 1)),
            ulysses=bool(data.get("vsp", 0)),
            sharded=bool(data.get("vocab_sdp", data.get("embed_sdp", 0))),
            cp=int(data.get("vcp", 1)),
        )
        return HybridPlan(
            world_size=world_size,
            global_batch_size=int(data["global_bsz"]),
            num_microbatches=int(data["chunks"]),
            stages=tuple(_numbers(data["pp_division"])),
            layers=tuple(
                row(t, ulysses=bool(u), sharded=bool(d), recompute=bool(c), cp=cp, near=bool(n))
                for t, u, d, c, cp, n in columns
            ),
            embedding=vocab,
            head=vocab,
            schedule=_SCHEDULES[data.get("pipeline_type", "gpipe")],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"galvatron plan {str(path)!r}: {type(error).__name__}: {error}") from error


def write_galvatron_plan(plan: HybridPlan, path: str | Path) -> Path:
    """Writes a plan as the released Galvatron reads it.

    Raises:
        ValueError: If the plan has what that format cannot say: different layouts of embedding and head, or more than
            one type of data parallelism besides zero3.
    """
    if plan.embedding != plan.head:
        raise ValueError(f"plan.head={plan.head}, plan.embedding={plan.embedding}: the format has one for both.")
    rows = [*plan.layers, plan.embedding]
    plain = sorted({row.dp_type for row in rows if row.dp > 1 and row.dp_type != "zero3"})
    if len(plain) > 1:
        raise ValueError(f"plan uses {' and '.join(plain)}: the format has one type of data parallelism besides zero3.")
    names = {ours: theirs for theirs, ours in _SCHEDULES.items()}

    def text(values: Iterable[int]) -> str:
        return ",".join(str(int(value)) for value in values)

    vocab, sharded = plan.embedding, int(plan.embedding.dp_type == "zero3")
    data = {
        "pp_deg": plan.pipeline_parallel_size,
        "tp_sizes_enc": text(layer.tp * layer.sp for layer in plan.layers),
        "cp_sizes_enc": text(layer.cp for layer in plan.layers),
        "tp_consecutive_flags": text(layer.tp_consecutive for layer in plan.layers),
        "dp_types_enc": text(layer.dp_type == "zero3" for layer in plan.layers),
        "use_sp": text(layer.sp > 1 for layer in plan.layers),
        "checkpoint": text(layer.recompute for layer in plan.layers),
        "global_bsz": plan.global_batch_size,
        "chunks": plan.num_microbatches,
        "pp_division": text(plan.stages),
        "pipeline_type": names[plan.schedule],
        "default_dp_type": plain[0] if plain else "zero2",
        "vtp": vocab.tp * vocab.sp,
        "vsp": int(vocab.sp > 1),
        "vcp": vocab.cp,
        # Its search writes the first name, its runtime reads the second one.
        "embed_sdp": sharded,
        "vocab_sdp": sharded,
        "world_size": plan.world_size,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")
    return path


def _numbers(value: Any) -> list[int]:
    if isinstance(value, str):
        return [int(part) for part in value.split(",")]
    return [int(part) for part in value] if isinstance(value, Sequence) else [int(value)]
