"""Finds the operators of a model: the modules whose parameters can be gathered and freed on their own.

OSDP (arXiv 2209.13258) decides per operator, a module that owns parameters. FSDP2 gathers when such a module is called
and frees when it returns, so what counts is not only where a parameter is registered, but who uses it: a tied weight is
used by two modules, and ``nn.MultiheadAttention`` uses the weight of a child that it never calls. A run of the model
shows it. Every parameter belongs to the innermost module that is called once per step and around all of its uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ROOT = "."
"""Name of the unit of the whole module."""
SMALL_SHARE = 0.01
"""Units with less than this share of the parameters of the module around them join that module's unit."""

# Products that autocast computes in half precision, so that their parameters may as well be gathered in it.
_HALF_PRODUCTS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, torch.addmm,
    torch.baddbmm, torch.bmm, torch.matmul, torch.mm, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.matmul, Tensor.mm,
}  # fmt: skip
_WRITES = {
    "copy_", "mul_", "add_", "sub_", "div_", "lerp_", "zero_", "fill_", "set_", "clamp_", "addcmul_", "addcdiv_",
    "normal_", "uniform_", "__imul__", "__iadd__", "__isub__", "__itruediv__",
}  # fmt: skip
_READS_VALUES = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"}


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together.

    Args:
        name: The module that is called around their uses; :data:`ROOT` for the whole model.
        parameters: Their names, in the order of ``named_parameters``. They are those of the module and everything below
            it that no other unit has.
        kind: Class of the module.
        leaf: Whether they are all the module has, so that it may be cut into slices.
        half: The dtype into which autocast converts all of them at every use; ``None`` if it does not.
    """

    name: str
    parameters: tuple[str, ...]
    kind: str
    leaf: bool
    half: torch.dtype | None = None


def find_units(
    root: nn.Module, run: Callable[[], Any], *, whole: Collection[str] = (), small_join_root: bool = True
) -> tuple[Unit, ...]:
    """The units of a model in the order in which they are first called; those that are never called come last.

    Args:
        root: The model, on any device, also with fake tensors.
        run: Runs one forward pass of a step.
        whole: Names of classes whose modules are not to be looked into: all parameters below are one unit.
        small_join_root: Whether small units join that of ``root`` too. It cannot be replicated in an OSDP plan.

    Raises:
        ValueError: If a name in ``whole`` is the class of no module, or the step changes a parameter.
    """
    kinds = {type(module).__name__ for module in root.modules()}
    for kind in whole:
        if kind not in kinds:
            raise ValueError(f"whole={kind!r}: no module of the model is one; classes are {', '.join(sorted(kinds))}.")
    calls = _Calls(root)
    calls.watch(run)
    owners = _owners(root, calls, frozenset(whole))
    owners = _join_small(root, calls, owners, small_join_root)
    order = {name: position for position, name in enumerate(calls.order)}
    names: dict[str, list[str]] = {}
    for parameter, owner in owners.items():
        names.setdefault(owner, []).append(parameter)
    units = []
    for name, parameters in names.items():
        module = _module(root, name)
        own = {id(parameter) for parameter in module.parameters()}
        direct = {id(parameter) for parameter in module.parameters(recurse=False)}
        members = {id(root.get_parameter(parameter)) for parameter in parameters}
        halves = {calls.half.get(key) for key in members}
        half = halves.pop() if len(halves) == 1 else None
        leaf = own == members == direct and members.isdisjoint(calls.asked)
        units.append(Unit(name, tuple(parameters), type(module).__name__, leaf, half))
    return tuple(sorted(units, key=lambda unit: order.get(unit.name, len(order))))


def _module(root: nn.Module, name: str) -> nn.Module:
    return root if name == ROOT else root.get_submodule(name)


class _Calls(TorchFunctionMode):
    """Which modules are called, and inside of which ones every parameter is used."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.stack: list[str] = [ROOT]
        self.counts: Counter[str] = Counter({ROOT: 1})
        self.order: list[str] = [ROOT]
        self.chains: dict[int, list[tuple[str, ...]]] = {}
        """For every parameter, by its identity, the modules around each of its uses, outermost first."""
        self.half: dict[int, torch.dtype | None] = {}
        self.asked: set[int] = set()
        """Parameters whose dtype, device or shape others than their own module ask for."""
        self._known = {id(parameter): name for name, parameter in root.named_parameters()}

    def watch(self, run: Callable[[], Any]) -> None:
        """Runs a step under observation."""
        with ExitStack() as stack:
            for name, module in self.root.named_modules():
                if name:
                    stack.callback(module.register_forward_pre_hook(self._enter(name), prepend=True).remove)
                    stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            with self:
                run()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.stack.append(name)
            self.counts[name] += 1
            if self.counts[name] == 1:
                self.order.append(name)

        return hook

    def _leave(self, *_: Any) -> None:
        self.stack.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        used = [id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._known]
        name = getattr(func, "__name__", "")
        # Assigning to `.data` is a call of that descriptor.
        writes = name in _WRITES or (name == "__set__" and getattr(func.__self__, "__name__", "") == "data")
        if used and writes and id(args[0]) in self._known:
            raise ValueError(
                f"parameter {self._known[id(args[0])]!r} is changed inside of the step, where it is a copy that is"
                " thrown away: change it in on_train_batch_end."
            )
        # Shapes and dtypes of a parameter may be asked for anywhere.
        if used and (name in _READS_VALUES or any(isinstance(x, Tensor) for x in tree_leaves(result))):
            chain, half = tuple(self.stack), self._half(func, result)
            for key in used:
                chains = self.chains.setdefault(key, [])
                if chain not in chains:
                    chains.append(chain)
                self.half[key] = half if self.half.get(key, half) == half else None
        else:
            self.asked.update(key for key in used if self._known[key].rpartition(".")[0] != self.stack[-1])
        return result

    @staticmethod
    def _half(func: Any, result: Any) -> torch.dtype | None:
        if func not in _HALF_PRODUCTS or not isinstance(result, Tensor):
            return None
        device = result.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def around(self, chains: Collection[tuple[str, ...]]) -> list[str]:
        """Modules that are called once and around all of these uses, innermost first; the whole model is the last."""
        shared = set.intersection(*(set(chain) for chain in chains))
        innermost = next(iter(chains))
        return [name for name in reversed(innermost) if name in shared and self.counts[name] == 1]


