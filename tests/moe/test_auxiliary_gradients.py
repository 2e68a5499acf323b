"""With the balance of all ranks, auxiliary losses have the gradients of one process with all tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetu.moe.gates import build_gate

DIM, EXPERTS, RANKS = 6, 8, 4
SIZES = ([5, 5, 5, 5], [9, 0, 4, 2])
"""Tokens of every rank in each of two micro-batches."""
CASES: dict[str, dict[str, Any]] = {
    "switch": {},
    "gshard": {},
    "topk": {"k": 3},
    "topk, sigmoid": {"k": 2, "score": "sigmoid", "z_loss": False},
    "ktop1": {"k": 2},
    "sam": {"k": 2, "num_groups": 4},
    "dts": {"noise": "none"},
}


def tokens() -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [[torch.randn(n, DIM, generator=draw, dtype=torch.float64) for n in sizes] for sizes in SIZES]


def gradient(case: str, micro_batches: list[Tensor]) -> Tensor:
    """Of all losses of the gate together, each the mean over micro-batches."""
    torch.manual_seed(0)
    options = {"z_loss": True, "balance_scope": "global", **CASES[case]}
    gate = build_gate(case.partition(",")[0], dim=DIM, num_experts=EXPERTS, **options).double()
    for x in micro_batches:
        losses = gate(x).losses
        assert "balance" in losses and ("z" in losses) is options["z_loss"]
        (torch.stack(list(losses.values())).sum() / len(micro_batches)).backward()
    assert isinstance(gate.weight.grad, Tensor)
    return gate.weight.grad


def mean_gradients(rank: int) -> list[Tensor]:
    """What data parallelism makes of the gradients of all ranks."""
    out = []
    for case in CASES:
        own = gradient(case, [parts[rank] for parts in tokens()])
        dist.all_reduce(own)
        out.append(own / RANKS)
    return out


def test_the_mean_over_ranks_is_the_joint_gradient(ranks: Any) -> None:
    """Two micro-batches, ranks with different numbers of tokens, one of them without."""
    for answers in ranks(RANKS).run(mean_gradients):
        for case, found in zip(CASES, answers, strict=True):
            wanted = gradient(case, [torch.cat(parts) for parts in tokens()])
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14, msg=lambda text, c=case: f"{c}: {text}")


def test_the_mean_of_each_rank_by_itself_is_another(ranks: Any) -> None:
    """So the first test can fail."""
    wanted = gradient("switch", [torch.cat(parts) for parts in tokens()])
    alone = torch.stack([gradient("switch", [parts[rank] for parts in tokens()]) for rank in range(RANKS)])
    assert not torch.allclose(alone.mean(dim=0), wanted, rtol=1e-3)
