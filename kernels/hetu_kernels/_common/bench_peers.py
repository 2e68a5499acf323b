"""Which implementations a benchmark compares, and whether they compute the same thing: a fast wrong peer is no peer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hetu_kernels._common.bench_report import OURS, one_line
from hetu_kernels._common.registry import OpSpec

# Relative root mean square of the difference, whatever the dtype: twice and more what bfloat16 loses, and far below
# what a wrong scale or a missing mask does.
AGREEMENT = 2e-2
_CHUNK = 2**24  # elements compared at a time, as float32
_GRADIENT_PASSES = ("backward", "both")

Peer = Callable[[dict[str, Any]], Callable[..., Any]]


@dataclass
class Implementation:
    """Ours or a peer, and what the check has found out about it.

    Args:
        name: Ours or the peer's name.
        build: Given the arguments, returns the function, or raises with the reason why it cannot run.
        function: The function for the benchmark's own arguments; None where it cannot run.
        reasons: Why it cannot run, by ``all`` or ``backward``.
        differences: In what its results differ from ours, by ``forward`` and ``backward``.
        compared: What was compared with ours, ``forward`` and ``backward``.
    """

    name: str
    build: Peer
    function: Callable[..., Any] | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    differences: dict[str, str] = field(default_factory=dict)
    compared: set[str] = field(default_factory=set)

    def reason_in(self, pass_: str) -> str | None:
        """Why it does not run in a pass; None where it does."""
        return self.reasons.get("all") or (self.reasons.get("backward") if pass_ in _GRADIENT_PASSES else None)

    def difference_in(self, pass_: str) -> str | None:
        """In what it differs from ours in a pass; None where it does not, or nobody knows."""
        forward = self.differences.get("forward")
        return forward or (self.differences.get("backward") if pass_ in _GRADIENT_PASSES else None)

    def agrees_in(self, pass_: str) -> bool | None:
        """Whether it computes what ours does in a pass; None where nobody knows."""
        needed = "backward" if pass_ in _GRADIENT_PASSES else "forward"
        return self.difference_in(pass_) is None if needed in self.compared else None


@dataclass
class Results:
    """What one call returned.

    Args:
        outputs: Its tensors.
        grads: Gradients by argument; None for one the call does not compute, or where backward does not run.
    """

    outputs: list[Tensor]
    grads: dict[str, Tensor | None] | None


def implementations(spec: OpSpec, *, peers: bool, tiny_cpu: bool) -> list[Implementation]:
    """Ours first, then the peers.

    Args:
        spec: The operator.
        peers: All of them. Otherwise torch eager only; the reference takes its place where the spec has none.
        tiny_cpu: Only to see what runs: all of them in any case, but those that compile for a reason instead.
    """

    def ours(_: dict[str, Any]) -> Callable[..., Any]:
        return spec.function

    def reference(_: dict[str, Any]) -> Callable[..., Any]:
        return spec.reference

    def too_slow(_: dict[str, Any]) -> Callable[..., Any]:
        raise RuntimeError("not compiled for a tiny shape on a CPU unless --peers asks for it")

    found = [Implementation(OURS, ours)]
    if not any("eager" in name.lower() for name in spec.peers):
        found.append(Implementation("reference (eager)", reference))
    for name, build in spec.peers.items():
        if tiny_cpu and not peers and "compile" in name.lower():
            found.append(Implementation(name, too_slow))
        elif peers or tiny_cpu or "eager" in name.lower():
            found.append(Implementation(name, build))
    return found


def with_leaves(arguments: dict[str, Any], differentiable: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments with those tensors that gradients are wanted for as leaves, and these leaves by name."""
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in differentiable
        if isinstance(arguments.get(name), Tensor) and arguments[name].dtype.is_floating_point
    }
    return {**arguments, **leaves}, leaves


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors of what a function returned."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def add_cotangents(outputs: Sequence[Tensor], cotangents: dict[int, Tensor]) -> None:
    """Make the gradients of those outputs that have none yet: 1 for a loss, random otherwise."""
    for index, output in enumerate(outputs):
        if output.requires_grad and index not in cotangents:
            make = torch.randn_like if output.dim() else torch.ones_like
            cotangents[index] = make(output, requires_grad=False)


