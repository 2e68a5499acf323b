"""Experts spread over ranks train what one process trains, with empty ranks and empty experts among the steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetu.moe.gradients import clip_with_experts, expert_parameters, sync_expert_gradients
from lightning_hetu.moe.layer import MoELayer
from lightning_hetu.parallel.expert_mesh import ExpertMesh

DIM, HIDDEN, EXPERTS, RANKS, STEPS = 6, 10, 8, 4, 20
CASES = {
    "switch": {"gate": "switch"},
    "topk": {"gate": "topk", "gate_options": {"k": 3}, "activation": "gelu"},
    "gshard": {"gate": "gshard", "activation": "relu"},
    "base": {"gate": "base"},
    "full": {"gate": "topk", "gate_options": {"k": 2, "capacity_factor": 0.7, "capacity_scope": "global"}},
    "best first": {
        "gate": "switch",
        "gate_options": {"capacity_factor": 0.8, "capacity_scope": "global", "batch_prioritized": True},
    },
}


class Model(nn.Module):
    """A linear layer, experts with a residual around them, and another linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 1)
        self.moe = MoELayer(DIM, HIDDEN, EXPERTS, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.into(x))
        return self.out(x + self.moe(x)).squeeze(-1)


def make_model(dtype: torch.dtype, case: str) -> Model:
    torch.manual_seed(0)
    return Model(**CASES[case]).to(dtype)


def batches(dtype: torch.dtype) -> list[list[Tensor]]:
    """For each step the tokens of every rank: as many for all, very different numbers, and none for some."""
    draw = torch.Generator().manual_seed(1)
    sizes = [[5, 5, 5, 5], [9, 1, 4, 2], [0, 7, 0, 1], [0, 0, 0, 6], [1, 0, 0, 0]]
    out = []
    for step in range(STEPS):
        # In every third step tokens are alike, so that most experts have none.
        spread = 0.0 if step % 3 == 2 else 1.0
        base = torch.randn(DIM, generator=draw, dtype=torch.float64)
        rows = [base + spread * torch.randn(n, DIM, generator=draw, dtype=torch.float64) for n in sizes[step % 5]]
        out.append([part.to(dtype) for part in rows])
    return out


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train_one(dtype: torch.dtype, case: str) -> list[Any]:
    """Losses, gradients and weights after each step on the joint batch."""
    model = make_model(dtype, case)
    optimizer, out = optimizer_of(model), []
    for parts in batches(dtype):
        loss = model(torch.cat(parts)).square().mean()
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        out.append((loss.detach(), gradients, norm, state_of(model)))
    return out


def train_many(rank: int, dtype: torch.dtype, case: str, settings: dict[str, Any], two_stage: bool) -> list[Any]:
    """The same with a rank's own tokens; experts under the names and in the shapes of all."""
    import torch.distributed as dist

    model = make_model(dtype, case)
    groups = ExpertMesh.build("cpu", **settings)
    model.moe.parallelize(groups)
    model.moe.all_to_all = "two_stage" if two_stage else "one_stage"
    experts = {name for name, _ in expert_parameters(model)}
    assert len(experts) == (3 if model.moe.experts.w3 is not None else 2)

    def whole(name: str, share: Tensor) -> Tensor:
        if name not in experts:
            return share.clone()
        parts = [torch.empty_like(share) for _ in range(groups.expert_size)]
        dist.all_gather(parts, share.contiguous(), group=groups.expert)
        return torch.cat(parts)

    optimizer, out = optimizer_of(model), []
    for parts in batches(dtype):
        # The sum over ranks is the mean over all tokens; a rank without tokens takes part.
        loss = model(parts[rank]).square().sum() / sum(map(len, parts))
        loss.backward()
        for name, parameter in model.named_parameters():
            if name not in experts:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
        sync_expert_gradients(model, mean=False)
        total = loss.detach().clone()
        dist.all_reduce(total)
        gradients = {name: whole(name, parameter.grad) for name, parameter in model.named_parameters()}  # type: ignore[arg-type]
        norm = clip_with_experts(model, model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        out.append((total, gradients, norm, {name: whole(name, p.detach()) for name, p in model.named_parameters()}))
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("switch", {}),
        ("switch", {"expert_parallel": 2}),
        ("topk", {"devices_per_node": 2}),
        ("gshard", {"expert_parallel": 2}),
        ("base", {}),
        ("full", {"expert_parallel": 2}),
        ("best first", {}),
    ],
)
def test_ranks_train_what_one_process_trains(
    ranks: Any, case: str, settings: dict[str, int], dtype: torch.dtype, tolerance: float
) -> None:
    """Loss, gradients, their norm, and weights of twenty steps of Adam; ranks and experts without tokens included."""
    wanted = train_one(dtype, case)
    found = ranks(RANKS).run(train_many, dtype, case, settings, "devices_per_node" in settings)
    for rank in range(RANKS):
        for step, (have, want) in enumerate(zip(found[rank], wanted, strict=True)):
            torch.testing.assert_close(have[0], want[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(have[2].to(dtype), want[2], rtol=tolerance, atol=tolerance)
            for index in (1, 3):
                for name, value in want[index].items():
                    message = f"rank {rank}, step {step}, {('gradient', 'weight')[index == 3]} of {name}"
                    torch.testing.assert_close(
                        have[index][name], value, rtol=0, atol=tolerance * max(1.0, float(value.abs().max())),
                        msg=lambda text, message=message: f"{message}: {text}",
                    )  # fmt: skip


def two_ways(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    out = []
    for two_stage in (False, True):
        steps = train_many(0 * rank + rank, torch.float32, "topk", {"devices_per_node": 2}, two_stage)
        out.append([value for step in steps for value in (step[0], *step[1].values(), *step[3].values())])
    return out[0], out[1]


def test_two_stages_change_no_bit(ranks: Any) -> None:
    for one, two in ranks(RANKS).run(two_ways):
        assert len(one) > 100 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def replicated(rank: int) -> list[Tensor]:
    torch.manual_seed(rank)  # as a user does who has not seeded
    layer = MoELayer(DIM, HIDDEN, EXPERTS)
    layer.parallelize(ExpertMesh.build("cpu", expert_parallel=2))
    return [parameter.detach() for parameter in layer.experts.parameters()]


def test_holders_of_the_same_experts_start_alike(ranks: Any) -> None:
    first, second, third, fourth = ranks(RANKS).run(replicated)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, fourth, strict=True))
    assert not torch.equal(first[0], second[0])


def refused(rank: int) -> list[str]:
    layer, messages = MoELayer(DIM, HIDDEN, 6), []
    for build in (
        lambda: layer.parallelize(ExpertMesh.build("cpu")),
        lambda: layer.parallelize(ExpertMesh.build("cpu", expert_parallel=2)),
        lambda: layer.parallelize(ExpertMesh.build("cpu", expert_parallel=2)),
    ):
        try:
            build()
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    return messages


def test_experts_that_ranks_do_not_divide_are_refused(ranks: Any) -> None:
    assert ranks(RANKS).run(refused)[0] == [
        "num_experts=6: expected a multiple of the 4 ranks that share them out.",
        "parallelize: the experts of this layer are shared out already.",
    ]
