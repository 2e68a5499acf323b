"""Which strategies a layer may have: the decision trees of Galvatron (arXiv 2211.13878, section 3.2).

One tree per pipeline degree. Under it, the devices of a stage are factored by an ordered sequence of distinct paradigms
out of data parallelism, sharded data parallelism and tensor parallelism; the last one of the sequence takes
neighboring ranks. Recomputation doubles the leaves (Galvatron-BMW, arXiv 2307.02031, section 3).

Where operators inside of a layer may be sharded further than the rest of it (OSDP, arXiv 2209.13258),
:func:`with_sharded_operators` adds a few choices of them.

Three sets are offered:

* :func:`decision_tree`: the tree of the papers, with or without takeaway 3 (never mix DP and SDP in one layer);
* :func:`strategies_with_sequence_parallelism`: the set of the released Galvatron 3, tensor and Ulysses parallelism
  innermost;
* :func:`layer_strategies`: what this package's executor runs and its search looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, permutations
from math import prod

from lightning_hetu.planning.layer_strategy import DataParallelType, LayerStrategy

_PARADIGMS = ("dp", "sdp", "tp")
Leaf = tuple[tuple[str, int], ...]
_OPERATOR_STEPS = ((4, 4), (16, 2))
"""Up to so many layers in a stage, so many choices of operators. Where there are more layers one is enough: different
strategies of the layers then make for fine steps."""


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to ``limit``."""
    return [1 << k for k in range(limit.bit_length()) if 1 << k <= limit]


def check_device_count(num_devices: int, *, name: str = "num_devices") -> None:
    """Raises unless ``num_devices`` is a power of two.

    Raises:
        ValueError: Otherwise; takeaway 2 of the paper only splits into groups of equal size.
    """
    whole = isinstance(num_devices, int) and not isinstance(num_devices, bool)
    if not whole or num_devices < 1 or num_devices & (num_devices - 1):
        raise ValueError(f"{name}={num_devices!r}: expected a power of two (1, 2, 4, ...).")


