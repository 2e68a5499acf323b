"""Put the kernels into an existing model by one call, and take them out again.

    from hetu_kernels.integrate import use_kernels

    integration = use_kernels(model)      # modules are exchanged by type, attention through the model's own interface
    ...
    integration.undo()

Works for modules built of torch's own layers, for modules that name an ``attention_function``
(:mod:`hetu_kernels.integrate.attention`), and for models of the transformers library. Parameters, their names, hooks
and checkpoints stay as they are: an exchanged module is the same object with another ``forward``. A call that the
kernels cannot do goes to what the model had before.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from types import TracebackType

from torch import nn

from hetu_kernels.integrate import attention
from hetu_kernels.integrate.layers import exchange_for

logger = logging.getLogger("hetu_kernels")

__all__ = ["Integration", "use_kernels"]


class Integration:
    """What :func:`use_kernels` has changed, and how to change it back.

    Also a context manager that undoes the changes at its end.

    Attributes:
        replaced: What was exchanged: name of the module (empty for the model itself) to what it uses now.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, str] = {}
        self._undo: list[Callable[[], None]] = []

    def add(self, name: str, what: str, undo: Callable[[], None]) -> None:
        """Note a change."""
        self.replaced[name] = what
        self._undo.append(undo)

    def undo(self) -> None:
        """Give every module its own ``forward`` back. Doing it twice does nothing."""
        while self._undo:
            self._undo.pop()()
        self.replaced = {}

    def __enter__(self) -> Integration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for what in self.replaced.values():
            counts[what] = counts.get(what, 0) + 1
        return f"Integration({', '.join(f'{count} x {what}' for what, count in sorted(counts.items())) or 'nothing'})"


def use_kernels(
    model: nn.Module,
    *,
    attention: bool = True,
    norms: bool = True,
    activations: bool = True,
    loss: bool = False,
) -> Integration:
    """Make a model use this package's kernels where they do what its own modules do.

    Off the GPU the kernels' references run, with the same results; see ``LIGHTNING_HETU_KERNELS``. Modules whose
    parameters are DTensors, inner modules that have hooks, and dropout within attention, go on as before.

    Args:
        model: Any module. Call it again after adding modules.
        attention: Attention becomes :func:`~hetu_kernels.varlen_attention`; padded tokens are not computed.
        norms: LayerNorm and RMSNorm, with the residual addition before them where a module does both.
        activations: GELU and the gated activations of feed-forward layers.
        loss: A causal language model of the transformers library that is given ``labels`` computes its loss by
            :func:`~hetu_kernels.linear_cross_entropy` and returns no logits. There is a warning where ``model`` has
            none of the classes this is known for.

    Returns:
        What was changed, nothing if all of it already was; its ``undo`` takes it back.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If nothing in it can use a kernel.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"use_kernels: model is a {type(model).__name__}, expected a torch.nn.Module.")
    integration = Integration()
    wanted = {"norm": norms, "activation": activations, "loss": loss}
    for name, module in model.named_modules():
        exchange = exchange_for(module)
        if exchange is not None and wanted[exchange.kind]:
            own = module.__class__
            module.__class__ = exchange.cls
            integration.add(name, exchange.what, functools.partial(setattr, module, "__class__", own))
        if attention:
            _give_attention(name, module, integration)
    if attention and "transformers" in sys.modules:
        from hetu_kernels.integrate.transformers_attention import use_attention

        use_attention(model, integration)
    if loss and not any(_has_kernel_loss(module) for module in model.modules()):
        logger.warning(
            "use_kernels: loss=True changes no loss of %s, expected one of %s of the transformers library.",
            type(model).__name__, ", ".join(_loss_classes()) or "the causal language models",
        )  # fmt: skip
    if not integration.replaced and not any(_uses_kernels(module) for module in model.modules()):
        raise ValueError(f"use_kernels: {type(model).__name__} has no module that one of the chosen kernels replaces.")
    logger.info("use_kernels: %r", integration)
    return integration


def _uses_kernels(module: nn.Module) -> bool:
    """Whether it was changed by an earlier call."""
    if type(module).__module__.startswith(__name__):
        return True
    if vars(module).get("attention_function") is attention.padded_attention:
        return True
    if "transformers" not in sys.modules:
        return False
    from hetu_kernels.integrate.transformers_attention import uses_it

    return uses_it(module)


def _has_kernel_loss(module: nn.Module) -> bool:
    """Whether ``loss=True`` has an effect on it."""
    return type(module).__module__.startswith(__name__) and type(module).__name__ in _loss_classes()


def _loss_classes() -> tuple[str, ...]:
    if "transformers" not in sys.modules:
        return ()
    from hetu_kernels.integrate.transformers import LOSS_CLASSES

    return LOSS_CLASSES


def _give_attention(name: str, module: nn.Module, integration: Integration) -> None:
    """A module that names an ``attention_function`` gets another one."""
    if getattr(module, "attention_function", None) is attention.padded_attention:
        return
    if not callable(getattr(module, "attention_function", None)):
        return
    own = module.__dict__.get("attention_function")
    vars(module)["attention_function"] = attention.padded_attention

    def undo() -> None:
        del vars(module)["attention_function"]
        if own is not None:
            vars(module)["attention_function"] = own

    integration.add(name, "varlen_attention", undo)
