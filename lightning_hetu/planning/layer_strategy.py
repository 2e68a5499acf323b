"""How one layer is parallelized inside its pipeline stage.

Follows Galvatron (arXiv 2211.13878, section 3): the devices of a stage are factored into data, tensor, sequence and
context parallel degrees, and a layer may additionally be recomputed in backward. Ranks of a stage go by data
parallelism outermost, then context parallelism; the innermost degree (``tp`` or ``sp``) takes consecutive ranks.

Three of them cut the sequence of a layer: Megatron sequence parallelism along with ``tp`` (arXiv 2205.05198), Ulysses
(arXiv 2309.14509), and context parallelism by ring attention (arXiv 2310.01889). Between layers activations are whole
sequences all the same.

Some operators inside of a layer may be sharded further than the rest of it: OSDP (arXiv 2209.13258) decides that for
every operator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

DataParallelType = Literal["ddp", "zero2", "zero3"]

_DP_TYPES: tuple[str, ...] = get_args(DataParallelType)
_DEGREE = re.compile(r"^(dp|tp|sp|cp)(\d+)$")
_SHARDED = re.compile(r"-sharded\(([^()]*)\)", re.IGNORECASE)
_NO_NAME = re.compile(r"[\s,()]")


@dataclass(frozen=True)
class LayerStrategy:
    """The parallel form of one layer.

    Args:
        dp: Data-parallel degree: number of batch shards.
        tp: Tensor-parallel degree (Megatron column/row split).
        dp_type: What the data-parallel ranks share out. ``ddp`` replicates everything, ``zero2`` shards gradients and
            optimizer states, ``zero3`` shards the parameters too.
        recompute: Whether activations inside the layer are dropped in forward and recomputed in backward.
        sp: Ulysses sequence-parallel degree (all-to-all over heads). Exclusive with ``tp``.
        cp: Context-parallel degree (ring attention).
        tp_consecutive: Whether the tensor-parallel group consists of neighboring ranks.
        sequence_parallel: Whether the tensor-parallel ranks share out the sequence between the split products (Megatron
            sequence parallelism, arXiv 2205.05198, section 4.2.2).
        sharded: Names inside the layer of the operators that are ``zero3``, each gathered on its own, while the rest of
            the layer has ``dp_type``. In alphabetical order.

    Raises:
        ValueError: If a degree is not a positive integer, ``dp_type`` is unknown, ``tp`` and ``sp`` are both used,
            ``sequence_parallel`` is set without ``tp``, or ``sharded`` names something twice, or where there is nothing
            to shard further.
    """

    dp: int = 1
    tp: int = 1
    dp_type: DataParallelType = "ddp"
    recompute: bool = False
    sp: int = 1
    cp: int = 1
    tp_consecutive: bool = True
    sequence_parallel: bool = False
    sharded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "sp", "cp"):
            degree = getattr(self, name)
            if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
                raise ValueError(f"LayerStrategy {name}={degree!r}: expected an integer of at least 1.")
        for name in ("recompute", "tp_consecutive", "sequence_parallel"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"LayerStrategy {name}={getattr(self, name)!r}: expected true or false.")
        if self.dp_type not in _DP_TYPES:
            raise ValueError(f"LayerStrategy dp_type={self.dp_type!r}: expected one of {', '.join(_DP_TYPES)}.")
        if self.tp > 1 and self.sp > 1:
            raise ValueError(f"LayerStrategy tp={self.tp} with sp={self.sp}: they exclude each other, set one to 1.")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "LayerStrategy sequence_parallel=True with tp=1: the tensor-parallel ranks share it, use tp2."
            )
        self._check_sharded()

    def _check_sharded(self) -> None:
        given = self.sharded
        names = tuple(given) if isinstance(given, tuple | list) else ()
        if not isinstance(given, tuple | list) or any(
            not isinstance(name, str) or not name or _NO_NAME.search(name) for name in names
        ):
            raise ValueError(f"LayerStrategy sharded={given!r}: expected a list of names of modules inside the layer.")
        if len(set(names)) < len(names):
            raise ValueError(f"LayerStrategy sharded={list(names)}: each operator at most once.")
        if names and self.dp_type == "zero3":
            raise ValueError(
                f"LayerStrategy sharded={list(names)} with dp_type='zero3': all of the layer is, use zero2 or ddp for"
                " the rest, or leave out sharded."
            )
        if names and self.shard_degree == 1:
            raise ValueError(
                f"LayerStrategy sharded={list(names)} with dp={self.dp}: weights have one copy only, leave out sharded."
            )
        object.__setattr__(self, "sharded", tuple(sorted(names)))

    @property
    def num_devices(self) -> int:
        """Devices of the pipeline stage that the layer uses (all of them)."""
        return self.dp * self.tp * self.sp * self.cp

    @property
    def sequence_degree(self) -> int:
        """Parts that Ulysses and context parallelism cut the sequence into (``sp * cp``)."""
        return self.sp * self.cp

    @property
    def shard_degree(self) -> int:
        """Ranks that hold copies of the same weights, over which ZeRO may shard (``dp * sp * cp``)."""
        return self.dp * self.sp * self.cp

    def __str__(self) -> str:
        """Compact form that :meth:`parse` reads back, for example ``dp2-tp2-zero3-recompute``.

        Operators that are sharded further follow the type, as in ``dp4-zero2-sharded(attention.query,mlp.up)``.
        """
        parts = [f"{name}{getattr(self, name)}" for name in ("dp", "tp", "sp", "cp") if getattr(self, name) > 1]
        parts = parts or ["dp1"]
        if self.shard_degree > 1 or self.dp_type != "ddp":
            parts.append(self.dp_type)
        if self.sharded:
            parts.append(f"sharded({','.join(self.sharded)})")
        if self.sequence_parallel:
            parts.append("sequence")
        if self.recompute:
            parts.append("recompute")
        if not self.tp_consecutive:
            parts.append("strided")
        return "-".join(parts)

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | LayerStrategy) -> LayerStrategy:
        """Reads ``"dp2-tp2-zero3-recompute"``, a mapping of the fields, or an instance.

        Raises:
            ValueError: If a part is unknown.
        """
        if isinstance(value, LayerStrategy):
            return value
        if isinstance(value, Mapping):
            allowed = [field.name for field in fields(cls)]
            unknown = [str(key) for key in value if key not in allowed]
            if unknown:
                raise ValueError(
                    f"LayerStrategy has no field {', '.join(map(repr, unknown))}: expected {', '.join(allowed)}."
                )
            return cls(**value)
        if not isinstance(value, str):
            raise ValueError(f"LayerStrategy {value!r}: expected text such as 'dp2-tp2-zero3', or its fields.")
        options: dict[str, Any] = {}
        # Names of modules keep their case, and may have any of the other words in them.
        operators = _SHARDED.findall(value)
        if len(operators) > 1:
            raise ValueError(f"LayerStrategy {value!r}: sharded is given twice.")
        if operators:
            options["sharded"] = tuple(name.strip() for name in operators[0].split(","))
        for part in _SHARDED.sub("", value).strip().lower().split("-"):
            degree = _DEGREE.match(part)
            item: Any
            if degree:
                key, item = degree.group(1), int(degree.group(2))
            elif part in _DP_TYPES:
                key, item = "dp_type", part
            elif part == "sequence":
                key, item = "sequence_parallel", True
            elif part == "recompute":
                key, item = "recompute", True
            elif part == "strided":
                key, item = "tp_consecutive", False
            else:
                raise ValueError(
                    f"LayerStrategy {value!r}: unknown part {part!r}, expected dpN, tpN, spN, cpN, "
                    f"{', '.join(_DP_TYPES)}, sharded(NAME,...), sequence, recompute or strided, joined by '-'."
                )
            if key in options:
                raise ValueError(f"LayerStrategy {value!r}: {key} is given twice.")
            options[key] = item
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-compatible values."""
        return {**asdict(self), "sharded": list(self.sharded)}
