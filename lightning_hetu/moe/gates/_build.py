"""Gates by name, for configurations."""

from __future__ import annotations

import inspect
from typing import Any

from lightning_hetu.moe.gates._gate import Gate
from lightning_hetu.moe.gates.base import BASEGate
from lightning_hetu.moe.gates.dts import DTSGate
from lightning_hetu.moe.gates.gshard import GShardGate
from lightning_hetu.moe.gates.hash import HashGate
from lightning_hetu.moe.gates.ktop1 import KTop1Gate
from lightning_hetu.moe.gates.sam import SAMGate
from lightning_hetu.moe.gates.switch import SwitchGate
from lightning_hetu.moe.gates.topk import TopKGate

_GATES: dict[str, type[Gate]] = {
    "switch": SwitchGate,
    "gshard": GShardGate,
    "topk": TopKGate,
    "ktop1": KTop1Gate,
    "sam": SAMGate,
    "base": BASEGate,
    "hash": HashGate,
    "dts": DTSGate,
}


def build_gate(name: str, *, dim: int, num_experts: int, **options: Any) -> Gate:
    """Builds a gate.

    Args:
        name: ``switch``, ``gshard``, ``topk``, ``ktop1``, ``sam``, ``base``, ``hash`` or ``dts``.
        dim: Width of a token.
        num_experts: Number of experts.
        **options: Options of the gate's class.

    Raises:
        ValueError: If there is no gate of that name, or it has no such option, needs one that is missing, or refuses
            its value.
    """
    if name not in _GATES:
        raise ValueError(f"gate={name!r}: expected one of {', '.join(_GATES)}.")
    kind = _GATES[name]
    parameters = _parameters(kind)
    if unknown := [option for option in options if option not in parameters]:
        allowed = ", ".join(sorted(set(parameters) - {"dim", "num_experts"}))
        raise ValueError(f"{unknown[0]}={options[unknown[0]]!r}: gate {name!r} has no such option, but {allowed}.")
    given = {"num_experts": num_experts, **({"dim": dim} if "dim" in parameters else {}), **options}
    for option, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and option not in given:
            raise ValueError(f"{option} is missing: gate {name!r} needs it.")
    return kind(**given)


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """What a gate's constructor takes, with that of its base class where it passes options on."""
    found: dict[str, inspect.Parameter] = {}
    for ancestor in kind.__mro__:
        if "__init__" not in vars(ancestor):
            continue
        own = list(inspect.signature(ancestor).parameters.values())
        named = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
        found.update({p.name: p for p in named if p.name not in found})
        if len(named) == len(own):
            break
    return found
