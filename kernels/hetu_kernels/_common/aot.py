"""Compile every kernel for devices that are not there, and read what the compiler made of it.

The operators' own launchers are called on meta tensors while a stub stands for the driver; a hook of triton's records
each launch instead of compiling it. A hand-written signature would not do: it lacks what triton derives from the
arguments (divisibility by 16, strides of 1), on which vector loads and asynchronous copies depend.

What is compiled is then read back: registers, spills and matrix instructions from the machine code, shared memory from
the metadata (the compiler does not enforce its limit), and 32-bit offset products from triton's intermediate code.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hetu_kernels._common.device import TARGETS, Target, interpreting, recording_for
from hetu_kernels._common.registry import AotCall, op_names, op_spec

_MATRIX_INSTRUCTIONS = {"cuda": ("HMMA", "HGMMA", "UTCHMMA"), "hip": ("v_mfma",)}
_ASYNC_COPIES = ("LDGSTS", "UTMALDG")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    Args:
        op: Operator.
        call: Name of the launch.
        kernel: Name of the kernel.
        target: Name of the target.
        fp_fusion: Compiled with multiply-add contraction.
        registers: Per thread; vector registers on AMD.
        spills: Instructions that store to or load from local memory (NVIDIA); spilled registers (AMD).
        shared: Bytes of dynamic shared memory.
        has_dot: The kernel multiplies matrices.
        instructions: How often each matrix and asynchronous-copy instruction occurs.
        narrow_offsets: Places where an offset is multiplied in 32 bits.
        num_warps: Warps per program.
        tuning: Not a default configuration.
        wgmma: HGMMA is expected on sm_90.
    """

    op: str
    call: str
    kernel: str
    target: str
    fp_fusion: bool
    registers: int
    spills: int
    shared: int
    has_dot: bool
    num_warps: int
    instructions: dict[str, int] = field(default_factory=dict)
    narrow_offsets: tuple[str, ...] = ()
    tuning: bool = False
    wgmma: bool = False

    @property
    def key(self) -> str:
        """Identifies it in a baseline."""
        return f"{self.op}|{self.call}|{self.kernel}|{self.target}"

    @property
    def matrix_instructions(self) -> int:
        """Number of matrix instructions of any kind."""
        return sum(self.instructions.get(name, 0) for name in _MATRIX_INSTRUCTIONS[TARGETS[self.target].backend])

    def problems(self, baseline: dict[str, int] | None = None) -> list[str]:
        """What is wrong with it, one line each.

        Args:
            baseline: Spills that are accepted, by :attr:`key`; none where absent.
        """
        found = []
        limit = TARGETS[self.target].shared_memory
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {self.target} has {limit}")
        if self.has_dot and not self.matrix_instructions:
            found.append("a matrix product without matrix instructions")
        if self.wgmma and self.target == "sm_90" and not self.instructions.get("HGMMA"):
            found.append("no warp-group matrix instruction (HGMMA)")
        accepted = 0 if self.target == "sm_90" and not self.tuning else (baseline or {}).get(self.key, 0)
        if self.spills > accepted:
            found.append(f"{self.spills} spills, {accepted} accepted")
        found.extend(f"an offset is multiplied in 32 bits: {line}" for line in self.narrow_offsets)
        where = f"{self.kernel} on {self.target}{'' if self.fp_fusion else ' without contraction'}"
        return [f"{self.op}, {self.call}, {where}: {problem}" for problem in found]


@dataclass(frozen=True)
class Launch:
    """One recorded launch of a kernel."""

    function: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: tuple[tuple[str, Any], ...]

    @property
    def identity(self) -> str:
        """Two launches with the same identity run the same binary."""
        parts = (self.signature, sorted(map(str, self.constants.items())), sorted(map(str, self.attributes.items())))
        return f"{self.function.fn.__name__} {parts} {self.options}"


