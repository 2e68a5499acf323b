"""The checklist of ``kernels/README.md``, item by item: an operator that is not complete does not pass."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import hetu_kernels
from hetu_kernels._common.registry import REQUIRED_ATTENTION_TAGS, REQUIRED_TAGS, op_names, op_spec

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "hetu_kernels"
OPS = op_names()


def jitted(file: Path) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]


def test_every_operator_is_registered() -> None:
    """A custom operator in the source that no spec names would escape every check."""
    named = {op for name in OPS for op in op_spec(name).custom_ops}
    in_source = {
        node.args[0].value.removeprefix("lightning_hetu::")
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("custom_op")
        and isinstance(node.args[0], ast.Constant)
    }
    assert in_source == named


@pytest.mark.parametrize("name", OPS)
def test_public_function_is_exported_and_documented(name: str) -> None:
    assert name in hetu_kernels.__all__
    doc = inspect.getdoc(getattr(hetu_kernels, name)) or ""
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in doc, f"{name}'s docstring has no {section}"
    for parameter in inspect.signature(getattr(hetu_kernels, name)).parameters:
        assert f"{parameter}:" in doc, f"{name}'s docstring does not explain {parameter}"


@pytest.mark.parametrize("name", OPS)
def test_reference_has_the_same_signature(name: str) -> None:
    spec = op_spec(name)
    ours, theirs = (inspect.signature(f).parameters for f in (spec.function, spec.reference))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


@pytest.mark.parametrize("name", OPS)
def test_cases_cover_what_every_operator_must(name: str) -> None:
    spec = op_spec(name)
    cases = spec.cases()
    covered = frozenset().union(*(case.tags for case in cases))
    assert (REQUIRED_ATTENTION_TAGS if spec.attention else REQUIRED_TAGS) - covered == frozenset()
    assert len({case.name for case in cases}) == len(cases), "case names repeat"
    assert any(case.contiguous for case in cases)


@pytest.mark.parametrize("name", OPS)
def test_has_launches_benchmarks_peers_and_a_goal(name: str) -> None:
    spec = op_spec(name)
    assert spec.aot()
    assert any(call.same_as is not None for call in spec.aot()), "no launch checks that token counts do not recompile"
    assert spec.benchmarks()
    assert spec.peers
    assert spec.goal


@pytest.mark.parametrize("name", OPS)
def test_has_a_test_file_and_a_docs_row(name: str) -> None:
    assert (ROOT / "tests" / "kernels" / f"test_{name}.py").is_file()
    assert f"`{name}`" in (ROOT / "docs" / "kernels.md").read_text()


@pytest.mark.parametrize("name", OPS)
def test_custom_operators_are_named_after_the_operator(name: str) -> None:
    """``<op>_fwd`` and ``<op>_bwd``; pack and unpack are each other's backward; ``<op>`` for what works in place."""
    pair = {"pack_fwd", "unpack_fwd"} if name in ("pack", "unpack") else {f"{name}_fwd", f"{name}_bwd"}
    spec = op_spec(name)
    assert set(spec.custom_ops) <= pair or (spec.custom_ops == (name,) and not spec.differentiable)


def test_what_is_launched_is_called_a_kernel() -> None:
    for file in PACKAGE.rglob("*.py"):
        own = {function.name for function in jitted(file)}
        for node in ast.walk(ast.parse(file.read_text())):
            launch = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
            if launch and isinstance(node.func.value, ast.Name) and node.func.value.id in own:
                assert re.fullmatch(r"_[a-z_]+_kernel", node.func.value.id), f"{file.name}: {node.func.value.id}"


def test_kernels_are_named_and_documented() -> None:
    """Pointers end in ``_ptr``, compile-time constants are upper case."""
    for file in PACKAGE.rglob("*.py"):
        for function in jitted(file):
            assert ast.get_docstring(function), f"{file.name}: {function.name} has no docstring"
            for argument in function.args.args:
                constant = argument.annotation is not None and "constexpr" in ast.unparse(argument.annotation)
                assert constant == argument.arg.isupper(), f"{file.name}: {function.name}: {argument.arg}"


def test_operators_do_not_ask_the_device_themselves() -> None:
    """They could then not be recorded for a device that is not there."""
    for file in PACKAGE.rglob("*.py"):
        if file.name in ("device.py", "bench.py", "config.py"):
            continue
        assert "torch.cuda." not in file.read_text(), f"{file} calls torch.cuda"
