"""Links between experts are measured as they are, and decide how rows travel."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_hetu.moe import MoELayer
from lightning_hetu.parallel.expert_mesh import ExpertMesh
from lightning_hetu.planning.topology import Link
from lightning_hetu.profiling.links import fit_link, measure_links

LATENCY, SECONDS_PER_BYTE = 5e-2, 1e-8


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_two_times_give_the_link(ranks: int) -> None:
    sizes = 4096, 1 << 20
    few, many = ((ranks - 1) * (3e-5 + size / ranks / 5e9) for size in sizes)
    found = fit_link(ranks, sizes, (few, many))
    assert found.latency == pytest.approx(3e-5) and found.bytes_per_second == pytest.approx(5e9)


def test_noise_makes_no_negative_link() -> None:
    assert fit_link(2, (1000, 2000), (2.0, 1.0)) == Link(math.inf, 2.0)
    assert fit_link(2, (1000, 2000), (1.0, 4.0)) == Link(500 / 3.0, 0.0)


def slowed(rank: int, slow: str) -> tuple[tuple[Link, Link], bool]:
    """Links of 2 x 2 ranks where one kind is slow, and whether few rows take two stages."""
    groups = ExpertMesh.build("cpu", devices_per_node=2)
    assert groups.nodes is not None
    slow_group, plain = groups.nodes.get_group(slow), dist.all_to_all_single

    def delayed(out: Any, own: Any, group: Any = None) -> Any:
        # The flat exchange, between all ranks, is not run here.
        if group is slow_group:
            time.sleep(LATENCY + own.numel() / 2 * SECONDS_PER_BYTE)
        return plain(out, own, group=group)

    layer = MoELayer(4, 8, 8)
    dist.all_to_all_single = delayed  # type: ignore[assignment]
    try:
        layer.parallelize(groups)
    finally:
        dist.all_to_all_single = plain
    assert groups.links is not None
    few = layer._takes_two_stages(((2,) * 4,) * 4, torch.zeros(1, 4))
    return groups.links, few


@pytest.mark.parametrize("slow", ["node", "local"])
def test_what_is_slow_is_seen_and_avoided(ranks: Any, slow: str) -> None:
    """Two stages halve the messages between nodes: good where those wait, bad where neighbors do."""
    answers = ranks(4).run(slowed, slow)
    links = answers[0][0]
    assert all(answer[0] == links for answer in answers)
    link = links[slow == "node"]
    assert (
        link.latency >= LATENCY and link.bytes_per_second <= 1 / SECONDS_PER_BYTE
    )  # asleep, whatever the machine does
    for _, few in answers:
        assert few is (slow == "node")


def given(rank: int) -> tuple[object, object]:
    groups = ExpertMesh.build("cpu", devices_per_node=2)
    MoELayer(4, 8, 8, all_to_all="one_stage").parallelize(groups)
    first = groups.links
    MoELayer(4, 8, 8, links=(Link(1.0), Link(1.0, 1.0))).parallelize(groups)
    return first, groups.links


def test_nothing_is_measured_that_is_not_asked(ranks: Any) -> None:
    assert ranks(4).run(given) == [(None, None)] * 4


def refused(rank: int) -> list[str]:
    messages = []
    for nodes, sizes in ((None, (1, 2)), (2, (2, 2))):
        try:
            measure_links(ExpertMesh.build("cpu", devices_per_node=nodes), sizes)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_measured_is_refused(ranks: Any) -> None:
    wanted = ["groups.nodes=None: expected groups with nodes; build them with devices_per_node."]
    wanted.append("sizes=(2, 2): expected two numbers above 0 that ascend.")
    assert ranks(4).run(refused) == [wanted] * 4
