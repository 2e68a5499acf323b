"""Pipeline schedules as lists of actions: what every device does, in order.

A schedule only fixes an order; when an action starts follows from the durations, see
:mod:`~lightning_hetu.planning.simulate`. Available are

* ``gpipe``: all forwards, then all backwards (arXiv 1811.06965),
* ``1f1b``: one forward, one backward after a warm-up (PipeDream-Flush, arXiv 2006.09503),
* ``interleaved_1f1b``: 1F1B over several chunks of layers per device (arXiv 2104.04473, section 2.2),
* ``zero_bubble``: the backward is split in the gradient of the input and that of the weights; the latter fills the
  bubble. With one chunk this is ZB-H1 (arXiv 2401.10241, section 2): the weight gradients of device ``s`` lag ``s``
  microbatches behind, so that no device holds more microbatches than the first one does under 1F1B. With several it is
  interleaved, and warms up half as far as ``interleaved_1f1b``.

With several chunks, the model is cut into ``P * chunks`` *virtual stages*; virtual stage ``v`` is chunk ``v // P`` of
device ``v % P``. The lists are those of the schedules in ``torch.distributed.pipelining`` that plans run with; those
also list waits, which follow from the durations here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, get_args

ActionKind = Literal["forward", "backward", "backward_input", "backward_weight"]
PipelineSchedule = Literal["1f1b", "gpipe", "interleaved_1f1b", "zero_bubble"]
WITH_CHUNKS: tuple[PipelineSchedule, ...] = ("interleaved_1f1b", "zero_bubble")
"""Schedules that may have several chunks per device; their microbatches come in groups of one per device."""


class Action(NamedTuple):
    """One piece of work of a device.

    Args:
        kind: ``backward`` is the whole backward; ``backward_input`` and ``backward_weight`` are its two parts.
        microbatch: Which microbatch.
        chunk: Which chunk of the layers of this device.
    """

    kind: ActionKind
    microbatch: int
    chunk: int = 0


def action_lists(
    schedule: PipelineSchedule, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> tuple[tuple[Action, ...], ...]:
    """The actions of every device in the order it runs them.

    Args:
        schedule: Name of the schedule.
        num_stages: Devices P of the pipeline.
        num_microbatches: Microbatches per step.
        num_chunks: Chunks of layers per device, for ``interleaved_1f1b`` and ``zero_bubble``.

    Raises:
        ValueError: If the schedule is unknown or does not exist for these numbers.
    """
    if schedule not in get_args(PipelineSchedule):
        raise ValueError(f"schedule={schedule!r}: expected one of {', '.join(get_args(PipelineSchedule))}.")
    for name, value in (
        ("num_stages", num_stages),
        ("num_microbatches", num_microbatches),
        ("num_chunks", num_chunks),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of at least 1.")
    if schedule not in WITH_CHUNKS and num_chunks > 1:
        known = " or ".join(map(repr, WITH_CHUNKS))
        raise ValueError(f"num_chunks={num_chunks}: expected 1 with schedule={schedule!r}, or {known}.")
    if schedule in WITH_CHUNKS and num_microbatches % num_stages:
        raise ValueError(
            f"num_microbatches={num_microbatches}: expected a multiple of {num_stages} stages with"
            f" schedule={schedule!r}."
        )
    return _action_lists(schedule, num_stages, num_microbatches, num_chunks)


@lru_cache(maxsize=64)
def _action_lists(
    schedule: PipelineSchedule, num_stages: int, num_microbatches: int, num_chunks: int
) -> tuple[tuple[Action, ...], ...]:
    """:func:`action_lists` of arguments that are known to be right."""
    if schedule in WITH_CHUNKS:
        order = {"interleaved_1f1b": _interleaved, "zero_bubble": _zero_bubble}[schedule]
        return tuple(order(stage, num_stages, num_microbatches, num_chunks) for stage in range(num_stages))
    simple = {"1f1b": _one_forward_one_backward, "gpipe": _all_forward_all_backward}[schedule]
    return tuple(simple(stage, num_stages, num_microbatches) for stage in range(num_stages))


def _all_forward_all_backward(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    forwards = [Action("forward", m) for m in range(num_microbatches)]
    return tuple(forwards + [Action("backward", m) for m in range(num_microbatches)])


def _one_forward_one_backward(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    forwards = [Action("forward", m) for m in range(num_microbatches)]
    backwards = [Action("backward", m) for m in range(num_microbatches)]
    return _alternate(forwards, backwards, num_stages - 1 - stage)


def _grouped(num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[list[Action], list[Action]]:
    """Forwards and backwards of any device in the order they run.

    Groups of P microbatches go through one chunk after the other; backward visits the chunks last to first.
    """
    group = num_stages * num_chunks
    forwards, backwards = [], []
    for position in range(num_microbatches * num_chunks):
        microbatch = position // group * num_stages + position % num_stages
        chunk = position % group // num_stages
        forwards.append(Action("forward", microbatch, chunk))
        backwards.append(Action("backward", microbatch, num_chunks - 1 - chunk))
    return forwards, backwards


def _interleaved(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    forwards, backwards = _grouped(num_stages, num_microbatches, num_chunks)
    # Without chunks this is 1F1B. With them, a device starts twice as early per stage of distance to the end, because
    # its last chunk is what the first backward waits for.
    distance = num_stages - 1 - stage
    warmup = distance if num_chunks == 1 else 2 * distance + (num_chunks - 1) * num_stages
    return _alternate(forwards, backwards, warmup)


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> tuple[Action, ...]:
    """``warmup`` forwards, then forward and backward in turn, then the remaining backwards."""
    warmup = min(warmup, len(forwards))
    actions = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        actions += [forward, backward]
    return tuple(actions + backwards[len(forwards) - warmup :])


def _zero_bubble(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    forwards, backwards = _grouped(num_stages, num_microbatches, num_chunks)
    warmup = (num_chunks - 1) * num_stages + num_stages - 1 - stage
    actions: list[Action] = []
    inputs = 0
    for action in _alternate(forwards, backwards, warmup):
        if action.kind == "forward":
            actions.append(action)
            continue
        actions.append(action._replace(kind="backward_input"))
        if inputs >= stage:  # Every gap takes one weight part, in the order of the input parts.
            actions.append(backwards[inputs - stage]._replace(kind="backward_weight"))
        inputs += 1
    rest = backwards[max(len(backwards) - stage, 0) :]
    return tuple(actions + [action._replace(kind="backward_weight") for action in rest])


# ---- what follows from the order alone ------------------------------------------------------------------------------


class Holding(NamedTuple):
    """What a device holds while it runs a chunk.

    Args:
        chunk: The chunk that runs.
        held: Microbatches of each chunk whose activations are there.
        waiting: Those of them whose input part of backward is done and whose weight part is not.
    """

    chunk: int
    held: tuple[int, ...]
    waiting: tuple[int, ...]


@lru_cache(maxsize=4096)
def holdings(order: tuple[Action, ...], whole: tuple[bool, ...]) -> tuple[Holding, ...]:
    """The fullest moments of a device: for each chunk that runs, those that no other one exceeds everywhere.

    Args:
        order: Actions of the device.
        whole: For each chunk whether it runs the whole backward as the input part, and so lets go of activations then.
    """
    held, waiting = [0] * len(whole), [0] * len(whole)
    found: dict[Holding, None] = {}
    for kind, _, chunk in order:
        held[chunk] += kind == "forward"
        found[Holding(chunk, tuple(held), tuple(waiting))] = None
        if kind == "backward" or (kind == "backward_input" and whole[chunk]):
            held[chunk] -= 1
        elif kind == "backward_input":
            waiting[chunk] += 1
        elif kind == "backward_weight" and not whole[chunk]:
            held[chunk] -= 1
            waiting[chunk] -= 1
    kept: list[Holding] = []
    for state in sorted(found, key=lambda state: (-sum(state.held) - sum(state.waiting), state)):
        if not any(other.chunk == state.chunk and _exceeds(other, state) for other in kept):
            kept.append(state)
    return tuple(kept)


def _exceeds(one: Holding, other: Holding) -> bool:
    """Whether a moment holds at least as much of everything."""
    pairs = zip((*one.held, *one.waiting), (*other.held, *other.waiting), strict=True)
    return all(a >= b for a, b in pairs)


@lru_cache(maxsize=256)
def most_in_flight(
    schedule: PipelineSchedule, num_stages: int, num_microbatches: int, num_chunks: int
) -> tuple[int, ...]:
    """Most microbatches that each of ``num_stages * num_chunks`` virtual stages holds at once.

    With split backward, until the end of the weight part.
    """
    most = [[0] * num_chunks for _ in range(num_stages)]
    for stage, order in enumerate(action_lists(schedule, num_stages, num_microbatches, num_chunks)):
        for state in holdings(order, (False,) * num_chunks):
            most[stage] = [max(pair) for pair in zip(most[stage], state.held, strict=True)]
    return tuple(most[virtual % num_stages][virtual // num_stages] for virtual in range(num_stages * num_chunks))
