"""The dense-to-sparse gate of EvoMoE: many experts per token at first, one at last (arXiv 2112.14397).

A softmax with Gumbel noise and a temperature says which experts count for a token: those above a threshold. While the
temperature falls they become fewer, and the gate ends as Switch routing. It differs from the authors' code in three
points: a token always keeps its best expert, also where no expert is above the threshold; nothing becomes hard unless
it is told to; and the room in experts follows the number of experts in use instead of being T for each.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_hetu.moe.gates._checks import check_at_most, check_choice, check_count, check_number
from lightning_hetu.moe.gates._gate import RouterGate
from lightning_hetu.moe.gates._output import GateOutput
from lightning_hetu.moe.gates._scores import gumbel_like, weights_of
from lightning_hetu.moe.gates.switch import route_to_most_probable

Phase = Literal["single", "soft", "hard"]
Noise = Literal["gumbel", "none"]
SoftWeight = Literal["softmax", "tempered"]
EvalMode = Literal["same", "top1"]


class DTSGate(RouterGate):
    """Sends a token to all experts whose tempered probability is above a threshold.

    In phase ``soft``, s = softmax((logits + noise) / tau), and a token gets every expert with s above ``threshold``, at
    least ``min_active`` and at most ``max_active`` of them. ``expert_ids`` is ``[T, max_active]``, by falling s and -1
    behind the last one, so the first column is the largest s. The balance loss is E times the sum over experts of the
    fraction of tokens that have it times its mean weight, whose gradient goes through the weights only. In phase
    ``single``, before experts are made different, every token has expert 0 with weight 1, nothing is dropped, and
    losses are zero. In phase ``hard`` everything is as in :class:`SwitchGate`, bit for bit. Both give one slot per
    token.

    With a capacity, ``soft`` sizes it by ``average_active``, the moving average that :meth:`update_average` keeps; to
    read it, the host waits for the device. Forward passes do not change it: activation checkpointing repeats them.

    The temperature and the phase are a schedule's to set, at every start too: they are not saved with the weights.
    ``metrics`` has ``mean_active``, experts per token, and ``frac_single``, the share of tokens with one expert.

    Args:
        dim: Width of a token.
        num_experts: Number of experts E.
        tau: Temperature.
        threshold: What s must be above.
        noise: In training, standard Gumbel noise on logits, or ``none``.
        weight: ``softmax``: weights are the probabilities without noise and temperature, as the authors have it.
            ``tempered``: weights are s; they near 1 when tau falls, and the router learns less and less.
        min_active: The least experts per token in ``soft``.
        max_active: The most experts per token in ``soft``. Default: all.
        eval_mode: In evaluation, ``same`` as in training but without noise, or ``top1``, as in ``hard``.
        average_decay: Weight of the past in ``average_active`` at each update.
        phase: Phase to start with.
        **options: Options of :class:`RouterGate`.

    Attributes:
        tau: float32 scalar buffer, not saved.
        average_active: float32 scalar buffer, saved; starts at ``max_active``.

    Raises:
        ValueError: If an option is out of range.
    """

    tau: Tensor
    average_active: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        tau: float = 1.0,
        threshold: float = 0.001,
        noise: Noise = "gumbel",
        weight: SoftWeight = "softmax",
        min_active: int = 1,
        max_active: int | None = None,
        eval_mode: EvalMode = "same",
        average_decay: float = 0.99,
        phase: Phase = "soft",
        **options: Any,
    ) -> None:
        check_count("num_experts", num_experts)
        max_active = num_experts if max_active is None else max_active
        check_number("tau", tau, above=True)
        check_number("threshold", threshold, most=1.0, below=True)
        check_choice("noise", noise, Noise)
        check_choice("weight", weight, SoftWeight)
        check_at_most("max_active", max_active, num_experts, "num_experts")
        check_at_most("min_active", min_active, max_active, "max_active")
        check_choice("eval_mode", eval_mode, EvalMode)
        check_number("average_decay", average_decay, most=1.0, below=True)
        check_choice("phase", phase, Phase)
        super().__init__(dim, num_experts, **options)
        self.threshold = threshold
        self.noise: Noise = noise
        self.soft_weight: SoftWeight = weight
        self.min_active = min_active
        self.max_active = max_active
        self.eval_mode: EvalMode = eval_mode
        self.average_decay = average_decay
        self.phase: Phase = phase
        self._first_tau = tau
        self.register_buffer("tau", torch.tensor(tau, dtype=torch.float32), persistent=False)
        self.register_buffer("average_active", torch.tensor(float(max_active), dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Draws the router's weights as ``nn.Linear`` does; the temperature and the average start anew."""
        super().reset_parameters()
        if "tau" in self._buffers:
            torch.nn.init.constant_(self.tau, self._first_tau)
            torch.nn.init.constant_(self.average_active, self.max_active)

    @property
    def hard(self) -> bool:
        """Whether the gate routes as :class:`SwitchGate` does."""
        return self.phase == "hard"

    def set_hard(self, hard: bool) -> None:
        """Ends the schedule, or goes back to phase ``soft``."""
        self.set_phase("hard" if hard else "soft")

    def set_phase(self, phase: Phase) -> None:
        """Changes the phase.

        Raises:
            ValueError: If there is none of that name.
        """
        check_choice("phase", phase, Phase)
        self.phase = phase

    def set_tau(self, value: float) -> None:
        """Sets the temperature.

        Raises:
            ValueError: If it is not above 0.
        """
        check_number("tau", value, above=True)
        self.tau.fill_(value)

    @torch.no_grad()
    def update_average(self, mean_active: Tensor | float) -> None:
        """Moves ``average_active`` towards the experts per token of a step.

        To be called once per optimizer step, on every rank with the same value: experts' room depends on it.

        Args:
            mean_active: The mean of ``metrics["mean_active"]`` over the micro-batches and ranks of the step.
        """
        self.average_active.mul_(self.average_decay).add_((1 - self.average_decay) * mean_active)

    def _route(self, logits: Tensor, valid: Tensor) -> GateOutput:
        if self.phase == "single":
            return self._route_single(logits, valid)
        if self.phase == "hard" or (not self.training and self.eval_mode == "top1"):
            return route_to_most_probable(self, logits, valid, _one_each(logits))
        return self._route_soft(logits, valid)

    def _route_single(self, logits: Tensor, valid: Tensor) -> GateOutput:
        scores = logits.softmax(dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)
        expert_ids = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
        expert_ids = expert_ids.masked_fill(~valid.unsqueeze(-1), -1)
        nothing = 0.0 * scores.sum()  # with a graph: wrappers that wait for every gradient get one for the router
        return self._finish(
            expert_ids,
            (expert_ids >= 0).to(scores.dtype),
            scores=scores,
            losses={name: nothing for name in ("balance", "z")[: 1 + self.z_loss]},
            metrics=_one_each(logits),
        )

    def _route_soft(self, logits: Tensor, valid: Tensor) -> GateOutput:
        noisy = logits + gumbel_like(logits) if self.training and self.noise == "gumbel" else logits
        tempered = (noisy / self.tau).softmax(dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)
        scores = logits.softmax(dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)
        ranked, order = tempered.detach().sort(dim=-1, descending=True, stable=True)
        active = (ranked > self.threshold).sum(dim=-1, keepdim=True).clamp(self.min_active, self.max_active)
        rank = torch.arange(self.max_active, device=logits.device)
        chosen = order[:, : self.max_active].masked_fill(rank >= active, -1)
        source = scores if self.soft_weight == "softmax" else tempered
        share = self._share(chosen, valid, scores.dtype)
        unchosen = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, : self.max_active], rank >= active)
        expert_ids = self._placed(chosen, valid)
        return self._finish(
            expert_ids,
            weights_of(source, expert_ids),
            scores=scores,
            slots=self.average_active,
            confidence=self._confidence(scores),
            losses=self._losses(logits, valid, source.masked_fill(unchosen, 0.0), share, self.num_experts),
            metrics=_activity(active, valid),
        )


def _one_each(logits: Tensor) -> dict[str, Tensor]:
    one = torch.ones((), device=logits.device)
    return {"mean_active": one, "frac_single": one}


def _activity(active: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Experts per token, and the share of tokens with one, over the rows that count; 0 without any."""
    tokens = valid.sum().clamp(min=1)
    active = active.squeeze(-1).masked_fill(~valid, 0)
    return {"mean_active": active.sum() / tokens, "frac_single": (active == 1).sum() / tokens}
