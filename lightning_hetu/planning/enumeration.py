"""Which strategies a layer may have: the decision trees of Galvatron (arXiv 2211.13878, section 3.2).

One tree per pipeline degree. Under it, the devices of a stage are factored by an ordered sequence of distinct paradigms
out of data parallelism, sharded data parallelism and tensor parallelism; the last one of the sequence takes
neighboring ranks. Recomputation doubles the leaves (Galvatron-BMW, arXiv 2307.02031, section 3).

Three sets are offered:

* :func:`decision_tree`: the tree of the papers, with or without takeaway 3 (never mix DP and SDP in one layer);
* :func:`strategies_with_sequence_parallelism`: the set of the released Galvatron 3, tensor and Ulysses parallelism
  innermost;
* :func:`layer_strategies`: what this package's executor runs and its search looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import permutations

from lightning_hetu.planning.layer_strategy import DataParallelType, LayerStrategy

_PARADIGMS = ("dp", "sdp", "tp")
Leaf = tuple[tuple[str, int], ...]


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
) -> list[LayerStrategy]:
    """The strategies our executor runs in a stage of ``devices``: tensor parallelism innermost, no sp, no cp.

    Where data parallelism has degree 1 its types coincide; such a strategy appears once, as ``ddp``.

    Args:
        devices: Devices of the stage.
        tp_degrees: Tensor-parallel degrees the layer can run with; those that do not divide ``devices`` are left out.
        dp_types: Types of data parallelism in the set.
        recompute: Which values of recomputation.
        sequence_degrees: Those of ``tp_degrees`` that are offered with Megatron sequence parallelism too.

    Raises:
        ValueError: If ``devices`` is not a power of two.
    """
    check_device_count(devices, name="devices")
    kinds, flags = list(dict.fromkeys(dp_types)), list(dict.fromkeys(recompute))
    cut = set(sequence_degrees) - {1}
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
    return found
