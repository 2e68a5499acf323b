"""How long a step takes if communication runs beside computation: an estimate for a finished OSDP plan.

OSDP (arXiv 2209.13258) adds computation and communication up, and so does the search here. This is the shortest model
of what FSDP2 does instead: one gather ahead in forward, and in backward one gather ahead and one reduction behind. Of
each slice's computation and of the communication beside it, the longer one counts. Gathers and reductions share the
link.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lightning_hetu.planning.osdp.costs import Accumulation, SliceSeconds


class SliceStep(NamedTuple):
    """One slice in one micro-step: seconds of its computation, and of what it waits for."""

    forward: float
    backward: float
    communication: SliceSeconds
    kept: bool = False  # whether it is gathered in the first micro-step only


def overlapped_seconds(slices: Sequence[SliceStep], micro_steps: int, accumulation: Accumulation) -> float:
    """Seconds of one optimizer step.

    Args:
        slices: Slices in the order of forward.
        micro_steps: Forward and backward passes per optimizer step.
        accumulation: When gradients are reduced.
    """
    kinds = Counter((step == 0, accumulation == "every" or step == micro_steps - 1) for step in range(micro_steps))
    return sum(count * _micro_step(slices, *kind) for kind, count in kinds.items())


def _micro_step(slices: Sequence[SliceStep], first: bool, reduces: bool) -> float:
    """Seconds of one forward and backward."""
    gathers = [0.0 if part.kept and not first else part.communication.forward_gather for part in slices]
    forward = _pass([part.forward for part in slices], gathers, [0.0] * len(slices))
    back = slices[::-1]
    reductions = [part.communication.reduction * reduces for part in back]
    return forward + _pass(
        [part.backward for part in back], [part.communication.backward_gather for part in back], reductions
    )


def _pass(compute: Sequence[float], before: Sequence[float], after: Sequence[float]) -> float:
    """Seconds of one pass over slices, each of which needs communication before and causes some after it."""
    if not compute:
        return 0.0
    beside = [gather + reduction for gather, reduction in zip([*before[1:], 0.0], [0.0, *after[:-1]], strict=True)]
    return before[0] + sum(map(max, compute, beside)) + after[-1]
