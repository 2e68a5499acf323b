"""Plans as text: a table for people, and one line on what changed between two plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from textwrap import wrap

from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.partition import balance_degree
from lightning_hetu.planning.plan import HybridPlan
from lightning_hetu.planning.units import format_bytes, format_seconds

_MAX_WIDTH = 110
_DETAILS = ("stages", "embedding", "head", "layers")
_HEADINGS = ("rows", "stage", "strategy", "time per microbatch", "memory per device")


def explain(plan: HybridPlan) -> str:
    """The plan as a text table of at most 110 columns.

    Runs of equal neighboring rows share a line; their time and memory are those of the whole run. Times are of one
    microbatch, forward and backward, without gradient synchronization. The memory of a row is what it holds after
    forward; that of a stage is its fullest phase, temporary buffers included.
    """
    lines = [*_header(plan), "", *_table(plan)]
    if plan.rejected:
        lines += ["", "alternatives"]
        for item in plan.rejected:
            lines += _wrap(f"{item.description} -> {item.reason}", indent="  ")
    return "\n".join(lines)


def _header(plan: HybridPlan) -> list[str]:
    stages, world = len(plan.stages), plan.world_size
    even = len(set(plan.stages)) == 1
    sizes = str(plan.stages[0]) if even else ", ".join(map(str, plan.stages[:-1])) + f" and {plan.stages[-1]}"
    blocks = f"{stages} stage{'s' * (stages > 1)} of {sizes} block{'s' * (max(plan.stages) > 1)}"
    if stages > 1:
        blocks += f", {plan.virtual_stages} per rank" if plan.virtual_stages > 1 else ""
        blocks += f", schedule {plan.schedule}"
    lines = [
        f"hybrid-parallel plan for {world} device{'s' * (world > 1)}: {blocks}",
        f"global batch of {plan.global_batch_size} samples in {plan.num_microbatches}"
        f" microbatch{'es' * (plan.num_microbatches > 1)} of {plan.microbatch_size}",
    ]
    lines += _sequence_lines(plan)
    lines += _operator_lines(plan)
    prediction = plan.prediction
    if prediction is None:
        return [*lines, "no prediction: written by hand"]
    time = prediction.iteration_time
    rate = f", {plan.global_batch_size / time:.4g} samples/s" if time > 0 else ""
    budget = "" if prediction.memory_budget is None else f", budget {format_bytes(prediction.memory_budget)} per device"
    lines.append(f"predicted step {format_seconds(time)}{rate}{budget} (cost model {prediction.cost_model})")
    if stages > 1:
        ranks = plan.pipeline_parallel_size
        times = [sum(prediction.stage_times[stage] for stage in plan.stages_of_rank(rank)) for rank in range(ranks)]
        # Every stage of a rank has the memory of the whole rank.
        balance = [balance_degree(loads) for loads in (times, prediction.stage_memory[:ranks])]
        what = "ranks" if plan.virtual_stages > 1 else "stages"
        lines.append(f"balance of the {what}: time {balance[0]:.3f}, memory {balance[1]:.3f}, even {1 - 1 / ranks:.3f}")
    return lines


def _sequence_lines(plan: HybridPlan) -> list[str]:
    """One line on the layers whose sequence is cut, if there are any."""
    counts: dict[str, int] = {}
    for layer in plan.layers:
        names = [f"Ulysses sp{layer.sp}"] if layer.sp > 1 else []
        names += [f"context parallel cp{layer.cp}"] if layer.cp > 1 else []
        names += [f"Megatron tp{layer.tp}"] if layer.sequence_parallel else []
        if names:
            text = " with ".join(names)
            counts[text] = counts.get(text, 0) + 1
    cut = [f"{text} in {count} block{'s' * (count > 1)}" for text, count in counts.items()]
    return _wrap(f"sequence cut: {', '.join(cut)}", indent="") if cut else []


def _operator_lines(plan: HybridPlan) -> list[str]:
    """A line for each set of operators that are sharded further than the rest of their blocks."""
    counts: dict[tuple[str, ...], int] = {}
    for layer in plan.layers:
        if layer.sharded:
            counts[layer.sharded] = counts.get(layer.sharded, 0) + 1
    lines = []
    for names, count in counts.items():
        lines += _wrap(f"zero3 in {count} block{'s' * (count > 1)}: {', '.join(names)}", indent="")
    return lines


def describe(strategy: LayerStrategy) -> str:
    """A strategy in words for a table: ``dp2 tp2 zero3 recompute``, ``dp4 zero2, 3 operators zero3``."""
    words = str(replace(strategy, sharded=())).replace("-", " ")
    count = len(strategy.sharded)
    return f"{words}, {count} operator{'s' * (count > 1)} zero3" if count else words


def _table(plan: HybridPlan) -> list[str]:
    prediction = plan.prediction
    times = prediction.layer_times if prediction else ()
    memory = prediction.layer_memory if prediction else ()
    cells: list[tuple[str, ...]] = []
    rows = plan.rows()
    row = 0
    for stage, (first, last) in enumerate(plan.stage_bounds):
        end = last + 1 + (stage == len(plan.stages) - 1)
        row = 0 if stage == 0 else first + 1
        while row < end:
            stop = _run_end(plan, row, end)
            cells.append(
                (
                    _run_name(row, stop, len(rows)),
                    str(stage),
                    describe(rows[row][1]),
                    format_seconds(sum(times[row:stop])) if times else "-",
                    format_bytes(sum(memory[row:stop])) if memory else "-",
                )
            )
            row = stop
        if prediction is not None:
            cells.append(_stage_total(plan, stage))
    columns = _HEADINGS if prediction is not None else _HEADINGS[:3]
    cells = [line[: len(columns)] for line in cells]
    widths = [max(len(line[i]) for line in (columns, *cells)) for i in range(len(columns))]
    # Only strategies can be long; the rest of the table is well below the limit.
    widths[2] = min(widths[2], _MAX_WIDTH - sum(widths) + widths[2] - 3 * (len(columns) - 1))
    text = [_line(columns, widths), "-+-".join("-" * width for width in widths)]
    return text + [part for line in cells for part in _lines(line, widths)]


def _run_end(plan: HybridPlan, row: int, end: int) -> int:
    """One past the last row of the run of equal blocks that begins at ``row``."""
    rows = plan.rows()
    stop = row + 1
    if 0 < row < len(rows) - 1:
        while stop < min(end, len(rows) - 1) and rows[stop][1] == rows[row][1]:
            stop += 1
    return stop


def _run_name(row: int, stop: int, num_rows: int) -> str:
    if row == 0:
        return "embedding"
    if row == num_rows - 1:
        return "head"
    return f"block {row - 1}" if stop == row + 1 else f"blocks {row - 1}-{stop - 2}"


def _stage_total(plan: HybridPlan, stage: int) -> tuple[str, ...]:
    prediction = plan.prediction
    assert prediction is not None  # The caller asks for totals only where there is a prediction.
    peak = prediction.stage_memory[stage]
    rank = f" of rank {stage % plan.pipeline_parallel_size}" if plan.virtual_stages > 1 else ""
    text = f"peak{rank} {format_bytes(peak)}"
    if prediction.memory_budget:
        text += f" ({peak / prediction.memory_budget:.1%} of budget)"
    return f"stage {stage} total", str(stage), "", format_seconds(prediction.stage_times[stage]), text


def _lines(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A line, and more where its strategy does not fit."""
    pieces = wrap(cells[2], widths[2]) or [""]
    empty = [""] * len(cells)
    return [
        _line([piece if index == 2 else cell for index, cell in enumerate(cells if first else empty)], widths)
        for first, piece in zip([True] + [False] * len(pieces), pieces, strict=False)
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return " | ".join(cell[:width].ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _wrap(text: str, *, indent: str) -> list[str]:
    """Lines of at most the table's width, later ones indented further."""
    lines, current = [], indent
    for word in text.split(" "):
        if len(current) + len(word) + 1 > _MAX_WIDTH and current.strip():
            lines.append(current.rstrip())
            current = indent * 2
        current += word + " "
    return [*lines, current.rstrip()]


def diff(before: HybridPlan, after: HybridPlan) -> str:
    """One line on what changed: ``"replanned pp=2, dp=2 -> pp=1, dp=4"``, or ``"the plan is unchanged"``."""
    old, new = _traits(before), _traits(after)
    changed = [name for name in old if old[name] != new[name]]
    # Details are only worth naming where nothing else tells the plans apart.
    changed = [name for name in changed if name not in _DETAILS] or changed
    if not changed:
        return "the plan is unchanged"
    old_text, new_text = (", ".join(f"{name}={traits[name]}" for name in changed) for traits in (old, new))
    return f"replanned {old_text} -> {new_text}"


def _traits(plan: HybridPlan) -> dict[str, str]:
    """The properties of a plan that a line can name. Properties that differ between blocks are ranges or ``mixed``."""

    def of_blocks(name: str) -> str:
        values = list(dict.fromkeys(str(getattr(layer, name)).lower() for layer in plan.layers))
        return "/".join(values)

    operators = "/".join(dict.fromkeys(str(len(layer.sharded)) for layer in plan.layers))

    runs: list[list[str]] = []
    for layer in plan.layers:
        if runs and runs[-1][0] == str(layer):
            runs[-1][1] = str(int(runs[-1][1]) + 1)
        else:
            runs.append([str(layer), "1"])
    layout = "+".join(f"{count}x{text}" for text, count in runs[:4]) + ("+..." if len(runs) > 4 else "")
    traits = {
        "devices": str(plan.world_size),
        "pp": str(plan.pipeline_parallel_size),
        **{name: of_blocks(name) for name in ("dp", "tp", "sp", "cp", "sequence_parallel", "dp_type", "recompute")},
        "zero3_operators": operators,
        "batch": str(plan.global_batch_size),
        "microbatches": str(plan.num_microbatches),
        "schedule": plan.schedule,
        "virtual_stages": str(plan.virtual_stages),
        "stages": "/".join(map(str, plan.stages)),
        "embedding": str(plan.embedding),
        "head": str(plan.head),
        "layers": layout,
    }
    return traits
