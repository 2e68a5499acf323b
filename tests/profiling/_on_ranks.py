"""What the profiling tests run on several processes; imported by the processes themselves."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_hetu.models.gpt import GPTBlock, GPTConfig, GPTEmbedding, GPTHead
from lightning_hetu.models.gpt_module import GPTLightningModule
from lightning_hetu.parallel.structure import find_structure
from lightning_hetu.parallel.tensor import apply_tensor_parallel
from lightning_hetu.planning.cluster import ClusterSpec
from lightning_hetu.profiling import MemoryMeter, ProfileCache, cluster_key, profile_cluster, profile_model
from lightning_hetu.profiling._agreement import lone_mesh
from lightning_hetu.profiling._case import LayerCase
from lightning_hetu.profiling._tensor_parallel import one_of

CONFIG = GPTConfig(vocab_size=512, max_seq_len=64, num_layers=2, num_heads=4, dim=64)
SAMPLES = 4


def gpt_part(role: str) -> LayerCase:
    """Block, embedding, or head with loss, of a small GPT."""
    torch.manual_seed(0)
    module: nn.Module = {"block": GPTBlock, "embedding": GPTEmbedding, "head": GPTHead}[role](CONFIG)
    tokens = torch.randint(CONFIG.vocab_size, (SAMPLES, CONFIG.max_seq_len))
    hidden = torch.randn(SAMPLES, CONFIG.max_seq_len, CONFIG.dim)
    if role == "head":
        return LayerCase(
            name=role,
            module=module,
            call=lambda arguments: F.cross_entropy(module(arguments[0]).flatten(0, 1), arguments[1].flatten()),
            arguments=(hidden, tokens),
            batch=SAMPLES,
            plan=module.tensor_parallel_plan,
            tp_degrees=(1, 2),
        )
    return LayerCase(
        name=role,
        module=module,
        call=lambda arguments: module(arguments[0]),
        arguments=(tokens if role == "embedding" else hidden,),
        batch=SAMPLES,
        plan=module.tensor_parallel_plan,
        tp_degrees=(1, 2),
    )


def metered(case: LayerCase) -> tuple[float, float, float]:
    """Kept by the forward, its peak, and the backward's, as allocated; gradients of parameters are already there."""
    for _ in range(2):  # the first run makes what is made once
        loss = case.forward(case.batch)
        loss.backward()
    del loss
    _settle()
    with MemoryMeter() as forward:
        loss = case.forward(case.batch)
        _settle()
    with MemoryMeter() as backward:
        loss.backward()
    return forward.kept, forward.peak, backward.peak


def _settle() -> None:
    # A thread of a collective may hold its buffer a moment longer, and free it while the next thing is measured.
    if dist.is_initialized():
        time.sleep(0.02)


def measure_tensor_parallel(rank: int) -> dict[str, tuple[float, float, float]]:
    """Kept, forward beyond it, backward beyond it, of the parts on two tensor-parallel ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    found = {}
    for role in ("block", "embedding", "head"):
        case = gpt_part(role)
        apply_tensor_parallel(case.module, mesh, dict(case.plan))
        kept, forward, backward = map(median, zip(*(metered(case) for _ in range(7)), strict=True))
        found[role] = (kept, forward - kept, backward)
    return found


def meter_sharded_step(rank: int) -> tuple[int, int, int]:
    """Bytes left and at most alive in sharded steps, and the bytes of this rank's gradients."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(blocks, mesh=mesh)
    inputs = torch.randn(8, 64)
    blocks(inputs).sum().backward()  # FSDP sets itself up in its first pass
    blocks.zero_grad()
    gc.collect()  # models of earlier tests
    for _ in range(4):  # the collectives' threads let go of a buffer when they take up other work
        dist.barrier()
    with MemoryMeter(tensors=blocks.parameters()) as meter:
        for _ in range(8):  # a release that is missed would add up
            blocks.zero_grad()
            blocks(inputs).sum().backward()
    assert meter.baseline == sum(p.to_local().nbytes for p in blocks.parameters())
    gradients = sum(p.grad.to_local().nbytes for p in blocks.parameters())
    return meter.kept, meter.peak, gradients


