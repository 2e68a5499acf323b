"""A small GPT in plain PyTorch, written so that it can be cut into stages and split over devices.

What makes it easy to parallelize:

- Three children, called one after another: ``embedding``, ``blocks``, ``head``. Each takes one tensor and returns one
  tensor, so any cut between two of them is a place where a pipeline stage can end.
- Query, key and value are separate linear layers, and heads are counted with ``view(..., -1, head_dim)``: under tensor
  parallelism a device simply sees fewer heads.
- Every module with parameters of its own has ``reset_parameters``, so the model can be built on the meta device and
  materialized piece by piece.
- Every layer class names its own tensor-parallel layout in ``tensor_parallel_plan``.

Pre-normalization with RMSNorm, learned positions, no biases, and no weight tying: input table and output layer live in
different pipeline stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EMBEDDING_STD = 0.02  # GPT-2's.


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a :class:`GPT`.

    Args:
        vocab_size: Number of different tokens.
        max_seq_len: Context length: the longest sequence, in tokens, the model can read.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads per block. Must divide ``dim``.
        dim: Width of the residual stream.
        mlp_ratio: Hidden width of the MLP as a multiple of ``dim``.
        dropout: Probability of zeroing an element of each branch's output in training.
        norm_eps: Constant under the root of RMSNorm.

    Raises:
        ValueError: If a size is not positive, ``num_heads`` does not divide ``dim``, or ``dropout`` is outside [0, 1).
    """

    vocab_size: int
    max_seq_len: int = 128
    num_layers: int = 6
    num_heads: int = 4
    dim: int = 128
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_seq_len", "num_layers", "num_heads", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide dim={self.dim}: change one of them.")
        if self.mlp_hidden < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} of dim={self.dim} gives an MLP of width {self.mlp_hidden}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: expected a probability in [0, 1).")

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.dim * self.mlp_ratio)


class NormalLinear(nn.Linear):
    """A linear layer without bias whose output starts with the variance of its input, times ``scale`` squared.

    Args:
        in_features: Size of the input's last dimension.
        out_features: Size of the output's last dimension.
        scale: Factor of the initial weights, which are normal with standard deviation ``scale / sqrt(in_features)``.
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0) -> None:
        self.scale = scale  # before the parent, whose constructor calls reset_parameters
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weights anew from the default generator."""
        nn.init.normal_(self.weight, std=self.scale / math.sqrt(self.in_features))


class NormalEmbedding(nn.Embedding):
    """An embedding table whose entries start with standard deviation 0.02 instead of 1."""

    def reset_parameters(self) -> None:
        """Draw the table anew from the default generator."""
        nn.init.normal_(self.weight, std=_EMBEDDING_STD)


class GPTEmbedding(nn.Module):
    """Sum of a token's vector and its position's vector.

    Args:
        config: Sizes of the model.
    """

    tensor_parallel_plan: ClassVar[dict[str, str]] = {"token": "vocab_rowwise"}

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = NormalEmbedding(config.vocab_size, config.dim)
        self.position = NormalEmbedding(config.max_seq_len, config.dim)

    @property
    def tensor_parallel_divisor(self) -> int:
        """The tensor-parallel degree must divide this: the number of rows of the token table."""
        return self.token.num_embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed a batch.

        Args:
            tokens: Token numbers, int64 ``[batch, sequence]``.

        Returns:
            Vectors ``[batch, sequence, dim]``.

        Raises:
            ValueError: If the sequence is longer than the model's context.
        """
        length = tokens.shape[1]
        if length > self.position.num_embeddings:
            raise ValueError(f"A sequence of {length} tokens exceeds max_seq_len={self.position.num_embeddings}.")
        return self.token(tokens) + self.position(torch.arange(length, device=tokens.device))


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """torch's attention; ``[batch, heads, sequence, head_dim]`` in and out."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and those before it.

    Args:
        config: Sizes of the model.
    """

    # Exchangeable: `hetu_kernels.integrate.use_kernels` puts a kernel here.
    attention_function = staticmethod(dot_product_attention)

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.query = NormalLinear(config.dim, config.dim)
        self.key = NormalLinear(config.dim, config.dim)
        self.value = NormalLinear(config.dim, config.dim)
        self.out = NormalLinear(config.dim, config.dim, scale=_branch_output_scale(config))

    def forward(self, x: Tensor) -> Tensor:
        """Mix information between positions; ``[batch, sequence, dim]`` in and out."""
        batch, length, _ = x.shape
        # -1: the number of heads on this device.
        query, key, value = (
            linear(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mixed = self.attention_function(query, key, value, causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, applied to every position by itself.

    Args:
        config: Sizes of the model.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = NormalLinear(config.dim, config.mlp_hidden)
        self.activation = nn.GELU()
        self.down = NormalLinear(config.mlp_hidden, config.dim, scale=_branch_output_scale(config))

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position; ``[batch, sequence, dim]`` in and out."""
        return self.down(self.activation(self.up(x)))


class GPTBlock(nn.Module):
    """One transformer block: attention, then MLP, each on normalized input and added to the residual stream.

    Args:
        config: Sizes of the model.
    """

    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "attention.query": "colwise",
        "attention.key": "colwise",
        "attention.value": "colwise",
        "attention.out": "rowwise",
        "mlp.up": "colwise",
        "mlp.down": "rowwise",
    }

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self._parallel_units = (config.num_heads, config.mlp_hidden)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)
        # On the branches' outputs only: these are whole on every tensor-parallel device, heads are not.
        self.dropout = nn.Dropout(config.dropout)

    @property
    def tensor_parallel_divisor(self) -> int:
        """The tensor-parallel degree must divide this: whole heads and MLP columns on every device."""
        return math.gcd(*self._parallel_units)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; ``[batch, sequence, dim]`` in and out."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPTHead(nn.Module):
    """Final normalization and the linear layer that scores every token of the vocabulary.

    Args:
        config: Sizes of the model.
    """

    tensor_parallel_plan: ClassVar[dict[str, str]] = {"linear": "colwise_gather"}

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.linear = NormalLinear(config.dim, config.vocab_size)

    @property
    def tensor_parallel_divisor(self) -> int:
        """The tensor-parallel degree must divide this: the number of columns of the logits."""
        return self.linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Score the next token at every position; ``[batch, sequence, dim]`` to ``[batch, sequence, vocab_size]``."""
        return self.linear(self.norm(x))


class GPT(nn.Module):
    """A decoder-only language model.

    Args:
        config: Sizes of the model.

    Example::

        model = GPT(GPTConfig(vocab_size=256))
        logits = model(torch.randint(256, (2, 128)))  # [2, 128, 256]
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = GPTEmbedding(config)
        self.blocks = nn.ModuleList(GPTBlock(config) for _ in range(config.num_layers))
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
            x = block(x)
        return self.head(x)


def example_tokens(config: GPTConfig, batch_size: int) -> tuple[Tensor, Tensor]:
    """Random ``(tokens, targets)`` of the full context length, int64 ``[batch_size, max_seq_len]``; always the same."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch_size, config.max_seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _branch_output_scale(config: GPTConfig) -> float:
    """Two branches per block add to the residual stream; this keeps its variance independent of depth (GPT-2)."""
    return 1 / math.sqrt(2 * config.num_layers)
