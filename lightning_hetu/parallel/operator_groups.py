"""Operators inside of a layer whose parameters can be gathered on their own, as in OSDP (arXiv 2209.13258).

FSDP2 gathers when a module is called and frees when it returns, so the module must be called once in every forward of
its layer, on every rank, and be alone in using its parameters. Some of that can be read off the layer, the rest shows
when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_hetu.parallel.osdp.discover import ROOT, find_units


def operator_groups(layer: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Bytes of the parameters of each such operator, in the order in which they are called.

    Modules that hold less than a hundredth of what is around them are left out.

    Args:
        layer: The layer, on any device, also with fake tensors.
        run: Runs its forward once.
    """
    called: dict[str, int] = {}
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.update({name: called.get(name, 0) + 1}))
        for name, module in layer.named_modules()
    ]
    try:
        units = find_units(layer, run)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, int] = {}
    for unit in units:
        # A unit inside of which another one stands would take that one's parameters along.
        whole = unit.name != ROOT and {name for name, _ in layer.get_submodule(unit.name).named_parameters()}
        own = {name.removeprefix(f"{unit.name}.") for name in unit.parameters}
        if whole and whole == own and called.get(unit.name) == 1 and problem_of_group(layer, unit.name) is None:
            found[unit.name] = sum(
                parameter.numel() * parameter.element_size()
                for parameter in layer.get_submodule(unit.name).parameters()
            )
    return found


def check_groups(layer: nn.Module, names: Sequence[str]) -> None:
    """Refuses operators that cannot be groups of their own.

    Raises:
        ValueError: One line that names the first of them, and what is wrong with it.
    """
    for name in names:
        problem = problem_of_group(layer, name)
        if problem is not None:
            raise ValueError(f"{name!r} {problem}.")
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"{name!r} is a part of {outer!r}, which is sharded as well: leave out one of them.")


def problem_of_group(layer: nn.Module, name: str) -> str | None:
    """What keeps the module ``name`` of a layer from being a group of its own, as far as the layer shows it."""
    path = name.split(".")
    around: list[nn.Module] = [layer]
    for child in path:
        module = around[-1]._modules.get(child)
        if module is None:
            operators = [key for key, part in layer.named_modules() if key and _owns_parameters(part)]
            return f"is no module inside of the layer, expected one such as {', '.join(operators[:6])}"
        around.append(module)
    module = around.pop()
    parameters = list(module.parameters())
    if not parameters:
        return "has no parameters"
    if any(parameter.ndim == 0 or parameter.numel() == 0 for parameter in parameters):
        return "has a parameter without dimensions or elements, which FSDP does not shard"
    if type(module).forward is nn.Module.forward:
        return f"is a {type(module).__name__}, which is never called: name the modules in it"
    if any(isinstance(part, nn.MultiheadAttention) for part in around):
        return "is a part of MultiheadAttention, which uses its parameters without calling it"
    for part, child in zip(around, path, strict=True):
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            alike = [other for other in part.children() if _shapes(other) == _shapes(part._modules[child])]
            if len(alike) > 1:
                return "is one of several modules of a kind, such as experts, of which a forward may call only some"
    inside = {id(part) for part in module.modules()}
    members = {id(parameter) for parameter in parameters}
    for key, part in layer.named_modules(remove_duplicate=False):
        if key == name or key.startswith(f"{name}."):
            continue
        if id(part) == id(module):
            return f"is the same module as {key!r}"
        if id(part) not in inside and any(id(p) in members for p in part._parameters.values() if p is not None):
            return f"shares a parameter with {key or 'the layer itself'!r}"
    return None


def _owns_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _shapes(module: nn.Module | None) -> tuple[Any, ...]:
    parameters = () if module is None else module.parameters()
    return (type(module), *(tuple(parameter.shape) for parameter in parameters))
