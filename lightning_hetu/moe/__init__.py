"""Mixture of experts: gates, and the layer that sends tokens to experts (HetuMoE, arXiv 2203.14685).

Reading order: ``gates`` (which experts a token goes to), ``dispatch`` (sorting tokens), ``experts`` (what they
compute), ``layer`` (all together); then ``exchange`` (experts on other ranks), ``gradients`` and ``checkpoint``, and
``mixin`` for the Trainer. Which ranks share experts out is in :mod:`lightning_hetu.parallel.expert_mesh`.

Gates are imported here. What needs more than torch is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_hetu.moe.gates import (
    BASEGate,
    DTSGate,
    Gate,
    GateOutput,
    GShardGate,
    HashGate,
    KTop1Gate,
    SAMGate,
    SwitchGate,
    TopKGate,
    build_gate,
)

if TYPE_CHECKING:
    from lightning_hetu.moe.layer import MoELayer as MoELayer
    from lightning_hetu.moe.metrics import BalanceRatio as BalanceRatio
    from lightning_hetu.moe.metrics import DropRate as DropRate
    from lightning_hetu.moe.metrics import ExpertLoad as ExpertLoad
    from lightning_hetu.moe.metrics import MeanActiveExperts as MeanActiveExperts
    from lightning_hetu.moe.mixin import MoEModuleMixin as MoEModuleMixin
    from lightning_hetu.parallel.expert_mesh import ExpertMesh as ExpertMesh

_EXPORTS = {
    "BalanceRatio": "lightning_hetu.moe.metrics",
    "DropRate": "lightning_hetu.moe.metrics",
    "ExpertLoad": "lightning_hetu.moe.metrics",
    "ExpertMesh": "lightning_hetu.parallel.expert_mesh",
    "MeanActiveExperts": "lightning_hetu.moe.metrics",
    "MoELayer": "lightning_hetu.moe.layer",
    "MoEModuleMixin": "lightning_hetu.moe.mixin",
}

__all__ = [
    "BASEGate",
    "BalanceRatio",
    "DTSGate",
    "DropRate",
    "ExpertLoad",
    "ExpertMesh",
    "GShardGate",
    "Gate",
    "GateOutput",
    "HashGate",
    "KTop1Gate",
    "MeanActiveExperts",
    "MoELayer",
    "MoEModuleMixin",
    "SAMGate",
    "SwitchGate",
    "TopKGate",
    "build_gate",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
