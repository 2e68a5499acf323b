"""Pipeline schedules as lists of actions: what every device does, in order.

A schedule only fixes an order; when an action starts follows from the durations, see
:mod:`~lightning_hetu.planning.simulate`. Available are

* ``gpipe``: all forwards, then all backwards (arXiv 1811.06965),
* ``1f1b``: one forward, one backward after a warm-up (PipeDream-Flush, arXiv 2006.09503),
* ``interleaved_1f1b``: 1F1B over several chunks of layers per device (arXiv 2104.04473, section 2.2),
* ``zb_h1``: 1F1B whose backward is split in the gradient of the input and that of the weights; the latter fills the
  bubble (arXiv 2401.10241, section 2). The weight gradients of device ``s`` lag ``s`` microbatches behind, so that no
  device holds more microbatches than the first one does under 1F1B.

With several chunks, the model is cut into ``P * chunks`` *virtual stages*; virtual stage ``v`` is chunk ``v // P`` of
device ``v % P``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

ActionKind = Literal["forward", "backward", "backward_input", "backward_weight"]
PipelineSchedule = Literal["1f1b", "gpipe", "interleaved_1f1b", "zb_h1"]


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
        num_chunks: Chunks of layers per device, for ``interleaved_1f1b``.

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
    if schedule != "interleaved_1f1b" and num_chunks > 1:
        raise ValueError(f"num_chunks={num_chunks}: expected 1 with schedule={schedule!r}, or 'interleaved_1f1b'.")
    if schedule == "interleaved_1f1b":
        if num_microbatches % num_stages:
            raise ValueError(
                f"num_microbatches={num_microbatches}: expected a multiple of {num_stages} stages with"
                " schedule='interleaved_1f1b'."
            )
        return tuple(_interleaved(stage, num_stages, num_microbatches, num_chunks) for stage in range(num_stages))
    order = {"1f1b": _one_forward_one_backward, "gpipe": _all_forward_all_backward, "zb_h1": _zero_bubble}[schedule]
    return tuple(order(stage, num_stages, num_microbatches) for stage in range(num_stages))


def _all_forward_all_backward(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    forwards = [Action("forward", m) for m in range(num_microbatches)]
    return tuple(forwards + [Action("backward", m) for m in range(num_microbatches)])


def _one_forward_one_backward(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    forwards = [Action("forward", m) for m in range(num_microbatches)]
    backwards = [Action("backward", m) for m in range(num_microbatches)]
    return _alternate(forwards, backwards, num_stages - 1 - stage)


def _interleaved(stage: int, num_stages: int, num_microbatches: int, num_chunks: int) -> tuple[Action, ...]:
    """Groups of P microbatches go through one chunk after the other; backward visits the chunks last to first."""
    group = num_stages * num_chunks
    forwards, backwards = [], []
    for position in range(num_microbatches * num_chunks):
        microbatch = position // group * num_stages + position % num_stages
        chunk = position % group // num_stages
        forwards.append(Action("forward", microbatch, chunk))
        backwards.append(Action("backward", microbatch, num_chunks - 1 - chunk))
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


def _zero_bubble(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    actions: list[Action] = []
    weights = 0
    for action in _one_forward_one_backward(stage, num_stages, num_microbatches):
        if action.kind == "forward":
            actions.append(action)
            continue
        actions.append(Action("backward_input", action.microbatch))
        # Once all forwards are done, the device would wait for the next gradient: every gap takes one weight part.
        if action.microbatch >= min(stage, num_microbatches - (num_stages - 1 - stage)):
            actions.append(Action("backward_weight", weights))
            weights += 1
    return tuple(actions + [Action("backward_weight", m) for m in range(weights, num_microbatches)])