def compile_all(
    ops: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    *,
    fp_fusion: Sequence[bool] = (True,),
    include_slow: bool = False,
    include_tuning: bool = False,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Resources]:
    """Compile the launches of operators for targets.

    Args:
        ops: Operators; all unless told.
        targets: Names of targets; all unless told.
        fp_fusion: Settings of multiply-add contraction to compile under.
        include_slow: Also launches marked slow.
        include_tuning: Also configurations that are no defaults.
        jobs: Processes to compile in.
        progress: Called with the number of finished parts and of all.

    Raises:
        ValueError: If an operator or target does not exist.
        RuntimeError: If triton runs its interpreter: kernels are then no kernels.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled. Unset it.")
    # Read when triton is imported, which warns where it is unset; every compilation here says what it wants.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    chosen = [op_spec(name).name for name in ops or op_names()]
    names = list(targets or TARGETS)
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"target={name!r}: expected one of {', '.join(TARGETS)}.")
    tasks = [
        (op, call, target, fusion, include_slow, include_tuning)
        for op in chosen
        for call in range(len(op_spec(op).aot()))
        for target in names
        for fusion in fp_fusion
    ]
    rows: list[Resources] = []
    if jobs <= 1:
        for done, task in enumerate(tasks, 1):
            rows += _compile_task(*task)
            if progress:
                progress(done, len(tasks))
        return rows
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_compile_task, *task) for task in tasks]
        for done, future in enumerate(as_completed(futures), 1):
            rows += future.result()
            if progress:
                progress(done, len(tasks))
    return sorted(
        rows,
        key=lambda row: (chosen.index(row.op), row.call, row.kernel, names.index(row.target), not row.fp_fusion),
    )


def record(launch: Callable[[], object], target: Target) -> list[Launch]:
    """Call a launcher and return the launches it makes, each binary once, without compiling any."""
    import triton
    from triton.runtime import driver

    recorded: dict[str, Launch] = {}

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = ("num_warps", "num_stages", "num_ctas")
        made = Launch(
            fn.jit_function,
            dict(compile["signature"]),
            dict(compile["constants"]),
            dict(compile["configs"][0]),
            tuple((option, compile[option]) for option in options),
        )
        recorded.setdefault(made.identity, made)
        return True

    _forget_target()
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    driver.set_active(_StubDriver(target))
    try:
        with recording_for(target):
            launch()
    finally:
        triton.knobs.runtime.jit_cache_hook = before
        _forget_target()
    return list(recorded.values())


def jit_functions() -> dict[str, Any]:
    """Every kernel and device function in the package's modules that have been imported, by qualified name."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("hetu_kernels."):
            continue
        for name, value in list(vars(module).items()):
            inner = value
            while hasattr(inner, "fn") and not hasattr(inner, "device_caches"):
                inner = inner.fn  # an autotuner or heuristics around it
            if hasattr(inner, "device_caches"):
                found[f"{module_name}.{name}"] = inner
    return found


class _StubDriver:
    """Answers what a launch asks the driver, for a device that is not there."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return _gpu_target(self._target)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._target.shared_memory, "multiprocessor_count": self._target.multiprocessors}


def _gpu_target(target: Target) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(target.backend, target.arch, target.warp_size)


def _forget_target() -> None:
    """Launchers remember the target they were first asked for."""
    for function in jit_functions().values():
        function.device_caches.clear()


def _compile_task(op: str, index: int, target_name: str, fp_fusion: bool, slow: bool, tuning: bool) -> list[Resources]:
    call = op_spec(op).aot()[index]
    if (call.slow and not slow) or (call.tuning and not tuning):
        return []
    target = TARGETS[target_name]
    launches = record(call.launch, target)
    if call.same_as is not None:
        other = {launch.identity for launch in record(call.same_as, target)}
        extra = other - {launch.identity for launch in launches}
        if extra:
            raise AssertionError(f"{op}, {call.name}: other token counts compile anew: {sorted(extra)[0]}")
    return [_compile(op, call, launch, target, fp_fusion) for launch in launches]


def _compile(op: str, call: AotCall, launch: Launch, target: Target, fp_fusion: bool) -> Resources:
    import triton
    from triton.compiler import ASTSource

    kernel = launch.function.fn.__name__
    options = {**dict(launch.options), "enable_fp_fusion": fp_fusion}
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    try:
        compiled = triton.compile(source, target=_gpu_target(target), options=options)
    except Exception as error:
        raise RuntimeError(f"{op}, {call.name}: {kernel} does not compile for {target.name}: {error}") from error
    ttir = compiled.asm["ttir"]
    read = _read_nvidia if target.backend == "cuda" else _read_amd
    registers, spills, instructions = read(compiled.asm)
    return Resources(
        op, call.name, kernel, target.name, fp_fusion, registers, spills, compiled.metadata.shared,
        has_dot="tt.dot" in ttir, num_warps=dict(launch.options)["num_warps"], instructions=instructions,
        narrow_offsets=tuple(narrow_offsets(ttir)), tuning=call.tuning, wgmma=kernel in call.wgmma,
    )  # fmt: skip


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, dict[str, int]]:
    """Registers, local-memory instructions and the counts of interesting ones, from the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        usage = _run(_tool("cuobjdump"), "-res-usage", str(cubin))
        sass = _run(_tool("nvdisasm"), "-c", str(cubin))
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage[:200]!r}")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z0-9]+)", sass, re.MULTILINE)
    if not opcodes:
        raise RuntimeError("nvdisasm printed no instructions")
    counts = {name: opcodes.count(name) for name in (*_MATRIX_INSTRUCTIONS["cuda"], *_ASYNC_COPIES) if name in opcodes}
    return int(found[1]), opcodes.count("LDL") + opcodes.count("STL"), counts


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, dict[str, int]]:
    text = asm["amdgcn"]

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    matrix = len(re.findall(r"^\s+v_mfma", text, re.MULTILINE))
    # A scalar register that does not fit goes to a vector register, not to memory: only vector spills count.
    return value("vgpr_count"), value("vgpr_spill_count"), {"v_mfma": matrix} if matrix else {}


