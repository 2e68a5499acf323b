"""Launch configurations: computed for row kernels, looked up for kernels that multiply matrices.

Nothing is tuned behind the user's back: a first call that takes minutes, or one more for every new token count, is what
people complain about most in other kernel libraries. ``LIGHTNING_HETU_AUTOTUNE=1`` turns on tuning, once per bucket.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources

import torch

from hetu_kernels._common import device as _device
from hetu_kernels._common.triton_utils import next_power_of_2

logger = logging.getLogger("hetu_kernels")

AUTOTUNE_VARIABLE = "LIGHTNING_HETU_AUTOTUNE"
MAX_ROW_BLOCK = 16_384  # elements of a row held in registers at once; longer rows are looped over
_BUCKET_CAP = 65_536


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Args:
        blocks: The kernel's block sizes by constexpr name.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.blocks.items())), self.num_warps, self.num_stages))

    @property
    def kwargs(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


def row_block(n: int, limit: int = MAX_ROW_BLOCK) -> int:
    """Columns of a row that one program holds: the next power of two, at most ``limit``."""
    return min(next_power_of_2(n), limit)


def row_config(n: int, *, limit: int = MAX_ROW_BLOCK, tile: int = 2048) -> Config:
    """Launch of a row kernel over rows of ``n`` elements.

    Short rows are taken several at a time so that a program has ``tile`` elements to work on; warps are chosen for 8 to
    32 elements a thread, where loads are 16 bytes wide.
    """
    block = row_block(n, limit)
    rows = max(1, tile // block)
    elements = rows * block
    return Config({"ROWS": rows, "BLOCK": block}, num_warps=min(16, max(4, elements // 512)), num_stages=1)


def bucket(tokens: int) -> int:
    """Token counts that share a configuration: the next power of two, capped."""
    return min(next_power_of_2(tokens), _BUCKET_CAP)


def tuned(
    op: str,
    key: Sequence[object],
    device: torch.device,
    default: Config,
    candidates: Sequence[Config] = (),
    launch: Callable[[Config], object] | None = None,
    fits: Callable[[Config], bool] | None = None,
) -> Config:
    """Configuration of a matrix kernel: from the table of the architecture, or the default.

    Args:
        op: Name of the kernel.
        key: What the best configuration depends on: dtype, head dimension, :func:`bucket` of the tokens. Never exact
            token counts.
        device: Where it runs.
        default: What to use where the table has no entry.
        candidates: What tuning may choose from.
        launch: Runs the kernel with a configuration, for tuning. It must be harmless to run twice.
        fits: Says whether a configuration is within the device's shared memory.

    Returns:
        The configuration. Under the interpreter and while recording it is always the default.
    """
    chosen = _choose(op, key, device, default, candidates, launch, fits)
    for seen in _watchers:
        seen[op] = chosen
    return chosen


_watchers: list[dict[str, Config]] = []


@contextlib.contextmanager
def watching() -> Iterator[dict[str, Config]]:
    """Inside, the dictionary it gives is filled with the configuration of every matrix kernel, by the kernel's name."""
    seen: dict[str, Config] = {}
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers[:] = [other for other in _watchers if other is not seen]  # equal dictionaries are not the same


def _choose(
    op: str,
    key: Sequence[object],
    device: torch.device,
    default: Config,
    candidates: Sequence[Config],
    launch: Callable[[Config], object] | None,
    fits: Callable[[Config], bool] | None,
) -> Config:
    arch = _device.arch(device)
    if device.type != "cuda" or _device.interpreting():
        return default
    name = ",".join(map(str, key))
    found = _table(arch).get(f"{op}|{name}") or _tuned_here.get((arch, op, name))
    if found is not None:
        return found
    if os.environ.get(AUTOTUNE_VARIABLE) == "1" and launch is not None and candidates:
        best = _fastest([c for c in candidates if fits is None or fits(c)] or [default], launch)
        logger.info("tuned %s for %s on %s: %s", op, name, arch, json.dumps(asdict(best)))
        _tuned_here[arch, op, name] = best
        return best
    return default


_tuned_here: dict[tuple[str, str, str], Config] = {}


def tuned_so_far() -> dict[str, dict[str, dict[str, object]]]:
    """What this process has tuned, in the form of the table files: ``{arch: {"op|key": config}}``."""
    tables: dict[str, dict[str, dict[str, object]]] = {}
    for (arch, op, name), config in _tuned_here.items():
        tables.setdefault(arch, {})[f"{op}|{name}"] = asdict(config)
    return tables


def _fastest(candidates: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: dict[Config, float] = {}
    for config in candidates:
        try:
            times[config] = do_bench(functools.partial(launch, config), warmup=10, rep=50, return_mode="median")
        except OutOfResources:
            continue
    if not times:
        raise RuntimeError(f"None of {len(candidates)} candidate configurations fits this device.")
    return min(times, key=times.__getitem__)


@functools.cache
def _table(arch: str) -> dict[str, Config]:
    file = resources.files("hetu_kernels").joinpath("tables", f"{arch}.json")
    if not file.is_file():
        return {}
    return {name: Config(**values) for name, values in json.loads(file.read_text()).items()}
