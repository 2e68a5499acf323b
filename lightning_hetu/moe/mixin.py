"""What a LightningModule with mixture-of-experts layers needs: losses, gradients, figures and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_hetu.moe.checkpoint import gather_experts, scatter_experts
from lightning_hetu.moe.gates import TopKGate
from lightning_hetu.moe.gradients import clip_with_experts, expert_parameters, moe_layers, sync_expert_gradients
from lightning_hetu.moe.layer import MoELayer
from lightning_hetu.moe.metrics import BalanceRatio, DropRate, ExpertLoad, MeanActiveExperts
from lightning_hetu.parallel.expert_mesh import ExpertMesh, check_expert_parallel


class MoEModuleMixin(LightningModule):
    """Mixin for a LightningModule that contains :class:`MoELayer`.

    Its ``training_step`` adds :meth:`moe_loss` to its own loss; everything else happens by itself::

        class MyModule(MoEModuleMixin, LightningModule):
            expert_parallel = 4

            def training_step(self, batch, batch_idx):
                loss = ...
                return loss + self.moe_loss()

    Under DDPStrategy with several processes the experts are shared out, the gradients of shared experts are added,
    ``gradient_clip_val`` counts every expert once, and checkpoints hold all experts under the names of the whole model,
    so that any number of processes can load them. ``hetu_auto`` plans what is around the experts, and shares experts
    out beside it; ``hetu_osdp`` shards stacked experts like any other parameters.

    Attributes:
        expert_parallel: Ranks that share out the experts; ``None`` for all, 1 for none.
        devices_per_node: Ranks of one node, where experts are shared over nodes and rows may travel in two stages.
        expert_slots: Room for experts on every rank, where they are to move: a number, or a float for a multiple of its
            share, rounded up. ``None`` where they stay.
        moe_coefficients: What the gates' losses are multiplied by, by their names.
    """

    expert_parallel: int | None = None
    devices_per_node: int | None = None
    expert_slots: int | float | None = None
    moe_coefficients: Mapping[str, float] = {"balance": 1e-2, "z": 1e-3, "alignment": 1e-2}
    _moe_loads: dict[int, Tensor]
    """Assignments per expert since the last optimizer step, by the number of the layer."""
    _moe_step = 0
    _moe_metrics: list[dict[str, Metric]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._completed: set[int] = set()
        """Optimizers whose gradients are complete for the step to come."""
        self._watched: set[int] = set()

    def moe_loss(self) -> Tensor:
        """Sum over layers of the gates' losses times their coefficients, of the last forward pass.

        It belongs into the loss of ``training_step``, which Lightning divides by ``accumulate_grad_batches``.

        Raises:
            ValueError: If a gate has a loss without a coefficient.
        """
        parts = []
        for layer in moe_layers(self):
            for name, loss in layer.losses.items():
                if name not in self.moe_coefficients:
                    raise ValueError(
                        f"moe_coefficients: expected one for {name!r}; there are {', '.join(self.moe_coefficients)}."
                    )
                parts.append(self.moe_coefficients[name] * loss)
        return torch.stack(parts).sum() if parts else torch.zeros((), device=self.device)

    # ------------------------------------------------------------------ where experts are

    def configure_model(self) -> None:
        """Shares the experts out, where there are several processes; again it does nothing."""
        super().configure_model()
        layers = [layer for layer in moe_layers(self) if layer.groups is None]
        if not layers or not dist.is_initialized() or dist.get_world_size() == 1 or self.expert_parallel == 1:
            return
        strategy = self.trainer.strategy
        if self._is_planned:
            if self.expert_parallel is not None and not strategy.shares_experts:  # type: ignore[attr-defined]
                raise ValueError(
                    f"expert_parallel={self.expert_parallel}: {type(strategy).__name__} shards experts as it shards all"
                    " other parameters; leave it out, or use DDPStrategy or hetu_auto."
                )
            check_expert_parallel(self.expert_parallel, dist.get_world_size())
            for layer in layers:  # once there is a plan
                layer.expert_parallel, layer.devices_per_node = self.expert_parallel, self.devices_per_node
            return
        if not isinstance(strategy, DDPStrategy):
            raise ValueError(
                f"expert_parallel={self.expert_parallel}: experts cannot be shared out under {type(strategy).__name__};"
                " use DDPStrategy or hetu_auto, or set expert_parallel=1."
            )
        device = strategy.root_device.type
        groups = ExpertMesh.build(device, expert_parallel=self.expert_parallel, devices_per_node=self.devices_per_node)
        for layer in layers:
            layer.parallelize(groups, slots=self._slots_of(layer, groups.expert_size))
        # DDP would take every rank's experts for copies of the same ones.
        names = [name for name, _ in expert_parameters(self)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def _slots_of(self, layer: MoELayer, ranks: int) -> int | None:
        if not isinstance(self.expert_slots, float):
            return self.expert_slots
        return math.ceil(self.expert_slots * layer.num_experts / ranks)

    @property
    def _is_planned(self) -> bool:
        """Whether the strategy decides where experts are."""
        return hasattr(self.trainer.strategy, "shares_experts")

    # ------------------------------------------------------------------ gradients

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Completes the gradients of experts; who overrides it calls ``super()``."""
        super().on_before_optimizer_step(optimizer)
        self._complete(optimizer)

    def _complete(self, optimizer: Optimizer) -> None:
        """Once per step, for the parameters of the optimizer that steps."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # of Lightning's wrapper
        if id(optimizer) in self._completed:
            return
        self._completed.add(id(optimizer))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Under a plan the loss is divided before, and gradients are summed.
        sync_expert_gradients(self, mean=not self._is_planned, parameters=parameters)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and expert_parameters(self):
            # One rank alone may have seen an overflow, in its own experts: all leave out the step, or none.
            for found in scaler._found_inf_per_device(optimizer).values():
                dist.all_reduce(found, op=dist.ReduceOp.MAX)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._completed:
            raise RuntimeError(
                f"{type(self).__name__}.on_before_optimizer_step does not call super().on_before_optimizer_step: the"
                " gradients of experts were not those of all ranks."
            )
        self._completed.discard(id(optimizer))

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips in manual optimization, by the norm of the whole model."""
        if self.automatic_optimization or self._is_planned or not expert_parameters(self):
            super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        self._complete(optimizer)
        self.configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm of the whole model, where experts are spread over ranks."""
        others = self._is_planned or not expert_parameters(self)  # a planned strategy knows what is where
        if not gradient_clip_val or gradient_clip_algorithm == "value" or others:
            super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip_with_experts(self, parameters, float(gradient_clip_val))

    # ------------------------------------------------------------------ figures, and biases of gates

    def on_train_start(self) -> None:
        """Makes the figures of every layer."""
        super().on_train_start()
        self._completed = set()
        if expert_parameters(self):
            for optimizer in self.trainer.optimizers:
                if id(optimizer) not in self._watched:
                    self._watched.add(id(optimizer))
                    optimizer.register_step_post_hook(self._after_step)
        self._moe_step, self._moe_loads = self.trainer.global_step, {}
        # In a list, so that they are no part of the model.
        self._moe_metrics = [_metrics_of(layer, self.device) for layer in moe_layers(self)]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Forgets the losses of the batch before: a layer may be left out of this one."""
        for layer in moe_layers(self):
            layer.losses, layer.last, layer.rank_rows = {}, None, ()
        return super().on_train_batch_start(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts where the batch went; after an optimizer step it logs that, and moves the biases of gates."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        layers = list(moe_layers(self))
        if not layers:
            return
        for number, layer in enumerate(layers):
            if layer.last is not None:
                loads = layer.last.tokens_per_expert
                self._moe_loads[number] = self._moe_loads[number] + loads if number in self._moe_loads else loads
                for name, metric in self._moe_metrics[number].items():
                    metric.update(layer.rank_rows if name == "balance_ratio" and layer.rank_rows else layer.last)
        if self.trainer.global_step == self._moe_step:
            return
        self._moe_step = self.trainer.global_step
        for number, layer in enumerate(layers):
            self._move_bias(layer, self._moe_loads.get(number))
        self._moe_loads = {}
        if self._moe_step % cast(Any, self.trainer).log_every_n_steps == 0:
            self.log_moe_metrics()

    def log_moe_metrics(self) -> None:
        """Logs the figures of all layers since the last time, under ``moe/``, and starts them anew."""
        found: dict[str, list[Tensor]] = {}
        for of_layer in self._moe_metrics:
            for name, metric in of_layer.items():
                value = metric.compute()
                values = value if isinstance(value, dict) else {"": value}
                for part, scalar in values.items():
                    found.setdefault(f"moe/{name}{part and '_'}{part}", []).append(scalar)
                metric.reset()
        self.log_dict({name: torch.stack(values).mean() for name, values in found.items()})

    @staticmethod
    def _move_bias(layer: MoELayer, load: Tensor | None) -> None:
        gate = layer.gate
        if not isinstance(gate, TopKGate) or not gate.bias_balancing:
            return
        load = gate.weight.new_zeros(layer.num_experts, dtype=torch.int64) if load is None else load.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(load)
        gate.update_bias(load)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts all experts, and what the optimizers keep for them, in the place of this rank's."""
        super().on_save_checkpoint(checkpoint)
        gather_experts(self, checkpoint, self.trainer.optimizers)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes this rank's experts out of a checkpoint that has all."""
        super().on_load_checkpoint(checkpoint)
        scatter_experts(self, checkpoint)


def _metrics_of(layer: MoELayer, device: torch.device) -> dict[str, Metric]:
    ranks = 1 if layer.groups is None else layer.groups.expert_size
    owners = [expert * ranks // layer.num_experts for expert in range(layer.num_experts)]
    metrics: dict[str, Metric] = {
        "load": ExpertLoad(layer.num_experts),
        "active": MeanActiveExperts(),
        "drop_rate": DropRate(),
        "balance_ratio": BalanceRatio(owners),
    }
    return {name: metric.to(device) for name, metric in metrics.items()}
