"""The best plans of restricted spaces, and why the chosen plan is better.

These are the baselines of Galvatron's evaluation (arXiv 2211.13878, section 5): each of the pure kinds of parallelism,
and one hybrid for all layers. To these come the best plans of the other pipeline schedules that were tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from lightning_hetu.planning.cost_model import CostModel, Setting, predict
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan, PlanPrediction, RejectedPlan
from lightning_hetu.planning.schedule_search import WORTHWHILE_GAIN, PricedPlan
from lightning_hetu.planning.search_space import Pins
from lightning_hetu.planning.units import format_bytes, format_seconds

_TIE = 1e-9
_Test = Callable[[HybridPlan], bool]


def uniform_plans(model: CostModel, global_batch_size: int, pins: Pins) -> Iterator[HybridPlan]:
    """Every plan that gives all blocks one strategy, and embedding and head the same layout where they can have it."""
    for setting in pins.settings(model, global_batch_size):
        # Blocks of one kind have the same options, unless they are pinned.
        kinds = {(model.row_kind(row), pins.given(model, row)): row for row in reversed(range(1, setting.num_rows - 1))}
        first, *others = (pins.options(model, row, setting) for row in sorted(kinds.values()))
        embeddings, heads = (pins.options(model, row, setting) for row in (0, setting.num_rows - 1))
        for strategy in first:
            if any(strategy not in options for options in others) or not embeddings or not heads:
                continue
            plan = _uniform_plan(model, setting, strategy, embeddings, heads)
            if plan is not None:
                yield plan


def _uniform_plan(
    model: CostModel,
    setting: Setting,
    strategy: LayerStrategy,
    embeddings: list[LayerStrategy],
    heads: list[LayerStrategy],
) -> HybridPlan | None:
    plain = replace(strategy, recompute=False, sharded=())

    def nearest(options: list[LayerStrategy]) -> LayerStrategy:
        return min(options, key=lambda s: (s != plain, s.dp_type != plain.dp_type, abs(s.tp - plain.tp)))

    embedding, head = nearest(embeddings), nearest(heads)
    if not model.split_vocab:
        shared = [option for option in embeddings if option in heads]
        if not shared:
            return None
        embedding = head = nearest(shared)
    return HybridPlan(
        world_size=setting.world_size,
        global_batch_size=setting.global_batch_size,
        num_microbatches=setting.num_microbatches,
        stages=setting.stages,
        layers=(strategy,) * sum(setting.stages),
        embedding=embedding,
        head=head,
        schedule=setting.schedule,
    )


def _spaces() -> list[tuple[str, _Test]]:
    """Names and tests of the restricted spaces; a uniform plan counts to all whose test it passes."""

    def data_parallel(kind: str) -> _Test:
        def test(plan: HybridPlan) -> bool:
            layer = plan.layers[0]
            return layer.dp == plan.world_size and layer.dp_type == kind and not layer.sharded

        return test

    return [
        ("data parallel (ddp)", data_parallel("ddp")),
        ("data parallel (zero2)", data_parallel("zero2")),
        ("data parallel (zero3)", data_parallel("zero3")),
        ("tensor parallel", lambda p: p.layers[0].tp == p.world_size),
        ("pipeline parallel", lambda p: p.pipeline_parallel_size == p.world_size),
        ("one hybrid for all blocks", lambda p: True),
    ]


def rejected_alternatives(
    model: CostModel, plan: HybridPlan, budget: int, pins: Pins, schedules: Sequence[PricedPlan] = ()
) -> tuple[RejectedPlan, ...]:
    """The best plan of each restricted space at the same batch size, feasible ones first, fastest first.

    Spaces whose best plan is the chosen plan itself, or that have no plan, are left out; all of them are where a
    schedule is pinned that their plans do not have.

    Args:
        model: The cost model.
        plan: The chosen plan, with its prediction.
        budget: Bytes per device.
        pins: Fields that are given.
        schedules: The best plan of every other schedule that was tried.
    """
    assert plan.prediction is not None  # The caller has just predicted it.
    uniform = () if pins.simulated else uniform_plans(model, plan.global_batch_size, pins)
    priced = [(p, predict(model, p, memory_budget=budget)) for p in uniform]
    rejected = [
        _rejected(item.plan.schedule, item.plan, item.prediction, plan, budget, fits=item.peak <= budget)
        for item in schedules
    ]
    seen: set[HybridPlan] = set()
    same = replace(plan, prediction=None, rejected=())
    for name, test in _spaces():
        members = [(p, prediction) for p, prediction in priced if test(p)]
        if not members or model.num_devices == 1:
            continue
        fits = [item for item in members if max(item[1].stage_memory) <= budget]
        if fits:
            best, prediction = min(fits, key=lambda item: item[1].iteration_time)
        else:
            best, prediction = min(members, key=lambda item: max(item[1].stage_memory))
        if best in seen or best == same:
            continue
        seen.add(best)
        rejected.append(_rejected(name, best, prediction, plan, budget, fits=bool(fits)))
    infinite = float("inf")
    return tuple(sorted(rejected, key=lambda r: infinite if r.iteration_time is None else r.iteration_time))


def _rejected(
    name: str, plan: HybridPlan, prediction: PlanPrediction, other: HybridPlan, budget: int, *, fits: bool
) -> RejectedPlan:
    """What is said of a plan, where another one is chosen."""
    assert other.prediction is not None  # The caller has just predicted it.
    chosen, memory = other.prediction.iteration_time, max(prediction.stage_memory)
    description = f"{name}: {short_description(plan)}"
    if (plan.stages, plan.layers, plan.num_microbatches) == (other.stages, other.layers, other.num_microbatches):
        description += f", embedding {plan.embedding}, head {plan.head}"
    if not fits:
        reason = f"out of memory: needs {format_bytes(memory)} of {format_bytes(budget)}"
        return RejectedPlan(description, reason, None, memory)
    slower = prediction.iteration_time / chosen - 1 if chosen > 0 else 0.0
    if slower > _TIE:
        percent = f"{slower:.1%}" if slower >= 0.0005 else "less than 0.1%"
        reason = f"slower by {percent} ({format_seconds(prediction.iteration_time)})"
    elif slower < -_TIE:
        hint = f"under {WORTHWHILE_GAIN:.0%}" if -slower < WORTHWHILE_GAIN else "pin schedule='any' to have it"
        reason = f"faster by {-slower:.1%} ({format_seconds(prediction.iteration_time)}), {hint}"
    else:
        reason = "equally fast, more microbatches, stages or memory"
    return RejectedPlan(description, reason, prediction.iteration_time, memory)


def short_description(plan: HybridPlan) -> str:
    """A plan in a few words: ``pp2, dp2-tp2-zero3, 4 microbatches``, with its stages per rank if they are several."""
    blocks = ", ".join(dict.fromkeys(str(layer) for layer in plan.layers))
    pieces = [f"pp{plan.pipeline_parallel_size}"] if plan.pipeline_parallel_size > 1 else []
    if plan.virtual_stages > 1:
        pieces.append(f"{plan.virtual_stages} stages per rank")
    count = plan.num_microbatches
    return ", ".join([*pieces, blocks, f"{count} microbatch{'es' if count > 1 else ''}"])
