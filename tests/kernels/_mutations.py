"""Break kernels on purpose, to see whether a test notices.

``python -m tests.kernels._mutations [op ...] [--all]`` runs them and prints what survives. Two kinds of damage are done
to a kernel's source: a stride becomes one larger, and a load or store loses its mask.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "hetu_kernels"

# Runs an operator's cases, short ones first, until one fails: 0 if all pass, 3 if a comparison fails.
_RUN = """
import sys, warnings
import torch
from hetu_kernels._common.registry import op_spec
from hetu_kernels._common.testing import check_case
from tests.kernels._reads import reads_watched
warnings.simplefilter("ignore")
torch.set_num_threads(1)
spec = op_spec(sys.argv[1])
for case in spec.cases():
    if case.slow:
        continue
    for dtype in case.dtypes[:1]:
        try:
            check_case(spec, case, dtype, torch.device("cpu"), reads_watched)
        except Exception as error:
            print(f"{case.name}, {dtype}: {type(error).__name__}: {str(error)[:200]}")
            sys.exit(3)
"""


@dataclass(frozen=True)
class Mutation:
    """One change of one place.

    Args:
        op: Operator whose cases are run.
        file: Source file, relative to the package.
        kernel: The jitted function that is damaged.
        kind: ``"stride"`` or ``"mask"``.
        line: Line of the damage.
        start: Offset of the replaced text in the file.
        end: Offset behind it.
        text: What is put there.
        old: What was there.
    """

    op: str
    file: str
    kernel: str
    kind: str
    line: int
    start: int
    end: int
    text: str
    old: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.kernel}: {self.old} -> {self.text or '(no mask)'}"


def files_of(op: str) -> list[Path]:
    """Files with jitted functions that an operator's module imports within its own folder, directly or not."""
    from hetu_kernels._common.registry import op_spec

    module = importlib.import_module(op_spec(op).function.__module__)
    start = Path(module.__file__ or "")
    found, queue = [], [start]
    while queue:
        file = queue.pop()
        if file in found:
            continue
        found.append(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hetu_kernels."):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                for name in names:
                    other = ROOT / "kernels" / (name.replace(".", "/") + ".py")
                    if other.is_file() and other.parent == start.parent:
                        queue.append(other)
    return [file for file in found if "@triton.jit" in file.read_text()]


def mutations_of(op: str) -> list[Mutation]:
    """Every damage of the two kinds that can be done to an operator's kernels."""
    return [mutation for file in files_of(op) for mutation in _in_file(op, file)]


def _in_file(op: str, file: Path) -> Iterator[Mutation]:
    source = file.read_text()
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    data = source.encode()

    def span(first: ast.expr, last: ast.expr) -> tuple[int, int]:
        assert last.end_lineno is not None and last.end_col_offset is not None
        return starts[first.lineno - 1] + first.col_offset, starts[last.end_lineno - 1] + last.end_col_offset

    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or not any(
            "triton.jit" in ast.unparse(d) for d in function.decorator_list
        ):
            continue
        name = str(file.relative_to(PACKAGE))
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                for side in (node.left, node.right):
                    if isinstance(side, ast.Name) and side.id.startswith("stride_"):
                        begin, end = span(side, side)
                        yield Mutation(
                            op, name, function.name, "stride", side.lineno, begin, end, f"({side.id} + 1)", side.id
                        )
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store"):
                mask = [keyword for keyword in node.keywords if keyword.arg in ("mask", "other")]
                if any(keyword.arg == "mask" for keyword in mask):
                    begin, end = span(node.args[-1], mask[-1].value)
                    begin = span(node.args[-1], node.args[-1])[1]
                    old = data[begin:end].decode()
                    yield Mutation(op, name, function.name, "mask", node.lineno, begin, end, "", old.lstrip(", "))


def chosen(op: str, seed: int = 0) -> list[Mutation]:
    """One wrong stride and one missing mask of every kernel that has any, drawn by a seed."""
    rng = random.Random(seed)
    groups: dict[tuple[str, str], list[Mutation]] = {}
    for mutation in mutations_of(op):
        groups.setdefault((mutation.kernel, mutation.kind), []).append(mutation)
    return [rng.choice(group) for group in groups.values()]


def users_of(mutation: Mutation) -> list[str]:
    """Operators with kernels in the damaged file: what is one's optional branch may be another's main road."""
    from hetu_kernels._common.registry import op_names

    others = [op for op in op_names() if op != mutation.op and PACKAGE / mutation.file in files_of(op)]
    return [mutation.op, *others]


def outcome(mutation: Mutation, timeout: float = 300) -> str | None:
    """What failed with the damage done; None if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder, "hetu_kernels"), ignore=shutil.ignore_patterns("__pycache__"))
        file = Path(folder, "hetu_kernels", mutation.file)
        data = file.read_bytes()
        file.write_bytes(data[: mutation.start] + mutation.text.encode() + data[mutation.end :])
        for op in users_of(mutation):
            try:
                ran = subprocess.run(
                    [sys.executable, "-c", _RUN, op],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": folder, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"},
                    capture_output=True,
                    text=True,
                    timeout=timeout,
                )
            except subprocess.TimeoutExpired:
                return "the process hangs: memory of its own was overwritten"
            if ran.returncode < 0:
                return f"the process died of signal {-ran.returncode}: an address outside of memory"
            if ran.returncode:
                assert ran.returncode == 3, ran.stderr[-2000:]
                return ran.stdout.strip()
    return None


def main() -> int:
    """Print the outcome of each mutation; 1 if any survives."""
    from hetu_kernels._common.registry import op_names

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=op_names())
    parser.add_argument("--all", action="store_true", help="every possible damage, not one of each kind per kernel")
    options = parser.parse_args()
    survivors = 0
    for op in options.ops:
        for mutation in mutations_of(op) if options.all else chosen(op):
            result = outcome(mutation)
            survivors += result is None
            print(f"{'SURVIVES' if result is None else 'caught  '} {mutation}\n         {result or ''}", flush=True)
    print(f"{survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
