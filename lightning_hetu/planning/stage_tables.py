"""What the dynamic program works on: the options of rows, choices of them, and labels of partial choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RowTable:
    """The options of one row; arrays of ``S`` entries.

    Args:
        held: ``H``, bytes after forward.
        released: ``R``, bytes after backward.
        working: ``W``, bytes while the row runs, larger of forward and backward; at least ``H``.
        step: Bytes in the optimizer step.
        cost: ``[S, C]`` seconds; ``C`` criteria that add up along the rows.
    """

    held: Floats
    released: Floats
    working: Floats
    step: Floats
    cost: Floats

    def take(self, options: NDArray[np.intp]) -> RowTable:
        """The table of some of the options."""
        columns = (self.held, self.released, self.working, self.step, self.cost)
        return RowTable(*(column[options] for column in columns))


@dataclass(frozen=True)
class StageChoice:
    """One way to choose the strategies of a stage.

    Args:
        cost: Sum of each criterion, relayouts included.
        peak: Bytes in the fullest phase.
        options: Index of the chosen option of each row.
    """

    cost: tuple[float, ...]
    peak: float
    options: tuple[int, ...]


@dataclass(frozen=True)
class Support:
    """A linear lower bound on the time of a whole plan: ``constant + weights . criteria`` of this stage."""

    weights: tuple[float, ...]
    constant: float = 0.0


@dataclass
class Labels:
    """Partial choices up to one row: ``n`` labels."""

    held: Floats
    peak: Floats
    step: Floats
    cost: Floats  # [n, C]
    layout: Ints
    parent: Ints
    option: Ints

    def take(self, index: NDArray[np.intp]) -> Labels:
        """Some of the labels."""
        return Labels(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Move:
    """The step from one row to the next.

    Options whose relayouts to the next row cost the same are one *layout*, ``D`` of them.

    Args:
        layout_of: ``[S]`` layout of each option of the row in front.
        cost: ``[D, S of the next row, C]`` seconds.
    """

    layout_of: Ints
    cost: Floats


def moves_between(rows: Sequence[RowTable], relayouts: Sequence[Floats]) -> list[Move]:
    """The steps into each row, and the one behind the last row; equal ones are the same object."""
    criteria = rows[0].cost.shape[1]
    found = [Move(np.zeros(1, dtype=np.int64), np.zeros((1, rows[0].held.size, criteria)))]
    done: dict[int, Move] = {}
    for matrix in relayouts:
        if id(matrix) not in done:
            _, first, layout_of = np.unique(
                matrix.reshape(len(matrix), -1), axis=0, return_index=True, return_inverse=True
            )
            done[id(matrix)] = Move(layout_of.reshape(-1).astype(np.int64), matrix[first])
        found.append(done[id(matrix)])
    found.append(Move(np.zeros(rows[-1].held.size, dtype=np.int64), np.zeros((1, 0, criteria))))
    return found
