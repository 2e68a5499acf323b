"""What holds for every operator: right in every case, and a good citizen of torch.

On the CPU the kernels run in triton's interpreter, on a GPU for real; the reference is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from hetu_kernels._common.registry import Case, OpSpec, op_names, op_spec
from hetu_kernels._common.testing import check_case, embed, poison, run
from tests.kernels._reads import reads_watched

OPS = op_names()


def cases() -> Iterator[Any]:
    for name in OPS:
        for case in op_spec(name).cases():
            for dtype in case.dtypes:
                marks = [pytest.mark.slow] if case.slow else []
                yield pytest.param(op_spec(name), case, dtype, id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, computing with infinities
@pytest.mark.parametrize(("spec", "case", "dtype"), list(cases()))
def test_kernel_equals_its_reference(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    watched = device.type == "cpu" and dtype == case.dtypes[0]
    check_case(spec, case, dtype, device, reads_watched if watched else None)


@pytest.mark.parametrize("name", OPS)
def test_operator_off_the_gpu_is_the_reference(name: str, reference_only: None) -> None:
    """Outputs and gradients through the operator, without a kernel, are those of the reference itself."""
    spec = op_spec(name)
    for case in spec.cases()[:6]:
        arguments = case.make(torch.float32, torch.Generator().manual_seed(0))
        names = spec.differentiable if case.grads else ()
        cotangents: dict[str, Tensor] | None = {} if names else None
        clone = pytree.tree_map_only(Tensor, torch.clone, arguments)
        through, direct = (
            run(f, a, names, cotangents) for f, a in ((spec.function, arguments), (spec.reference, clone))
        )
        for ours, theirs in ((through.outputs, direct.outputs), (through.grads, direct.grads)):
            assert ours.keys() == theirs.keys()
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-5, equal_nan=True)


def _requiring_grad(spec: OpSpec, tokens: int, device: torch.device) -> dict[str, Any]:
    arguments = pytree.tree_map_only(Tensor, lambda t: t.to(device), spec.example(tokens))
    for name in spec.differentiable:
        if isinstance(arguments.get(name), Tensor):
            arguments[name].requires_grad_()
    return arguments


class _Recorder:
    """Calls of the custom operators made inside, with their arguments."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.names = {f"lightning_hetu::{name}" for name in names}

    def __enter__(self) -> _Recorder:
        from torch.utils._python_dispatch import TorchDispatchMode

        recorder = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func.name() in recorder.names:
                    recorder.calls.append((func, args))
                return func(*args, **(kwargs or {}))

        self.mode = Mode()
        self.mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)


@pytest.mark.interpret
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, device: torch.device) -> None:
    """``torch.library.opcheck`` on every custom operator, with the arguments a real call gives it."""
    spec = op_spec(name)
    arguments = _requiring_grad(spec, 5, device)
    with _Recorder(spec.custom_ops) as recorder:
        run(spec.function, arguments, spec.differentiable, {} if spec.differentiable else None)
    assert {func.name() for func, _ in recorder.calls} == recorder.names, "an operator was not called"
    for func, args in recorder.calls:
        forward = func.name().endswith("_fwd")  # backward has no backward of its own
        clones = pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), args)
        detached = pytree.tree_map_only(Tensor, torch.detach, clones)
        torch.library.opcheck(func, clones if forward else detached)


