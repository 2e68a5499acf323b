"""lightning_hetu: large-model training and generation for people who already use PyTorch Lightning.

Importing it registers the strategies by name, so that ``Trainer(strategy="hetu_auto")`` works. Everything else is
imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hetu.data import TextDataModule as TextDataModule
    from lightning_hetu.models import GPTLightningModule as GPTLightningModule
    from lightning_hetu.models import TransformersModule as TransformersModule
    from lightning_hetu.parallel.consolidate import consolidate as consolidate
    from lightning_hetu.parallel.pipeline_mixin import PipelineMixin as PipelineMixin
    from lightning_hetu.planning import ClusterSpec as ClusterSpec
    from lightning_hetu.planning import HybridPlan as HybridPlan
    from lightning_hetu.planning import LayerStrategy as LayerStrategy
    from lightning_hetu.planning import ModelProfile as ModelProfile
    from lightning_hetu.planning import NoFeasiblePlanError as NoFeasiblePlanError
    from lightning_hetu.planning import search as search
    from lightning_hetu.planning.osdp import OSDPInfeasibleError as OSDPInfeasibleError
    from lightning_hetu.planning.osdp import OSDPPlan as OSDPPlan
    from lightning_hetu.strategies.auto import AutoHybridParallelStrategy as AutoHybridParallelStrategy
    from lightning_hetu.strategies.osdp import OSDPStrategy as OSDPStrategy

__version__ = "0.1.0"

_EXPORTS = {
    "AutoHybridParallelStrategy": "lightning_hetu.strategies.auto",
    "ClusterSpec": "lightning_hetu.planning",
    "GPTLightningModule": "lightning_hetu.models",
    "HybridPlan": "lightning_hetu.planning",
    "LayerStrategy": "lightning_hetu.planning",
    "ModelProfile": "lightning_hetu.planning",
    "NoFeasiblePlanError": "lightning_hetu.planning",
    "OSDPInfeasibleError": "lightning_hetu.planning.osdp",
    "OSDPPlan": "lightning_hetu.planning.osdp",
    "OSDPStrategy": "lightning_hetu.strategies.osdp",
    "PipelineMixin": "lightning_hetu.parallel.pipeline_mixin",
    "TextDataModule": "lightning_hetu.data",
    "TransformersModule": "lightning_hetu.models",
    "consolidate": "lightning_hetu.parallel.consolidate",
    "search": "lightning_hetu.planning",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


# The planner also runs where there is neither torch nor lightning.
if find_spec("lightning") is not None:
    from lightning_hetu.strategies import register_strategies

    register_strategies()