def measure_cluster(rank: int) -> ClusterSpec:
    """A quick profile of the cluster."""
    steps: list[tuple[int, int]] = []
    spec = profile_cluster("cpu", sizes=(1 << 10, 1 << 18), repeats=2, progress=lambda n, of, _: steps.append((n, of)))
    assert [done for done, _ in steps] == list(range(steps[-1][1] + 1))
    return spec


def measure_model(rank: int, slots: float | None) -> tuple[str, bool]:
    """Hash of the model's profile on this rank, and whether this rank measured it."""
    module = GPTLightningModule(32, max_seq_len=8, num_layers=2, dim=16)
    inputs, target = module.example_batch(2)
    steps: list[int] = []
    profile = profile_model(
        module,
        find_structure(module),
        inputs,
        target,
        repeats=1,
        slots=slots,
        progress=lambda done, *_: steps.append(done),
    )
    return hashlib.sha256(json.dumps(profile.to_dict()).encode()).hexdigest(), bool(steps)


def fail_on_one(rank: int) -> str:
    """What a rank raises when profiling fails on rank 2 alone."""
    module = GPTLightningModule(32, max_seq_len=8, num_layers=2, dim=16)
    inputs, target = module.example_batch(2)
    if rank == 2:
        module.pipeline_loss = lambda output, target: output.no_such_method()
    try:
        profile_model(module, find_structure(module), inputs, target, repeats=1, slots=4)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def use_cache(rank: int, folder: str) -> dict[str, Any]:
    """How often this rank measured with an empty, a filled and a damaged cache, and what the last one raised."""
    cache = ProfileCache(folder if rank == 0 else f"{folder}-not-read-by-rank-{rank}")
    measured = []

    def measure() -> ClusterSpec:
        measured.append(rank)
        return ClusterSpec.from_bandwidth(4, gigabytes_per_second=1.0)

    key = cluster_key("cpu")
    first = cache.cluster(key, measure)
    empty = len(measured)
    same = cache.cluster(key, measure) == first
    filled = len(measured) - empty
    if rank == 0:
        path = cache.path("cluster", key)
        path.write_text(path.read_text()[:-40])
    dist.barrier()
    try:
        cache.cluster(key, measure)
        message = ""
    except ValueError as error:
        message = str(error)
    return {
        "key": key,
        "empty": empty,
        "filled": filled,
        "same": same,
        "message": message,
        "files": len(list(Path(cache.folder).glob("*"))),
    }


def run_one_rank(rank: int) -> dict[str, tuple[bool, list[list[int]]]]:
    """Per part: whether it is as before afterwards, and sizes of its split weights whole, as one of 2 ranks, and of 4.

    As one of 2 ranks it runs on DTensors; any other weight has size 0 there.
    """
    found = {}
    with lone_mesh(torch.device("cpu")) as mesh:
        for role in ("block", "embedding", "head"):
            case = gpt_part(role)
            weights = [f"{name}.weight" for name in case.plan]
            before = {name: (id(p), p.detach().clone()) for name, p in case.module.named_parameters()}
            output = case.call(case.arguments).detach()
            sizes = [[before[name][1].numel() for name in weights]]
            for on, tp in ((mesh, 2), (None, 4)):
                with one_of(case, tp, on):
                    case.forward(case.batch).backward()
                    parameters = [case.module.get_parameter(name) for name in weights]
                    sizes.append([p.numel() if isinstance(p, DTensor) == (on is not None) else 0 for p in parameters])
            same = torch.equal(case.call(case.arguments), output)
            for name, parameter in case.module.named_parameters():
                same &= id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])
            found[role] = (same, sizes)
    return found
