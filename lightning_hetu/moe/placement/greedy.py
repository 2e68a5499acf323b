"""The Policy Maker of FlexMoE (arXiv 2304.03946): improves a placement move by move.

A move is scored by the load of the fullest rank. Where several ranks are equally full no single move lowers that, so a
high power mean of all loads counts too: it falls with each rank that is relieved. FlexMoE stops where no move pays for
itself; here the best ones are tried with a second one behind them, as two replicas often only help together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lightning_hetu.moe.placement.moves import (
    NONE,
    Floats,
    Ints,
    Layout,
    Move,
    parts,
)
from lightning_hetu.moe.placement.operations import Operation

_POWER_MEAN = 0.2  # its weight beside the fullest rank
_DOUBLINGS = 3  # the power is two to this
_BALANCED = 5e-3  # above the best ratio: moving experts for less is not worth it, as loads of steps differ by more
_STUCK = 1e-2  # above the best ratio: worth looking ahead


class State(Protocol):
    """What the search needs of a split; see :class:`EvenState` and :class:`FlowState`."""

    layout: Layout
    fullest: float

    def copy(self) -> State:
        """A copy that can be changed."""

    def apply(self, move: Move) -> None:
        """Changes the placement."""

    def candidates(self, *, wide: bool) -> list[Move]:
        """Moves to try; all if ``wide``."""

    def loads(self, moves: Ints | None = None) -> Floats:
        """Loads of which the largest counts, now or after each move: ``[moves, loads]``."""


@dataclass(frozen=True)
class Prices:
    """What else counts, in units of the mean load of a rank.

    Args:
        copy: Price of sending an expert.
        sync: Price of an expert by its number of holders, on one node and on several, ``[2, ranks + 1]``.
        locality: Worth of a token that is computed where it comes from.
        ranks_per_node: Ranks of a node.
    """

    copy: float
    sync: Floats | None
    locality: float
    ranks_per_node: int

    @classmethod
    def free(cls, ranks: int) -> Prices:
        """No prices: only balance counts."""
        return cls(0.0, None, 0.0, ranks)

    def standing(self, state: State) -> float:
        """What a placement costs per step, in mean loads."""
        if self.sync is None:
            return state.fullest
        layout = state.layout
        return state.fullest + float(self._sync(layout.held[:-1]).sum() - self.locality * layout.at_home[:-1].min())

    def of(self, layout: Layout, moves: Ints) -> Floats:
        """What each move adds."""
        experts, to, off = parts(moves)
        gained = to != NONE
        price: Floats = self.copy * gained.sum(axis=1)
        if self.sync is None:
            return price
        if self.ranks_per_node >= layout.num_ranks:
            counts = layout.counts[experts]
            change = self.sync[0][counts + gained - (off != NONE)] - self.sync[0][counts]
        else:
            held = layout.held[experts]
            before = self._sync(held)
            np.put_along_axis(held, to[:, :, None], 1.0, axis=2)
            np.put_along_axis(held, off[:, :, None], 0.0, axis=2)
            change = self._sync(held) - before
        after = np.empty((len(moves), layout.num_ranks + 1))
        after[:] = layout.at_home
        rows = np.arange(len(moves))
        for item in (0, 1):
            after[rows, to[:, item]] += layout.sources[experts[:, item], to[:, item]]
            after[rows, off[:, item]] -= layout.sources[experts[:, item], off[:, item]]
        return price + (change[:, 0] + change[:, 1]) + self.locality * (_stay(layout.at_home) - _stay(after))

    def _sync(self, held: Floats) -> Floats:
        assert self.sync is not None
        held = held[..., :-1]
        first = held.argmax(axis=-1) // self.ranks_per_node
        last = (held.shape[-1] - 1 - held[..., ::-1].argmax(axis=-1)) // self.ranks_per_node
        return self.sync[(first != last).astype(np.int64), held.sum(axis=-1).astype(np.int64)]


def _stay(here: Floats) -> Floats:
    """Tokens that stay on a rank: of the rank with the fewest, which takes longest to exchange, and on average."""
    here = here[..., :-1]
    least: Floats = np.minimum.reduce(here, axis=-1)
    return (least + np.add.reduce(here, axis=-1) / here.shape[-1]) / 2


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Args:
        wide: Whether all moves are tried.
        ahead: How many first moves are tried with a second one.
        looks: How often.
        moves: Most moves, looks included.
        least_gain: What a move must gain, in mean loads.
        least_room: What new placements must be able to gain for being constructed, in mean loads.
    """

    wide: bool
    ahead: int
    looks: int
    moves: int
    least_gain: float
    least_room: float


def improve(state: State, prices: Prices, effort: Effort, max_operations: int) -> list[Operation]:
    """Changes ``state`` for the better and returns how.

    Args:
        state: The placement.
        prices: What moves cost.
        effort: How much to try.
        max_operations: Most operations.
    """
    done: list[Operation] = []
    looks = effort.looks
    for _ in range(effort.moves):
        if len(done) >= max_operations or (prices.sync is None and state.fullest <= 1 + _BALANCED):
            break
        left = max_operations - len(done)
        moves, gains = _scored(state, prices, effort, left)
        best = int(gains.argmax()) if moves else NONE
        if moves and gains[best] > effort.least_gain:
            path = [moves[best]]
        elif looks and state.fullest > 1 + _STUCK:
            looks -= 1
            path = _look_ahead(state, prices, effort, left, moves, gains)
        else:
            break
        if not path:
            break
        for move in path:
            done += state.layout.operations(move, prices.ranks_per_node)
            state.apply(move)
    return done


def _scored(state: State, prices: Prices, effort: Effort, left: int) -> tuple[list[Move], Floats]:
    """Moves, and what they gain."""
    moves = state.candidates(wide=effort.wide)
    if left < 2:
        moves = [move for move in moves if _num_operations(move) <= left]
    if not moves:
        return moves, np.zeros(0)
    table = np.array(moves)
    return moves, _score(state.loads()) - _score(state.loads(table)) - prices.of(state.layout, table)


def _score(loads: Floats) -> Floats:
    powers = loads
    for _ in range(_DOUBLINGS):
        powers = np.square(powers)
    mean = np.add.reduce(powers, axis=-1) / loads.shape[-1]
    for _ in range(_DOUBLINGS):
        mean = np.sqrt(mean)
    fullest: Floats = np.maximum.reduce(loads, axis=-1)
    return fullest + _POWER_MEAN * mean


def _num_operations(move: Move) -> int:
    return 2 if move[5] != NONE and move[4] == NONE else 1


def _look_ahead(
    state: State, prices: Prices, effort: Effort, left: int, moves: list[Move], gains: Floats
) -> list[Move]:
    """The two moves that gain most together; none if they gain nothing."""
    best = effort.least_gain
    found: list[Move] = []
    for index in np.argsort(-gains, kind="stable")[: effort.ahead].tolist():
        move = moves[index]
        behind = left - _num_operations(move)
        if behind < 1:
            continue
        after = state.copy()
        after.apply(move)
        second, more = _scored(after, prices, effort, behind)
        if second and gains[index] + more.max() > best:
            best, found = float(gains[index] + more.max()), [move, second[int(more.argmax())]]
    return found