@functools.cache
def _tool(name: str) -> str:
    """A program of the CUDA toolkit that triton brings along."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise RuntimeError(f"{name} is not part of this triton ({path.parent})")
    return str(path)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_ASSIGNMENT = re.compile(r"^\s*(%[\w$.]+)(?::\d+)?(?:, %[\w$.]+)* = ([\w.]+)(.*)$")


def narrow_offsets(ttir: str) -> Iterator[str]:
    """Address computations that overflow where a tensor has more than 2^31 elements.

    Follows the offset of every ``tt.addptr`` back to where it comes from. Two things are wrong: a product of two values
    in 32 bits (a row times a stride), and a 32-bit product with a constant (a program times its block) that becomes an
    element's offset without a product in 64 bits after it, as in ``pid * BLOCK + arange`` over a flat tensor.

    Args:
        ttir: Triton's intermediate code of one kernel.

    Yields:
        The offending line of code.
    """
    definitions: dict[str, tuple[str, list[str], str]] = {}
    for line in ttir.splitlines():
        line = line.split(" loc(")[0]
        for argument, start in (
            re.findall(r"(%\w+) = (%[\w#]+)", line.split("iter_args(")[1]) if "iter_args(" in line else ()
        ):
            definitions[argument] = ("carried", [start.split("#")[0]], line)
        found = _ASSIGNMENT.match(line)
        if found:
            operands = [name.split("#")[0] for name in re.findall(r"%[\w$.#]+", found[3])]
            definitions[found[1]] = (found[2], operands, line.strip())

    def constant(name: str) -> bool:
        kind, operands, _ = definitions.get(name, ("argument", [], ""))
        return kind == "arith.constant" or (kind in ("tt.splat", "arith.extsi") and all(map(constant, operands)))

    def offending(name: str, multiplied: bool, seen: set[tuple[str, bool]]) -> Iterator[str]:
        if (name, multiplied) in seen or name not in definitions:
            return
        seen.add((name, multiplied))
        kind, operands, line = definitions[name]
        if kind in ("tt.load", "scf.for", "scf.while", "scf.if", "tt.reduce", "tt.call", "arith.cmpi"):
            return  # a value of its own, not a piece of an offset
        if kind == "arith.muli":
            if re.search(r": (tensor<[\dx]+x)?i64", line):
                multiplied = True
            elif not any(map(constant, operands)) or (not multiplied and not all(map(constant, operands))):
                yield line
                return
        for operand in operands:
            yield from offending(operand, multiplied, seen)

    told: set[str] = set()
    for kind, operands, _ in list(definitions.values()):
        if kind == "tt.addptr":
            for line in offending(operands[1], False, set()):
                if line not in told:
                    told.add(line)
                    yield line


def to_json(rows: Sequence[Resources]) -> dict[str, Any]:
    """The report, with the versions it was made with."""
    import torch
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__, "kernels": [asdict(row) for row in rows]}


def available_jobs() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
