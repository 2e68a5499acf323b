"""Losses over all ranks' tokens have, as the mean over ranks, the gradient of one process, for unequal numbers too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetu.moe.gates import RouterGate, build_gate
from tests._ranks import RankPool

CASES: list[tuple[str, dict[str, Any]]] = [
    ("switch", {"z_loss": True}),
    ("gshard", {}),
    ("topk", {"k": 2, "score": "sigmoid"}),
    ("ktop1", {"k": 2, "z_loss": True}),
    ("sam", {"k": 2}),
    ("dts", {"noise": "none", "threshold": 0.1, "z_loss": True}),
]
SHARES = {"unequal": [3, 8], "one without tokens": [0, 5]}


def losses_and_gradient(name: str, options: dict[str, Any], x: Tensor, scope: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Every loss of tokens ``x``, with its gradient."""
    torch.manual_seed(7)
    gate = build_gate(name, dim=5, num_experts=4, balance_scope=scope, **options).double()
    assert isinstance(gate, RouterGate)
    output = gate(x)
    return {
        key: (loss.detach(), torch.autograd.grad(loss, gate.weight, retain_graph=True)[0])
        for key, loss in output.losses.items()
    }


def tokens(share: list[int]) -> Tensor:
    x = torch.randn(sum(share), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[share[0]] = torch.nan  # the first one of the second rank counts nowhere
    return x


def on_one_rank(rank: int, scope: str) -> list[dict[str, tuple[Tensor, Tensor]]]:
    found = []
    for share in SHARES.values():
        mine = tokens(share).split(share)[rank]
        for name, options in CASES:
            here = losses_and_gradient(name, options, mine, scope)
            for loss, gradient in here.values():
                for part in (loss, gradient):
                    dist.all_reduce(part)
                    part /= 2
            found.append(here)
    return found


def test_the_mean_over_ranks_is_the_gradient_of_all_tokens(ranks: Callable[[int], RankPool]) -> None:
    joint = [
        losses_and_gradient(name, options, tokens(share), "micro")
        for share in SHARES.values()
        for name, options in CASES
    ]
    shared, alone = (ranks(2).run(on_one_rank, scope)[0] for scope in ("global", "micro"))
    for expected, found in zip(joint, shared, strict=True):
        assert expected.keys() == found.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=1e-14)
    # Losses of each rank's own tokens are something else.
    assert not torch.allclose(alone[0]["balance"][1], joint[0]["balance"][1])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_without_other_ranks_global_is_micro(name: str, options: dict[str, Any]) -> None:
    x = tokens([3, 8])
    torch.testing.assert_close(
        losses_and_gradient(name, options, x, "global"), losses_and_gradient(name, options, x, "micro"), rtol=0, atol=0
    )
