"""Whether an all-to-all between experts is faster in one stage or in two.

Of ``nodes`` times ``local`` ranks, each sends ``num_bytes``, evenly to all. In one stage a rank sends ``(nodes - 1)
local`` messages over the network; in two (HetuMoE, arXiv 2203.14685, section 3.2) it sends ``nodes - 1`` messages that
are ``local`` times as large, after an exchange within its node. So two stages pay where latency counts: small messages,
many nodes.
"""

from __future__ import annotations

from lightning_hetu.planning.topology import Link


def one_stage_seconds(num_bytes: float, nodes: int, local: int, inside: Link, between: Link) -> float:
    """Seconds of the flat all-to-all: both kinds of links are used at once.

    Args:
        num_bytes: Bytes that one rank sends, its own share included.
        nodes: Number of nodes.
        local: Ranks of each node.
        inside: Links within a node.
        between: Links between nodes.
    """
    share = num_bytes / (nodes * local)
    near = _seconds(inside, local - 1, (local - 1) * share)
    far = _seconds(between, (nodes - 1) * local, (nodes - 1) * local * share)
    return max(near, far)


def two_stage_seconds(num_bytes: float, nodes: int, local: int, inside: Link, between: Link) -> float:
    """Seconds of the two-stage all-to-all; arguments as in :func:`one_stage_seconds`."""
    near = _seconds(inside, local - 1, num_bytes * (local - 1) / local)
    return near + _seconds(between, nodes - 1, num_bytes * (nodes - 1) / nodes)


def two_stages_are_faster(num_bytes: float, nodes: int, local: int, inside: Link, between: Link) -> bool:
    """Whether to take two stages; arguments as in :func:`one_stage_seconds`."""
    if nodes < 2 or local < 2:
        return False
    arguments = num_bytes, nodes, local, inside, between
    return two_stage_seconds(*arguments) < one_stage_seconds(*arguments)


def _seconds(link: Link, messages: int, num_bytes: float) -> float:
    """Seconds for messages one after another that have these bytes in all."""
    return messages * link.latency + num_bytes / link.bytes_per_second
