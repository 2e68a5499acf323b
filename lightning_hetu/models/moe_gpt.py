"""A small GPT whose feed-forward networks are mixtures of experts, and the LightningModule that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hetu.models.gpt import CausalSelfAttention, GPTConfig, GPTEmbedding, GPTHead, example_tokens
from lightning_hetu.models.optimization import LearningRateSchedule, TrainedByAdamW
from lightning_hetu.moe import MoELayer, MoEModuleMixin
from lightning_hetu.moe.experts import Activation, Backend


class MoEGPTBlock(nn.Module):
    """One transformer block with a mixture of experts instead of the MLP.

    Args:
        config: Sizes of the model.
        experts: The mixture of experts.
    """

    def __init__(self, config: GPTConfig, experts: MoELayer) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = CausalSelfAttention(config)
        self.experts_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.moe = experts

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: ``[batch, sequence, dim]``.
            tokens: Numbers of the tokens, int64 ``[batch, sequence]``, for gates that go by them.

        Returns:
            As ``x``.
        """
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.experts_norm(x), tokens)


class MoEGPT(nn.Module):
    """A decoder-only language model with experts in every block.

    Args:
        config: Sizes of the model; ``mlp_hidden`` is the width of an expert.
        num_experts: Experts of each block.
        **experts: Further arguments of :class:`MoELayer`.
    """

    def __init__(self, config: GPTConfig, num_experts: int, **experts: Any) -> None:
        super().__init__()
        self.config = config
        self.embedding = GPTEmbedding(config)
        layers = (MoELayer(config.dim, config.mlp_hidden, num_experts, **experts) for _ in range(config.num_layers))
        self.blocks = nn.ModuleList(MoEGPTBlock(config, layer) for layer in layers)
        self.head = GPTHead(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score the next token at every position.

        Args:
            tokens: Token numbers, int64 ``[batch, sequence]``.

        Returns:
            Logits ``[batch, sequence, vocab_size]``.
        """
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, tokens)
        return self.head(x)


class MoEGPTLightningModule(MoEModuleMixin, TrainedByAdamW):
    """Trains a small GPT with experts to predict the next token.

    Logs ``train_loss``, ``val_loss`` and ``test_loss`` in nats per token, without the gates' losses, and under ``moe/``
    where tokens go. With several processes each has its own samples and some of the experts.

    Args:
        vocab_size: Number of different tokens. Link it to the datamodule's ``vocab_size``.
        max_seq_len: Context length in tokens.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads per block. Must divide ``dim``.
        dim: Width of the residual stream.
        mlp_ratio: Hidden width of an expert as a multiple of ``dim``.
        num_experts: Experts of each block.
        gate: Name of the gate; see :func:`lightning_hetu.moe.build_gate`.
        gate_options: Its options.
        activation: Activation of the experts.
        backend: What multiplies; see :class:`lightning_hetu.moe.MoELayer`.
        expert_parallel: Ranks that share out the experts; by default all.
        moe_coefficients: What the gates' losses are multiplied by, where it is not the default.
        learning_rate: Highest learning rate of AdamW.
        betas: Decay rates of AdamW's two moments.
        weight_decay: Decoupled weight decay; matrices and tables only, not the norms' gains.
        lr_schedule: After the warmup, hold the learning rate or let it fall along half a cosine.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from zero.
        total_steps: Optimizer steps at which the cosine ends. Default: as many as the Trainer will make.
        min_lr_ratio: Last learning rate of the cosine, as a fraction of ``learning_rate``.

    Raises:
        ValueError: If a size, a rate or an option is out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        max_seq_len: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        dim: int = 128,
        mlp_ratio: float = 2.0,
        num_experts: int = 8,
        gate: str = "switch",
        gate_options: Mapping[str, Any] | None = None,
        activation: Activation = "gelu",
        backend: Backend = "auto",
        expert_parallel: int | None = None,
        moe_coefficients: Mapping[str, float] | None = None,
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
        self.expert_parallel = expert_parallel
        self.moe_coefficients = {**MoEModuleMixin.moe_coefficients, **(moe_coefficients or {})}
        config = GPTConfig(vocab_size, max_seq_len, num_layers, num_heads, dim, mlp_ratio)
        self.model = MoEGPT(
            config, num_experts, gate=gate, gate_options=gate_options, activation=activation, backend=backend
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, sequence, vocab_size]`` of the token after each position of ``[batch, sequence]`` tokens."""
        return self.model(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of ``(tokens, targets)``, both int64 ``[batch, sequence]``, with the gates' losses."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss + self.moe_loss()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and, where the datamodule allows, the losses per character."""
        self.log_evaluation("val", self._loss(batch), len(batch[0]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and, where the datamodule allows, the losses per character."""
        self.log_evaluation("test", self._loss(batch), len(batch[0]))

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())

    def example_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Random tokens of the model's full context length; see :meth:`GPTLightningModule.example_batch`."""
        return example_tokens(self.model.config, batch_size)
