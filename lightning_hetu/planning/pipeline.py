"""How long a pipelined step takes, from what each stage takes: the closed form, bounds on it, and the best combination.

The textbook ``(m - 1) max c + sum c`` (Galvatron-BMW, arXiv 2307.02031, section 3) is exact for stages of equal time.
Where the slowest stage is an early one it is too much: under 1F1B that stage runs its first forwards, and its last
backwards, while the stages behind it still fill and drain. The exact time is the longest path through the actions of a
step (PipeDream-Flush, arXiv 2006.09503). Let a stage take ``c = f + b`` for forward and backward of a microbatch, let
``C``, ``G`` and ``R`` be the sums of ``c``, of what is done once in the first forward, and of what is done once in the
last backward, over the first stage to it, and let it run ``w = min(stages behind it, m - 1)`` forwards ahead of its
first backward. The longest path alternates between forward and backward at a stage ``s``; reaches it from the first
forward by way of a stage ``t`` behind it, where it turns, and a stage ``v`` in front of ``t`` whose forward it repeats;
and leaves it the same way to the last backward::

    fill[t] = C[t] + max over v <= t of (G[v] + w[t] f[v])
    drain[t] = C[t] + max over v <= t of (R[v] + w[t] b[v])
    T = max over s of ((m - 1 - w[s]) c[s] - C[s] + max over t >= s of fill[t] + max over t >= s of drain[t])

Under GPipe (arXiv 1811.06965) all forwards come first, and
``T = sum c + max over v of (G[v] + (m - 1) f[v]) + max over v of (R[v] + (m - 1) b[v])``. Both equal
:mod:`~lightning_hetu.planning.simulate`, which plays the step event by event. The optimizer is the one part that is
bounded and not followed: its longest time in any stage comes on top.

A search needs bounds that know little of the other stages. They leave out the paths that repeat one stage and turn or
alternate at another one, unless that is the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_hetu.planning.pareto import Floats, non_dominated
from lightning_hetu.planning.plan import Schedule
from lightning_hetu.planning.stage_tables import StageChoice, Support

_LABEL_LIMIT = 256
_CHOICE_LIMIT = 64
_PREFIX_LIMIT = 64
_TIE = 1e-9

Weights = tuple[float, float, float, float, float]
"""One for each of :class:`StageTimes`."""
StageBound = Callable[[int, Weights], float]
"""Least weighted sum of the times of a stage, given the stage and the weights."""


class StageTimes(NamedTuple):
    """Seconds of one stage.

    Args:
        forward: Forward of one microbatch.
        backward: Backward of one microbatch.
        first_forward: What the first forward of a step takes besides.
        last_backward: What the last backward of a step takes besides.
        optimizer: After the last backward; no other stage waits for it.
    """

    forward: float
    backward: float
    first_forward: float = 0.0
    last_backward: float = 0.0
    optimizer: float = 0.0

    @property
    def seconds(self) -> float:
        """Of one microbatch."""
        return self.forward + self.backward

    @property
    def sync(self) -> float:
        """Once per step."""
        return self.first_forward + self.last_backward + self.optimizer


EVERY_MICROBATCH: Weights = (1.0, 1.0, 0.0, 0.0, 0.0)
"""Weights that give :attr:`StageTimes.seconds`."""
ONCE_PER_STEP: Weights = (0.0, 0.0, 1.0, 1.0, 1.0)
"""Weights that give :attr:`StageTimes.sync`."""
_PASSED: Weights = (1.0, 1.0, 1.0, 1.0, 0.0)
"""Weights of a stage that the first forward and the last backward pass through."""


@dataclass(frozen=True)
class Demand:
    """A linear lower bound on the step time: what one stage asks for if it is the one that holds up the step.

    Every stage in front of it is passed through once in each direction.

    Args:
        stage: That stage.
        own: Weights of its times.
        behind: Weights of the times of the stages behind it.
        bound: The least value, given least values of each stage.
    """

    stage: int
    own: Weights
    behind: Weights
    bound: float

    def weights(self, stage: int) -> Weights:
        """Weights of the times of a stage."""
        return self.own if stage == self.stage else _PASSED if stage < self.stage else self.behind


@dataclass(frozen=True)
class PipelineForm:
    """The closed form of the time of one step.

    Args:
        num_microbatches: ``m``; under 1F1B at least the number of stages.
        schedule: ``gpipe`` runs all forwards before the first backward.
    """

    num_microbatches: int
    schedule: Schedule = "1f1b"

    def step_time(self, stages: Sequence[Sequence[float]]) -> float:
        """Seconds of one step, from the :class:`StageTimes` of every stage."""
        return float(self.step_times(np.array(stages, dtype=float)))

    def step_times(self, stages: Floats) -> Floats:
        """Seconds of one step for each of many combinations of stages: ``[..., P, 5]`` to ``[...]``."""
        forward, backward, _, _, optimizer = np.moveaxis(stages, -1, 0)
        if self.schedule == "gpipe":
            fill, drain = (repeats[..., -1] for repeats in self._repeats(stages))
            pipeline = (forward + backward).sum(axis=-1) + fill + drain
        else:
            fill, drain = (_largest_behind(turn) for turn in self._turns(stages))
            pipeline = (self._alternations(stages) + fill + drain).max(axis=-1)
        return np.asarray(pipeline + optimizer.max(axis=-1))

    def _ahead(self, num_stages: int) -> Floats:
        """Forwards that each stage runs ahead of its first backward, and as many backwards behind its last forward."""
        if self.schedule == "gpipe":
            return np.full(num_stages, self.num_microbatches - 1.0)
        return np.asarray(np.minimum(np.arange(num_stages - 1.0, -1.0, -1.0), self.num_microbatches - 1.0))

    def _alternations(self, stages: Floats) -> Floats:
        """What a path gets for alternating at each stage, less what its ways in and out both count."""
        both = stages[..., 0] + stages[..., 1]
        return np.asarray((self.num_microbatches - 1 - self._ahead(both.shape[-1])) * both - both.cumsum(axis=-1))

    def _turns(self, stages: Floats) -> tuple[Floats, Floats]:
        """The longest ways in that turn at each stage, and the longest ways out."""
        done = (stages[..., 0] + stages[..., 1]).cumsum(axis=-1)
        fill, drain = self._repeats(stages)
        return done + fill, done + drain

    def _repeats(self, stages: Floats) -> tuple[Floats, Floats]:
        """The most that repeating one stage gives a path that turns at each stage, on its way in and on its way out."""
        ways = self._repeat_table(stages[..., 0], stages[..., 2]), self._repeat_table(stages[..., 1], stages[..., 3])
        return ways[0].max(axis=-1), ways[1].max(axis=-1)

    def _repeat_table(self, seconds: Floats, once: Floats) -> Floats:
        """``[..., turn, repeated stage]``: once-per-step work up to the repeated stage, and its repetitions."""
        num_stages = seconds.shape[-1]
        table = once.cumsum(axis=-1)[..., None, :] + self._ahead(num_stages)[:, None] * seconds[..., None, :]
        return np.where(np.tri(num_stages, dtype=bool), table, -np.inf)

    def stage_weights(self, stages: Sequence[Sequence[float]]) -> list[float]:
        """By how much the step gets longer per second that each stage does; the largest is the one to relieve.

        A second is split into forward and backward as the stage's time is. Of infinite stages, each is as bad.
        """
        times = np.array(stages, dtype=float)
        if not np.isfinite(times).all():
            return [0.0 if finite else 1.0 for finite in np.isfinite(times).all(axis=1)]
        count, ahead = len(times), self._ahead(len(times))
        repeated = [
            self._repeat_table(times[:, direction], times[:, 2 + direction]).argmax(axis=-1) for direction in (0, 1)
        ]
        weights = np.zeros((count, 2))
        if self.schedule == "gpipe":
            weights += 1
            for direction in (0, 1):
                weights[repeated[direction][-1], direction] += ahead[-1]
        else:
            turns, alternations = self._turns(times), self._alternations(times)
            asked = alternations + sum(map(_largest_behind, turns))
            tied = np.flatnonzero(asked >= asked.max() * (1 - _TIE))
            for stage in tied:
                weights[stage] += self.num_microbatches - 1 - ahead[stage]
                weights[: stage + 1] -= 1
                for direction, turn in enumerate(turns):
                    last = count - 1 - int(turn[stage:][::-1].argmax())
                    weights[: last + 1] += 1
                    weights[repeated[direction][last], direction] += ahead[last]
            weights /= len(tied)
        both = times[:, :2].sum(axis=1)
        shares = np.divide(times[:, :2], both[:, None], out=np.full((count, 2), 0.5), where=both[:, None] > 0)
        return [float(weight) for weight in (weights * shares).sum(axis=1)]

    def fastest_cut(
        self, blocks: Sequence[StageTimes], first: StageTimes, last: StageTimes, num_stages: int
    ) -> tuple[int, ...]:
        """The cut whose stages ask for least, see :meth:`demands`, by dynamic programming from the last stage on.

        Args:
            blocks: Times of every block. Only forward and backward count.
            first: Those of what the first stage has besides.
            last: Those of what the last stage has besides.
            num_stages: ``P``, at most the number of blocks.

        Returns:
            Blocks of each stage.
        """
        count, ahead = len(blocks), self._ahead(num_stages)
        sums = np.concatenate([np.zeros((1, 2)), np.cumsum([(b.forward, b.backward) for b in blocks], axis=0)])
        behind = (sums[-1] - sums).sum(axis=1) + last.seconds  # of the blocks from each one on, and the last row
        behind[-1] = 0.0
        # best[a]: from the first forward to the last backward of stages that hold all blocks from a on
        best = np.full(count + 1, np.inf)
        best[-1] = 0.0
        empty = np.tri(count + 1, dtype=bool)
        ends = []
        for stage in reversed(range(num_stages)):
            own = sums[None, :] - sums[:, None] + (np.array(first[:2]) if stage == 0 else 0.0)
            own[:, -1] += last[:2]
            both = own.sum(axis=2)
            if self.schedule == "gpipe":
                total = np.maximum(ahead[stage] * both, best[None])
            else:
                waits = np.maximum(ahead[stage] * own, behind[None, :, None]).sum(axis=2)
                total = np.maximum((self.num_microbatches - ahead[stage]) * both + waits, both + best[None])
            total[empty] = np.inf
            ends.append(total.argmin(axis=1))
            best = total.min(axis=1)
        cut, start = [], 0
        for end in reversed(ends):
            cut.append(int(end[start]) - start)
            start = int(end[start])
        return tuple(cut)

    # ---- bounds -----------------------------------------------------------------------------------------------------

    def demands(self, least: StageBound, num_stages: int) -> list[Demand]:
        """Linear lower bounds on the step time: paths that repeat the stage where they alternate or no stage at all.

        Args:
            least: What each stage takes at least.
            num_stages: ``P``.
        """
        forms = [self._forms(stage, num_stages) for stage in range(num_stages)]
        # behind_of[weights][s]: of the stages from s on
        behind_of: dict[Weights, list[float]] = {}
        for weights in {_PASSED, *(behind for form in forms for _, behind in form)}:
            values = [0.0]
            for stage in reversed(range(num_stages)):
                values.append(values[-1] + (least(stage, weights) if any(weights) else 0.0))
            behind_of[weights] = values[::-1]
        found = []
        for stage, form in enumerate(forms):
            before = behind_of[_PASSED][0] - behind_of[_PASSED][stage]
            for own, behind in form:
                bound = before + least(stage, own) + behind_of[behind][stage + 1]
                found.append(Demand(stage, own, behind, bound))
        return found

    def _forms(self, stage: int, num_stages: int) -> list[tuple[Weights, Weights]]:
        """Own weights and weights of the stages behind, for each way in which a stage may hold up a step."""
        rounds = float(self.num_microbatches)
        repeated: Weights = (rounds, rounds, 1.0, 1.0, 1.0)
        if self.schedule == "gpipe":
            return [(repeated, (1.0, 1.0, 0.0, 0.0, 0.0))]
        base = rounds - float(self._ahead(num_stages)[stage])
        if stage == num_stages - 1:
            return [(repeated, (0.0, 0.0, 0.0, 0.0, 0.0))]
        return [
            (repeated, (0.0, 0.0, 0.0, 0.0, 0.0)),
            ((base, rounds, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 0.0, 0.0)),
            ((rounds, base, 1.0, 1.0, 1.0), (1.0, 1.0, 0.0, 1.0, 0.0)),
            ((base, base, 1.0, 1.0, 1.0), (2.0, 2.0, 1.0, 1.0, 0.0)),
        ]

    def time_bound(self, seconds: Sequence[float], forward: Sequence[float], backward: Sequence[float]) -> float:
        """No step is faster whose stages take at least this long, together and in each direction.

        Args:
            seconds: Of one microbatch; may be more than the other two together.
            forward: Its forward.
            backward: Its backward.
        """
        both, total, best, before = np.array(seconds), float(sum(seconds)), 0.0, 0.0
        if self.schedule == "gpipe":
            return float((self.num_microbatches - 1) * both.max() + total)
        ahead = self._ahead(len(seconds)).tolist()
        for stage, own in enumerate(seconds):
            after = max(total - before - own, 0.0)
            repeats, fill, drain = (ahead[stage] * time for time in (own, forward[stage], backward[stage]))
            waits = max(repeats, after + fill, after + drain, 2 * after)
            best = max(best, before + (self.num_microbatches - ahead[stage]) * own + waits)
            before += own
        return best

    def even_weights(self, num_stages: int) -> list[Weights]:
        """A step takes at least the sum of these times what each stage takes, wherever the cuts are.

        Equal stages are the best ones: a weighting of :meth:`demands` without any repetitions shows it for ``m > P``.
        For ``m = P``, what the first stage asks for shows a little less.
        """
        stages, rounds = num_stages, self.num_microbatches
        even = (rounds + stages - 1) / stages
        if self.schedule == "gpipe":
            return [(even, even, 1 - s / stages, 1 - s / stages, 1 / stages) for s in range(stages)]
        if rounds > stages:
            return [(even, even, 1.0, 1.0, 1 / stages)] * stages
        share = rounds / (rounds + 1)
        return [(2 * share, 2 * share, 1.0, 1.0, 1.0), *[(2 * share, 2 * share, share, share, 0.0)] * (stages - 1)]

    def comparison(self, stage: int, num_stages: int) -> Floats:
        """What a choice for a stage must not be worse in to be as good whatever the others do; ``[5, 5]`` weights.

        No path counts one direction more than ``w + 1`` times as often as the other one.
        """
        ahead = float(self._ahead(num_stages)[stage])
        columns = [(1 + ahead, 1, 0, 0, 0), (1, 1 + ahead, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)]
        return np.array(columns, dtype=float).T

    # ---- the best combination ---------------------------------------------------------------------------------------

    def combine(
        self, fronts: Sequence[Sequence[StageChoice]], incumbent: float = np.inf
    ) -> tuple[float, list[StageChoice]] | None:
        """The choice for each stage that makes the fastest step, and its time; of equal times, that of smallest peak.

        From the last stage to the first, partial choices are compared by what the bounds tell of them. Where the best
        one is longer than its bound, partial choices from the first stage on are followed exactly and cut off by the
        bounds of the rest. The result is exact while there are few choices; of many, the most promising and an even
        selection are looked at.

        Args:
            fronts: Choices of each stage, whose criteria are :class:`StageTimes`.
            incumbent: ``None`` is returned where nothing is as fast as this.
        """
        tables = [self._thinned(front) for front in fronts]
        suffixes = self._suffixes(tables, incumbent)
        if suffixes is None:
            return None
        labels, picks = suffixes[0]
        times = self.step_times(
            np.stack([table[pick, :5] for table, pick in zip(tables, picks.T, strict=True)], axis=1)
        )
        position = int(np.lexsort((labels[:, 4], times))[0])
        best, chosen = float(times[position]), picks[position]
        if best > float(self._bounds(labels).min()) * (1 + _TIE):
            known = min(best, incumbent * (1 + 2 * _TIE))
            better = self._from_the_first(tables, [labels for labels, _ in suffixes[1:]], known)
            best, chosen = better or (best, chosen)
        if best > incumbent * (1 + _TIE):
            return None
        indices = [int(table[pick, 6]) for table, pick in zip(tables, chosen, strict=True)]
        return best, [front[index] for front, index in zip(fronts, indices, strict=True)]

    def _suffixes(self, tables: Sequence[Floats], incumbent: float) -> list[tuple[Floats, NDArray[np.intp]]] | None:
        """Partial choices for the stages from each one on, and for no stage at the end: labels and picks.

        The columns of a label are a bound on the time from the first forward to the last backward, the longest way in
        and the longest way out if the stages in front repeat nothing, the longest optimizer, and the largest peak.
        Under ``gpipe`` the first one is the time of one microbatch, and the sum of the three is the time.
        """
        stages, ahead = len(tables), self._ahead(len(tables)).tolist()
        gpipe = self.schedule == "gpipe"
        least = [float(table[:, :4].sum(axis=1).min()) for table in tables]
        found = [(np.zeros((1, 5)), np.zeros((1, 0), dtype=np.intp))]
        for stage in reversed(range(stages)):
            labels, picks = found[0]
            total, fill, drain, step, fullest = (labels[:, None, column] for column in range(5))
            forward, backward, first, last, optimizer, peak = (tables[stage][None, :, i] for i in range(6))
            both, size = forward + backward, len(tables[stage])
            passed = 0.0 if gpipe else both
            fill = passed + first + np.maximum(fill, ahead[stage] * forward)
            drain = passed + last + np.maximum(drain, ahead[stage] * backward)
            if gpipe:
                total = total + both
            else:
                rounds = (self.num_microbatches - 2 - ahead[stage]) * both
                total = np.maximum(total + both + first + last, rounds + fill + drain)
            columns = (total, fill, drain, np.maximum(step, optimizer), np.maximum(fullest, peak))
            points = np.stack([np.broadcast_to(column, total.shape).reshape(-1) for column in columns], axis=1)
            times = self._bounds(points) + sum(least[:stage])
            keep = np.flatnonzero(times <= incumbent * (1 + _TIE))
            if not keep.size:
                return None
            # Of points that are equal but for the peak, the smaller one comes first and stays.
            keep = keep[np.argsort(points[keep, 4], kind="stable")]
            keep = keep[non_dominated(points[keep, :4])]
            if keep.size > _LABEL_LIMIT:
                keep = keep[np.argsort(times[keep], kind="stable")[:_LABEL_LIMIT]]
            found.insert(0, (points[keep], np.column_stack([keep % size, picks[keep // size]])))
        return found

    def _bounds(self, labels: Floats) -> Floats:
        """Least step time of labels that hold all stages."""
        pipeline = labels[:, :3].sum(axis=1) if self.schedule == "gpipe" else labels[:, 0]
        return np.asarray(pipeline + labels[:, 3])

    def _from_the_first(
        self, tables: Sequence[Floats], suffixes: Sequence[Floats], incumbent: float
    ) -> tuple[float, NDArray[np.intp]] | None:
        """The choices that make a step faster than ``incumbent``, and its time: branch and bound from the first stage.

        Args:
            tables: Choices of each stage.
            suffixes: Labels of the stages behind each one.
            incumbent: Time to beat.
        """
        ahead = self._ahead(len(tables))
        picks = np.zeros((1, 0), dtype=np.intp)
        sums, step = np.zeros((3, 1)), np.zeros(1)  # of a microbatch, once forward and once backward; longest optimizer
        ways_in, ways_out = (np.full((1, len(tables)), -np.inf) for _ in range(2))  # largest repetition for each turn
        # Longest paths that alternate so far: from there on, from their way in or out on, and as a whole.
        paths = np.full((4, 1), -np.inf)
        for stage, table in enumerate(tables):
            forward, backward, first, last, optimizer = table.T[:5]
            done, once_in, once_out = sums[:, :, None] + np.stack([forward + backward, first, last])[:, None]
            ways_in = np.maximum(ways_in[:, None], once_in[..., None] + ahead * forward[:, None])
            ways_out = np.maximum(ways_out[:, None], once_out[..., None] + ahead * backward[:, None])
            turn_in, turn_out = done + ways_in[..., stage], done + ways_out[..., stage]
            here = (self.num_microbatches - 1 - ahead[stage]) * (forward + backward) - done
            alternating = np.maximum(paths[0][:, None], here)
            entered = np.maximum(paths[1][:, None], alternating + turn_in)
            left = np.maximum(paths[2][:, None], alternating + turn_out)
            whole = np.maximum(paths[3][:, None], np.maximum(entered + turn_out, left + turn_in))
            picks = np.column_stack([np.repeat(picks, len(table), axis=0), np.tile(np.arange(len(table)), len(picks))])
            sums = np.stack([done, once_in, once_out]).reshape(3, -1)
            paths = np.stack([alternating, entered, left, whole]).reshape(4, -1)
            step = np.maximum(step[:, None], optimizer).reshape(-1)
            bounds = paths[3] + step if stage + 1 == len(tables) else _completed(sums, paths, step, suffixes[stage])
            keep = np.flatnonzero(bounds < incumbent * (1 - _TIE))
            keep = keep[np.argsort(bounds[keep], kind="stable")[:_PREFIX_LIMIT]]
            if not keep.size:
                return None
            picks, sums, paths, step, bounds = picks[keep], sums[:, keep], paths[:, keep], step[keep], bounds[keep]
            ways_in, ways_out = (ways.reshape(-1, len(tables))[keep] for ways in (ways_in, ways_out))
        return float(bounds[0]), picks[0]

    def _thinned(self, front: Sequence[StageChoice]) -> Floats:
        """Times, peak and index of the choices of a stage: all of them, or a selection of many."""
        table = np.array([[*choice.cost, choice.peak, index] for index, choice in enumerate(front)])
        if len(front) <= _CHOICE_LIMIT:
            return table
        seconds, sync = table[:, :2].sum(axis=1), table[:, 2:5].sum(axis=1)
        order = np.argsort(seconds, kind="stable")
        even = order[np.unique(np.linspace(0, order.size - 1, _CHOICE_LIMIT // 2).astype(np.intp))]
        promising = np.argsort(self.num_microbatches * seconds + sync, kind="stable")[: _CHOICE_LIMIT // 2]
        return table[np.union1d(even, promising)]


def _largest_behind(turns: Floats) -> Floats:
    """The largest value at each stage or behind it."""
    return np.maximum.accumulate(turns[..., ::-1], axis=-1)[..., ::-1]


def _completed(sums: Floats, paths: Floats, step: Floats, suffix: Floats) -> Floats:
    """Least step time of each partial choice for the first stages, over labels of the stages behind them."""
    both, once_in, once_out = sums[:, :, None]
    alternating, entered, left, whole = paths[:, :, None]
    total, fill, drain, optimizer, _ = suffix.T
    found = np.maximum(whole, both + once_in + once_out + total)
    found = np.maximum(found, entered + both + once_out + drain)
    found = np.maximum(found, left + both + once_in + fill)
    found = np.maximum(found, alternating + 2 * both + once_in + once_out + fill + drain)
    return np.asarray((found + np.maximum(step[:, None], optimizer)).min(axis=1))


def stage_supports(demands: Sequence[Demand], least: StageBound, stage: int) -> list[Support]:
    """Linear lower bounds on the step time in the times of one stage, from :meth:`PipelineForm.demands`."""
    best: dict[Weights, float] = {}
    for demand in demands:
        weights = demand.weights(stage)
        best[weights] = max(best.get(weights, -np.inf), demand.bound - (least(stage, weights) if any(weights) else 0.0))
    return [Support(weights, constant) for weights, constant in best.items()]
