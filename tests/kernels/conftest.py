"""What the kernel tests share: the device they run on, and one ahead-of-time report for the session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BASELINE = Path(__file__).parents[1] / "aot_baseline.json"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one; otherwise the CPU, on which kernels run in triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators run their references, kernels are not interpreted."""
    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", "reference")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the ahead-of-time report comes last of the kernel tests: it is compiled while the others run."""
    late = [item for item in items if "aot_report" in getattr(item, "fixturenames", ())]
    if not late:
        return
    rest = [item for item in items if item not in late]
    ours = [i for i, item in enumerate(rest) if Path(item.path).parent == Path(__file__).parent]
    cut = ours[-1] + 1 if ours else 0
    items[:] = rest[:cut] + late + rest[cut:]


def start_aot(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start ``python -m hetu_kernels.aot`` in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "hetu_kernels.aot", *arguments),
            *("--json", str(folder / "aot.json"), "--baseline", str(BASELINE)),
        ],
        env={**environment, "PYTHONPATH": os.pathsep.join(["kernels", environment.get("PYTHONPATH", "")])},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("w"),
        text=True,
    )


def finish_aot(folder: Path, process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], str]:
    """Wait for it; its rows, and what it calls problems."""
    process.wait(timeout=5400)
    stderr = (folder / "stderr").read_text()
    report = folder / "aot.json"
    assert report.is_file(), stderr[-3000:]
    return json.loads(report.read_text())["kernels"], stderr


def aot(folder: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """Run ``python -m hetu_kernels.aot`` and return :func:`finish_aot`."""
    return finish_aot(folder, start_aot(folder, *arguments))


@pytest.fixture(scope="session", autouse=True)
def _aot_started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, subprocess.Popen[str]] | None]:
    """Every default launch of every operator is compiled for every target on one core, while tests use the other."""
    if not any("aot_report" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("aot")
    process = start_aot(folder, "--jobs", "1")
    yield folder, process
    if process.poll() is None:
        process.kill()


@pytest.fixture(scope="session")
def aot_report(_aot_started: tuple[Path, subprocess.Popen[str]]) -> tuple[list[dict[str, Any]], str]:
    """Rows of the ahead-of-time report, and what it says is wrong."""
    return finish_aot(*_aot_started)
