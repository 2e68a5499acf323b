"""Every kernel compiles for every target, within its limits: no GPU is needed to know."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from hetu_kernels._common import aot as aot_module
from hetu_kernels._common.aot import Resources, jit_functions, narrow_offsets
from hetu_kernels._common.device import TARGETS
from hetu_kernels.aot import table
from tests.kernels.conftest import aot

PACKAGE = Path(__file__).parents[2] / "kernels" / "hetu_kernels"
Report = tuple[list[dict[str, Any]], str]


def test_no_kernel_breaks_a_rule(aot_report: Report) -> None:
    """Spills, shared memory, matrix instructions, 64-bit offsets, no recompilation for other token counts."""
    _, stderr = aot_report
    problems = [line for line in stderr.splitlines() if line.startswith(("problem:", "error:"))]
    assert not problems, "\n".join(problems)


def test_every_kernel_was_compiled_for_every_target(aot_report: Report) -> None:
    """A kernel that no launch reaches is a kernel nobody checks."""
    rows, _ = aot_report
    compiled = {(row["kernel"], row["target"]) for row in rows}
    kernels = {
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }
    assert kernels, "found no kernels"
    assert {(kernel, target) for kernel in kernels for target in TARGETS} - compiled == set()


def test_default_configurations_do_not_spill_on_sm_90(aot_report: Report) -> None:
    rows, _ = aot_report
    assert [f"{row['kernel']} of {row['call']}" for row in rows if row["target"] == "sm_90" and row["spills"]] == []


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("add_rms_norm", "swiglu", "adamw", "--target", "sm_90"), id="a few"),
        pytest.param(("--all",), id="all", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_without_contraction_too(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Triton 3.10 no longer contracts multiply and add by default."""
    rows, stderr = aot(tmp_path, "--fp-fusion", "0", *arguments)
    assert not [line for line in stderr.splitlines() if line.startswith(("problem:", "error:"))], stderr
    assert rows


@pytest.mark.slow
def test_every_launch_and_configuration_compiles(tmp_path: Path) -> None:
    """With those that the default run leaves out."""
    rows, stderr = aot(tmp_path, "--all")
    assert not [line for line in stderr.splitlines() if line.startswith(("problem:", "error:"))], stderr
    assert rows


def test_no_block_pointers() -> None:
    """Triton 3.9 has removed them."""
    assert [str(file) for file in PACKAGE.rglob("*.py") if "make_block" + "_ptr" in file.read_text()] == []


def resources(**changes: Any) -> Resources:
    plain: dict[str, Any] = {
        "op": "op", "call": "call", "kernel": "kernel", "target": "sm_90", "fp_fusion": True, "registers": 32,
        "spills": 0, "shared": 0, "has_dot": False, "num_warps": 4,
    }  # fmt: skip
    return Resources(**{**plain, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shared": 65_537, "target": "gfx942"}, "65537 bytes of shared memory, gfx942 has 65536"),
        ({"spills": 1}, "1 spills, 0 accepted"),
        ({"spills": 3, "target": "sm_80"}, "3 spills, 2 accepted"),
        ({"has_dot": True}, "without matrix instructions"),
        ({"has_dot": True, "wgmma": True, "instructions": {"HMMA": 4}}, "no warp-group"),
        ({"narrow_offsets": ("%1 = arith.muli",)}, "multiplied in 32 bits"),
    ],
)
def test_broken_rules_are_reported(changes: dict[str, Any], problem: str) -> None:
    accepted = {"op|call|kernel|sm_80": 2, "op|call|kernel|sm_90": 2}  # the latter counts for nothing
    (line,) = resources(**changes).problems(accepted)
    assert problem in line
    assert resources().problems() == []
    assert resources(target="sm_80", spills=2).problems(accepted) == []


def test_rows_with_and_without_contraction_can_be_told_apart() -> None:
    rows = [resources(fp_fusion=fusion, spills=3) for fusion in (True, False)]
    heads, *lines = (line.split() for line in table(rows).splitlines())
    assert [line[heads.index("fusion")] for line in lines] == ["yes", "no"]
    assert [line[: heads.index("fusion")] for line in lines] == [["op", "call", "kernel", "sm_90"]] * 2
    problems = [row.problems()[0] for row in rows]
    assert problems[0].startswith("op, call, kernel on sm_90: 3 spills")
    assert problems[1].startswith("op, call, kernel on sm_90 without contraction: 3 spills")


TTIR = """
  tt.func public @k(%x_ptr: !tt.ptr<f32>, %stride: i32) {{
    %c128_i32 = arith.constant 128 : i32
    %pid = tt.get_program_id x : i32
    {body}
    %p = tt.addptr %x_ptr, %off : !tt.ptr<f32>, {type}
"""


@pytest.mark.parametrize(
    ("body", "kind", "wrong"),
    [
        ("%off = arith.muli %pid, %stride : i32", "i32", True),
        ("%a = arith.muli %pid, %stride : i32\n    %off = arith.extsi %a : i32 to i64", "i64", True),
        ("%off = arith.muli %pid, %c128_i32 : i32", "i32", True),
        ("%a = arith.muli %pid, %c128_i32 : i32\n    %off = arith.extsi %a : i32 to i64", "i64", True),
        ("%a = arith.extsi %pid : i32 to i64\n    %b = arith.extsi %stride : i32 to i64\n"
         "    %off = arith.muli %a, %b : i64", "i64", False),
        ("%r = arith.muli %pid, %c128_i32 : i32\n    %a = arith.extsi %r : i32 to i64\n"
         "    %b = arith.extsi %stride : i32 to i64\n    %off = arith.muli %a, %b : i64", "i64", False),
        ("%r = arith.muli %pid, %stride : i32\n    %a = arith.extsi %r : i32 to i64\n"
         "    %b = arith.extsi %stride : i32 to i64\n    %off = arith.muli %a, %b : i64", "i64", True),
        ("%off = arith.addi %pid, %c128_i32 : i32", "i32", False),
    ],
)  # fmt: skip
def test_offsets_multiplied_in_32_bits_are_found(body: str, kind: str, wrong: bool) -> None:
    assert bool(list(narrow_offsets(TTIR.format(body=body, type=kind)))) is wrong


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    for arguments, message in ((["nonsense"], "op='nonsense'"), (["--target", "sm_20"], "target='sm_20'")):
        with pytest.raises(AssertionError, match=message):
            aot(tmp_path, *arguments)


def test_the_interpreter_is_refused() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        aot_module.compile_all(["add_rms_norm"])


def test_jit_functions_lists_nothing_while_interpreting() -> None:
    """Interpreted functions have no binaries; the list is for compiling processes."""
    assert jit_functions() == {}
