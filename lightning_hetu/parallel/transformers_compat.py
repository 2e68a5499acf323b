"""Every touch of the internals of Hugging Face transformers, in one place. Checked against transformers 5.23.

Nothing is imported that the user has not imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import _lru_cache_wrapper, wraps
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn


def disable_caches(model: nn.Module) -> None:
    """Makes a model keep no keys and values: generation reuses them, training only fills memory.

    Recomputation would also add them a second time.
    """
    for module in model.modules():  # an encoder-decoder's parts have configurations of their own
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]


def collects_router_logits(model: nn.Module) -> bool:
    """Whether a loss has a term over what routers said of all tokens, which leaves the blocks by the side."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(getattr(config, "output_router_logits", False) for config in configs)


def use_batched_experts(copied: nn.Module) -> None:
    """Lets the experts of a copy run on fake tensors: the product they use otherwise has bf16 only there.

    Args:
        copied: A copy, whose configurations are its own.
    """
    if all(parameter.dtype == torch.bfloat16 for parameter in copied.parameters()):
        return
    for module in copied.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation = "batched_mm"  # type: ignore[union-attr]


@contextmanager
def forget_fake_tensors() -> Iterator[None]:
    """Empties the caches of functions of transformers behind a run on fake tensors, some of which would be in them."""
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.models."):
                for value in list(vars(module).values()):
                    _clear_caches(value)


def _clear_caches(value: Any) -> None:
    members = vars(value).values() if isinstance(value, type) else (value,)
    for member in members:
        function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        # transformers wraps some of them, so that compilation goes around the cache
        inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if not _is_empty(cell)]
        for candidate in (function, *inside):
            if isinstance(candidate, _lru_cache_wrapper):
                candidate.cache_clear()


def _is_empty(cell: CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def counted_labels(model: nn.Module, target: Any) -> Any:
    """How many labels the mean loss of a model is over; ``None`` where it has none that could be ignored.

    Args:
        model: A model; those of transformers leave out labels of -100, in segmentation those of an option of theirs.
        target: Its batch, or a tensor of labels.

    Raises:
        ValueError: If labels are ignored in a loss that is the sum of two means.
    """
    labels = target.get("labels") if isinstance(target, Mapping) else target
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    config = getattr(model, "config", None)
    ignored = getattr(config, "semantic_loss_ignore_index", -100) if labels.ndim == 3 else -100
    if isinstance(target, Mapping) and _shifts_labels(model):
        labels = labels[..., 1:]
    counted = labels.ne(ignored)
    if isinstance(target, Mapping) and "next_sentence_label" in target and not bool(counted.all()):
        raise ValueError(
            f"{type(model).__name__} adds up two means, and labels of {ignored} make one of them uneven: implement"
            " pipeline_loss for it, with one mean."
        )
    return counted.sum()


def _shifts_labels(model: Any) -> bool:
    """Whether a model itself compares its output with the next label."""
    utilities = sys.modules.get("transformers.loss.loss_utils")
    config = getattr(model, "config", None)
    if (
        utilities is None
        or getattr(config, "is_encoder_decoder", False)
        or getattr(config, "model_type", "") == "xlnet"
    ):
        return False
    return getattr(model, "loss_function", None) is utilities.ForCausalLMLoss


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
