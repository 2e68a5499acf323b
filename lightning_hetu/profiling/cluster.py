"""Measures what the processes of a run can do: collectives of every group shape, memory, cores.

The measurements of Galvatron's hardware profiler (arXiv 2211.13878, section 3.3), on torch.distributed's own process
groups: all groups of one shape communicate at the same time, as they do in training, and the slowest rank counts.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_hetu.planning.cluster import ClusterSpec, Collective, CollectiveCost
from lightning_hetu.profiling._agreement import broadcast, gather, lone_mesh, rank_and_size
from lightning_hetu.profiling._measure import Stopwatch, ascending
from lightning_hetu.profiling.progress import ProgressCallback

_log = logging.getLogger(__name__)

_CPU_SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)
_CUDA_SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20, 64 << 20, 256 << 20)
# A run shorter than the first is repeated in a row, up to 8 times, because leaving a barrier takes as long; one point
# of a curve takes about the second where processes crowd the cores.
_CLOCK_SECONDS = 5e-3
_POINT_SECONDS = 0.08
# torch 2.13 renamed both; the older names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_OPERATIONS: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def profile_cluster(
    device: torch.device | str,
    *,
    sizes: Sequence[int] | None = None,
    repeats: int = 5,
    progress: ProgressCallback | None = None,
) -> ClusterSpec:
    """Measures the processes of the default process group. All of them call this, and all get the same result.

    Args:
        device: This process's device.
        sizes: Bytes of the full tensor; by default 4 KiB to 8 MiB on CPU, to 256 MiB on CUDA.
        repeats: Timed runs per collective and size at most, after two that are not counted; slow ones are run less.
        progress: Called with steps done, steps in total, and the step.

    Raises:
        ValueError: If the number of processes, or of those on one host, is not a power of two, or an argument is out
            of range.
    """
    device = torch.device(device)
    rank, world = rank_and_size()
    sizes = tuple(sorted(sizes or (_CPU_SIZES if device.type == "cpu" else _CUDA_SIZES)))
    if sizes[0] < 1 or repeats < 1:
        raise ValueError(f"sizes={list(sizes)}, repeats={repeats}: expected numbers of at least 1.")
    hosts = gather(socket.gethostname())
    local = _processes_per_host(hosts)
    shapes = group_shapes(world)
    pipelines = [1 << power for power in range(1, world.bit_length()) if 1 << power <= world]
    total = len(shapes) * len(_OPERATIONS) + len(pipelines) + 3
    done = 0

    def tick(description: str) -> None:
        nonlocal done
        if progress is not None:
            progress(done, total, description)
        done += 1

    costs: list[CollectiveCost] = []
    for size, consecutive in shapes:
        with _Groups(rank, world, size, consecutive) as group:
            for op in _OPERATIONS:
                tick(f"{op} over {size} {'neighboring' if consecutive else 'strided'}")
                points = _time_collective(op, group, size, sizes, repeats, device)
                if points:
                    costs.append(CollectiveCost(op, size, consecutive, points))
    for stages in pipelines:
        tick(f"p2p between {stages} stages")
        costs.append(CollectiveCost("p2p", stages, False, _time_p2p(rank, world, stages, sizes, repeats, device)))
    tick("computing together")
    slots = _compute_slots(rank, world, world // local, device)
    tick("overhead of a layer")
    overhead = _layer_overhead(rank, world, slots, device)
    tick("computing while communicating")
    overlap = _overlap_slowdown(world, device, repeats)
    spec = ClusterSpec(
        num_devices=world,
        devices_per_node=local,
        collectives=tuple(costs),
        device_memory=min(gather(_device_memory(device, local))),
        overlap_slowdown=overlap,
        compute_slots=slots,
        layer_overhead=overhead,
        device=device_name(device),
    )
    if progress is not None:
        progress(total, total, "done")
    return ClusterSpec.from_dict(broadcast(spec.to_dict()))


def group_shapes(world: int) -> list[tuple[int, bool]]:
    """Group sizes and whether the ranks are neighbors; a group of all ranks is only neighboring.

    Raises:
        ValueError: If ``world`` is not a power of two.
    """
    if world < 1 or world & (world - 1):
        raise ValueError(
            f"{world} processes: expected a power of two (1, 2, 4, ...), because a plan halves the devices repeatedly."
        )
    shapes = []
    size = 2
    while size <= world:
        shapes += [(size, True)] + ([(size, False)] if size < world else [])
        size *= 2
    return shapes


def device_name(device: torch.device) -> str:
    """Name of the device; for CPU the machine type and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {os.uname().machine} with {os.cpu_count()} cores"


