"""What it costs to replicate, shard or offload one operator: seconds, bytes and collectives per optimizer step.

Follows the cost model of OSDP (arXiv 2209.13258 and 2305.09940, section on the cost model): rings over all ranks, model
states, and the copies that exist around a gather. It differs where FSDP2 does: gathers and reductions have dtypes of
their own, a parameter gathered once per step is a mode of its own, gradients are accumulated over micro-steps, and
buffers are those that FSDP2 was measured to allocate (:class:`MemoryConstants`).

``A`` micro-steps, ``R`` of which reduce gradients, over ``N`` ranks, for a slice of ``S`` parameters:

========== ================================ =========================== ===========================
mode       gathers                          reductions                  kept gathered
========== ================================ =========================== ===========================
``dp``     none                             ``R`` all-reduces           a second copy, all of it
``z2``     ``A`` over ``N``                 ``R`` reduce-scatters       all of it
``zdp-k``  ``A`` over ``N``, ``A`` over k   ``R`` reduce-scatters       one k-th
``zdp``    ``2 A`` over ``N``               ``R`` reduce-scatters       nothing
``off``    as ``zdp``                       as ``zdp``                  nothing
========== ================================ =========================== ===========================

``off`` keeps its shard on the host, and copies it to the device before each gather and gradients back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from typing import Literal, NamedTuple, get_args

from lightning_hetu.planning.osdp.links import CollectiveSeconds
from lightning_hetu.planning.osdp.operator import Operator
from lightning_hetu.planning.topology import Collective

Accumulation = Literal["last", "every", "hold"]
"""When gradients of several micro-steps are reduced: in the ``last`` one, in ``every`` one, or in the last one while
``z2`` keeps (``hold``) its parameters gathered in between."""
Part = tuple[str, int]
"""A mode and the number of slices that have it."""


@dataclass(frozen=True)
class MemoryConstants:
    """Buffers of FSDP2, as multiples of one slice.

    The defaults were read off the storages that torch 2.13 allocates for equal blocks on 4 ranks, in fp32 and with
    bf16 compute. The largest slice counts for the buffers, since only one or two groups have them at a time.

    Args:
        forward_copies: Copies in the gathered dtype while a sharded slice runs forward: its own unsharded parameters
            and the flat buffers of its gather and the previous one.
        backward_copies: The same in backward.
        backward_reductions: Copies in the reduced dtype in backward: unsharded gradients and the flat buffer.
        replicate_copies: Copies in the gathered dtype that a replicated slice keeps from forward to backward.
        kept_copies: Copies of these that a slice need not have because it is kept gathered anyway (``z2``). For equal
            blocks 1 was measured; 0 is for sure.
        gradients_replace_gathered: Without accumulation, whether the gathered copy of a slice is freed as its
            gradients appear, so that only the larger of the two counts. Otherwise both do.

    Raises:
        ValueError: If a factor is negative.
    """

    forward_copies: float = 3.0
    backward_copies: float = 2.0
    backward_reductions: float = 2.0
    replicate_copies: float = 1.0
    kept_copies: float = 0.0
    gradients_replace_gathered: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"constants.{name}={value!r}: expected a number of at least 0.")


class SliceSize(NamedTuple):
    """Size of one slice: parameters, and parameters padded to what all ranks together hold when it is sharded."""

    parameters: int
    padded: int

    def in_mode(self, mode: str) -> int:
        """Parameters that a collective of this mode moves."""
        return self.parameters if mode == "dp" else self.padded


class SliceCost(NamedTuple):
    """What one slice costs per optimizer step: seconds, bytes per rank, buffers, and groups that gather it."""

    seconds: float
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    transient: int
    host: int
    groups: int


_TRANSIENT = SliceCost._fields.index("transient")


class Option(NamedTuple):
    """One choice for an operator and what it costs per optimizer step and rank.

    ``gathered`` counts what is kept gathered beyond the gradients that take its place, so that the categories add up.
    ``transient`` is not part of ``memory``: of all operators only the largest one counts.
    """

    parts: tuple[Part, ...]
    seconds: float
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    transient: int
    host: int
    groups: int

    @property
    def memory(self) -> int:
        """Bytes on the device for all of the step."""
        return self.parameters + self.gradients + self.optimizer + self.gathered


class SliceSeconds(NamedTuple):
    """Seconds of one slice in one micro-step: gathers in forward and backward, and the reduction of its gradients."""

    forward_gather: float
    backward_gather: float
    reduction: float


class CollectiveCount(NamedTuple):
    """Collectives of one kind per optimizer step; ``bytes`` are those of all full tensors together."""

    op: str
    ranks: int
    calls: int
    bytes: int


def mode_ranks(mode: str, world_size: int) -> int:
    """Ranks over which parameters stay sharded between forward and backward: 1 for ``dp`` and ``z2``, k for ``zdp-k``.

    Raises:
        ValueError: If there is no such mode.
    """
    if mode in ("dp", "z2"):
        return 1
    if mode in ("zdp", "off"):
        return world_size
    prefix, _, text = mode.partition("-")
    if prefix == "zdp" and text.isdecimal() and 1 < int(text) < world_size and world_size % int(text) == 0:
        return int(text)
    raise ValueError(
        f"mode {mode!r}: expected dp, z2, zdp, off, or zdp-k with a k between 1 and world_size={world_size} that"
        " divides it."
    )


@dataclass(frozen=True)
class OperatorCosts:
    """The options of operators.

    Args:
        world_size: Data-parallel ranks.
        comm: What knows how long collectives take; mode ``off`` also needs its ``host_seconds_per_byte``.
        modes: Allowed modes: ``dp``, ``z2``, ``zdp``, ``zdp-k`` with a divisor k of the ranks, ``off``.
        micro_steps: Forward and backward passes per optimizer step.
        accumulation: When gradients are reduced; see :data:`Accumulation`.
        gather_bytes: Bytes per element that is gathered; ``None`` is that of the stored parameter.
        reduce_bytes: Bytes per element that is reduced; ``None`` is ``gather_bytes``.
        optimizer_values: Values that the optimizer keeps per trained parameter, in the parameter's dtype: 2 for Adam.
        constants: Buffers of the runtime.
        operator_dtypes: Bytes per gathered and per reduced element of the operators that have their own, by name.
        bucket_bytes: Replicated operators reduce their gradients in buckets of so many bytes: each pays its share of
            the reduction of one. ``None``: each reduces alone.

    Raises:
        ValueError: If a mode is unknown or a number is out of range.
    """

    world_size: int
    comm: CollectiveSeconds
    modes: tuple[str, ...] = ("dp", "z2", "zdp")
    micro_steps: int = 1
    accumulation: Accumulation = "last"
    gather_bytes: int | None = None
    reduce_bytes: int | None = None
    optimizer_values: float = 2.0
    constants: MemoryConstants = field(default_factory=MemoryConstants)
    operator_dtypes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    bucket_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("world_size", "micro_steps", "gather_bytes", "reduce_bytes", "bucket_bytes"):
            value = getattr(self, name)
            if value is None and name.endswith("bytes"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of at least 1.")
        if self.accumulation not in get_args(Accumulation):
            raise ValueError(
                f"accumulation={self.accumulation!r}: expected one of {', '.join(get_args(Accumulation))}."
            )
        if not 0 <= self.optimizer_values < math.inf:
            raise ValueError(f"optimizer_values={self.optimizer_values!r}: expected a number of at least 0.")
        if isinstance(self.modes, str) or not self.modes:
            raise ValueError(f"modes={self.modes!r}: expected at least one mode in a list.")
        # From the one that keeps most memory to the one that keeps least: the order in which ties are broken.
        rank = {"dp": 0, "z2": 1, "zdp": 3, "off": 4}
        order = sorted(set(self.modes), key=lambda mode: (rank.get(mode, 2), mode_ranks(mode, self.world_size)))
        object.__setattr__(self, "modes", tuple(order))
        if "off" in self.modes and self.host_seconds_per_byte is None:
            raise ValueError("modes: 'off' needs host_seconds_per_byte in comm; see Ring and HostLink.")

    @property
    def host_seconds_per_byte(self) -> float | None:
        """Inverse bandwidth between device and host, where ``comm`` knows it."""
        value: float | None = getattr(self.comm, "host_seconds_per_byte", None)
        return value

    def dtypes(self, operator: Operator) -> tuple[int, int]:
        """Bytes per gathered and per reduced element."""
        if operator.name in self.operator_dtypes:
            return self.operator_dtypes[operator.name]
        gather = self.gather_bytes or operator.dtype_bytes
        return gather, self.reduce_bytes or gather

    def sizes(self, operator: Operator, slices: int) -> tuple[SliceSize, ...]:
        """Size of every slice."""
        known = bool(operator.shapes)
        return tuple(self._size(shapes, known) for shapes in operator.slice_shapes(slices))

    def _size(self, shapes: Sequence[tuple[int, ...]], known: bool) -> SliceSize:
        count = sum(map(math.prod, shapes))
        if not known:
            return SliceSize(count, count)
        rows = (
            (-(-shape[0] // self.world_size) * self.world_size, shape[1:]) if shape else (1, ()) for shape in shapes
        )
        return SliceSize(count, sum(first * math.prod(rest) for first, rest in rows))

    def reductions(self, trained: bool) -> int:
        """How often the gradients of an operator are reduced per optimizer step."""
        return (self.micro_steps if self.accumulation == "every" else 1) if trained else 0

    def forward_gathers(self, mode: str) -> int:
        """How often parameters are gathered for forward per optimizer step."""
        if mode == "dp":
            return 0
        return 1 if mode == "z2" and self.accumulation == "hold" else self.micro_steps

    def schedule(self, mode: str, trained: bool) -> list[tuple[Collective, int, int]]:
        """Collectives of one slice per optimizer step, as ``(op, ranks, calls)``."""
        world, reductions = self.world_size, self.reductions(trained)
        if mode == "dp":
            return [("all_reduce", world, reductions)]
        calls: list[tuple[Collective, int, int]] = [("all_gather", world, self.forward_gathers(mode))]
        if mode != "z2":
            calls.append(("all_gather", mode_ranks(mode, world), self.micro_steps))
        return [*calls, ("reduce_scatter", world, reductions)]

    def held(self, size: SliceSize, mode: str) -> int:
        """Parameters of a slice that one rank stores."""
        return size.parameters if mode == "dp" else -(-size.padded // self.world_size)

    def slice_seconds(self, operator: Operator, size: SliceSize, mode: str) -> SliceSeconds:
        """What one slice waits for in a micro-step in which it is gathered and reduced."""
        gather, reduce = self.dtypes(operator)
        reduced = reduce * size.in_mode(mode) if operator.trained else 0
        if mode == "dp":
            whole = size.parameters == operator.parameters  # slices reduce alone
            together = max(reduced, self.bucket_bytes or 0) if whole else reduced
            seconds = self.comm.seconds("all_reduce", self.world_size, together)
            return SliceSeconds(0.0, 0.0, seconds * reduced / together if together else 0.0)
        ranks = mode_ranks(mode, self.world_size)
        forward = self.comm.seconds("all_gather", self.world_size, gather * size.padded)
        backward = 0.0 if mode == "z2" else self.comm.seconds("all_gather", ranks, gather * size.padded)
        reduction = self.comm.seconds("reduce_scatter", self.world_size, reduced)
        if mode != "off":
            return SliceSeconds(forward, backward, reduction)
        host = self.held(size, mode) * operator.dtype_bytes * (self.host_seconds_per_byte or 0.0)
        return SliceSeconds(forward + host, backward + host, reduction + operator.trained * host)

    def slice_cost(self, operator: Operator, size: SliceSize, mode: str) -> SliceCost:
        """What one slice of an operator costs in a mode."""
        gather, reduce = self.dtypes(operator)
        trained = operator.trained
        copy, reduced = gather * size.in_mode(mode), (reduce * size.in_mode(mode) if trained else 0)
        each = self.slice_seconds(operator, size, mode)
        seconds = self.forward_gathers(mode) * each.forward_gather + self.micro_steps * each.backward_gather
        parameters = self.held(size, mode) * operator.dtype_bytes
        gradients = parameters if trained else 0
        optimizer = math.ceil(gradients * self.optimizer_values)
        host = 0
        if mode == "off":
            host, parameters, gradients, optimizer = parameters + gradients + optimizer, 0, 0, 0
        if trained and self.micro_steps > 1 and self.accumulation != "every":
            gradients = max(gradients, reduce * size.parameters)  # unreduced until the last micro-step
        return SliceCost(
            seconds + self.reductions(trained) * each.reduction,
            parameters,
            gradients,
            optimizer,
            gathered=self._gathered(mode, copy, gradients),
            transient=self._transient(mode, copy, reduced),
            host=host,
            groups=int(mode != "dp" and size.padded > 0),
        )

    def _gathered(self, mode: str, copy: int, gradients: int) -> int:
        """Bytes kept gathered from forward to backward, without those that gradients take the place of."""
        if mode == "dp":
            kept = math.ceil(copy * self.constants.replicate_copies)
        elif mode in ("zdp", "off"):
            kept = 0
        else:
            kept = -(-copy // mode_ranks(mode, self.world_size))
        if self.micro_steps == 1 and self.constants.gradients_replace_gathered:
            return max(kept - gradients, 0)
        return kept

    def _transient(self, mode: str, copy: int, reduced: int) -> int:
        """Bytes of the buffers of a slice, in forward or in backward, whichever has more."""
        constants = self.constants
        if mode == "dp":
            return math.ceil(constants.backward_reductions * reduced)
        kept = constants.kept_copies if mode == "z2" else 0.0
        forward = max(constants.forward_copies - kept, 0.0) * copy
        backward = max(constants.backward_copies - kept, 0.0) * copy + constants.backward_reductions * reduced
        return math.ceil(max(forward, backward))

    def options(self, operator: Operator) -> tuple[Option, ...]:
        """All choices for an operator: whole, in slices of one mode, and in slices of two modes.

        Of slices with two modes the first ones have the mode that keeps less memory.

        Raises:
            ValueError: If the operator can have none of the modes.
        """
        modes = [mode for mode in self.modes if mode not in operator.excluded]
        if not modes:
            raise ValueError(
                f"modes={list(self.modes)}: operator {operator.name!r} cannot have"
                f" {', '.join(operator.excluded)}; allow another one, z2 say."
            )
        out: list[Option] = []
        for slices in operator.slice_counts:
            runs = [(size, len(list(run))) for size, run in groupby(self.sizes(operator, slices))]
            costs = {mode: [self.slice_cost(operator, size, mode) for size, _ in runs] for mode in modes}
            lengths = [length for _, length in runs]
            overhead = (slices - 1) * self.micro_steps * operator.split_seconds
            choices: list[tuple[Part, ...]] = [((mode, slices),) for mode in modes]
            for wide, narrow in combinations(modes, 2):
                choices += [((narrow, k), (wide, slices - k)) for k in range(1, slices)]
            out += [_add(parts, costs, lengths, overhead) for parts in choices]
        return tuple(out)

    def collectives(self, operator: Operator, parts: Sequence[Part]) -> tuple[CollectiveCount, ...]:
        """The collectives of one choice per optimizer step; those among one rank are left out."""
        gather, reduce = self.dtypes(operator)
        sizes = iter(self.sizes(operator, sum(count for _, count in parts)))
        totals: dict[tuple[str, int], tuple[int, int]] = {}
        for mode in (mode for mode, count in parts for _ in range(count)):
            elements = next(sizes).in_mode(mode)
            for op, ranks, calls in self.schedule(mode, operator.trained):
                if calls and elements and ranks > 1:
                    before, moved = totals.get((op, ranks), (0, 0))
                    size = elements * (gather if op == "all_gather" else reduce)
                    totals[op, ranks] = before + calls, moved + calls * size
        return tuple(CollectiveCount(*key, *value) for key, value in sorted(totals.items()))


def _add(parts: tuple[Part, ...], costs: dict[str, list[SliceCost]], lengths: Sequence[int], overhead: float) -> Option:
    """Adds the costs of slices, of which ``lengths[i]`` in a row have the costs at ``i``."""
    total = [overhead, 0, 0, 0, 0, 0, 0, 0]  # columns of SliceCost
    run, left = 0, lengths[0]
    for mode, slices in parts:
        while slices:
            taken = min(slices, left)
            cost = costs[mode][run]
            largest = max(total[_TRANSIENT], cost[_TRANSIENT])
            total = [value + taken * each for value, each in zip(total, cost, strict=True)]
            total[_TRANSIENT] = largest
            slices, left = slices - taken, left - taken
            if not left and run + 1 < len(lengths):
                run, left = run + 1, lengths[run + 1]
    seconds, *rest = total
    return Option(parts, seconds, *map(int, rest))
