"""Trains models of Hugging Face transformers as they are; needs the extra ``lightning-hetu[hf]``."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hetu.models.optimization import LearningRateSchedule, TrainedByAdamW
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin
from lightning_hetu.parallel.transformers_compat import disable_caches

_IGNORED = -100


class TransformersModule(PipelineMixin, TrainedByAdamW):
    """Any model of Hugging Face transformers that has a loss: language models, encoder-decoders, classifiers.

    Nothing in it is about devices: ``Trainer(strategy="hetu_auto")`` finds the model's blocks, splits them by the
    ``tp_plan`` that the model brings, and cuts between them. Batches are what the model takes, as a mapping
    (``{"input_ids": ..., "labels": ...}``); or pairs of tokens and next tokens, as of
    :class:`~lightning_hetu.data.TextDataModule`.

    Logs ``train_loss``, ``val_loss`` and ``test_loss``: means over what is not ignored (label -100); for text also the
    losses per character, as :class:`~lightning_hetu.models.GPTLightningModule` does.

    Args:
        architecture: Name of a model class, for example ``"LlamaForCausalLM"``.
        config: Values of that class's configuration that differ from its defaults. Either these or ``pretrained``.
        pretrained: Folder that ``save_pretrained`` has written; weights and configuration come from there.
        learning_rate: Highest learning rate of AdamW.
        betas: Decay rates of AdamW's two moments.
        weight_decay: Decoupled weight decay; matrices and tables only, not the norms' gains.
        lr_schedule: After the warmup, hold the learning rate or let it fall along half a cosine.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from zero.
        total_steps: Optimizer steps at which the cosine ends. Default: as many as the Trainer will make.
        min_lr_ratio: Last learning rate of the cosine, as a fraction of ``learning_rate``.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If there is no such class, an option of the configuration is unknown, or a rate is out of range.
        FileNotFoundError: If ``pretrained`` is no folder.
    """

    pipeline_model = "model"

    def __init__(
        self,
        architecture: str = "LlamaForCausalLM",
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        lr_schedule: LearningRateSchedule = "cosine",
        warmup_steps: int = 20,
        total_steps: int | None = None,
        min_lr_ratio: float = 0.1,
    ) -> None:
        super().__init__(learning_rate, betas, weight_decay, lr_schedule, warmup_steps, total_steps, min_lr_ratio)
        if config is not None and pretrained is not None:
            raise ValueError(f"config={config} and pretrained={pretrained!r}: give one of them.")
        self.save_hyperparameters()
        self.model = build_transformer(architecture, config or {}, pretrained)
        self.architecture = architecture

    def setup(self, stage: str) -> None:
        """Compare the vocabulary with that of the datamodule, before anything is computed.

        Raises:
            ValueError: If the data has more tokens or longer samples than the model was built for.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        for option, limits in (
            ("vocab_size", ("vocab_size",)),
            ("seq_len", ("max_position_embeddings", "n_positions")),
        ):
            there = getattr(datamodule, option, None)
            name = next((name for name in limits if isinstance(getattr(self.model.config, name, None), int)), None)
            if there is None or name is None:
                continue
            allowed = getattr(self.model.config, name)
            if there > allowed:
                raise ValueError(
                    f"config.{name}={allowed} of {self.architecture}: the datamodule has {option}={there}. Raise the"
                    " one, or lower the other."
                )

    def forward(self, inputs: Any) -> Tensor:
        """The model's ``logits`` for a batch as it takes it, or for tokens ``[batch, sequence]``."""
        return self.pipeline_forward({"input_ids": inputs} if isinstance(inputs, Tensor) else inputs)

    def pipeline_loss(self, output: Any, target: Any) -> Tensor:
        """The model's own loss; for pairs of tokens and next tokens mean cross entropy in nats per token."""
        if isinstance(target, Tensor):
            logits = self.pipeline_output(output)
            return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), ignore_index=_IGNORED)
        return super().pipeline_loss(output, target)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        inputs, target = self._inputs(batch)
        loss = self.pipeline_step(inputs, target)
        self.log("train_loss", loss, prog_bar=True, batch_size=self._samples(inputs))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``val_loss``."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``test_loss``."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The model's ``logits``."""
        inputs, _ = self._inputs(batch)
        return self.pipeline_forward(inputs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model as ``from_pretrained`` of transformers reads it; the whole model must be on this process.

        Args:
            folder: Folder to write.
        """
        self.model.save_pretrained(str(folder))  # type: ignore[operator]

    def _evaluate(self, stage: str, batch: Any) -> None:
        inputs, target = self._inputs(batch)
        self.log_evaluation(stage, self.pipeline_step(inputs, target), self._samples(inputs))

    @staticmethod
    def _inputs(batch: Any) -> tuple[Any, Tensor | None]:
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return {"input_ids": batch[0]}, batch[1]
        return batch, None

    @staticmethod
    def _samples(inputs: Any) -> int:
        return len(next(value for value in inputs.values() if isinstance(value, Tensor)))


def build_transformer(architecture: str, config: Mapping[str, Any], pretrained: str | None = None) -> nn.Module:
    """A model of Hugging Face transformers, from a configuration or from a folder.

    Args:
        architecture: Name of the class.
        config: Values of its configuration that differ from the defaults.
        pretrained: Folder to load from instead.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If there is no such class, or an option is unknown.
        FileNotFoundError: If ``pretrained`` is no folder.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Hugging Face models need transformers: pip install 'lightning-hetu[hf]'.") from error
    kind = getattr(transformers, architecture, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(
            f"architecture={architecture!r}: expected a model class of transformers {transformers.__version__}."
        )
    if pretrained is not None:
        if not Path(pretrained).is_dir():
            raise FileNotFoundError(f"pretrained={pretrained!r}: expected a folder that save_pretrained has written.")
        model: nn.Module = kind.from_pretrained(pretrained)
    else:
        make_config: Any = kind.config_class
        settings = make_config()
        # Tokens that start and end a text are options of generation, which models read from their configuration.
        places = (settings, transformers.GenerationConfig())
        known = {name for place in places for name in dir(place) if name[0] != "_"} | set(settings.attribute_map)
        for name in set(config) - known:
            # Configurations take options that they have no default for; a slip of the pen is close to a known one.
            near = get_close_matches(name, known, 1, cutoff=0.85)
            if near:
                raise ValueError(
                    f"config.{name}={config[name]!r}: {type(settings).__name__} has no such option. Did you mean"
                    f" {near[0]!r}?"
                )
        model = kind(make_config(**config))
    disable_caches(model)
    return model
