"""Moves experts to where they are needed while a model trains (FlexMoE, arXiv 2304.03946).

Between optimizer steps the callback looks at the tokens of the last ones, plans with
:func:`lightning_hetu.moe.placement.plan`, and moves experts by :class:`lightning_hetu.moe.relocate.Relocation`. What a
model computes does not depend on where its experts are, and neither do its checkpoints.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from torch.optim import Optimizer

from lightning_hetu.callbacks.dts_gate_schedule import DTSGateSchedule
from lightning_hetu.callbacks.routing_trace import check_layers, gathered, step_counts
from lightning_hetu.moe.gradients import moe_layers
from lightning_hetu.moe.layer import MoELayer
from lightning_hetu.moe.mixin import MoEModuleMixin
from lightning_hetu.moe.placement import Placement, PlacementCostModel, PlacementPlan, plan
from lightning_hetu.moe.placement.planner import Policy
from lightning_hetu.moe.placement.replay import Refresh
from lightning_hetu.moe.placement.split import SplitName, balance_ratio, split_tokens
from lightning_hetu.moe.placement_costs import measure_placement_costs
from lightning_hetu.moe.relocate import Relocation, check_elementwise


class FlexMoEPlacement(Callback):
    """Copies hot experts to more ranks, takes copies of cold ones away, and moves others, under DDPStrategy.

    Every rank has slots for more experts than its share. At each look, every ``interval`` optimizer steps, there are
    new values, which Lightning writes every ``log_every_n_steps``. As means over layers: ``flex/balance_ratio``, tokens
    of the fullest rank over the mean since the last look; ``flex/balance_ratio_planned``, what is expected from now on;
    ``flex/operations``, ``flex/bytes_moved`` over all ranks, and ``flex/seconds``, of planning and moving weights.

    Args:
        slots: Experts that a rank has room for: a whole number, or as a multiple of its share, rounded up.
        policy: ``flexmoe``; ``eplb``, which always makes a new placement; ``shadow``, which puts the experts that were
            hot on all ranks (FasterMoE); ``none``.
        split: How tokens of an expert are split between its ranks: ``flow``, such that the fullest rank has least, or
            ``even``.
        refresh: When the ``flow`` split is solved: by the tokens of a ``step`` in its forward pass, or by those of the
            window at each ``check``.
        threshold: Balance ratio above which something is done.
        interval: Optimizer steps between two looks.
        window: Optimizer steps whose tokens count.
        max_ops: Most operations of a layer at a time; ``eplb`` and ``shadow`` do nothing where they need more. By
            default any number.
        start_step: Optimizer step before which nothing is done.
        dry_run: Whether plans are only logged.
        cost_model: What steps and moves take: ``profile`` measures it when training starts, by the first layer. By
            default balance alone counts.

    Attributes:
        operations: How many were done in this run, in all layers.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        slots: int | float = 1.5,
        policy: Policy = "flexmoe",
        split: SplitName = "flow",
        refresh: Refresh = "check",
        threshold: float = 1.1,
        interval: int = 10,
        window: int = 10,
        max_ops: int | None = None,
        start_step: int = 0,
        dry_run: bool = False,
        cost_model: PlacementCostModel | Literal["profile"] | None = None,
    ) -> None:
        for name, value, least in (("interval", interval, 1), ("window", window, 1), ("start_step", start_step, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected an integer of at least {least}.")
        if max_ops is not None and (isinstance(max_ops, bool) or not isinstance(max_ops, int) or max_ops < 1):
            raise ValueError(f"max_ops={max_ops!r}: expected an integer of at least 1, or null for any number.")
        choices = (("policy", policy, Policy), ("split", split, SplitName), ("refresh", refresh, Refresh))
        for name, option, allowed in choices:
            if option not in get_args(allowed):
                raise ValueError(f"{name}={option!r}: expected one of {', '.join(get_args(allowed))}.")
        if isinstance(slots, bool) or not isinstance(slots, int | float) or not slots >= 1:
            raise ValueError(
                f"slots={slots!r}: expected a number of experts, or a multiple of a rank's share from 1.0."
            )
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 1:
            raise ValueError(f"threshold={threshold!r}: expected a balance ratio of at least 1.")
        if isinstance(cost_model, str) and cost_model != "profile":
            raise ValueError(f"cost_model={cost_model!r}: expected 'profile', a PlacementCostModel, or null.")
        self.slots, self.threshold, self.interval, self.window = slots, threshold, interval, window
        self.policy: Policy = policy
        self.split: SplitName = split
        self.refresh: Refresh = refresh
        self.max_ops, self.start_step, self.dry_run, self.cost_model = max_ops, start_step, dry_run, cost_model
        self._costs = None if isinstance(cost_model, str) else cost_model
        self.operations = 0
        self._saved: dict[str, Any] | None = None
        self._layers: list[MoELayer] = []
        self._mover: Relocation | None = None
        self._counts: deque[NDArray[np.int64]] = deque(maxlen=window)
        """Of each step int64 ``[layers, ranks, experts]``, of all groups of ranks together."""
        self._current: torch.Tensor | None = None
        self._rows: NDArray[np.int64] | None = None
        self._step = self._looked = 0

    # ------------------------------------------------------------------ the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes room for experts, before they are shared out.

        Raises:
            ValueError: If the module has no :class:`MoEModuleMixin`, or the strategy shares experts out itself.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, MoEModuleMixin):
            raise ValueError(f"FlexMoEPlacement: expected a MoEModuleMixin, not {type(pl_module).__name__}.")
        if hasattr(trainer.strategy, "shares_experts"):
            raise ValueError(
                f"FlexMoEPlacement: under {type(trainer.strategy).__name__} experts stay where they are; use"
                " DDPStrategy."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            averages = isinstance(other, StochasticWeightAveraging | WeightAveraging)
            if averages or (isinstance(other, DTSGateSchedule) and other.diversify_step is not None):
                what = "averages of weights do" if averages else "diversify_step does"
                raise ValueError(f"FlexMoEPlacement with {type(other).__name__}: {what} not follow experts that move.")
        pl_module.expert_slots = self.slots

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Brings experts to where they were, if training goes on.

        Raises:
            ValueError: If an optimizer cannot be used.
        """
        self._step = self._looked = trainer.global_step
        self._current, self._rows = None, None
        check_layers("FlexMoEPlacement", pl_module)
        self._layers = list(moe_layers(pl_module))
        if not self._layers or any(layer.placement is None for layer in self._layers):
            rank_zero_warn(
                "FlexMoEPlacement: experts are not shared out over ranks with slots for more: there is nothing to move."
            )
            self._layers = []
            return
        check_elementwise(trainer.optimizers)
        groups = self._layers[0].groups
        assert groups is not None
        self._mover = Relocation.among(groups, getattr(trainer.strategy, "_timeout", None))
        if self.cost_model == "profile":
            with isolate_rng():
                self._costs = measure_placement_costs(self._layers[0])
        if self._solves_each_step:
            for layer in self._layers:
                layer.fractions = None
        self._restore(trainer.optimizers)

    def _restore(self, optimizers: list[Optimizer]) -> None:
        """Takes up what a checkpoint has, where it fits the ranks and slots of today."""
        saved, self._saved = self._saved, None
        if saved is None or self._mover is None:
            return
        shapes = [np.shape(layer.placement.slots) for layer in self._layers if layer.placement is not None]
        if [np.shape(slots) for slots in saved["placements"]] != shapes:
            rank_zero_info(
                "FlexMoEPlacement: ranks or slots are others than in the checkpoint; experts start in order."
            )
            return
        self._mover.move(self._layers, [Placement.from_lists(slots) for slots in saved["placements"]], optimizers)
        self._mover.finish()
        for layer, fractions in zip(self._layers, saved["fractions"], strict=True):
            solved = fractions is None or self._solves_each_step
            layer.fractions = None if solved else np.array(fractions)
        self._counts.extend(np.array(counts) for counts in saved["counts"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts tokens; every ``interval`` steps it looks whether experts should move."""
        if not self._layers:
            return
        counts = step_counts(pl_module)
        self._current = counts if self._current is None else self._current + counts
        groups = self._layers[0].groups
        assert groups is not None
        # A layer may have been left out of this batch.
        rows = np.array([layer.rank_rows or (0,) * groups.expert_size for layer in self._layers])
        self._rows = rows if self._rows is None else self._rows + rows
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        everyone = gathered(self._current).cpu().numpy()  # [ranks, layers, experts]
        self._current = None
        # Groups of ranks have the same experts in the same places, so they decide by all their tokens.
        together = everyone.reshape(-1, groups.expert_size, *everyone.shape[1:]).sum(axis=0)
        self._counts.append(together.swapaxes(0, 1))
        if self._step // self.interval > self._looked // self.interval and self._step >= self.start_step:
            self._looked = self._step
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._mover is not None and self._rows is not None
        begin = time.perf_counter()
        mean = np.mean(np.stack(self._counts), axis=0)  # [layers, ranks, experts]
        plans = [self._plan(layer, loads) for layer, loads in zip(self._layers, mean, strict=True)]
        moves = [p.ops if p is not None and not self.dry_run else () for p in plans]
        if any(moves):
            self._mover.move(self._layers, [self._after(*pair) for pair in zip(self._layers, plans, strict=True)],
                             trainer.optimizers)  # fmt: skip
        self.operations += sum(map(len, moves))
        planned = []
        for layer, loads, found in zip(self._layers, mean, plans, strict=True):
            assert layer.placement is not None
            split = split_tokens(loads, layer.placement, self.split)
            layer.fractions = None if self._solves_each_step else split.fractions
            planned.append(found.ratio_after if self.dry_run and found is not None else split.ratio)
        rows = torch.from_numpy(self._rows).to(pl_module.device)
        if dist.get_world_size() > rows.shape[1]:
            dist.all_reduce(rows)  # each group's rows as often as it has ranks, which changes no ratio
        copies = sum(len(p.copies) for p, done in zip(plans, moves, strict=True) if p is not None and done)
        pl_module.log_dict(
            {
                "flex/balance_ratio": float(np.mean([balance_ratio(row) for row in rows.cpu().numpy()])),
                "flex/balance_ratio_planned": float(np.mean(planned)),
                "flex/operations": float(sum(map(len, moves))),
                "flex/bytes_moved": float(copies * self._state_bytes(trainer.optimizers)),
                "flex/seconds": time.perf_counter() - begin,
            }
        )
        self._rows = None

    def _plan(self, layer: MoELayer, loads: NDArray[np.float64]) -> PlacementPlan | None:
        """What is worth doing in a layer; ``None`` for nothing."""
        assert layer.placement is not None
        if self.policy == "none":
            return None
        if self.policy != "shadow" and split_tokens(loads, layer.placement, self.split).ratio <= self.threshold:
            return None
        found = plan(
            loads,
            layer.placement,
            policy=self.policy,
            split=self.split,
            max_ops=self.max_ops,
            cost_model=self._costs,
        )
        return found if found.ops and (found.pays or self.policy == "shadow") else None

    @property
    def _solves_each_step(self) -> bool:
        return self.refresh == "step" and self.split == "flow"

    @staticmethod
    def _after(layer: MoELayer, found: PlacementPlan | None) -> Placement:
        assert layer.placement is not None
        return layer.placement if found is None else found.after

    def _state_bytes(self, optimizers: list[Optimizer]) -> int:
        """Bytes of one expert with what optimizers keep of it."""
        total = 0
        for parameter in self._layers[0].experts.parameters():
            states = [value for optimizer in optimizers for value in optimizer.state.get(parameter, {}).values()]
            tensors = [parameter, *(v for v in states if isinstance(v, torch.Tensor) and v.shape == parameter.shape)]
            total += sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
        return total

    # ------------------------------------------------------------------ what is on its way

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Waits for what optimizers keep of moved experts."""
        self._finish()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As before a step."""
        self._finish()

    def _finish(self) -> None:
        if self._mover is not None:
            self._mover.finish()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Where experts are, how tokens are split, and the tokens of the last steps."""
        if not self._layers:
            return self._saved or {}
        self._finish()
        return {
            "placements": [layer.placement.to_lists() for layer in self._layers if layer.placement is not None],
            "fractions": [None if layer.fractions is None else layer.fractions.tolist() for layer in self._layers],
            "counts": [counts.tolist() for counts in self._counts],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave; experts move when training starts."""
        self._saved = state_dict or None
