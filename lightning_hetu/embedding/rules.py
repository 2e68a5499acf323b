"""What a cache of embedding rows is allowed to do: the bounds and choices of HET (arXiv 2112.07221).

Every row of the table has a global clock ``c_g``, the number of updates merged into it so far by all workers. A copy in
a cache keeps its start clock ``v``, how many of those updates it contains, and ``u``, its own updates that were not
pushed yet. Two bounds hold per row:

- a read may use the copy while ``c_g - v <= pull_limit``, otherwise the row is fetched again;
- a write may stay in the cache while ``u <= push_limit``, otherwise it is pushed.

``c_g - v`` counts exactly the updates of others that a copy lacks. Comparing ``c_g`` with ``v + u`` instead would let a
worker's own updates hide as many of the others', and nearly double the staleness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Policy = Literal["lru", "lfu", "lfuopt"]
"""Which row leaves a full cache: the one read longest ago, or the one read least often."""
OnStale = Literal["rebase", "flush"]
"""A stale copy with own updates takes the fetched row plus those (``rebase``), or pushes them first (``flush``)."""

PERMANENT_COUNT = 10
"""With ``lfuopt``, a row that was hit this often is not evicted any more; the number of the published system."""


@dataclass(frozen=True)
class CacheRules:
    """Bounds and policy of the caches of one table; the same on every worker.

    Args:
        staleness: Both bounds, in updates of one row: 0 keeps training synchronous, ``math.inf`` pushes on eviction and
            flush only.
        pull_bound: Bound for reads where it differs.
        push_bound: Bound for writes where it differs.
        policy: Which row is evicted. ``lru``: the one read longest ago. ``lfu``: the one read least often since it was
            inserted. ``lfuopt``: likewise, but rows with ``PERMANENT_COUNT`` hits stay. Ties go to the one that was
            read longest ago, then to the smaller id.
        on_stale: What becomes of own updates when a copy is fetched again.
        aging: Halve all counts after every so many training reads, so that rows that were popular once can leave again,
            those that ``lfuopt`` keeps included; ``None`` never does.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    staleness: float = 10
    pull_bound: float | None = None
    push_bound: float | None = None
    policy: Policy = "lfu"
    on_stale: OnStale = "rebase"
    aging: int | None = None

    def __post_init__(self) -> None:
        for name in ("staleness", "pull_bound", "push_bound"):
            bound = getattr(self, name)
            if bound is not None and not (bound >= 0 and (bound == math.inf or bound == int(bound))):
                raise ValueError(f"{name}={bound!r}: expected a whole number of updates, at least 0, or math.inf.")
        for name, allowed in (("policy", Policy), ("on_stale", OnStale)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(get_args(allowed))}.")
        if self.aging is not None and self.aging < 1:
            raise ValueError(f"aging={self.aging!r}: expected at least 1 read, or None to keep counts.")
        if self.aging is not None and self.policy == "lru":
            raise ValueError(f"aging={self.aging!r}: policy='lru' has no counts; use 'lfu' or 'lfuopt', or None.")

    @property
    def pull_limit(self) -> float:
        """Most updates of others that a copy may lack when it is read."""
        return self.staleness if self.pull_bound is None else self.pull_bound

    @property
    def push_limit(self) -> float:
        """Most own updates that a copy may keep to itself."""
        return self.staleness if self.push_bound is None else self.push_bound
