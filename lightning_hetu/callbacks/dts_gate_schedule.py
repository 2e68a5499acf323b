"""From dense to sparse: the schedule of DTS gates (EvoMoE, arXiv 2112.14397, sections 3.2 and 3.3).

Training begins with many experts per token and ends with one. Everything is a function of the optimizer step, so
accumulating gradients changes nothing, and a run that is resumed goes on exactly.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_hetu.moe.diversify import Diversity, Moments, diversify
from lightning_hetu.moe.gates import DTSGate
from lightning_hetu.moe.gates.dts import Phase
from lightning_hetu.moe.gradients import moe_layers

Mode = Literal["linear", "exp", "cosine", "constant"]


class GateState(NamedTuple):
    """What every gate is set to in a step."""

    phase: Phase
    tau: float


class DTSGateSchedule(Callback):
    """Lowers the temperature of all :class:`DTSGate` of a model from step to step.

    Before ``diversify_step`` every token goes to expert 0, as in a dense model; at that step all experts become changed
    copies of it. From ``start_step`` on the temperature falls for ``steps`` optimizer steps, and with it the number of
    experts per token. From ``hard_step`` on gates route as Switch does.

    Logs ``dts/tau``, ``dts/mean_active``, experts per token, and ``dts/frac_single``, the share of tokens with one,
    every ``log_every_n_steps``.

    Args:
        steps: Optimizer steps in which the temperature falls.
        tau_start: First temperature.
        tau_end: Last temperature.
        mode: How it falls: ``linear``, by an equal factor per step (``exp``), along half a ``cosine``, or not at all
            (``constant``).
        start_step: Step at which it begins to fall.
        hard_step: Step from which gates are hard; ``None`` for never.
        diversify_step: Step up to which there is one expert; ``None`` for no such phase.
        diversity: How copies are made different: ``noise``, ``mask`` or ``drop``; see
            :func:`lightning_hetu.moe.diversify.diversify`.
        diversity_amount: How much.
        moments: Whether the optimizer's moments of expert 0 are copied too, or all set to zero.
        seed: Seed of the noise.

    Raises:
        ValueError: If a number is out of range, or steps are not in order.
    """

    def __init__(
        self,
        steps: int,
        tau_start: float = 2.0,
        tau_end: float = 0.3,
        mode: Mode = "exp",
        start_step: int = 0,
        hard_step: int | None = None,
        diversify_step: int | None = None,
        diversity: Diversity = "noise",
        diversity_amount: float = 0.1,
        moments: Moments = "copy",
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("steps", steps, 1),
            ("start_step", start_step, 0),
            ("hard_step", hard_step, 0),
            ("diversify_step", diversify_step, 1),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r}: expected an integer of at least {least}.")
        for name, tau in (("tau_start", tau_start), ("tau_end", tau_end)):
            if not 0 < tau < math.inf:
                raise ValueError(f"{name}={tau!r}: expected a number above 0.")
        options = (("mode", mode, Mode), ("diversity", diversity, Diversity), ("moments", moments, Moments))
        for name, option, allowed in options:
            if option not in get_args(allowed):
                raise ValueError(f"{name}={option!r}: expected one of {', '.join(get_args(allowed))}.")
        if hard_step is not None and diversify_step is not None and hard_step < diversify_step:
            raise ValueError(f"hard_step={hard_step}: expected at least diversify_step={diversify_step}.")
        self.steps, self.start_step, self.hard_step, self.diversify_step = steps, start_step, hard_step, diversify_step
        self.tau_start, self.tau_end = tau_start, tau_end
        self.mode: Mode = mode
        self.diversity: Diversity = diversity
        self.diversity_amount = diversity_amount
        self.moments: Moments = moments
        self.seed = seed
        self._diversified = False
        self._reached = 0
        self._seen: list[list[Tensor]] = []
        """Per micro-batch of the step: experts per token and share with one, of every gate."""

    def at(self, step: int) -> GateState:
        """What gates are set to in an optimizer step, counted from 0."""
        tau = self._tau(max(step - self.start_step, 0) / self.steps)
        if self.hard_step is not None and step >= self.hard_step:
            return GateState("hard", tau)
        if self.diversify_step is not None and step < self.diversify_step:
            return GateState("single", tau)
        return GateState("soft", tau)

    def _tau(self, progress: float) -> float:
        progress = min(progress, 1.0)
        first, last = self.tau_start, self.tau_end
        if self.mode == "linear":
            return first + (last - first) * progress
        if self.mode == "exp":
            return first * (last / first) ** progress
        if self.mode == "cosine":
            return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))
        return first

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks for the gates.

        Raises:
            ValueError: If the model has none.
        """
        if not _gates(pl_module):
            raise ValueError(
                f"DTSGateSchedule: {type(pl_module).__name__} has no DTSGate; build its layers with gate='dts'."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the gates for the step, and makes experts different where the step says so."""
        self._reached = trainer.global_step
        state = self.at(self._reached)
        if self.diversify_step is not None and state.phase != "single" and not self._diversified:
            for number, layer in enumerate(_layers(pl_module)):
                diversify(
                    layer,
                    how=self.diversity,
                    amount=self.diversity_amount,
                    seed=self.seed + number,
                    optimizers=trainer.optimizers,
                    moments=self.moments,
                )
            self._diversified = True
        self._set(pl_module, state)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps how many experts were in use; after an optimizer step the gates and the log get the mean."""
        found = [layer.last for layer in _layers(pl_module)]
        values = [torch.stack([x.metrics["mean_active"], x.metrics["frac_single"]]) for x in found if x is not None]
        if not values:
            return
        self._seen.append(values)
        if trainer.global_step == self._reached:
            return
        means = torch.stack([torch.stack(of_gate).mean(dim=0) for of_gate in zip(*self._seen, strict=True)])
        self._seen = []
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(means)
            means /= dist.get_world_size()
        for gate, (active, _) in zip(_gates(pl_module), means, strict=True):
            gate.update_average(active)
        if trainer.global_step % cast(Any, trainer).log_every_n_steps == 0:
            active, single = means.mean(dim=0)
            pl_module.log_dict(
                {"dts/tau": self.at(self._reached).tau, "dts/mean_active": active, "dts/frac_single": single}
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the gates as training has them, or had them where the checkpoint was written."""
        self._set_for_evaluation(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`on_validation_start`."""
        self._set_for_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`on_validation_start`."""
        self._set_for_evaluation(trainer, pl_module)

    def _set_for_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = max(self._reached, trainer.global_step - 1)
        self._set(pl_module, self.at(step))

    @staticmethod
    def _set(pl_module: LightningModule, state: GateState) -> None:
        for gate in _gates(pl_module):
            gate.set_phase(state.phase)
            gate.set_tau(state.tau)

    def state_dict(self) -> dict[str, Any]:
        """Whether experts are different already, and the last step."""
        return {"diversified": self._diversified, "reached": self._reached}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave."""
        self._diversified = state_dict["diversified"]
        self._reached = state_dict["reached"]


def _layers(module: LightningModule) -> list[Any]:
    return [layer for layer in moe_layers(module) if isinstance(layer.gate, DTSGate)]


def _gates(module: LightningModule) -> list[DTSGate]:
    return [layer.gate for layer in _layers(module)]