def _owners(root: nn.Module, calls: _Calls, whole: frozenset[str]) -> dict[str, str]:
    """The unit of every parameter, by name."""
    modules = dict(root.named_modules())
    tops = [name for name, module in modules.items() if name and type(module).__name__ in whole]
    found: dict[str, str] = {}
    direct: dict[str, list[str]] = {}
    for parameter, _ in root.named_parameters():
        direct.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    holders: dict[int, set[str]] = {}
    for alias, tensor in root.named_parameters(remove_duplicate=False):
        holders.setdefault(id(tensor), set()).add(alias.rpartition(".")[0])
    for holder, parameters in direct.items():
        chains = [chain for name in parameters for chain in calls.chains.get(id(root.get_parameter(name)), ())]
        tied = {other for name in parameters for other in holders[id(root.get_parameter(name))]}
        if chains:
            around = [name for name in calls.around(chains) if all(_contains(name, other) for other in tied)]
            owner = next(name for name in around if _outside(name, tops))
        else:  # never used, and never gathered either
            owner = holder if holder and len(tied) == 1 else ROOT
        found |= dict.fromkeys(parameters, owner)
    return found


def _outside(name: str, tops: Collection[str]) -> bool:
    return not any(name.startswith(f"{top}.") for top in tops)


def _contains(outer: str, inner: str) -> bool:
    return outer == ROOT or inner == outer or inner.startswith(f"{outer}.")


def _join_small(root: nn.Module, calls: _Calls, owners: dict[str, str], join_root: bool) -> dict[str, str]:
    """Lets small units join that of the module which calls theirs."""
    sizes: Counter[str] = Counter()
    shardable: set[str] = set()
    for parameter, owner in owners.items():
        tensor = root.get_parameter(parameter)
        sizes[owner] += tensor.numel()
        if tensor.ndim and tensor.numel():
            shardable.add(owner)
    parents: dict[str, str] = {}
    for owner in sizes:
        chains = [
            chain
            for name, of in owners.items()
            if of == owner
            for chain in calls.chains.get(id(root.get_parameter(name)), ())
        ]
        outer = [name for name in calls.around(chains) if name != owner and _contains(name, owner)] if chains else []
        # What is whole anyway may join the root in any case.
        if owner != ROOT and outer and (join_root or outer[0] != ROOT or owner not in shardable):
            around = sum(parameter.numel() for parameter in _module(root, outer[0]).parameters())
            if sizes[owner] < SMALL_SHARE * around:
                parents[owner] = outer[0]
    return {parameter: parents.get(owner, owner) for parameter, owner in owners.items()}
