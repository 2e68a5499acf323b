"""A simulated training step: when everything happened, and what follows from it.

The trace format is the Chrome trace event format, which ``chrome://tracing`` and Perfetto read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lightning_hetu.planning.schedules import Action
from lightning_hetu.planning.tables import text_table
from lightning_hetu.planning.units import format_bytes, format_seconds

Stream = Literal["compute", "tensor_parallel", "data_parallel", "receive", "send"]
_HEADINGS = ("stage", "busy", "idle", "bubble", "microbatches in flight", "peak activations", "done after")


class Event(NamedTuple):
    """Something that takes time on one stream of one stage; all devices of a stage do the same.

    Args:
        stage: Pipeline stage.
        stream: ``compute``; ``tensor_parallel`` for reductions and relayouts of activations; ``data_parallel`` for
            gathers of parameters and reductions of gradients; ``receive`` and ``send`` for transfers between stages.
        name: What it is, for people.
        kind: What it belongs to: ``forward``, ``backward``, ``backward_input``, ``backward_weight`` or ``step``.
        microbatch: Index of the microbatch, ``None`` for what is done once per step.
        row: Row of the plan (0 is the embedding, ``i + 1`` block ``i``, the last one the head), where it belongs to
            one.
        start: Seconds since the step began.
        end: Seconds since the step began.
    """

    stage: int
    stream: Stream
    name: str
    kind: str
    microbatch: int | None
    row: int | None
    start: float
    end: float


class Piece(NamedTuple):
    """An event of a body, with seconds since the body began."""

    stream: Stream
    name: str
    row: int | None
    start: float
    end: float


class Body(NamedTuple):
    """What a device does in one action.

    Args:
        seconds: How long it takes.
        pieces: What happens meanwhile.
        memory: ``(seconds since the body began, change of activation bytes)``.
    """

    seconds: float = 0.0
    pieces: tuple[Piece, ...] = ()
    memory: tuple[tuple[float, float], ...] = ()


class TimedAction(NamedTuple):
    """An action that was run.

    Args:
        action: The action; ``None`` for what a stage does at the end of the step.
        start: When the stage began to be occupied.
        body_start: When the body began; before that, the stage was occupied by receiving its input.
        end: When the body ended.
        body: What was done.
    """

    action: Action | None
    start: float
    body_start: float
    end: float
    body: Body


class Transfer(NamedTuple):
    """Activations (forward) or their gradients (backward) on their way between two stages."""

    sender: int
    receiver: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """One simulated training step.

    Args:
        schedule: Name of the pipeline schedule.
        num_microbatches: Microbatches of the step.
        actions: What every stage did, in order.
        transfers: What was sent between stages, in no particular order.
        predicted_time: Seconds per step by the closed formula of the cost model, where a plan was simulated.
    """

    schedule: str
    num_microbatches: int
    actions: tuple[tuple[TimedAction, ...], ...]
    transfers: tuple[Transfer, ...]
    predicted_time: float | None = None

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.actions)

    @cached_property
    def finish_times(self) -> tuple[float, ...]:
        """Seconds until each stage has done everything, its optimizer step included."""
        return tuple(max((done.end for done in stage), default=0.0) for stage in self.actions)

    @property
    def iteration_time(self) -> float:
        """Seconds per step: until the last stage is done."""
        return max(self.finish_times)

    @cached_property
    def busy_seconds(self) -> tuple[float, ...]:
        """Seconds that each stage is occupied.

        By computation, by communication that computation waits for, and, unless transfers overlap, by receiving.
        """
        return tuple(sum(done.end - done.start for done in stage) for stage in self.actions)

    @property
    def idle_seconds(self) -> tuple[float, ...]:
        """Seconds that each stage waits for others: the pipeline bubble."""
        time = self.iteration_time
        return tuple(time - busy for busy in self.busy_seconds)

    @property
    def bubble_fractions(self) -> tuple[float, ...]:
        """Share of the step that each stage is idle."""
        time = self.iteration_time
        return tuple(idle / time if time > 0 else 0.0 for idle in self.idle_seconds)

    @property
    def bubble_fraction(self) -> float:
        """Share of the step that the stages are idle on average."""
        return sum(self.bubble_fractions) / self.num_stages

    @cached_property
    def peak_in_flight(self) -> tuple[int, ...]:
        """Most microbatches that each stage holds at once, from the start of forward to the end of backward.

        With split backward, until the end of the weight part. Chunks of one stage count separately.
        """
        change = {"forward": 1, "backward": -1, "backward_weight": -1}
        counts = (
            accumulate((change.get(d.action.kind, 0) if d.action else 0 for d in stage), initial=0)
            for stage in self.actions
        )
        return tuple(map(max, counts))

    def activation_bytes(self, stage: int) -> list[tuple[float, float]]:
        """Activations of one stage over time: ``(seconds, bytes per device from then on)``.

        Counted are the activations that are kept from forward to backward: those of a row from the end of its forward
        to the end of its backward of the same microbatch, and what a stage received and sent, from the start of the
        forward to the end of the backward. Temporary buffers and recomputed activations are not counted. Without rows,
        all of it is there from the start of the forward to the end of the backward; the peak is the same.
        """
        # The actions of a stage are in order and do not overlap, so the changes are in order.
        changes = [(d.body_start + offset, size) for d in self.actions[stage] for offset, size in d.body.memory]
        times = (0.0, *(time for time, _ in changes))
        return list(zip(times, accumulate((size for _, size in changes), initial=0.0), strict=True))

    @cached_property
    def peak_activation_bytes(self) -> tuple[float, ...]:
        """Most bytes of activations per device of each stage, see :meth:`activation_bytes`."""
        return tuple(max(size for _, size in self.activation_bytes(stage)) for stage in range(self.num_stages))

    # ---- events -----------------------------------------------------------------------------------------------------

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """Everything that takes time, ordered by stage, start and stream."""
        order = {name: index for index, name in enumerate(get_args(Stream))}
        events = sorted(self._events(), key=lambda event: (event.stage, event.start, order[event.stream], event.end))
        return tuple(events)

    def _events(self) -> Iterator[Event]:
        for stage, actions in enumerate(self.actions):
            for done in actions:
                kind = done.action.kind if done.action else "step"
                microbatch = done.action.microbatch if done.action else None
                origin = done.body_start
                for stream, name, row, start, end in done.body.pieces:
                    if end > start:
                        yield Event(stage, stream, name, kind, microbatch, row, origin + start, origin + end)
        for sender, receiver, action, start, end in self.transfers:
            if end > start:
                what = "activations" if action.kind == "forward" else "gradients"
                common = (action.kind, action.microbatch, None, start, end)
                yield Event(sender, "send", f"send {what} to stage {receiver}", *common)
                yield Event(receiver, "receive", f"receive {what} from stage {sender}", *common)

    def to_chrome_trace(self) -> dict[str, Any]:
        """The step in the Chrome trace event format: a process per stage, a thread per stream, times in microseconds.

        A counter per stage shows its activations in bytes.
        """
        threads = {name: index for index, name in enumerate(get_args(Stream))}
        entries: list[dict[str, Any]] = []
        for stage in range(self.num_stages):
            entries.append(_metadata("process_name", stage, {"name": f"stage {stage}"}))
            entries.append(_metadata("process_sort_index", stage, {"sort_index": stage}))
            for name, thread in threads.items():
                entries.append(_metadata("thread_name", stage, {"name": name.replace("_", " ")}, thread))
                entries.append(_metadata("thread_sort_index", stage, {"sort_index": thread}, thread))
        for event in self.events:
            known = {"kind": event.kind, "microbatch": event.microbatch, "row": event.row}
            entries.append(
                {
                    "name": event.name,
                    "cat": event.kind,
                    "ph": "X",
                    "ts": event.start * 1e6,
                    "dur": (event.end - event.start) * 1e6,
                    "pid": event.stage,
                    "tid": threads[event.stream],
                    "args": {key: value for key, value in known.items() if value is not None},
                }
            )
        for stage, peak in enumerate(self.peak_activation_bytes):
            for time, size in self.activation_bytes(stage) if peak > 0 else ():
                counter = {"name": "activations", "ph": "C", "ts": time * 1e6, "pid": stage, "args": {"bytes": size}}
                entries.append(counter)
        return {"traceEvents": entries, "displayTimeUnit": "ms"}

    def save_chrome_trace(self, path: str | Path) -> Path:
        """Writes :meth:`to_chrome_trace` as JSON and returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_chrome_trace(), separators=(",", ":")) + "\n", encoding="utf-8")
        return path

    def summary(self) -> str:
        """The step as a text table of at most 110 columns."""
        time = self.iteration_time
        plural = "es" * (self.num_microbatches > 1)
        lines = [
            f"simulated step {format_seconds(time)} of {self.num_microbatches} microbatch{plural}, schedule"
            f" {self.schedule}, bubble {self.bubble_fraction:.1%}"
        ]
        if self.predicted_time is not None:
            difference = f" ({self.predicted_time / time - 1:+.1%})" if time > 0 else ""
            lines.append(f"predicted by the cost model {format_seconds(self.predicted_time)}{difference}")
        cells = [
            (
                str(stage),
                format_seconds(busy),
                format_seconds(time - busy),
                f"{bubble:.1%}",
                str(self.peak_in_flight[stage]),
                format_bytes(self.peak_activation_bytes[stage]),
                format_seconds(self.finish_times[stage]),
            )
            for stage, (busy, bubble) in enumerate(zip(self.busy_seconds, self.bubble_fractions, strict=True))
        ]
        return "\n".join([*lines, "", text_table([_HEADINGS, *cells])])


def _metadata(name: str, process: int, args: dict[str, Any], thread: int = 0) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": process, "tid": thread, "args": args}