def gradients(
    outputs: Sequence[Tensor], leaves: dict[str, Tensor], cotangents: dict[int, Tensor]
) -> dict[str, Tensor | None]:
    """Gradients of the leaves.

    Args:
        outputs: Results of the call.
        leaves: Of its arguments.
        cotangents: Gradients of the outputs by their number, the same for all implementations.

    Raises:
        RuntimeError: If no output has a gradient.
    """
    wanted = [index for index, output in enumerate(outputs) if output.requires_grad]
    if not wanted:
        raise RuntimeError("no result requires gradients")
    given = [cotangents[index].to(outputs[index].dtype).reshape(outputs[index].shape) for index in wanted]
    made = torch.autograd.grad([outputs[index] for index in wanted], list(leaves.values()), given, allow_unused=True)
    return dict(zip(leaves, made, strict=True))


def copies_of(cotangents: dict[int, Tensor]) -> dict[int, Tensor]:
    """Their copies: some kernels write over the gradient they are given."""
    return {index: given.clone() for index, given in cotangents.items()}


def check(
    one: Implementation,
    arguments: dict[str, Any],
    differentiable: Collection[str],
    cotangents: dict[int, Tensor],
    ours: Results | None,
    synchronize: Callable[[], None],
) -> Results | None:
    """Call an implementation once on a copy of the arguments, note what it raises, and compare it with ours.

    Args:
        one: The implementation; what is found out goes into it.
        arguments: Of the benchmark.
        differentiable: Names of those whose gradients are compared too.
        cotangents: See :func:`gradients`; those that are missing are added.
        ours: What ours returned; None if this is ours, or ours has failed.
        synchronize: Waits for the device, so that an error is blamed on who made it.

    Returns:
        Its results, None if it does not run.
    """
    try:
        # It may write into its arguments, and a peer may be built around them: this copy is for the check only.
        copy = pytree.tree_map_only(Tensor, torch.clone, arguments)
        call = one.build(copy)
        copy, leaves = with_leaves(copy, differentiable)
        outputs = outputs_of(call(**copy))
        synchronize()
        one.function = one.build(arguments)
    except Exception as error:
        one.function = None
        one.reasons["all"] = one_line(error)
        return None
    results = Results([output.detach() for output in outputs], None)
    try:
        if leaves:
            add_cotangents(outputs, cotangents)
            results.grads = gradients(outputs, leaves, copies_of(cotangents))
            synchronize()
    except Exception as error:
        one.reasons["backward"] = one_line(error)
    if one.name == OURS:
        one.compared.update(("forward", "backward"))
    elif ours is not None:
        compare(one, ours, results)
    return results


def compare(one: Implementation, ours: Results, theirs: Results) -> None:
    """Note in what a peer's results differ from ours. Results that only ours returns are passed over."""
    try:
        pairs = [(f"result {i}", a, b) for i, (a, b) in enumerate(zip(ours.outputs, theirs.outputs, strict=False))]
        found = [difference(*pair) for pair in pairs] if pairs else ["returns no tensor"]
        if any(found):
            one.differences["forward"] = next(text for text in found if text)
        one.compared.add("forward")
        if ours.grads is not None and theirs.grads is not None:
            for name, grad in ours.grads.items():
                text, other = f"gradient of {name}", theirs.grads[name]
                if grad is not None:
                    different = f"no {text}" if other is None else difference(text, grad, other)
                    if different:
                        one.differences.setdefault("backward", different)
            one.compared.add("backward")
    except Exception as error:
        where = "backward" if "forward" in one.compared else "forward"
        one.differences[where] = f"could not be compared: {one_line(error)}"


def difference(name: str, ours: Tensor, theirs: Tensor) -> str | None:
    """In what two tensors differ by more than their dtype explains; None if they agree.

    Args:
        name: What to call them.
        ours: One of them.
        theirs: The other; dimensions of size 1 more or less do not matter.
    """
    if ours.squeeze().shape != theirs.squeeze().shape:
        return f"{name} has shape {list(theirs.shape)}, ours {list(ours.shape)}"
    a, b = ours.reshape(-1), theirs.reshape(-1)
    if not a.dtype.is_floating_point or not b.dtype.is_floating_point:
        share = (a != b).double().mean().item() if a.numel() else 0.0
        return f"{name}: {share:.1%} of the elements differ" if share > AGREEMENT else None
    error = scale = 0.0
    for start in range(0, a.numel(), _CHUNK):
        x, y = a[start : start + _CHUNK].float(), b[start : start + _CHUNK].float()
        finite = x.isfinite()
        if not torch.equal(finite, y.isfinite()):
            return f"{name} is not finite in other places"
        x, y = x.where(finite, 0.0), y.where(finite, 0.0)
        error += (x - y).square().sum(dtype=torch.float64).item()
        scale += x.square().sum(dtype=torch.float64).item()
    relative = math.sqrt(error / scale) if scale else math.inf if error else 0.0
    return f"{name}: relative rms error {relative:.2g}" if relative > AGREEMENT else None
