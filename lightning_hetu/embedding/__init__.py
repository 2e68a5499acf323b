"""Cached embedding tables under the protocol of HET (arXiv 2112.07221): rows live with an owner, workers keep copies.

Reading order: ``rules`` (the clocks and bounds), ``trace`` (the whole protocol on a list of events, in plain Python);
then ``slot_index`` and ``cache`` (a worker's copies), ``push`` (what it sends), ``owner``, ``row_store`` and
``sqlite_row_store`` (where rows live), and ``row_optimizers``. Nothing here communicates.

The protocol is imported here and needs no torch. What does is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_hetu.embedding.rules import CacheRules
from lightning_hetu.embedding.trace import TraceStep, replay

if TYPE_CHECKING:
    from lightning_hetu.embedding.cache import ReadPlan as ReadPlan
    from lightning_hetu.embedding.cache import ReadResult as ReadResult
    from lightning_hetu.embedding.cache import RowCache as RowCache
    from lightning_hetu.embedding.owner import RowOwner as RowOwner
    from lightning_hetu.embedding.push import Push as Push
    from lightning_hetu.embedding.row_optimizers import SGD as SGD
    from lightning_hetu.embedding.row_optimizers import Adagrad as Adagrad
    from lightning_hetu.embedding.row_optimizers import Adam as Adam
    from lightning_hetu.embedding.row_optimizers import RowOptimizer as RowOptimizer
    from lightning_hetu.embedding.row_optimizers import RowwiseAdagrad as RowwiseAdagrad
    from lightning_hetu.embedding.row_optimizers import RowwiseAdam as RowwiseAdam
    from lightning_hetu.embedding.row_store import MmapRowStore as MmapRowStore
    from lightning_hetu.embedding.row_store import RowStore as RowStore
    from lightning_hetu.embedding.row_store import TensorRowStore as TensorRowStore
    from lightning_hetu.embedding.sqlite_row_store import SqliteRowStore as SqliteRowStore

_EXPORTS = {
    "Adagrad": "lightning_hetu.embedding.row_optimizers",
    "Adam": "lightning_hetu.embedding.row_optimizers",
    "MmapRowStore": "lightning_hetu.embedding.row_store",
    "Push": "lightning_hetu.embedding.push",
    "ReadPlan": "lightning_hetu.embedding.cache",
    "ReadResult": "lightning_hetu.embedding.cache",
    "RowCache": "lightning_hetu.embedding.cache",
    "RowOptimizer": "lightning_hetu.embedding.row_optimizers",
    "RowOwner": "lightning_hetu.embedding.owner",
    "RowStore": "lightning_hetu.embedding.row_store",
    "RowwiseAdagrad": "lightning_hetu.embedding.row_optimizers",
    "RowwiseAdam": "lightning_hetu.embedding.row_optimizers",
    "SGD": "lightning_hetu.embedding.row_optimizers",
    "SqliteRowStore": "lightning_hetu.embedding.sqlite_row_store",
    "TensorRowStore": "lightning_hetu.embedding.row_store",
}

__all__ = ["CacheRules", "TraceStep", "replay", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
