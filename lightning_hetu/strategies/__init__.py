"""Lightning strategies, registered by name and built when a Trainer asks for them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry


def _auto(**options: Any) -> Any:
    from lightning_hetu.strategies.auto import AutoHybridParallelStrategy

    return AutoHybridParallelStrategy(**options)


def _osdp(**options: Any) -> Any:
    from lightning_hetu.strategies.osdp import OSDPStrategy

    return OSDPStrategy(**options)


_STRATEGIES = {
    "hetu_auto": (_auto, "Automatic hybrid parallelism: the fastest plan that fits memory."),
    "hetu_osdp": (_osdp, "Sharded data parallelism that shards only the operators worth sharding."),
}


def register_strategies() -> None:
    """Makes ``Trainer(strategy="hetu_auto")`` and the others known; does nothing the second time."""
    for name, (build, description) in _STRATEGIES.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, build, description=description)
