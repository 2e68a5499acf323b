"""Finds kernels that read beside their arguments, where what they read there does not change the result.

A missing mask on a load of padding goes unnoticed in every comparison of results, and is an illegal access on a GPU as
soon as a tensor ends where a page does. The interpreter is told which addresses belong to the arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hetu_kernels._common import alloc
from hetu_kernels._common.registry import Case, OpSpec
from hetu_kernels._common.testing import embed, poison, run

_GUARD = 33  # as in testing: what a matrix product on the CPU returns depends on how its memory is aligned


class _Region:
    """The memory of a tensor, and which elements of it are its own."""

    def __init__(self, name: str, view: Tensor, *, complete: bool = True) -> None:
        storage = view.untyped_storage()
        self.name = name
        self.start = storage.data_ptr()
        self.bytes = storage.nbytes()
        self.own = np.zeros(self.bytes, dtype=bool)
        self.complete = complete  # no other view of the memory is an argument too
        self.keep = view  # or another tensor might get its memory
        self.add(view)

    def add(self, view: Tensor) -> None:
        """Let the elements of one more view of the memory be read."""
        own = torch.zeros(self.bytes // view.element_size(), dtype=torch.bool)
        own.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        self.own |= own.repeat_interleave(view.element_size()).numpy()

    def check(self, addresses: Any) -> Any:
        """Which of the addresses lie in this memory; those must be the tensor's own elements."""
        inside = (addresses >= self.start) & (addresses < self.start + self.bytes)
        if inside.any():
            offsets = (addresses[inside] - np.uint64(self.start)).astype(np.int64)
            wrong = offsets[~self.own[offsets]]
            assert not wrong.size, f"a kernel reads beside {self.name}, {wrong[0]} bytes into its memory"
        return inside


@contextlib.contextmanager
def reads_watched(arguments: Any) -> Iterator[None]:
    """Inside, interpreted kernels may read of the memory of these tensors only the tensors' own elements.

    The same holds for the buffers that launchers allocate, and for other tensors that are given to kernels (incoming
    gradients, copies, sums). Of memory that belongs to no tensor they may read nothing.

    Raises:
        AssertionError: Where a kernel loads from elsewhere.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    regions = [
        _Region(pytree.keystr(path), leaf)
        for path, leaf in pytree.tree_flatten_with_path(arguments)[0]
        if isinstance(leaf, Tensor) and leaf.numel()
    ]

    def buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        numel = int(np.prod(shape))
        memory = torch.full((numel + 2 * _GUARD,), poison(dtype), dtype=dtype)
        made = memory[_GUARD : _GUARD + numel].view(tuple(shape))
        if numel:
            regions.append(_Region(f"a buffer of {list(shape)}", made))
        return made

    load, launch = InterpreterBuilder.create_masked_load, GridExecutor.__call__

    def watched(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        addresses = np.asarray(ptrs.data).astype(np.uint64)
        active = addresses[np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)]
        known = np.zeros(active.shape, dtype=bool)
        for region in regions:
            known |= region.check(active)
        assert known.all(), f"a kernel reads {int((~known).sum())} elements that belong to no tensor"
        return load(self, ptrs, mask, *others)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, given in (*zip(self.arg_names, args, strict=False), *kwargs.items()):
            if isinstance(given, Tensor) and given.untyped_storage().nbytes():
                start = given.untyped_storage().data_ptr()
                known = next((r for r in regions if r.start <= start < r.start + r.bytes), None)
                if known is None:
                    regions.append(_Region(name, given, complete=False))
                elif not known.complete:
                    known.add(given)
        return launch(self, *args, **kwargs)

    InterpreterBuilder.create_masked_load, GridExecutor.__call__ = watched, launched
    alloc.set_allocator(buffer)
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load, GridExecutor.__call__ = load, launch
        alloc.set_allocator(None)


def check_reads(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """Run one case and its gradients with its reads watched."""
    made = case.make(dtype, torch.Generator().manual_seed(0))
    arguments = pytree.tree_map_only(Tensor, lambda t: embed(t, contiguous=case.contiguous), made)
    names = spec.differentiable if case.grads else ()
    with reads_watched(arguments):
        run(spec.function, arguments, names, {} if names else None, embedded=not case.contiguous)
