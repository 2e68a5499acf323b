"""Where the time and the memory of a plan go, as tables: a column per stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning_hetu.planning.cluster import ClusterSpec
from lightning_hetu.planning.galvatron_files import GalvatronProfile
from lightning_hetu.planning.hetu_cost import HetuConstants
from lightning_hetu.planning.plan import HybridPlan
from lightning_hetu.planning.profile import ModelProfile
from lightning_hetu.planning.search import CostModelName, build_cost_model, memory_breakdown, time_breakdown
from lightning_hetu.planning.tables import text_table
from lightning_hetu.planning.units import format_bytes, format_seconds

_SHOWN_STAGES = 8
"""Of more stages, the first and the last ones are shown."""
_ROUNDING = 1e-12


def breakdown(
    plan: HybridPlan,
    profile: ModelProfile | GalvatronProfile,
    cluster: ClusterSpec | None = None,
    cost_model: CostModelName = "hetu",
    *,
    constants: HetuConstants | None = None,
) -> str:
    """Seconds and bytes of every stage by what takes them, as text.

    The seconds are of one microbatch, but for those once per step. The bytes are those at the fullest moment.

    Raises:
        ValueError: If plan, profile and cluster do not belong together.
    """
    model = build_cost_model(profile, cluster, cost_model, constants=constants)
    stages = _shown(len(plan.stages))
    times = [time_breakdown(plan, profile, cluster, stage, model) for stage in stages]
    sizes = [memory_breakdown(plan, profile, cluster, stage, model) for stage in stages]
    names = list(dict.fromkeys(name for parts in times for name in parts))
    once = [name for name in names if name.endswith("_per_step")]
    each = [name for name in names if name not in once]
    return "\n\n".join(
        [
            _table("seconds of one microbatch", stages, times, each, format_seconds),
            _table("seconds once per step", stages, times, once, format_seconds),
            _table("bytes at the fullest moment", stages, sizes, list(sizes[0]), format_bytes),
        ]
    )


def _shown(count: int) -> list[int]:
    if count <= _SHOWN_STAGES:
        return list(range(count))
    half = _SHOWN_STAGES // 2
    return [*range(half), *range(count - half, count)]


def _table(
    title: str,
    stages: Sequence[int],
    parts: Sequence[Mapping[str, float]],
    names: Sequence[str],
    text: Callable[[float], str],
) -> str:
    """One line for each name that is not zero everywhere, and the total."""
    lines = [[title, *(f"stage {stage}" for stage in stages)]]
    for name in names:
        values = [part.get(name, 0.0) for part in parts]
        values = [value if abs(value) > _ROUNDING else 0.0 for value in values]
        if any(values):
            shown = name.removesuffix("_per_step").replace("_", " ")
            lines.append([shown, *(text(value) if value else "-" for value in values)])
    lines.append(["total", *(text(sum(part.get(name, 0.0) for name in names)) for part in parts)])
    return text_table(lines)
