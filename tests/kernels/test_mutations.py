"""A kernel with one wrong stride, or one missing mask, fails a test: the tests of the tests."""

from __future__ import annotations

import pytest
import torch

from hetu_kernels._common.registry import op_names
from tests.kernels._mutations import Mutation, chosen, mutations_of, outcome


def pick(op: str, kind: str) -> Mutation:
    return next(mutation for mutation in mutations_of(op) if mutation.kind == kind)


@pytest.mark.skipif(torch.cuda.is_available(), reason="damaged kernels are run in the interpreter, not on a GPU")
@pytest.mark.parametrize("op", ["swiglu"])
def test_a_wrong_stride_is_noticed(op: str) -> None:
    mutation = pick(op, "stride")
    assert outcome(mutation) is not None, f"no case of {op} notices {mutation}"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="damaged kernels are run in the interpreter, not on a GPU")
@pytest.mark.parametrize("op", op_names())
def test_seeded_damage_to_any_kernel_is_noticed(op: str) -> None:
    """One wrong stride and one missing mask of every kernel, drawn by a seed."""
    survivors = [str(mutation) for mutation in chosen(op, seed=1) if outcome(mutation) is None]
    assert survivors == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="damaged kernels are run in the interpreter, not on a GPU")
def test_undamaged_kernels_pass_the_same_run() -> None:
    """Or every damage would be noticed."""
    mutation = pick("unpack", "stride")
    untouched = Mutation(**{**vars(mutation), "text": mutation.old})
    assert outcome(untouched) is None
