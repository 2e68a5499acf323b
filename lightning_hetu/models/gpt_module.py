"""The LightningModule around :class:`~lightning_hetu.models.gpt.GPT`: loss, logging, optimizer, learning rate.

It contains nothing about devices. ``Trainer(strategy="hetu_auto")`` cuts it by what :class:`PipelineMixin` names, and
every other strategy runs it as it stands.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lightning_hetu.models.gpt import GPT, GPTConfig, example_tokens
from lightning_hetu.models.optimization import LearningRateSchedule, TrainedByAdamW
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin


class GPTLightningModule(PipelineMixin, TrainedByAdamW):
    """Trains a small GPT to predict the next token.

    Logs ``train_loss``, ``val_loss`` and ``test_loss`` in nats per token. With a datamodule that knows its
    ``characters_per_token`` (such as :class:`~lightning_hetu.data.TextDataModule`) it also logs
    ``val_loss_per_character``, and beside it ``bigram_loss_per_character``: what counting pairs of tokens achieves on
    the same text. A model above that number has learned nothing that needs a network.

    Args:
        vocab_size: Number of different tokens. Link it to the datamodule's ``vocab_size``.
        max_seq_len: Context length in tokens. The datamodule's ``seq_len`` must not exceed it.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads per block. Must divide ``dim``.
        dim: Width of the residual stream.
        mlp_ratio: Hidden width of the MLP as a multiple of ``dim``.
        dropout: Probability of zeroing an element of each branch's output in training.
        norm_eps: Constant under the root of RMSNorm.
        learning_rate: Highest learning rate of AdamW.
        betas: Decay rates of AdamW's two moments.
        weight_decay: Decoupled weight decay; matrices and tables only, not the norms' gains.
        lr_schedule: After the warmup, hold the learning rate or let it fall along half a cosine.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from zero.
        total_steps: Optimizer steps at which the cosine ends. Default: as many as the Trainer will make; if it does not
            know (``max_epochs=-1`` without ``max_steps``), the learning rate is held.
        min_lr_ratio: Last learning rate of the cosine, as a fraction of ``learning_rate``.

    Raises:
        ValueError: If a size or a rate is out of range.
    """

    pipeline_embedding = "model.embedding"
    pipeline_blocks = "model.blocks"
    pipeline_head = "model.head"

    def __init__(
        self,
        vocab_size: int,
        max_seq_len: int = 128,
        num_layers: int = 6,
        num_heads: int = 4,
        dim: int = 128,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        learning_rate: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        lr_schedule: LearningRateSchedule = "cosine",
        warmup_steps: int = 20,
        total_steps: int | None = None,
        min_lr_ratio: float = 0.1,
    ) -> None:
        super().__init__(learning_rate, betas, weight_decay, lr_schedule, warmup_steps, total_steps, min_lr_ratio)
        self.save_hyperparameters()
        self.model = GPT(
            GPTConfig(
                vocab_size=vocab_size,
                max_seq_len=max_seq_len,
                num_layers=num_layers,
                num_heads=num_heads,
                dim=dim,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                norm_eps=norm_eps,
            )
        )

    def setup(self, stage: str) -> None:
        """Compare the model's sizes with those of the datamodule, before anything is computed.

        Raises:
            ValueError: If the data has more tokens or longer samples than the model was built for.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        config = self.model.config
        vocab_size, seq_len = (getattr(datamodule, name, None) for name in ("vocab_size", "seq_len"))
        if vocab_size is not None and vocab_size > config.vocab_size:
            raise ValueError(
                f"vocab_size={config.vocab_size} of the model: the datamodule has {vocab_size} tokens. Raise the"
                " model's vocab_size, or lower the datamodule's max_vocab_size."
            )
        if seq_len is not None and seq_len > config.max_seq_len:
            raise ValueError(
                f"max_seq_len={config.max_seq_len} of the model: the datamodule's samples have seq_len={seq_len}."
                " Raise the one, or lower the other."
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, sequence, vocab_size]`` of the token after each position of ``[batch, sequence]`` tokens."""
        return self.pipeline_forward(tokens)

    def pipeline_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy in nats per token.

        Args:
            output: Logits ``[batch, sequence, vocab_size]``, any floating dtype; the loss is computed in float32.
            target: Tokens to be predicted, int64 ``[batch, sequence]``.

        Returns:
            A float32 scalar.
        """
        return F.cross_entropy(output.flatten(0, 1).float(), target.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of ``(tokens, targets)``, both int64 ``[batch, sequence]``."""
        tokens, targets = batch
        loss = self.pipeline_step(tokens, targets)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(tokens))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and, where the datamodule allows, the losses per character."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and, where the datamodule allows, the losses per character."""
        self._evaluate("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Log-probability the model gives to each target, float32 ``[batch, sequence]``."""
        tokens, targets = batch
        log_probabilities = self(tokens).float().log_softmax(dim=-1)
        return log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def example_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Random tokens of the model's full context length, to measure time and memory with.

        Args:
            batch_size: Number of samples.

        Returns:
            ``(tokens, targets)``, both int64 ``[batch_size, max_seq_len]`` on the CPU; the same at every call.
        """
        return example_tokens(self.model.config, batch_size)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        tokens, targets = batch
        loss = self.pipeline_step(tokens, targets)
        self.log_evaluation(stage, loss, len(tokens))
