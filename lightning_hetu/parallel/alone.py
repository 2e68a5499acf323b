"""Whether a model is being run by one rank only, to look at it.

Plans are made on one rank, by running a step that no other rank runs. A layer that talks to other ranks in its forward
asks here whether they are there; otherwise it would wait for them forever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_inside = 0


@contextmanager
def running_alone() -> Iterator[None]:
    """In this context other ranks are not to be waited for."""
    global _inside
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1


def is_alone() -> bool:
    """Whether other ranks are not to be waited for."""
    return _inside > 0
