"""The cases that the official search engines were run on, and what they found; shared by a test and a benchmark.

``official_plans.json`` holds, for every case, the plan file an engine wrote, its own prediction and its run time, and
says which engines they are.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hetu.planning import ClusterSpec, GalvatronProfile, load_galvatron_profiles

_DEFAULT = Path(__file__).parents[3] / "shared" / "data" / "galvatron_profiles"
DATA = Path(os.environ.get("HETU_GALVATRON_PROFILES", _DEFAULT))
RECORD: dict[str, Any] = json.loads(Path(__file__).with_name("official_plans.json").read_text(encoding="utf-8"))
_MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "llama2-7b": ("llama2-7b_seq2048", {}),
    "vit-1280": ("vit-1280", {"num_layers": 32}),
}


@dataclass(frozen=True)
class Case:
    """One run of an official engine.

    Args:
        engine: Release of the engine, ``"3"`` or ``"2.4.0"``.
        model: Name of the model's profile.
        devices: Devices of the one node.
        memory_gib: Budget in the official GB of 1024 MB.
        batch: Global batch size.
        seconds: Processor seconds of the run.
        elapsed: Seconds on the clock of the same run.
        iteration_time: What the engine predicts for its plan, in seconds; ``None`` if it found none.
        memory_mib: What it predicts per stage, its reserve included; empty if it does not tell.
        plan: Its plan file.
    """

    engine: str
    model: str
    devices: int
    memory_gib: int
    batch: int
    seconds: float
    elapsed: float
    iteration_time: float | None = None
    memory_mib: tuple[int, ...] = ()
    plan: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Short name."""
        return f"{self.model}-{self.devices}x{self.memory_gib}GB-{self.engine}"

    @property
    def budget(self) -> str:
        """The budget as the planner reads it."""
        return f"{self.memory_gib}GiB"

    def load(self) -> tuple[GalvatronProfile, ClusterSpec]:
        """The profile and the hardware."""
        folder, sizes = _MODELS[self.model]
        return load_galvatron_profiles(DATA / folder, DATA / "hardware", num_devices=self.devices, **sizes)


CASES = [Case(**{**entry, "memory_mib": tuple(entry.get("memory_mib", ()))}) for entry in RECORD["cases"]]
