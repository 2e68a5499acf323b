"""Every touch of the internals of Hugging Face transformers, in one place. Checked against transformers 5.23.

Nothing is imported that the user has not imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn


def disable_caches(model: nn.Module) -> None:
    """Makes a model keep no keys and values: generation reuses them, training only fills memory.

    Recomputation would also add them a second time.
    """
    for module in model.modules():  # an encoder-decoder's parts have configurations of their own
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]


@contextmanager
def steady_masks() -> Iterator[None]:
    """Attention masks are made whenever there is an ``attention_mask``, whatever is in it.

    transformers leaves a mask out where no token of the batch is padding. Ranks with other rows would have one, and
    moving it to another layout takes them all.
    """
    masking = sys.modules.get("transformers.masking_utils")
    registry = getattr(masking, "ALL_MASK_ATTENTION_FUNCTIONS", None)
    if registry is None:
        yield
        return
    before = {name: registry[name] for name in registry.valid_keys()}
    try:
        for name, function in before.items():
            registry[name] = _always(function)
        yield
    finally:
        for name, function in before.items():
            registry[name] = function


def _always(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def made(*args: Any, **options: Any) -> Any:
        if options.get("attention_mask") is not None:
            for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip"):
                if name in options:
                    options[name] = False
        return function(*args, **options)

    return made
