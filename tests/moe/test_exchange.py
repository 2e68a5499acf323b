"""Rows get to their ranks in order, in one stage and in two, with their gradients, also from and to ranks with none."""

from __future__ import annotations

from typing import Any

import torch

from lightning_hetu.moe.exchange import Exchange
from lightning_hetu.parallel.expert_mesh import ExpertMesh

RANKS, WIDTH = 4, 3


def tables() -> list[list[list[int]]]:
    """Rows from rank to rank: random ones, nothing at all, everything to one rank, one rank that sends nothing."""
    draw = torch.Generator().manual_seed(0)
    found = [torch.randint(0, high, (RANKS, RANKS), generator=draw).tolist() for high in (2, 5, 9)]
    lonely = [[0] * RANKS, [2, 0, 0, 3], [0, 0, 0, 0], [1, 0, 4, 0]]
    return [*found, [[0] * RANKS] * RANKS, [[0, 0, 5, 0]] * RANKS, lonely]


def exchanged(rank: int) -> list[Any]:
    groups = ExpertMesh.build("cpu", devices_per_node=2)
    out = []
    for number, table in enumerate(tables()):
        counts = tuple(map(tuple, table))
        rows = torch.randn(sum(table[rank]), WIDTH, generator=torch.Generator().manual_seed(10 * number + rank))
        results = []
        for two_stage in (False, True):
            mine = rows.clone().requires_grad_()
            exchange = Exchange(counts, groups, two_stage)
            got = exchange.send(mine)
            weight = torch.arange(got.numel(), dtype=torch.float32).view_as(got) + rank
            back = exchange.send_back(got * weight)
            (back * mine.detach()).sum().backward()
            results.append((got.detach(), back.detach(), mine.grad))
        out.append((rows, *results))
    return out


def test_rows_arrive_in_the_order_of_ranks(ranks: Any) -> None:
    """What a rank gets, what comes back, and gradients; two stages bit for bit like one."""
    answers = ranks(RANKS).run(exchanged)
    for number, table in enumerate(tables()):
        sent = [answers[rank][number][0] for rank in range(RANKS)]
        for rank in range(RANKS):
            _, one, two = answers[rank][number]
            for a, b in zip(one, two, strict=True):
                assert torch.equal(a, b)
            pieces = [sent[source].split(table[source])[rank] for source in range(RANKS)]
            assert torch.equal(one[0], torch.cat(pieces))
        # Where a row was, its weight is known: so what comes back, and the gradient, are known too.
        for rank in range(RANKS):
            wanted = []
            for target in range(RANKS):
                total = sum(table[source][target] for source in range(RANKS)) * WIDTH
                weight = torch.arange(total, dtype=torch.float32).view(-1, WIDTH) + target
                wanted.append(weight.split([table[source][target] for source in range(RANKS)])[rank])
            weights = torch.cat(wanted)
            assert torch.equal(answers[rank][number][1][1], sent[rank] * weights)
            assert torch.equal(answers[rank][number][1][2], weights * sent[rank])


def refused(rank: int) -> list[str]:
    messages = []
    for build in (
        lambda: ExpertMesh.build("cpu", expert_parallel=3),
        lambda: ExpertMesh.build("cpu", devices_per_node=3),
        lambda: Exchange(((0,) * 4,) * 4, ExpertMesh.build("cpu"), two_stage=True),
    ):
        try:
            build()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_groups_that_cannot_be_are_refused(ranks: Any) -> None:
    messages = ranks(RANKS).run(refused)[0]
    assert messages == [
        "expert_parallel=3: expected a divisor of the 4 ranks.",
        "devices_per_node=3: expected a divisor of expert_parallel=4.",
        "two_stage=True: the expert group is within one node; build it with devices_per_node.",
    ]