class _Groups:
    """The groups of one shape that together hold every rank; gives this rank's own one."""

    def __init__(self, rank: int, world: int, size: int, consecutive: bool) -> None:
        count = world // size
        if consecutive:
            self.ranks = [list(range(index * size, (index + 1) * size)) for index in range(count)]
        else:
            self.ranks = [list(range(index, world, count)) for index in range(count)]
        self.rank = rank
        self.groups: list[dist.ProcessGroup] = []

    def __enter__(self) -> dist.ProcessGroup:
        # Every rank makes every group, in the same order, as torch.distributed demands.
        self.groups = [dist.new_group(ranks) for ranks in self.ranks]
        return next(group for group, ranks in zip(self.groups, self.ranks, strict=True) if self.rank in ranks)

    def __exit__(self, *_: object) -> None:
        dist.barrier()
        for group, ranks in zip(self.groups, self.ranks, strict=True):
            if self.rank in ranks:
                dist.destroy_process_group(group)


def _time_collective(
    op: Collective, group: dist.ProcessGroup, size: int, sizes: Sequence[int], repeats: int, device: torch.device
) -> tuple[tuple[int, float], ...]:
    points = []
    for nbytes in sizes:
        part = max(nbytes // (4 * size), 1)
        whole = torch.zeros(part * size, device=device)
        piece = torch.zeros(part, device=device)
        other = torch.zeros_like(whole) if op == "all_to_all" else piece

        def run(whole: Tensor = whole, piece: Tensor = piece, other: Tensor = other) -> None:
            if op == "all_reduce":
                dist.all_reduce(whole, group=group)
            elif op == "all_gather":
                _all_gather(whole, piece, group=group)
            elif op == "reduce_scatter":
                _reduce_scatter(piece, whole, group=group)
            else:
                dist.all_to_all_single(other, whole, group=group)

        try:
            run()
        except (RuntimeError, NotImplementedError) as error:
            # A backend that lacks an operation refuses it on every rank before anything is sent.
            _log.debug("%s is not measured: %s", op, error)
            return ()
        points.append((part * size * 4, _slowest(run, repeats, device)))
    return ascending(points)


def _time_p2p(
    rank: int, world: int, stages: int, sizes: Sequence[int], repeats: int, device: torch.device
) -> tuple[tuple[int, float], ...]:
    """Every stage sends to the next at the same time, between equal positions in both."""
    distance = world // stages
    points = []
    for nbytes in sizes:
        count = max(nbytes // 4, 1)
        outgoing, incoming = torch.zeros(count, device=device), torch.zeros(count, device=device)

        def run(outgoing: Tensor = outgoing, incoming: Tensor = incoming) -> None:
            operations = []
            if rank + distance < world:
                operations.append(dist.P2POp(dist.isend, outgoing, rank + distance))
            if rank >= distance:
                operations.append(dist.P2POp(dist.irecv, incoming, rank - distance))
            for request in dist.batch_isend_irecv(operations):
                request.wait()

        run()
        points.append((count * 4, _slowest(run, repeats, device)))
    return ascending(points)


def _slowest(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median over the repeats of the seconds that the slowest rank took."""
    # One run, timed on all ranks, decides how often it is worth repeating; all ranks must decide alike.
    once = _reduced_max(_times(run, 1, 1, device), device)[0]
    inner = int(min(max(_CLOCK_SECONDS / once, 1), 8))
    repeats = int(min(max(_POINT_SECONDS / (once * inner), min(repeats, 2)), repeats))
    return median(_reduced_max(_times(run, repeats, inner, device), device))


def _times(run: Callable[[], None], repeats: int, inner: int, device: torch.device) -> list[float]:
    """Seconds of one run on this rank, each time the mean of ``inner`` in a row behind a barrier."""
    times = []
    for _ in range(repeats):
        _synchronize(device)
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(inner):
            run()
        _synchronize(device)
        times.append((time.perf_counter() - begin) / inner)
    return times


def _reduced_max(times: Sequence[float], device: torch.device) -> list[float]:
    slowest = torch.tensor(times, dtype=torch.float64, device=device).clamp_min(1e-9)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return [float(value) for value in slowest.tolist()]


def _compute_slots(rank: int, world: int, hosts: int, device: torch.device) -> float:
    """How many processes compute at the speed of a lone one: ``world`` times the speed that all together have."""
    if device.type != "cpu" or world == 1:
        return float(world)
    left, right = torch.rand(256, 256), torch.rand(256, 256)

    def work() -> float:
        begin = time.perf_counter()
        for _ in range(12):
            torch.nn.functional.gelu(left @ right)
        return time.perf_counter() - begin

    work()
    alone, together = [], []
    for _ in range(5):
        dist.barrier()
        if rank == 0:
            alone.append(work())
        dist.barrier()
        together.append(work())
    times = gather((alone, together))
    lone = median(times[0][0])
    mean = sum(median(item) for _, item in times) / world
    # More than there are cores is noise.
    return min(max(world * lone / mean, 1.0), float(world), float(hosts * len(os.sched_getaffinity(0))))


def _layer_overhead(rank: int, world: int, slots: float, device: torch.device) -> float:
    """Seconds that FSDP's hooks and buffers take for a layer of next to no computation, without communication.

    Measured on CPU only: on accelerators the host runs ahead of the device.
    """
    if device.type != "cpu" or world == 1:
        return 0.0
    layers, width, repeats = 8, 16, 12
    samples = torch.zeros(1, width, device=device)

    def seconds(model: nn.Module) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            model(samples).sum().backward()
            times.append(time.perf_counter() - start)
            model.zero_grad()
        return median(times) / layers

    def build() -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            return nn.Sequential(*(nn.Linear(width, width, device=device) for _ in range(layers)))

    # As many processes at a time as have a core for themselves; the others wait.
    measured = 0.0
    model = build()
    with lone_mesh(device) as alone:
        for layer in model:
            fully_shard(layer, mesh=alone)
        fully_shard(model, mesh=alone)
        dist.barrier()
        if rank < max(1, int(slots)):
            measured = max(seconds(model) - seconds(build()), 0.0)
        dist.barrier()
    return max(gather(measured))


def _overlap_slowdown(world: int, device: torch.device, repeats: int) -> float | None:
    """Slowdown of the worse off of a matrix product and an all-reduce that run at once; ``None`` on CPU."""
    if device.type != "cuda":
        return None
    if world == 1:
        return 1.0
    left = torch.rand(4096, 4096, device=device, dtype=torch.bfloat16)
    message = torch.zeros(16 << 20, device=device)
    stream = torch.cuda.Stream(device)

    def compute() -> None:
        for _ in range(8):
            left @ left

    def communicate() -> None:
        with torch.cuda.stream(stream):
            dist.all_reduce(message)

    def timed(*works: Callable[[], None]) -> tuple[float, float]:
        main, side = [], []
        for _ in range(repeats + 1):
            _synchronize(device)
            dist.barrier()
            watches = Stopwatch(device), Stopwatch(device)
            watches[0].start()
            with torch.cuda.stream(stream):
                watches[1].start()
            for work in works:
                work()
            with torch.cuda.stream(stream):
                side.append(watches[1].stop())
            main.append(watches[0].stop())
        return median(main[1:]), median(side[1:])

    compute_alone, communicate_alone = timed(compute)[0], timed(communicate)[1]
    compute_both, communicate_both = timed(communicate, compute)
    slowdown = torch.tensor(
        [max(compute_both / compute_alone, communicate_both / communicate_alone, 1.0)], device=device
    )
    dist.all_reduce(slowdown, op=dist.ReduceOp.MAX)
    return float(slowdown.item())


def _processes_per_host(hosts: Sequence[str]) -> int:
    counts = {hosts.count(host) for host in hosts}
    if len(counts) != 1:
        raise ValueError(f"processes per host {sorted(counts)}: expected the same number on every host.")
    group_shapes(len(hosts))
    return counts.pop()


def _device_memory(device: torch.device, local: int) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A container may be allowed less than the host has (control groups, version 2).
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file():
        allowed = limit.read_text(encoding="ascii").strip()
        if allowed.isdigit():
            memory = min(memory, int(allowed))
    return memory // local


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
