"""The gate of hash layers: a token's number in the vocabulary decides (arXiv 2106.04426)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_hetu.moe.gates._checks import check_choice, check_count
from lightning_hetu.moe.gates._gate import Gate
from lightning_hetu.moe.gates._output import GateOutput

Table = Literal["random", "modulo", "balanced"]


class HashGate(Gate):
    """Sends a token to the expert that a fixed table has for its number, with weight 1. Nothing is learned.

    Args:
        num_experts: Number of experts E.
        vocab_size: Number of different tokens V.
        table: ``random``: a random one in which experts have the same number of tokens, up to one. ``modulo``: a
            token's number modulo E. ``balanced``: by ``frequencies``, from the most frequent token to the least, each
            to the expert with the least so far.
        seed: Of ``random``.
        frequencies: How often each token occurs, V numbers of at least 0; for ``balanced``.
        **options: Options of :class:`Gate`.

    Attributes:
        expert_of: int64 buffer ``[V]``, saved.

    Raises:
        ValueError: If an option is out of range, or ``frequencies`` do not go with ``table``.
    """

    expert_of: Tensor

    def __init__(
        self,
        num_experts: int,
        vocab_size: int,
        *,
        table: Table = "random",
        seed: int = 0,
        frequencies: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_experts, **options)
        check_count("vocab_size", vocab_size)
        check_choice("table", table, Table)
        if (frequencies is None) == (table == "balanced"):
            raise ValueError(
                f"table={table!r} {'without' if frequencies is None else 'with'} frequencies: 'balanced' needs them,"
                " others take none."
            )
        if frequencies is not None and len(frequencies) != vocab_size:
            raise ValueError(f"frequencies: expected vocab_size={vocab_size} numbers, got {len(frequencies)}.")
        if frequencies is not None and not min(frequencies) >= 0:
            raise ValueError(f"frequencies: expected numbers of at least 0, got {min(frequencies)}.")
        self.vocab_size = vocab_size
        self.table: Table = table
        self.seed = seed
        self.frequencies = None if frequencies is None else [float(number) for number in frequencies]
        self.register_buffer("expert_of", torch.empty(vocab_size, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes the table."""
        if self.frequencies is not None:
            made = torch.tensor(_by_load(self.frequencies, self.num_experts), device="cpu")
        else:
            made = torch.arange(self.vocab_size, device="cpu") % self.num_experts
            if self.table == "random":
                generator = torch.Generator("cpu").manual_seed(self.seed)
                made = made[torch.randperm(self.vocab_size, generator=generator, device="cpu")]
        self.expert_of.copy_(made)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> GateOutput:
        """Routes tokens.

        Args:
            x: Tokens, ``[..., D]``; only their number and dtype matter.
            token_ids: Their numbers, int64 ``[...]``.

        Returns:
            Where they go; ``scores`` is ``None``.

        Raises:
            ValueError: If ``token_ids`` is missing, has another number of tokens, or numbers out of range.
        """
        if token_ids is None:
            raise ValueError("token_ids=None: a hash gate routes by tokens' numbers; give them to the layer's forward.")
        if token_ids.shape.numel() != x.shape[:-1].numel():
            raise ValueError(f"token_ids has shape {list(token_ids.shape)}: expected {list(x.shape[:-1])}.")
        return self._route(token_ids, torch.promote_types(x.dtype, torch.float32))

    def route(self, token_ids: Tensor) -> GateOutput:
        """Routes tokens by their numbers, int64 of any shape.

        Raises:
            ValueError: If a number is out of range. To see that, the host waits for the device.
        """
        return self._route(token_ids, torch.float32)

    def _route(self, token_ids: Tensor, dtype: torch.dtype) -> GateOutput:
        token_ids = token_ids.reshape(-1)
        if token_ids.numel():
            low, high = torch.stack(token_ids.aminmax()).tolist()
            if low < 0 or high >= self.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"token_ids has {wrong}: expected 0 to {self.vocab_size - 1}; vocab_size sets it.")
        chosen = self.expert_of[token_ids].unsqueeze(-1)
        expert_ids = self._placed(chosen, torch.ones_like(token_ids, dtype=torch.bool))
        weights = torch.ones(expert_ids.shape, dtype=dtype, device=expert_ids.device)
        return self._finish(expert_ids, weights, slots=1)


def _by_load(frequencies: Sequence[float], num_experts: int) -> list[int]:
    """Experts of tokens, the most frequent token first and always to the least loaded expert; ties by number."""
    table = [0] * len(frequencies)
    loads = [(0.0, expert) for expert in range(num_experts)]
    for token in sorted(range(len(frequencies)), key=lambda token: -frequencies[token]):
        load, expert = loads[0]
        table[token] = expert
        heapq.heapreplace(loads, (load + frequencies[token], expert))
    return table
