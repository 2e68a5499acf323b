"""What the kernel tests share: the device they run on, and one ahead-of-time report for the session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def aot(folder: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """Run ``python -m hetu_kernels.aot`` in a process that does not interpret; its rows, and what it calls problems."""
    report = folder / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "hetu_kernels.aot", *arguments, "--json", str(report), "--baseline", str(BASELINE)],
        env={**environment, "PYTHONPATH": os.pathsep.join(["kernels", environment.get("PYTHONPATH", "")])},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert report.is_file(), ran.stderr[-3000:]
    return json.loads(report.read_text())["kernels"], ran.stderr


@pytest.fixture(scope="session")
def aot_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Every default launch of every operator, compiled for every target."""
    return aot(tmp_path_factory.mktemp("aot"))
