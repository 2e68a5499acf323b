"""Rules of the house that no single module can keep by itself: imports, packaging, cheap imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {"lightning_hetu": ROOT / "lightning_hetu", "hetu_kernels": ROOT / "kernels" / "hetu_kernels"}

_TECHNIQUES = {"planning", "parallel", "hetu_kernels"}
_BELOW_STRATEGIES = _TECHNIQUES | {"profiling", "moe", "embedding", "generation", "models", "data"}
# What each room may import of the project, besides itself.
ALLOWED = {
    "hetu_kernels": set(),
    "planning": set(),
    "profiling": {"planning", "parallel"},  # it measures the layers that parallel finds
    "parallel": {"planning"},
    "moe": _TECHNIQUES | {"profiling"},
    "embedding": _TECHNIQUES,
    "generation": _TECHNIQUES,
    "models": _TECHNIQUES | {"moe", "embedding"},
    "data": _TECHNIQUES,
    "strategies": _BELOW_STRATEGIES,
    "callbacks": _BELOW_STRATEGIES,
    "cli": _BELOW_STRATEGIES | {"strategies", "callbacks", "__init__"},
    "__init__": _BELOW_STRATEGIES | {"strategies", "callbacks"},
}
FORBIDDEN_EXTERNAL = {
    "hetu_kernels": {"lightning", "numpy"},
    "planning": {"torch", "lightning"},
    "profiling": {"lightning"},
    "parallel": {"lightning"},
}


def room_of(module: str) -> str:
    """``lightning_hetu.parallel.tensor`` is in the room ``parallel``, ``lightning_hetu`` itself in ``__init__``."""
    package, _, rest = module.partition(".")
    if package != "lightning_hetu":
        return package
    return rest.split(".")[0] or "__init__"


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the two packages, by name and file."""
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports_of(module: str, source: str, is_package: bool) -> set[str]:
    """Absolute names a module imports anywhere in it, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: None if is_package else -1]
            start = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, [start, node.module]))
            # `from lightning_hetu import planning` imports a room, `from lightning_hetu import HybridPlan` the root.
            found.update(
                f"{name}.{alias.name}" if name == "lightning_hetu" and alias.name in ALLOWED else name
                for alias in node.names
            )
    return found


def complaints_about(module: str, imported: set[str]) -> list[str]:
    """What the direction rules say against a module's imports."""
    room = room_of(module)
    if room not in ALLOWED:
        return [f"{module}: there is no room {room!r}; docs/architecture.md lists the rooms."]
    found = []
    for name in sorted(imported):
        package = name.split(".")[0]
        if package in PACKAGES:
            if room_of(name) not in ALLOWED[room] | {room}:
                found.append(f"{module} imports {name}: {room} must not depend on {room_of(name)}.")
        elif package in FORBIDDEN_EXTERNAL.get(room, set()) | {"pytorch_lightning"}:
            found.append(f"{module} imports {name}: {room} must not depend on {package}.")
        elif package == "triton" and room != "hetu_kernels":
            found.append(f"{module} imports {name}: triton belongs in hetu_kernels.")
    return found


def test_imports_point_downward() -> None:
    complaints = [
        complaint
        for module, file in modules()
        for complaint in complaints_about(module, imports_of(module, file.read_text(), file.name == "__init__.py"))
    ]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lightning_hetu.planning.plan", "import torch"),
        ("lightning_hetu.planning.plan", "from ..parallel import mesh"),
        ("lightning_hetu.planning.plan", "from lightning_hetu import parallel"),
        ("lightning_hetu.planning.plan", "from lightning_hetu import HybridPlan"),
        ("lightning_hetu.parallel.mesh", "def f():\n    from lightning.pytorch import Trainer"),
        ("lightning_hetu.parallel.mesh", "from lightning_hetu.profiling import memory"),
        ("lightning_hetu.models.gpt", "from lightning_hetu.strategies.auto import AutoHybridParallelStrategy"),
        ("lightning_hetu.moe.gate", "import triton.language as tl"),
        ("lightning_hetu.callbacks.moe", "import pytorch_lightning as pl"),
        ("hetu_kernels.norm", "from lightning_hetu.planning import plan"),
        ("lightning_hetu.misc.stuff", "import math; import lightning_hetu"),
    ],
)
def test_the_direction_test_sees_violations(module: str, source: str) -> None:
    assert complaints_about(module, imports_of(module, source, is_package=False))


def test_kernels_is_a_source_root_and_never_a_package() -> None:
    """A ``kernels/__init__.py`` would shadow the distribution of that name in a checkout's working directory."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "hetu_kernels" / "__init__.py").exists()


def test_every_folder_with_modules_is_a_package() -> None:
    """Packaging looks for ``__init__.py``; a folder without one would be missing from the wheel."""
    missing = {file.parent for _, file in modules() if not (file.parent / "__init__.py").exists()}
    assert not missing


def test_packaging_maps_both_packages() -> None:
    setuptools_table = PYPROJECT["tool"]["setuptools"]
    for package, folder in PACKAGES.items():
        assert ROOT / setuptools_table["package-dir"][package] == folder
    assert setuptools_table["packages"]["find"]["where"] == [".", "kernels"]
    assert (PACKAGES["lightning_hetu"] / "py.typed").exists()


def test_both_packages_have_one_version() -> None:
    files = [folder / "__init__.py" for folder in PACKAGES.values()]
    versions = [line for file in files for line in file.read_text().splitlines() if line.startswith("__version__")]
    assert len(versions) == 2 and len(set(versions)) == 1


def test_console_script_points_at_a_function() -> None:
    module, _, function = PYPROJECT["project"]["scripts"]["lightning-hetu"].partition(":")
    file = ROOT / Path(*module.split(".")).with_suffix(".py")
    names = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert function in names


def test_constraints_pin_versions_and_no_index() -> None:
    """An index URL would force one build of torch on everybody."""
    lines = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and not line.startswith("-") for line in pins)
    assert "torch==2.13.0" in pins
    assert "index-url" not in (ROOT / "pyproject.toml").read_text() + (ROOT / "Makefile").read_text()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_import_is_cheap_and_silent() -> None:
    """Importing adds a few modules of our own to Lightning's, no CUDA context and no process group, and says nothing.

    Lightning itself imports triton, by way of ``torch._dynamo``; that is not ours to prevent.
    """
    run = run_python("""
import sys
import hetu_kernels
assert not {"torch", "triton"} & set(sys.modules), "hetu_kernels imports torch or triton"
import lightning.pytorch.strategies, torch
before = set(sys.modules)
import lightning_hetu
added = {name for name in set(sys.modules) - before if not name.startswith("lightning_hetu")}
assert not added, f"importing lightning_hetu also imports {sorted(added)}"
assert "lightning_hetu.strategies.auto" not in sys.modules, "strategies are imported before they are used"
assert not torch.cuda.is_initialized(), "there is a CUDA context"
assert not torch.distributed.is_initialized(), "there is a process group"
""")
    assert run.returncode == 0, run.stderr
    assert run.stdout + run.stderr == ""


def test_planning_runs_without_torch_and_lightning() -> None:
    run = run_python("""
import sys
sys.modules.update(dict.fromkeys(["torch", "lightning", "triton", "hetu_kernels"]))  # None: cannot be imported
import lightning_hetu
from lightning_hetu import HybridPlan
plan = HybridPlan.uniform("dp2-zero3", num_layers=4, global_batch_size=8, stages=2, num_microbatches=2)
assert lightning_hetu.search and HybridPlan.from_dict(plan.to_dict()) == plan
""")
    assert run.returncode == 0, run.stderr
