"""The best cut into stages for one batch size, microbatch count and number of stages.

Follows the bi-objective search of Galvatron-BMW (arXiv 2307.02031, section 4): from the memory-balanced cut towards the
time-balanced one, always taking a block from the stage that holds up the step. What we add:

* that stage may hand a block to any stage, not only to its neighbors: the stages in between pass blocks on;
* the even cut is always solved, so the result is never worse than its; the time-balanced cut and the one that would be
  fastest without a memory limit are starting points too;
* the found cut is improved by moving single blocks, judged by exact times;
* stages that occur in several cuts are solved once;
* where there are few cuts, all of them are looked at, most promising first, which is exact.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lightning_hetu.planning.cost_model import CostModel, Setting
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.partition import Cut, all_cuts, balanced_cut, count_cuts, neighbors
from lightning_hetu.planning.pipeline import StageTimes
from lightning_hetu.planning.search_space import Pins
from lightning_hetu.planning.stage_search import Found, Prices, SettingSearch
from lightning_hetu.planning.stage_tables import Floats, RowTable

EXHAUSTIVE_LIMIT = 64
"""Up to this many cuts, all are looked at."""
_RELIEVED = 2
"""Stages of a cut that may hand a block on."""
_RECEIVERS = 6
"""Stages that may take one, besides the neighbors: those of the least time."""
_PATIENCE = 12
"""Cuts without a better bound after which the queue is left."""
_IDLE_CUTS = 8
"""Cuts without a better plan after which no further ones are solved."""
_TIE = 1e-9


class PartitionSearch:
    """The plans of all cuts of one setting; has the interface of :class:`SettingSearch`."""

    def __init__(
        self, model: CostModel, setting: Setting, pins: Pins, exhaustive_limit: int = EXHAUSTIVE_LIMIT
    ) -> None:
        self.model = model
        self.setting = setting
        self.pins = pins
        self.prices = Prices(model, setting, pins)
        self.variants = self.prices.variants
        self.exhaustive = count_cuts(model.num_layers, setting.num_stages) <= exhaustive_limit
        self._cuts: dict[Cut, SettingSearch] = {}
        self._solved: dict[tuple[Cut, int], tuple[float, Found | None]] = {}
        self._starts: dict[str, Cut] | None = None
        self._roomiest: Cut | None = None

    def cut(self, stages: Cut) -> SettingSearch:
        """The search of one cut."""
        if stages not in self._cuts:
            setting = replace(self.setting, stages=stages)
            self._cuts[stages] = SettingSearch(self.model, setting, self.pins, self.prices)
        return self._cuts[stages]

    def _best_of_cut(self, stages: Cut, capacity: int, incumbent: float) -> Found | None:
        """What :meth:`SettingSearch.best` finds for one cut; a cut is not solved again for a smaller ``incumbent``."""
        known, found = self._solved.get((stages, capacity), (-np.inf, None))
        if incumbent > known and (found is None or found.time > known * (1 + _TIE)):
            known, found = incumbent, self.cut(stages).best(capacity, incumbent)
            self._solved[stages, capacity] = known, found
        return found

    # ---- bounds -----------------------------------------------------------------------------------------------------

    def lower_bound(self, capacity: int) -> float:
        """No plan of any cut in ``capacity`` bytes is faster; infinite where it is plain that none fits."""
        return min((self._variant_bound(options, capacity) for options, _ in self.variants), default=np.inf)

    def _variant_bound(self, options: list[tuple[LayerStrategy, ...]], capacity: int) -> float:
        """All stages together hold all rows at least once: as if they were one stage of all their memory."""
        setting, form = self.setting, self.model.pipeline_form(self.setting)
        rows = [self._plain_table(row, options[row]) for row in range(setting.num_rows)]
        weights = tuple(map(min, zip(*form.even_weights(setting.num_stages), strict=True)))
        together = self.prices.time_bound(rows, setting.num_stages * capacity, weights)
        # The stage of a row takes that row's time in every round. Rows in front of it are passed, or in the same stage.
        seconds = np.array([float(row.cost[:, :2].sum(axis=1).min()) for row in rows])
        once = np.array([float(row.cost[:, 2:4].sum(axis=1).min()) for row in rows])
        slowest = (setting.num_microbatches - 1) * seconds + seconds.cumsum() + once.cumsum()
        return max(together, float(slowest.max()))

    def _plain_table(self, row: int, options: tuple[LayerStrategy, ...]) -> RowTable:
        """Prices of a row that is at no border of its stage and holds as few microbatches as any stage does."""
        stages = self.setting.num_stages
        for long in (stages - 1, 0):
            cut = [1] * stages
            cut[long] += self.model.num_layers - stages
            setting = replace(self.setting, stages=tuple(cut))
            if row != setting.rows(stages - 1)[0]:
                return self.prices.table(row, stages - 1, options, setting)
        raise AssertionError("the two cuts begin their last stage with different rows")

    # ---- starting points --------------------------------------------------------------------------------------------

    def starts(self) -> dict[str, Cut]:
        """The even, the memory-balanced and the time-balanced cut, and the fastest one if there were no memory limit.

        Blocks are weighed by the least memory and the least time that any of their options has; memory counts as often
        as a stage holds microbatches.
        """
        if self._starts is None:
            stages, rows = self.setting.num_stages, self.setting.num_rows
            options = self.variants[0][0]
            prices = [self._plain_table(row, options[row]).cost for row in range(rows)]
            times = [StageTimes(*cost[cost[:, :2].sum(axis=1).argmin()].tolist()) for cost in prices]
            seconds = [row.seconds for row in times]
            memory = np.array([[self._least_memory(row, stage) for row in range(rows)] for stage in range(stages)])
            form = self.model.pipeline_form(self.setting)
            bases = [int(self.model.stage_base(stage, self.setting).sum()) for stage in range(stages)]
            self._starts = {
                "even": self.setting.stages,
                "memory": _balanced(memory, np.array(bases, dtype=float)),
                "time": _balanced(np.tile(seconds, (stages, 1)), np.zeros(stages)),
                "fastest": form.fastest_cut(times[1:-1], times[0], times[-1], stages),
            }
        return self._starts

    def _least_memory(self, row: int, stage: int) -> float:
        options = self.variants[0][0][row]
        return self.prices.least_held(row, stage, options, self.setting)

    def roomiest(self) -> Cut:
        """The cut found to need the least memory: from the memory-balanced one, blocks leave the fullest stage."""
        if self._roomiest is None:
            if self.exhaustive:
                self._roomiest = min(self._all(), key=lambda cut: (self.cut(cut).least_peak(), cut))
            else:
                best = min(dict.fromkeys(self.starts().values()), key=lambda cut: self.cut(cut).least_peak())
                improved: Cut | None = best
                while improved is not None:
                    best = improved
                    improved = self._with_less_memory(best)
                self._roomiest = best
        return self._roomiest

    def _with_less_memory(self, cut: Cut) -> Cut | None:
        """A neighbor of a cut whose fullest stage is less full."""
        search = self.cut(cut)
        peaks = min((search.stage_peaks(stages) for stages in search.variants), key=max)
        fullest = max(range(len(peaks)), key=peaks.__getitem__)
        return next((other for other in neighbors(cut, fullest) if self.cut(other).least_peak() < max(peaks)), None)

    def least_peak(self) -> int:
        """Fewest bytes with which :meth:`best` finds a plan."""
        return self.cut(self.roomiest()).least_peak()

    # ---- search -----------------------------------------------------------------------------------------------------

    def best(self, capacity: int, incumbent: float = np.inf) -> Found | None:
        """The fastest plan found in ``capacity`` bytes; ``None`` if none fits or none is as fast as ``incumbent``."""
        candidates = list(self._all()) if self.exhaustive else self._explored(capacity)
        bounds = [(self.cut(cut).lower_bound(capacity), index) for index, cut in enumerate(candidates)]
        best: Found | None = None
        idle = 0
        for bound, index in sorted(bounds):
            known = incumbent if best is None else min(incumbent, best.time)
            if not np.isfinite(bound) or bound > known * (1 + _TIE):
                break
            if idle >= _IDLE_CUTS and not self.exhaustive and index > 0:
                continue
            found = self._best_of_cut(candidates[index], capacity, known)
            better = found is not None and (best is None or found.key() < best.key())
            idle = 0 if better else idle + 1
            best = found if better else best
        if self.exhaustive:
            return best
        if best is None and not np.isfinite(incumbent):
            best = self.cut(self.roomiest()).best(capacity)
        return self._improved(best, capacity) if best is not None else None

    def _improved(self, best: Found, capacity: int) -> Found:
        """Moves single blocks as long as that makes the plan faster, now by its exact time."""
        tried = {best.setting.stages}
        better: Found | None = best
        while better is not None:
            best, better = better, None
            cut = best.setting.stages
            others = [o for stage in range(len(cut)) for o in neighbors(cut, stage, {stage - 1, stage + 1})]
            bounds = sorted((self.cut(other).lower_bound(capacity), other) for other in others if other not in tried)
            for bound, other in bounds:
                if bound >= best.time * (1 - _TIE):
                    break
                tried.add(other)
                found = self._best_of_cut(other, capacity, best.time)
                if found is not None and found.time < best.time * (1 - _TIE):
                    better = found
                    break
        return best

    def _all(self) -> Iterator[Cut]:
        """Every cut, the even one first."""
        yield self.setting.stages
        for cut in all_cuts(self.model.num_layers, self.setting.num_stages):
            if cut != self.setting.stages:
                yield cut

    def _explored(self, capacity: int) -> list[Cut]:
        """The even cut, with which uniform plans are compared, and all that the paper's queue comes by.

        The bound of a stage stands for its time: with many blocks it is close, and far cheaper than the exact answer.
        """
        moves: dict[Cut, list[tuple[int, set[int]]]] = {}
        queue: list[tuple[float, Cut]] = []
        form = self.model.pipeline_form(self.setting)

        def look_at(cut: Cut, limit: float = np.inf) -> None:
            if cut in moves:
                return
            search = self.cut(cut)
            bound, index = min((search.variant_bound(stages, capacity), i) for i, stages in enumerate(search.variants))
            times = search.least_times(search.variants[index], capacity)
            seconds = [time.seconds for time in times]
            weights = form.stage_weights(times)
            stages = [stage for stage, count in enumerate(cut) if count > 1]
            relieved = sorted(stages, key=lambda stage: -weights[stage])[:_RELIEVED]
            roomy = sorted(range(len(cut)), key=lambda stage: (seconds[stage], stage))[:_RECEIVERS]
            moves[cut] = [(stage, {stage - 1, stage + 1, *roomy}) for stage in relieved]
            # A block only moves where the step does not become slower.
            if np.isfinite(bound) and bound <= limit * (1 + _TIE):
                heapq.heappush(queue, (bound, cut))

        for start in self.starts().values():
            look_at(start)
        best, idle = np.inf, 0
        while queue and idle < _PATIENCE:
            bound, cut = heapq.heappop(queue)
            idle = 0 if bound < best * (1 - _TIE) else idle + 1
            best = min(best, bound)
            for stage, receivers in moves[cut]:
                for other in neighbors(cut, stage, receivers):
                    look_at(other, limit=bound)
        return [self.setting.stages, *(cut for cut in moves if cut != self.setting.stages)]


def _balanced(rows: Floats, base: Floats) -> Cut:
    """The balanced cut of ``[stages, rows]`` loads: the first row stays in the first stage, the last in the last."""
    extra = base.copy()
    extra[0] += rows[0, 0]
    extra[-1] += rows[-1, -1]
    return balanced_cut(rows[:, 1:-1], extra)
