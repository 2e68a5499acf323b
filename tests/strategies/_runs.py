"""Small trainings that the strategy's tests run on several ranks and on one."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetu.models import GPTLightningModule, TransformersModule
from lightning_hetu.parallel.osdp.discover import ROOT, find_units
from lightning_hetu.parallel.osdp.split import cuts_of, slice_parts
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin
from lightning_hetu.planning import HybridPlan, LayerStrategy
from lightning_hetu.planning.osdp import OperatorPlan, OSDPPlan
from lightning_hetu.strategies._lightning_compat import silent_logging
from lightning_hetu.strategies.auto import AutoHybridParallelStrategy
from lightning_hetu.strategies.osdp import OSDPStrategy

VOCABULARY, LENGTH, SAMPLES = 32, 16, 16


class Blocks(LightningModule):
    """An ordinary module: no mixin, blocks in a list, a loss of its own, tensor parallelism declared by full names."""

    tensor_parallel_plan = {"net.layers.*.up": "colwise", "net.layers.*.down": "rowwise"}

    class Block(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(dim)
            self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x + scale[:, None, None] * self.down(F.gelu(self.up(self.norm(x))))

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, dim)
        self.net = nn.Module()
        self.net.layers = nn.ModuleList(self.Block(dim) for _ in range(4))
        self.out = nn.Linear(dim, VOCABULARY)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = batch
        hidden = self.table(inputs)
        scale = 1 + inputs[:, 0] / VOCABULARY  # a second argument with a batch dimension
        for layer in self.net.layers:
            hidden = layer(hidden, scale)
        return F.cross_entropy(self.out(hidden).flatten(0, 1), target.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[0].float().mean(dim=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class Losses(Callback):
    """Global losses of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.values.append(float(loss) * trainer.accumulate_grad_batches)


class Thawing(Callback):
    """From the second epoch on trains the embedding too, in a parameter group of its own; or from where it resumes."""

    def __init__(self, resumes: bool = False) -> None:
        self.resumes = resumes

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.resumes:
            self.thaw(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.thaw(trainer, pl_module)

    def thaw(self, trainer: Trainer, pl_module: Any) -> None:
        parameters = [p for name, p in pl_module.named_parameters() if "embedding" in name]  # none in later stages
        for parameter in parameters:
            parameter.requires_grad_(True)
        trainer.optimizers[0].add_param_group({"params": parameters, "lr": 1e-3})


class Small(GPTLightningModule):
    """The GPT of all these runs."""

    def __init__(self, **options: Any) -> None:
        sizes = {"vocab_size": VOCABULARY, "max_seq_len": LENGTH, "num_layers": 4, "num_heads": 4, "dim": 32}
        super().__init__(**{**sizes, "lr_schedule": "constant", **options})


class Grouped(Small):
    """Picks parameters layer by layer, from every stage, the last layers first, and trains no embedding."""

    def __init__(self, frozen: int = 0) -> None:
        super().__init__()
        self.model.embedding.requires_grad_(False)
        for block in self.model.blocks[:frozen]:
            block.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        layers = [self.model.head, *reversed(self.model.blocks)]
        parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr": 5e-3},
        ]
        optimizer = torch.optim.AdamW(groups, lr=2e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Stepwise(Grouped):
    """One group per half of the model, so a stage has an empty one, and a schedule of all steps to come."""

    def configure_optimizers(self) -> Any:
        head = list(self.model.head.parameters())
        rest = [p for p in self.model.blocks.parameters() if p.requires_grad]
        groups = [{"params": head, "lr": 1e-2}, {"params": rest, "lr": 2e-3}]
        optimizer = torch.optim.SGD(groups, lr=2e-3, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 2e-3], total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Captured(Grouped):
    """Its optimizer keeps parameters where nobody can exchange them."""

    class Signs(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            self.kept = list(parameters)
            super().__init__(self.kept, lr=1e-2)

        def step(self, closure: Any = None) -> Any:
            loss = closure() if closure is not None else None
            with torch.no_grad():
                for parameter in self.kept:
                    if parameter.grad is not None:
                        parameter.sub_(1e-3 * parameter.grad.sign())
            return loss

    def configure_optimizers(self) -> Any:
        return self.Signs(p for p in self.parameters() if p.requires_grad)


class Llama(TransformersModule):
    """A Llama with tied embeddings on pairs of tokens and next tokens."""

    def __init__(self) -> None:
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": LENGTH,
                 "tie_word_embeddings": True}  # fmt: skip
        super().__init__("LlamaForCausalLM", sizes, lr_schedule="constant")


class T5(TransformersModule):
    """An encoder-decoder on padded text."""

    def __init__(self) -> None:
        sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                 "decoder_start_token_id": 0, "dropout_rate": 0.0}  # fmt: skip
        super().__init__("T5ForConditionalGeneration", sizes, lr_schedule="constant")


class Skipping(PipelineMixin, Blocks):
    """Names a model that is no chain of blocks: a later block sees what an earlier one was given."""

    pipeline_model = "whole"
    tensor_parallel_plan: Any = None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, 16)
            self.layers = nn.ModuleList(Blocks.Block(16) for _ in range(3))
            self.out = nn.Linear(16, VOCABULARY)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = first = self.table(tokens)
            for layer in self.layers:
                hidden = layer(hidden + first, torch.ones(len(tokens)))
            return self.out(hidden)

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.whole = self.Net()

    def pipeline_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.pipeline_step(*batch)


