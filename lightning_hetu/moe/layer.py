"""A mixture-of-experts layer in place of a feed-forward network, on one process or with experts spread over many.

Sparsely gated experts (arXiv 1701.06538) with the gates of HetuMoE (arXiv 2203.14685). What a rank computes does not
depend on where experts are: a token's result is the same as on one process, and so are all gradients once
:func:`lightning_hetu.moe.gradients.sync_expert_gradients` has added what only the ranks of one expert know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_hetu.moe.dispatch import Dispatch, sort_by_kernels
from lightning_hetu.moe.exchange import Exchange
from lightning_hetu.moe.experts import Activation, Backend, Experts
from lightning_hetu.moe.gates import Gate, GateOutput, build_gate
from lightning_hetu.moe.placement.placement import Placement
from lightning_hetu.moe.placement.split import even_split, optimal_split
from lightning_hetu.moe.route import route_of_placement, route_of_shares
from lightning_hetu.parallel.expert_mesh import ExpertMesh
from lightning_hetu.parallel.experts import SharesExperts
from lightning_hetu.planning.all_to_all import two_stages_are_faster
from lightning_hetu.planning.topology import Link
from lightning_hetu.profiling.links import measure_links

AllToAll = Literal["auto", "one_stage", "two_stage"]


class MoELayer(SharesExperts):
    """Sends every token to the experts its gate chooses, and adds up what they say.

    After a forward pass, ``losses`` has the gate's auxiliary losses with their graph, ``last`` its decisions without.
    Where experts are shared out, ``rank_rows`` has the rows that each rank worked on. Where they have slots to move
    between, ``placement`` tells which expert is where, and ``fractions`` ``[experts, ranks]`` how tokens are split, or
    ``None`` for the optimal split of every forward pass.

    Args:
        dim: Width of a token.
        hidden: Width of an expert between its two products.
        num_experts: Number of experts.
        gate: Name of a gate (see :func:`lightning_hetu.moe.gates.build_gate`) or a gate.
        gate_options: Options of the gate of that name.
        activation: Activation of the experts.
        backend: What multiplies; see :class:`Experts`.
        all_to_all: How rows get to experts on other nodes: in one stage, in two, or what is faster by ``links``.
        links: Within and between nodes, as one rank sees them; measured when experts are shared out, if not given.

    Raises:
        ValueError: If an option is unknown, or belongs to a gate that is given.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        gate: str | Gate = "switch",
        gate_options: Mapping[str, Any] | None = None,
        activation: Activation = "swiglu",
        backend: Backend = "auto",
        all_to_all: AllToAll = "auto",
        links: tuple[Link, Link] | None = None,
    ) -> None:
        super().__init__()
        if all_to_all not in get_args(AllToAll):
            raise ValueError(f"all_to_all={all_to_all!r}: expected one of {', '.join(get_args(AllToAll))}.")
        if isinstance(gate, Gate):
            if gate_options:
                raise ValueError(
                    f"gate_options={dict(gate_options)}: expected with the name of a gate, not with a gate."
                )
            if gate.num_experts != num_experts:
                raise ValueError(f"num_experts={num_experts}: the gate has {gate.num_experts}.")
        else:
            gate = build_gate(gate, dim=dim, num_experts=num_experts, **(gate_options or {}))
        self.dim, self.hidden, self.num_experts = dim, hidden, num_experts
        self.gate = gate
        self.experts = Experts(num_experts, dim, hidden, activation, backend)
        self.all_to_all: AllToAll = all_to_all
        self.links = links
        self.groups: ExpertMesh | None = None
        self.placement: Placement | None = None
        self.fractions: NDArray[np.float64] | None = None
        self.rank_rows: tuple[int, ...] = ()
        self.losses: dict[str, Tensor] = {}
        self.last: GateOutput | None = None

    def parallelize(self, groups: ExpertMesh, *, slots: int | None = None, distributed: bool = False) -> None:
        """Keeps this rank's share of the experts; to be called by all ranks, before there is an optimizer.

        Ranks that hold the same experts start with the weights of the first of them.

        Args:
            groups: The ranks.
            slots: Room for experts on every rank, so that they can move (see :mod:`lightning_hetu.moe.placement`);
                beyond its share slots are free at first. By default experts stay where they are.
            distributed: Whether parameters are DTensors that know of all experts, rather than tensors of this rank.

        Raises:
            ValueError: If the ranks do not divide the experts, or the slots do not suffice.
            RuntimeError: If it was called before.
        """
        if self.groups is not None:
            raise RuntimeError("parallelize: the experts of this layer are shared out already.")
        if self.num_experts % groups.expert_size:
            raise ValueError(
                f"num_experts={self.num_experts}: expected a multiple of the {groups.expert_size} ranks that share"
                " them out."
            )
        share = self.num_experts // groups.expert_size
        if slots is not None:
            self.placement = Placement.contiguous(self.num_experts, groups.expert_size, slots)
            self.fractions = even_split(np.ones(self.num_experts), self.placement).fractions
        mine = slice(groups.expert_rank * share, (groups.expert_rank + 1) * share)
        for name, weight in list(self.experts.named_parameters()):
            rows = weight.detach()[mine].clone()
            if slots is not None:
                rows = torch.cat([rows, rows.new_zeros(slots - share, *rows.shape[1:])])
            own = nn.Parameter(rows, requires_grad=weight.requires_grad)
            if groups.replica.size() > 1:
                dist.broadcast(own.data, group=groups.replica, group_src=0)
            if distributed:
                shares = DTensor.from_local(own.detach(), groups.mesh, (Replicate(), Shard(0)), run_check=False)
                own = nn.Parameter(shares, requires_grad=weight.requires_grad)
            setattr(self.experts, name, own)
        self.experts.num_slots = share if slots is None else slots
        if self.all_to_all == "auto" and self.links is None and groups.nodes is not None:
            groups.links = groups.links or measure_links(groups)
        self.groups = groups

    def stacked_parameters(self) -> list[nn.Parameter]:
        """The parameters with an expert in each row."""
        return list(self.experts.parameters())

    @property
    def shared(self) -> bool:
        """Whether the experts are shared out."""
        return self.groups is not None

    def share_out(self, groups: ExpertMesh) -> None:
        """Shares the experts out under a plan; see :class:`SharesExperts`."""
        self.parallelize(groups, distributed=True)

    def routed_bytes(self) -> int:
        """Bytes of the rows that the last forward pass has sent to experts."""
        if self.last is None:
            return 0
        return int(self.last.kept_per_expert.sum()) * self.dim * self.experts.w1.element_size()

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Applies the layer.

        Args:
            x: Tokens, ``[..., dim]``.
            token_ids: Numbers of the tokens, int64 ``[...]``, for gates that go by them.

        Returns:
            As ``x``. Tokens without an expert give zero, or themselves where the gate interpolates.
        """
        tokens = x.reshape(-1, x.shape[-1])
        decided: GateOutput = self.gate(tokens, None if token_ids is None else token_ids.reshape(-1))
        self.losses = dict(decided.losses)
        self.last = decided.detach()
        expert_ids = decided.expert_ids.masked_fill(decided.dropped, -1)
        if self.experts.product_of(tokens) == "triton":
            rows, counts, combine = sort_by_kernels(tokens, expert_ids, self.num_experts)
        else:
            dispatch = Dispatch.build(expert_ids, self.num_experts)
            rows, counts, combine = dispatch.rows(tokens), dispatch.counts, dispatch.combine
        rows = self.experts(rows, counts) if self.groups is None else self._spread(rows, counts)
        out = combine(rows, decided.weights)
        if decided.residual is not None:
            out = out + decided.residual.to(tokens.dtype).unsqueeze(-1) * tokens
        return out.view(*x.shape[:-1], out.shape[-1])

    def _spread(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The experts' results for rows that are sorted by expert, wherever the experts are."""
        assert self.groups is not None
        groups, rank = self.groups, self.groups.expert_rank
        everyone = all_gather_counts(counts, groups.expert).cpu().numpy()  # the one point where the host waits
        if self.placement is None:
            route = route_of_shares(everyone, rank)
        else:
            split = optimal_split(everyone, self.placement).fractions if self.fractions is None else self.fractions
            route = route_of_placement(everyone, rank, self.placement, split)
        self.rank_rows = route.rank_rows
        exchange = Exchange(route.table, groups, self._takes_two_stages(route.table, rows))
        order = torch.from_numpy(route.receive_order)
        back = order.argsort()
        if route.send_order is not None:
            send_order = torch.from_numpy(route.send_order)
            send_back = send_order.argsort()
            rows = _Reorder.apply(rows, send_order, send_back)
        received = _Reorder.apply(exchange.send(rows), order, back)
        results = self.experts(received, torch.from_numpy(route.slot_counts))
        out = exchange.send_back(_Reorder.apply(results, back, order))
        return out if route.send_order is None else _Reorder.apply(out, send_back, send_order)

    def _takes_two_stages(self, table: tuple[tuple[int, ...], ...], rows: Tensor) -> bool:
        assert self.groups is not None
        if self.groups.nodes is None or self.all_to_all == "one_stage":
            return False
        if self.all_to_all == "two_stage":
            return True
        links = self.links or self.groups.links
        if links is None:  # one stage was asked for when experts were shared out
            return False
        num_bytes = max(map(sum, table)) * rows.shape[1] * rows.element_size()
        _, nodes, local = self.groups.nodes.shape
        return two_stages_are_faster(num_bytes, nodes, local, *links)

    def __getstate__(self) -> dict[str, Any]:
        """Copies are made without what the last forward pass left."""
        return {**self.__dict__, "losses": {}, "last": None}

    def extra_repr(self) -> str:
        """Sizes, for printing the module."""
        return f"num_experts={self.num_experts}"


class _Reorder(torch.autograd.Function):
    """Rows in another order; the gradient is gathered, not scattered."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back.to(rows.device)
        return rows[order.to(rows.device)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.back], None, None


def all_gather_counts(counts: Tensor, group: ProcessGroup) -> Tensor:
    """Rows per expert of every rank, int64 ``[ranks, experts]``, on the device of ``counts``."""
    everyone = counts.new_empty(group.size() * len(counts))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 has renamed it
    gather(everyone, counts, group=group)
    return everyone.view(group.size(), len(counts))
