"""Lightning strategies, registered by name and built when a Trainer asks for them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry


def _auto(**options: Any) -> Any:
    from lightning_hetu.strategies.auto import AutoHybridParallelStrategy

    return AutoHybridParallelStrategy(**options)


def register_strategies() -> None:
    """Makes ``Trainer(strategy="hetu_auto")`` known; does nothing the second time."""
    if "hetu_auto" not in StrategyRegistry:
        StrategyRegistry.register(
            "hetu_auto", _auto, description="Automatic hybrid parallelism: the fastest plan that fits memory."
        )