MODULES = {
    "skipping": Skipping,
    "llama": Llama,
    "t5": T5,
    "gpt": Small,
    "blocks": Blocks,
    "grouped": Grouped,
    "stepwise": Stepwise,
    "captured": Captured,
}


def plan_of(text: str, world: int, stages: tuple[int, ...], microbatches: int = 1, batch: int = SAMPLES) -> HybridPlan:
    """Embedding, blocks and head, separated by spaces."""
    rows = [LayerStrategy.parse(word) for word in text.split()]
    return HybridPlan(
        world_size=world, global_batch_size=batch, num_microbatches=microbatches, stages=stages,
        embedding=rows[0], layers=tuple(rows[1:-1]), head=rows[-1],
    )  # fmt: skip


def osdp_plan_of(
    modes: str, world: int, kind: str = "gpt", accumulate: int = 1, accumulation: Any = "last", **module_options: Any
) -> OSDPPlan:
    """The units of a module with these modes in turn; ``3zdp+1z2`` are slices, of units that can be cut."""
    module = MODULES[kind](**module_options)
    batch = next(iter(loader(kind=kind)))
    with torch.no_grad(), silent_logging(module):
        units = find_units(module, lambda: module.training_step(batch, 0))
    operators = []
    for index, unit in enumerate(units):
        words = modes.split()[index % len(modes.split())]
        parts = tuple(
            (part.lstrip("0123456789"), int(part[: -len(part.lstrip("0123456789"))] or 1)) for part in words.split("+")
        )
        cuts = cuts_of(module.get_submodule(unit.name)) if unit.leaf else ()
        if sum(count for _, count in parts) > 1 and not cuts:
            parts = (("zdp", 1),)
        if unit.name == ROOT and parts[0][0] == "dp":
            parts = (("z2", 1),)
        cut = cuts[0] if sum(count for _, count in parts) > 1 else ""
        operators.append(OperatorPlan(unit.name, parts, cut=cut, kind=unit.kind))
    return OSDPPlan(
        world, tuple(operators), micro_steps=accumulate, accumulation=accumulation, batch_size=SAMPLES // world
    )


def dataset(samples: int, seed: int) -> TensorDataset:
    inputs = torch.randint(VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs * 7 + 3) % VOCABULARY)


def padded(samples: int, seed: int) -> list[dict[str, Tensor]]:
    """Texts of different lengths and answers to them, for an encoder-decoder."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for tokens, target in dataset(samples, seed):
        length = int(torch.randint(LENGTH // 2, LENGTH + 1, (), generator=generator))
        mask = (torch.arange(LENGTH) < length).long()
        labels = target[: LENGTH // 2].masked_fill(torch.arange(LENGTH // 2) >= length // 2, -100)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def loader(samples: int = 96, seed: int = 0, kind: str = "gpt", **options: Any) -> DataLoader[Any]:
    data: Any = padded(samples, seed) if kind == "t5" else dataset(samples, seed)
    return DataLoader(data, **{"batch_size": SAMPLES, **options})


def whole(module: nn.Module) -> dict[str, Tensor]:
    full = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in module.named_parameters()
    }
    for name, parts in slice_parts(module).items():
        full[name] = torch.cat([full.pop(part.name) for part in parts], dim=parts[0].dim)
    return full


def train(
    rank: int,
    folder: str,
    plan: HybridPlan | OSDPPlan | str | None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fits, then tests and predicts; ``plan=None`` is a plain Trainer on one device. Returns what can be compared."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    options = dict(options or {})
    kind, ckpt_path = options.pop("module", "gpt"), options.pop("ckpt_path", None)
    shuffle, evaluate = options.pop("shuffle", True), options.pop("evaluate", True)
    strategy_options, osdp = options.pop("strategy", {}), options.pop("osdp", False)
    callbacks = options.pop("callbacks", [])
    module_options, save = options.pop("module_options", {}), options.pop("save", False)
    seed_everything(1, verbose=False)
    module = MODULES[kind](**module_options)
    losses = Losses()
    checkpoint = ModelCheckpoint(
        dirpath=folder, filename="{epoch}", monitor="val_loss", save_top_k=-1, save_last=True, every_n_epochs=1
    )
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [losses, checkpoint, EarlyStopping("val_loss", patience=3), *callbacks],
        "default_root_dir": folder,
        **options,
    }
    if plan is None:
        trainer = Trainer(devices=1, **settings)
    else:
        kind_of = OSDPStrategy if isinstance(plan, OSDPPlan) or osdp else AutoHybridParallelStrategy
        strategy: Any = kind_of(plan=plan, **strategy_options)
        trainer = Trainer(devices=torch.distributed.get_world_size(), strategy=strategy, **settings)
    trainer.fit(module, loader(kind=kind, shuffle=shuffle, drop_last=True), loader(32, 1, kind), ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(Path(folder) / "end.ckpt")
    out: dict[str, Any] = {
        "losses": losses.values,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "weights": whole(module),
        "step": trainer.global_step,
        "best": Path(checkpoint.best_model_path).name,
        "plan": getattr(trainer.strategy, "plan", None),
    }
    if evaluate:
        out["test"] = trainer.test(module, loader(32, 2, kind), verbose=False)
        out["validate"] = trainer.validate(module, loader(32, 2, kind), verbose=False)
        predictions = trainer.predict(module, loader(32, 2, kind))
        out["predicted"] = [tuple(p.shape) for p in predictions]
        out["prediction"] = predictions[0]
    return out
