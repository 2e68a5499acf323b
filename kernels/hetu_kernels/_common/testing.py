"""How kernels are compared with their references: tolerances, guarded buffers, and one run of one case.

Used by the project's tests, on the CPU in triton's interpreter and on a GPU alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hetu_kernels._common import alloc
from hetu_kernels._common.device import interpreting
from hetu_kernels._common.registry import Case, OpSpec

_ATOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_RELATIVE_RMS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
_GUARD = 33  # elements on each side; odd, so that nothing stays aligned by chance
_INTEGER_GUARD = 7  # a wrong index that still points somewhere


def assert_close_2x(actual: Tensor, reference: Tensor, baseline: Tensor, name: str = "result") -> None:
    """The rule of flash-attention: no worse than twice what torch itself loses in this dtype, plus a little.

    ``max|y - r| <= 2 max|b - r| + atol`` and ``rms(y - r) <= rel * rms(r)``, with atol (scaled by ``max(1, rms(r))``)
    and rel by the dtype of ``actual``. NaN and infinities must be in the same places. Both are doubled for bfloat16 in
    the interpreter, which truncates instead of rounding.

    Args:
        actual: What the kernel returned.
        reference: The same in float64.
        baseline: The same by torch in the dtype of ``actual``.
        name: What to call it in the error.

    Raises:
        AssertionError: With the measured and the allowed errors.
    """
    assert actual.shape == reference.shape, f"{name}: shape {list(actual.shape)}, expected {list(reference.shape)}"
    assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, expected {baseline.dtype}"
    if actual.numel() == 0:
        return
    y, r, b = (t.detach().to("cpu", torch.float64) for t in (actual, reference, baseline))
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        # Overflow of a narrow dtype is torch's as well: what counts is that both overflow in the same places.
        wrong = test(y) != test(b if what != "NaN" else r)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} elements differ in being {what}, first {_first(wrong)}"
    finite = torch.isfinite(r) & torch.isfinite(b)
    if not finite.any():
        return
    y, r, b = y[finite], r[finite], b[finite]
    slack = 2.0 if actual.dtype == torch.bfloat16 and interpreting() else 1.0
    scale = max(1.0, _rms(r))
    error, allowed = (y - r).abs().max().item(), slack * (2 * (b - r).abs().max().item() + _ATOL[actual.dtype] * scale)
    assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g} ({actual.dtype})"
    relative = _rms(y - r) / max(_rms(r), 1e-30)
    allowed = slack * max(_RELATIVE_RMS[actual.dtype], 2 * _rms(b - r) / max(_rms(r), 1e-30))
    if _rms(r) > 1e-3 * _ATOL[actual.dtype]:  # of nothing, nothing is the right fraction
        assert relative <= allowed, f"{name}: relative error {relative:.3g}, allowed {allowed:.3g} ({actual.dtype})"


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _first(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist()


def poison(dtype: torch.dtype) -> float | int | bool:
    """The value that no kernel should ever read or overwrite."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else _INTEGER_GUARD


