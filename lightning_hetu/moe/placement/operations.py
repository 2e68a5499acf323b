"""What changes a placement: the three primitives of FlexMoE (arXiv 2304.03946).

``Expand`` gives an expert one more rank, ``Shrink`` takes one away, and ``Migrate`` moves a copy to a free slot of
another rank, or exchanges it for another expert's. :meth:`Placement.apply` says what each does to the slots.
"""

from __future__ import annotations

from dataclasses import dataclass

Copy = tuple[int, int, int]
"""``(expert, source, destination)``: the states of an expert go from rank to rank."""


@dataclass(frozen=True)
class Expand:
    """Copies an expert to the lowest free slot of another rank.

    Args:
        expert: The expert.
        source: A rank that holds it, which sends.
        destination: A rank that does not, which receives.
    """

    expert: int
    source: int
    destination: int

    @property
    def copies(self) -> tuple[Copy, ...]:
        """What is sent."""
        return ((self.expert, self.source, self.destination),)

    def __str__(self) -> str:
        return f"expand {self.expert}: {self.source} -> {self.destination}"


@dataclass(frozen=True)
class Shrink:
    """Frees the slot of a replica; nothing is sent.

    Args:
        expert: The expert, which some other rank holds too.
        source: The rank that gives it up.
    """

    expert: int
    source: int

    @property
    def copies(self) -> tuple[Copy, ...]:
        """What is sent: nothing."""
        return ()

    def __str__(self) -> str:
        return f"shrink {self.expert}: {self.source}"


@dataclass(frozen=True)
class Migrate:
    """Moves a copy of an expert to another rank: to its lowest free slot, or in exchange for another expert.

    Args:
        expert: The expert.
        source: The rank that holds it before and not after.
        destination: The rank that holds it after and not before.
        other: In an exchange, the expert that goes from ``destination`` to ``source``; each takes the other's slot.
    """

    expert: int
    source: int
    destination: int
    other: int | None = None

    @property
    def copies(self) -> tuple[Copy, ...]:
        """What is sent: one expert, or one each way at the same time."""
        there = (self.expert, self.source, self.destination)
        return (there,) if self.other is None else (there, (self.other, self.destination, self.source))

    def __str__(self) -> str:
        if self.other is None:
            return f"migrate {self.expert}: {self.source} -> {self.destination}"
        return f"swap {self.expert} at {self.source} with {self.other} at {self.destination}"


Operation = Expand | Shrink | Migrate