@pytest.mark.interpret
@pytest.mark.parametrize("name", OPS)
def test_compiles_without_a_graph_break_and_only_once(name: str, device: torch.device) -> None:
    """``torch.compile(fullgraph=True)`` gives the eager results and does not recompile for another token count."""
    spec = op_spec(name)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.function, fullgraph=True, backend=counter, dynamic=True)
    frames: list[int] = []
    for tokens in (5, 11, 7):
        cotangents: dict[str, Tensor] | None = {} if spec.differentiable else None
        eager = run(spec.function, _requiring_grad(spec, tokens, device), spec.differentiable, cotangents)
        ours = run(compiled, _requiring_grad(spec, tokens, device), spec.differentiable, cotangents)
        assert eager.grads.keys() == ours.grads.keys()
        for one, other in ((eager.outputs, ours.outputs), (eager.grads, ours.grads)):
            for key in one:
                torch.testing.assert_close(other[key], one[key], rtol=0, atol=0)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] > 0, f"compiled anew for another token count: {frames}"
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPS)
def test_meta_and_fake_tensors_have_the_shapes_of_real_ones(name: str, device: torch.device) -> None:
    spec = op_spec(name)
    cotangents: dict[str, Tensor] | None = {} if spec.differentiable else None
    real = run(spec.function, _requiring_grad(spec, 6, device), spec.differentiable, cotangents)
    to_meta = pytree.tree_map_only(Tensor, lambda t: t.detach().to("meta"), spec.example(6))
    on_meta = {k: t.to("meta") for k, t in cotangents.items()} if cotangents is not None else None
    results = [run(spec.function, to_meta, spec.differentiable, on_meta)]
    with FakeTensorMode() as mode:
        fake = pytree.tree_map_only(Tensor, mode.from_tensor, spec.example(6))
        fake_cotangents = (
            {k: mode.from_tensor(t.cpu()) for k, t in cotangents.items()} if cotangents is not None else None
        )
        results.append(run(spec.function, fake, spec.differentiable, fake_cotangents))
    for result in results:
        for ours, theirs in ((result.outputs, real.outputs), (result.grads, real.grads)):
            assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {
                k: (t.shape, t.dtype) for k, t in theirs.items()
            }


def _every_second(tensor: Tensor) -> Tensor:
    """The same values, with stride 2 in the last dimension and poison between them."""
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        return tensor
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), poison(tensor.dtype), dtype=tensor.dtype)
    view = wide.to(tensor.device)[..., ::2]
    return view.copy_(tensor)


@pytest.mark.interpret
@pytest.mark.parametrize("name", OPS)
def test_last_dimension_may_have_any_stride(name: str, device: torch.device) -> None:
    """Every tensor, vectors, integers and incoming gradients included, with stride 2 in its last dimension."""
    spec = op_spec(name)
    cotangents: dict[str, Tensor] | None = {} if spec.differentiable else None
    plain = pytree.tree_map_only(Tensor, lambda t: t.to(device), spec.example(6))
    strided = pytree.tree_map_only(Tensor, _every_second, plain)
    plain, strided = (dict(each) for each in (plain, strided))
    expected = run(spec.function, plain, spec.differentiable, cotangents)
    apart = {key: _every_second(t) for key, t in cotangents.items()} if cotangents is not None else None
    actual = run(spec.function, strided, spec.differentiable, apart)
    for ours, theirs in ((actual.outputs, expected.outputs), (actual.grads, expected.grads)):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.interpret
@pytest.mark.parametrize("name", OPS)
def test_tensors_on_different_devices_are_refused(name: str, device: torch.device) -> None:
    """Each tensor argument in turn is on another device than the rest; the message names it."""
    spec = op_spec(name)
    example = pytree.tree_map_only(Tensor, lambda t: t.to(device), spec.example(4))
    tensors = [key for key, value in example.items() if isinstance(value, Tensor)]
    for key in tensors[1:]:
        moved = {**example, key: example[key].to("meta")}
        with pytest.raises(ValueError, match=rf"\b{key} is on meta|is on .*, {key} on meta"):
            spec.function(**moved)


def test_guard_notices_a_write_outside_a_buffer() -> None:
    from hetu_kernels._common import alloc
    from hetu_kernels._common.testing import guarded_buffers

    with pytest.raises(AssertionError, match="behind its buffer"), guarded_buffers():
        buffer = alloc.empty((4,), dtype=torch.float32, device=torch.device("cpu"))
        buffer.as_strided((5,), (1,)).zero_()
    with pytest.raises(AssertionError, match="before its buffer"), guarded_buffers():
        buffer = alloc.empty((4,), dtype=torch.int32, device=torch.device("cpu"))
        buffer.as_strided((1,), (1,), buffer.storage_offset() - 1).zero_()


def test_embedded_tensors_are_strided_and_poisoned() -> None:
    from hetu_kernels._common.testing import is_poison, surroundings

    tensor = torch.randn(3, 4, 5)
    view = embed(tensor, contiguous=False)
    assert torch.equal(view, tensor)
    assert not view.is_contiguous()
    assert view.stride(-1) == 1
    assert is_poison(surroundings(view))
    view._base[0, 0, 0] = 1.0
    assert not is_poison(surroundings(view))
    assert embed(tensor, contiguous=True).is_contiguous()