def embed(tensor: Tensor, *, contiguous: bool) -> Tensor:
    """A copy of a tensor that lies among poison; its last dimension keeps stride 1.

    Args:
        tensor: What to copy.
        contiguous: Poison only before and after it. Otherwise it is a slice of a tensor that is larger in every
            dimension.
    """
    if contiguous or tensor.dim() == 0:
        flat = torch.full(
            (tensor.numel() + 2 * _GUARD,), poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device
        )
        view = flat[_GUARD : _GUARD + tensor.numel()].view(tensor.shape)
    else:
        sizes = [size + 3 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 5]
        larger = torch.full(sizes, poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
        view = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


def surroundings(view: Tensor) -> Tensor:
    """The elements of an embedded tensor's storage that are not its own."""
    base = view._base if view._base is not None else view
    assert base is not None
    while base._base is not None:
        base = base._base
    own = torch.zeros(base.untyped_storage().nbytes() // base.element_size(), dtype=torch.bool, device=base.device)
    own.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return torch.empty(0, dtype=base.dtype, device=base.device).set_(base.untyped_storage())[~own]


def is_poison(values: Tensor) -> bool:
    """Whether all of them still are what :func:`embed` put there."""
    if values.dtype.is_floating_point:
        return bool(values.isnan().all())
    return bool((values == poison(values.dtype)).all())


@contextlib.contextmanager
def guarded_buffers() -> Iterator[None]:
    """Inside, every buffer an operator allocates starts as NaN and lies between NaN, which must be there at the end.

    Raises:
        AssertionError: If a kernel wrote outside of a buffer.
    """
    given: list[Tensor] = []

    def guarded(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        numel = torch.Size(shape).numel()
        flat = torch.full((numel + 2 * _GUARD,), poison(dtype), dtype=dtype, device=device)
        given.append(flat)
        return flat[_GUARD : _GUARD + numel].view(tuple(shape))

    alloc.set_allocator(guarded)
    try:
        yield
    finally:
        alloc.set_allocator(None)
    for flat in given:
        assert is_poison(flat[:_GUARD]), "a kernel wrote before its buffer"
        assert is_poison(flat[-_GUARD:]), "a kernel wrote behind its buffer"


@dataclass
class Run:
    """Outputs of one call and the gradients of its arguments, by name."""

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]


def run(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    differentiable: Sequence[str],
    cotangents: dict[str, Tensor] | None,
    *,
    embedded: bool = False,
) -> Run:
    """Call a function and, unless ``cotangents`` is None, differentiate it.

    Args:
        function: An operator or its reference.
        arguments: Its keyword arguments.
        differentiable: Names of those whose gradients are wanted; what is no floating tensor is passed over.
        cotangents: Gradients of the outputs by name, filled in for those that are missing; they are converted to the
            dtype of the output.
        embedded: Give backward gradients that are slices of larger tensors, with poison around them.
    """
    arguments = dict(arguments)
    leaves = {}
    for name in differentiable if cotangents is not None else ():
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            leaves[name] = arguments[name] = value.detach().requires_grad_()
    outputs = {
        f"output{pytree.keystr(path)}": leaf
        for path, leaf in pytree.tree_flatten_with_path(function(**arguments))[0]
        if isinstance(leaf, Tensor)
    }
    grads: dict[str, Tensor] = {}
    wanted = {name: out for name, out in outputs.items() if out.requires_grad}
    if leaves and wanted and cotangents is not None:
        for name, out in wanted.items():
            if name not in cotangents:
                generator = torch.Generator().manual_seed(len(name))
                cotangents[name] = torch.randn(out.shape, generator=generator).to(out.device, torch.float16)
        incoming = [cotangents[name].to(out.dtype) for name, out in wanted.items()]
        if embedded:
            incoming = [embed(cotangent, contiguous=False) for cotangent in incoming]
        given = torch.autograd.grad(list(wanted.values()), list(leaves.values()), incoming, allow_unused=True)
        grads = {f"grad of {name}": grad for name, grad in zip(leaves, given, strict=True) if grad is not None}
    return Run({name: out.detach() for name, out in outputs.items()}, grads)


def converted(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with every floating tensor in another dtype, copied."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype, copy=True) if t.dtype.is_floating_point else t.clone(), arguments
    )


def check_case(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    watching: Callable[[Any], contextlib.AbstractContextManager[None]] | None = None,
) -> None:
    """Run one case through the kernel and compare outputs and gradients with the reference in float64.

    Args:
        spec: The operator.
        case: One of its cases.
        dtype: Dtype to make the case for.
        device: Where the kernel runs.
        watching: What a second call is made in, given its arguments. Without it the interpreter makes only one.

    Raises:
        AssertionError: If results are off, differ between two calls, or anything outside a buffer was touched.
    """
    made = case.make(dtype, torch.Generator().manual_seed(0))
    on_device = pytree.tree_map_only(Tensor, lambda t: t.to(device), made)
    names = spec.differentiable if case.grads else ()
    cotangents: dict[str, Tensor] | None = {} if names else None
    reference = run(spec.reference, converted(made, torch.float64), names, cotangents)
    baseline = run(spec.reference, converted_like(made), names, cotangents)
    runs = []
    # In the interpreter programs run one after another: there, a second call would show nothing new.
    for attempt in range(1 if watching is None and interpreting() else 2):
        arguments = pytree.tree_map_only(Tensor, lambda t: embed(t, contiguous=case.contiguous), on_device)
        with guarded_buffers() if watching is None or attempt == 0 else watching(arguments):
            moved = _moved(cotangents, device)
            runs.append(run(spec.function, arguments, names, moved, embedded=not case.contiguous))
        for path, leaf in pytree.tree_flatten_with_path(arguments)[0]:
            if isinstance(leaf, Tensor):
                assert is_poison(surroundings(leaf)), f"a kernel wrote beside {pytree.keystr(path)}"
    actual = runs[0]
    for kind in ("outputs", "grads"):
        ours, theirs, base = getattr(actual, kind), getattr(reference, kind), getattr(baseline, kind)
        assert ours.keys() == theirs.keys(), f"{kind}: {sorted(ours)}, the reference has {sorted(theirs)}"
        for name in ours:
            again = getattr(runs[-1], kind)[name]
            assert _same_bits(ours[name], again), f"{name}: two calls differ"
            if ours[name].dtype.is_floating_point:
                assert_close_2x(ours[name], theirs[name], base[name], name)
            else:
                assert torch.equal(ours[name].cpu(), theirs[name].cpu()), f"{name} differs"


def converted_like(arguments: dict[str, Any]) -> dict[str, Any]:
    """A copy of the arguments in their own dtypes."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone(), arguments)


def _moved(cotangents: dict[str, Tensor] | None, device: torch.device) -> dict[str, Tensor] | None:
    return None if cotangents is None else {name: t.to(device) for name, t in cotangents.items()}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