def _ordered_factorings(devices: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``devices`` as an ordered product of ``parts`` powers of two, each at least 2."""
    if parts == 0:
        if devices == 1:
            yield ()
        return
    for first in powers_of_two(devices)[1:]:
        for rest in _ordered_factorings(devices // first, parts - 1):
            yield (first, *rest)


def decision_tree(devices: int, *, mix_dp_and_sdp: bool = False) -> list[Leaf]:
    """Leaves of the tree of one stage: sequences of ``(paradigm, degree)``, outermost first.

    Args:
        devices: Devices of the stage, a power of two.
        mix_dp_and_sdp: Keep the sequences with both DP and SDP, which takeaway 3 drops.

    Raises:
        ValueError: If ``devices`` is not a power of two.
    """
    check_device_count(devices, name="devices")
    leaves: list[Leaf] = []
    for length in range(len(_PARADIGMS) + 1):
        for sequence in permutations(_PARADIGMS, length):
            if not mix_dp_and_sdp and "dp" in sequence and "sdp" in sequence:
                continue
            leaves += [tuple(zip(sequence, degrees, strict=True)) for degrees in _ordered_factorings(devices, length)]
    return leaves


def decision_trees(num_devices: int, *, mix_dp_and_sdp: bool = False) -> dict[int, list[Leaf]]:
    """``{pipeline degree: leaves}`` for all pipeline degrees 1, 2, .. ``num_devices``; see :func:`decision_tree`.

    Raises:
        ValueError: If ``num_devices`` is not a power of two.
    """
    check_device_count(num_devices)
    return {
        stages: decision_tree(num_devices // stages, mix_dp_and_sdp=mix_dp_and_sdp)
        for stages in powers_of_two(num_devices)
    }


def leaf_strategy(leaf: Leaf, *, default_dp_type: DataParallelType = "ddp", recompute: bool = False) -> LayerStrategy:
    """The strategy of a leaf without a mix of DP and SDP.

    Raises:
        ValueError: If the leaf mixes DP and SDP: a layer has one type of data parallelism.
    """
    degrees = dict(leaf)
    if "dp" in degrees and "sdp" in degrees:
        raise ValueError(f"leaf={leaf!r}: a layer is either DP or SDP, not both.")
    return LayerStrategy(
        dp=degrees.get("dp", degrees.get("sdp", 1)),
        tp=degrees.get("tp", 1),
        dp_type="zero3" if "sdp" in degrees else default_dp_type,
        recompute=recompute,
        # Innermost is last. A tp that fills the stage is consecutive in any order.
        tp_consecutive="tp" not in degrees or leaf[-1][0] == "tp",
    )


def strategies_with_sequence_parallelism(
    num_devices: int,
    *,
    max_degree: int = 8,
    sequence_parallel: bool = True,
    recompute: Iterable[bool] = (False, True),
    default_dp_type: DataParallelType = "zero2",
) -> dict[int, list[LayerStrategy]]:
    """The set of Galvatron 3 per pipeline degree: tensor (or Ulysses) parallelism innermost, no context parallelism.

    Args:
        num_devices: Devices in total, a power of two.
        max_degree: Largest tensor, sequence and pipeline degree.
        sequence_parallel: Whether Ulysses sequence parallelism is in the set.
        recompute: Which values of recomputation.
        default_dp_type: Type of plain data parallelism, next to ``zero3``.

    Raises:
        ValueError: If ``num_devices`` is not a power of two.
    """
    check_device_count(num_devices)
    found: dict[int, list[LayerStrategy]] = {}
    for stages in powers_of_two(min(num_devices, max_degree)):
        devices = num_devices // stages
        shapes: list[LayerStrategy] = []
        for degree in powers_of_two(min(devices, max_degree)):
            dp = devices // degree
            sharded = ("zero3",) if default_dp_type == "zero3" else (default_dp_type, "zero3")
            # The released set has one entry, plain DDP, where dp is 1, although Ulysses ranks could shard there.
            for kind in sharded if dp > 1 else ("ddp",):
                shapes.append(LayerStrategy(dp=dp, tp=degree, dp_type=kind))  # type: ignore[arg-type]
                if sequence_parallel and degree > 1:
                    shapes.append(LayerStrategy(dp=dp, sp=degree, dp_type=kind))  # type: ignore[arg-type]
        found[stages] = [
            LayerStrategy(**{**shape.to_dict(), "recompute": flag}) for flag in recompute for shape in shapes
        ]
    return found


def layer_strategies(
    devices: int,
    *,
    tp_degrees: Iterable[int],
    dp_types: Iterable[DataParallelType] = ("ddp", "zero2", "zero3"),
    recompute: Iterable[bool] = (False, True),
    sequence_degrees: Iterable[int] = (),
    ulysses_degrees: Iterable[int] = (),
    context_degrees: Iterable[int] = (),
) -> list[LayerStrategy]:
    """The strategies our executor looks at in a stage of ``devices``: tensor or Ulysses parallelism innermost.

    Where weights have one copy only, the types of data parallelism coincide; such a strategy appears once, as ``ddp``.

    A sequence is cut ``n`` ways by Ulysses alone where that is offered, and by context parallelism alone where that is.
    Where Ulysses alone cannot, the two are combined: with the largest Ulysses degree that goes, since its exchanges
    shrink with ``n`` while what goes round a ring does not. That is at most two shapes for each ``n``. Neither comes
    together with tensor parallelism, which our executor does not run.

    Args:
        devices: Devices of the stage.
        tp_degrees: Tensor-parallel degrees the layer can run with; those that do not divide ``devices`` are left out.
        dp_types: Types of data parallelism in the set.
        recompute: Which values of recomputation.
        sequence_degrees: Those of ``tp_degrees`` that are offered with Megatron sequence parallelism too.
        ulysses_degrees: Ulysses degrees the layer can run with.
        context_degrees: Context-parallel degrees the layer can run with.

    Raises:
        ValueError: If ``devices`` is not a power of two.
    """
    check_device_count(devices, name="devices")
    kinds, flags = list(dict.fromkeys(dp_types)), list(dict.fromkeys(recompute))
    cut = set(sequence_degrees) - {1}
    shapes = _sequence_shapes(devices, set(ulysses_degrees) - {1}, set(context_degrees) - {1})
    found: list[LayerStrategy] = []
    for flag in flags:
        for tp in sorted(set(tp_degrees)):
            if tp > devices or devices % tp:
                continue
            dp = devices // tp
            for kind in kinds if dp > 1 else ["ddp"]:
                plain = LayerStrategy(dp=dp, tp=tp, dp_type=kind, recompute=flag)  # type: ignore[arg-type]
                found.append(plain)
                if tp in cut:
                    found.append(replace(plain, sequence_parallel=True))
        for sp, cp in shapes:
            dp = devices // (sp * cp)
            found += [LayerStrategy(dp=dp, sp=sp, cp=cp, dp_type=kind, recompute=flag) for kind in kinds]
    return found


def operator_choices(operators: Mapping[str, int], layer_bytes: int, steps: int) -> tuple[tuple[str, ...], ...]:
    """Which operators of a layer may be sharded together: the largest ones, for a few numbers of them.

    With the largest ones, the fewest collectives take a given share of the layer. The numbers are those whose bytes
    come closest to equal steps up to all operators.

    Args:
        operators: Bytes of each.
        layer_bytes: Bytes of the layer. A single operator that is all of it is left out: it would be the layer itself.
        steps: How many choices there are at most.
    """
    names = sorted(operators, key=lambda name: -operators[name])  # in the order of calls where they are equal
    sums = list(accumulate(operators[name] for name in names))
    if not names or (len(names) == 1 and sums[0] == layer_bytes):
        return ()
    wanted = [sums[-1] * (step + 1) / steps for step in range(steps)]
    numbers = {min(range(len(names)), key=lambda n: abs(sums[n] - size)) + 1 for size in wanted}
    return tuple(tuple(names[:number]) for number in sorted(numbers))


def with_sharded_operators(
    strategies: Sequence[LayerStrategy], operators: Mapping[str, int], layer_bytes: int, layers: int
) -> list[LayerStrategy]:
    """Adds to each strategy that could be sharded further those in which some operators are.

    Args:
        strategies: Strategies of a layer.
        operators: Bytes of each of its operators.
        layer_bytes: Bytes of the layer.
        layers: Layers in a stage. Where they are many, there are fewer choices, and beside one type of data parallelism
            only, ``zero2`` where that is among the strategies.
    """
    steps = next((steps for most, steps in _OPERATOR_STEPS if layers <= most), 1)
    choices = operator_choices(operators, layer_bytes, steps)
    kinds = {strategy.dp_type for strategy in strategies if strategy.shard_degree > 1} - {"zero3"}
    if layers > _OPERATOR_STEPS[0][0] and "zero2" in kinds:
        kinds = {"zero2"}
    found = list(strategies)
    for strategy in strategies:
        if strategy.shard_degree > 1 and strategy.dp_type in kinds and not strategy.sharded:
            found += [replace(strategy, sharded=names) for names in choices]
    return found


def without_needless_cuts(strategies: Sequence[LayerStrategy]) -> list[LayerStrategy]:
    """Leaves out strategies that cut sequences where the batch can be cut instead.

    A strategy goes if another one that shards and recomputes the same has more data parallelism and cuts sequences
    less, and in no other way. For Ulysses and context parallelism that loses nothing: ranks have as much to compute and
    to keep, and share out weights and gradients over as many; only the exchanges of a cut sequence are fewer. Where a
    neighboring layer has fewer batch shards, going there and back takes the same gathers as cutting the sequence does.
    For Megatron sequence parallelism it is a choice, which keeps the search short: it also cuts weights, as plain
    tensor parallelism does, which stays; as few activations are had by more microbatches.

    Args:
        strategies: Those that may be chosen for one row of a stage: the microbatch divides over each of them.
    """
    return list(_needed(tuple(strategies)))


@lru_cache(maxsize=256)
def _needed(strategies: tuple[LayerStrategy, ...]) -> tuple[LayerStrategy, ...]:
    """See :func:`without_needless_cuts`. Rows of one type ask for the same."""

    def cuts(strategy: LayerStrategy) -> tuple[int, int, int]:
        return strategy.sp, strategy.cp, strategy.tp if strategy.sequence_parallel else 1

    def replaces(other: LayerStrategy, strategy: LayerStrategy) -> bool:
        return (
            other.dp > strategy.dp
            and all(getattr(other, name) == getattr(strategy, name) for name in ("dp_type", "recompute", "sharded"))
            and other.num_devices == other.dp * prod(cuts(other))
            and all(less <= more for less, more in zip(cuts(other), cuts(strategy), strict=True))
        )

    return tuple(s for s in strategies if max(cuts(s)) == 1 or not any(replaces(other, s) for other in strategies))


def _sequence_shapes(devices: int, ulysses: set[int], context: set[int]) -> list[tuple[int, int]]:
    """``(sp, cp)`` of :func:`layer_strategies`, fewest parts first."""
    found: list[tuple[int, int]] = []
    for parts in powers_of_two(devices)[1:]:
        if parts in ulysses:
            found.append((parts, 1))
        else:
            found += [(sp, parts // sp) for sp in sorted(ulysses) if parts % sp == 0 and parts // sp in context][-1:]
        if parts in context:
            found.append((1, parts))
    return found
