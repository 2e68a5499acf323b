"""Reads and writes plan files of the released Galvatron (PKU-DAIR/Hetu-Galvatron).

A file has one entry per layer in comma-separated columns, one strategy for embedding and head together, and one type of
plain data parallelism for the whole plan. Degrees of data parallelism are not in it: they are what the other degrees
leave of the devices of a stage. A plan that such a file cannot hold is refused, so that every file that is written
reads back as the same plan, without its prediction.

Two columns are our own, written only where they say something, and not read by the release. It runs all or none of its
tensor-parallel layers with Megatron sequence parallelism, which is a setting of the run and not of the plan:
``megatron_sp_enc`` tells which layers of a plan here have it. Its search knows only ``ddp`` for a layer whose weights
have copies on the ranks of a sequence and no others: ``sharded_sp_enc`` tells which of these shard as
``default_dp_type`` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_hetu.planning.galvatron_files import read_json
from lightning_hetu.planning.layer_strategy import DataParallelType, LayerStrategy
from lightning_hetu.planning.plan import HybridPlan, Schedule

_SCHEDULES: dict[str, Schedule] = {"pipedream_flush": "1f1b", "gpipe": "gpipe"}
_PLAIN_TYPES: tuple[DataParallelType, ...] = ("ddp", "zero2")
_EXPERT_COLUMNS = ("ep_sizes_enc", "tp_of_ep_sizes_enc")


def read_galvatron_plan(path: str | Path, *, world_size: int | None = None) -> HybridPlan:
    """Reads a plan file of the released Galvatron.

    Args:
        path: The file.
        world_size: Devices in total. Taken from the file or from its name if not given.

    Returns:
        The plan, without a prediction.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not such a plan, or the number of devices is not known.
    """
    path = Path(path)
    data = read_json(path)
    if world_size is None:
        match = re.search(r"(\d+)nodes_(\d+)gpus", path.name)
        world_size = int(match.group(1)) * int(match.group(2)) if match else None
        world_size = world_size if data.get("world_size") is None else data["world_size"]
    if world_size is None:
        raise ValueError(f"world_size: neither {path} nor its name tells the number of devices, give it.")
    try:
        return _parse(data, world_size)
    except ValueError as error:
        raise ValueError(f"galvatron plan {str(path)!r}: {error}") from error


def write_galvatron_plan(plan: HybridPlan, path: str | Path) -> Path:
    """Writes a plan as the released Galvatron reads it.

    Args:
        plan: The plan. Its prediction and its rejected alternatives have no place in the format.
        path: The file; missing folders are made.

    Returns:
        The path.

    Raises:
        ValueError: If the plan has what that format cannot say: different strategies of embedding and head, more than
            one type of data parallelism besides zero3, a type of plain data parallelism where there is none,
            recomputation or strided ranks of embedding and head.
    """
    if plan.embedding != plan.head:
        raise ValueError(f"plan.head={plan.head}, plan.embedding={plan.embedding}: the format has one for both.")
    rows = [*plan.layers, plan.embedding]
    shared = [row for row in rows if row.dp > 1 or _shards_sequence_ranks(row)]
    plain = sorted({row.dp_type for row in shared if row.dp_type != "zero3"})
    if len(plain) > 1:
        raise ValueError(f"plan uses {' and '.join(plain)}: the format has one type of data parallelism besides zero3.")
    names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    if plan.schedule not in names:
        raise ValueError(f"plan.schedule={plan.schedule!r}: the format has {' and '.join(names)}.")

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
    own = {
        "megatron_sp_enc": [layer.sequence_parallel for layer in plan.layers],
        "sharded_sp_enc": [_shards_sequence_ranks(layer) for layer in plan.layers],
    }
    data |= {name: text(values) for name, values in own.items() if any(values)}
    understood = _parse(data, plan.world_size)
    if understood != replace(plan, prediction=None, rejected=()):
        pairs = zip(plan.rows(), understood.rows(), strict=True)
        name, ours, theirs = next((name, ours, theirs) for (name, ours), (_, theirs) in pairs if ours != theirs)
        raise ValueError(f"plan.{name}={ours}: the format cannot say that, it would be read as {theirs}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")
    return path


def _shards_sequence_ranks(strategy: LayerStrategy) -> bool:
    """Whether weights are sharded over the ranks of a sequence only, and not by zero3."""
    return strategy.dp == 1 and strategy.shard_degree > 1 and strategy.dp_type == "zero2"


# ---- from the file's entries to a plan ------------------------------------------------------------------------------


def _parse(data: Mapping[str, Any], world_size: Any) -> HybridPlan:
    """The plan that a file's entries stand for.

    Raises:
        ValueError: If an entry is missing, malformed or contradicts another one; the message names it.
    """
    _check("world_size", world_size, 1)
    degrees = _column(data, "tp_sizes_enc")
    length = len(degrees)
    stages = _column(data, "pp_division")
    count = _number(data, "pp_deg")
    if count != len(stages):
        raise ValueError(f"pp_deg={count}, but pp_division={data['pp_division']!r} has {len(stages)} entries.")
    kind: DataParallelType = data.get("default_dp_type", "ddp")
    if kind not in _PLAIN_TYPES:
        raise ValueError(f"default_dp_type={kind!r}: expected one of {', '.join(_PLAIN_TYPES)}.")
    schedule = data.get("pipeline_type", "gpipe")
    if not isinstance(schedule, str) or schedule not in _SCHEDULES:
        raise ValueError(f"pipeline_type={schedule!r}: expected one of {', '.join(_SCHEDULES)}.")
    for name in _EXPERT_COLUMNS:
        if any(degree > 1 for degree in _column(data, name, length, default=1)):
            raise ValueError(f"{name}={data[name]!r}: expert parallelism has no place in a plan here, expected ones.")

    def strategy(
        where: str, degree: int, cp: int, ulysses: int, sharded: int, over_sequence: int = 0, **flags: bool
    ) -> LayerStrategy:
        if world_size % (count * degree * cp):
            raise ValueError(
                f"{where}: pp_deg={count} times a degree of {degree * cp} does not divide world_size={world_size}."
            )
        dp = world_size // (count * degree * cp)
        dp_type: DataParallelType = "zero3" if sharded else kind if dp > 1 or over_sequence else "ddp"
        shape = {"sp": degree} if ulysses else {"tp": degree}
        return LayerStrategy(dp=dp, dp_type=dp_type, cp=cp, **shape, **flags)  # type: ignore[arg-type]

    columns = zip(
        degrees,
        _column(data, "cp_sizes_enc", length, default=1),
        _column(data, "use_sp", length, default=0, flags=True),
        _column(data, "dp_types_enc", length, flags=True),
        _column(data, "checkpoint", length, default=0, flags=True),
        _column(data, "tp_consecutive_flags", length, default=1, flags=True),
        _column(data, "megatron_sp_enc", length, default=0, flags=True),
        _column(data, "sharded_sp_enc", length, default=0, flags=True),
        strict=True,
    )
    layers = tuple(
        strategy(
            f"tp_sizes_enc[{i}]",
            t,
            cp,
            u,
            d,
            s,
            recompute=bool(c),
            tp_consecutive=bool(near),
            sequence_parallel=bool(m),
        )
        for i, (t, cp, u, d, c, near, m, s) in enumerate(columns)
    )
    sharded = "vocab_sdp" if "vocab_sdp" in data else "embed_sdp"
    vocab = strategy(
        "vtp",
        _number(data, "vtp", default=1),
        _number(data, "vcp", default=1),
        _number(data, "vsp", default=0, flag=True),
        _number(data, sharded, default=0, flag=True),
    )
    return HybridPlan(
        world_size=world_size,
        global_batch_size=_number(data, "global_bsz"),
        num_microbatches=_number(data, "chunks"),
        stages=tuple(stages),
        layers=layers,
        embedding=vocab,
        head=vocab,
        schedule=_SCHEDULES[schedule],
    )


def _entry(data: Mapping[str, Any], name: str, default: int | None) -> Any:
    value = data.get(name, default)
    if value is None:
        raise ValueError(f"entry {name!r} is missing.")
    return value


def _check(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number between ``least`` and ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        expected = f"an integer of at least {least}" if most is None else f"{least} or {most}"
        raise ValueError(f"{name}={value!r}: expected {expected}.")
    return value


def _number(data: Mapping[str, Any], name: str, *, default: int | None = None, flag: bool = False) -> int:
    """One number of the file; a flag is 0 or 1, all others are at least 1."""
    value = _entry(data, name, default)
    return _check(name, int(value) if flag and isinstance(value, bool) else value, *((0, 1) if flag else (1,)))


def _column(
    data: Mapping[str, Any], name: str, length: int | None = None, *, default: int | None = None, flags: bool = False
) -> list[int]:
    """One number per layer or stage, in comma-separated text, a list, or a single number.

    Args:
        data: The file's entries.
        name: Name of the column.
        length: Expected number of entries; any if not given.
        default: What a column that is missing consists of; without it, the column must be there.
        flags: Whether the entries are 0 or 1; all others are at least 1.
    """
    if name not in data and default is not None:
        return [default] * (length or 0)
    value = _entry(data, name, None)
    if isinstance(value, str):
        parts: list[Any] = [int(part) if re.fullmatch(r"\s*\d+\s*", part) else part for part in value.split(",")]
    else:
        parts = list(value) if isinstance(value, list) else [value]
    for index, part in enumerate(parts):
        _check(f"{name}[{index}]", part, *((0, 1) if flags else (1,)))
    if length is not None and len(parts) != length:
        raise ValueError(f"{name} has {len(parts)} entries, but tp_sizes_enc has {length}.")
    return parts
