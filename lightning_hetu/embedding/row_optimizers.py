"""Optimizers of single rows: SGD, Adagrad, Adam, and their row-wise forms with one second moment for a whole row.

Only rows that have a gradient move: all others keep their values, moments and step counts. Adam corrects its bias by
the number of steps of that row, not of training. Otherwise each follows torch's optimizer of its name; the row-wise
forms keep the mean of the squared gradient over the row, as FBGEMM and torchrec do.

The state of a row lives with its owner, in columns behind its values, and takes one step for all gradients that workers
have accumulated. Functions here take gathered rows and return new ones; who stores them does not matter.

``lr`` may be changed between steps. The rate that counts is that of the step in which a gradient reaches the owner.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RowOptimizer(ABC):
    """Steps of rows.

    Args:
        lr: Learning rate.
        weight_decay: Times the value, added to the gradient of rows that have one.

    Raises:
        ValueError: If an option is out of range.
    """

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected at least 0.")

    @abstractmethod
    def state_width(self, dim: int) -> int:
        """Numbers of state for a row of ``dim`` values."""

    def initial_state(
        self, num_rows: int, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """State of rows before their first step, ``[num_rows, state_width]``.

        Args:
            num_rows: How many rows.
            dim: Values of a row.
            dtype: That of the rows.
            device: Where the state is needed.
        """
        return torch.zeros(num_rows, self.state_width(dim), dtype=dtype, device=device)

    def update(self, values: Tensor, state: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            values: ``[n, dim]`` rows.
            state: ``[n, state_width]``, of the rows' dtype, which must be float32 or wider.
            gradients: ``[n, dim]``.

        Returns:
            New values and new state, of the same shapes; the arguments stay as they are.
        """
        if self.weight_decay:
            gradients = gradients.add(values, alpha=self.weight_decay)
        return self._step(values, state, gradients)

    def update_packed(self, rows: Tensor, gradients: Tensor) -> Tensor:
        """:meth:`update` of rows ``[n, dim + state_width]`` that have their state behind their values."""
        dim = gradients.shape[1]
        return torch.cat(self.update(rows[:, :dim], rows[:, dim:], gradients), dim=1)

    @abstractmethod
    def _step(self, values: Tensor, state: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass
class SGD(RowOptimizer):
    """``x -= lr * g``. Without state.

    Args:
        lr: Learning rate.
        weight_decay: As for all row optimizers.
    """

    def state_width(self, dim: int) -> int:
        """Nothing."""
        return 0

    def _step(self, values: Tensor, state: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        return values.add(gradients, alpha=-self.lr), state


@dataclass
class Adagrad(RowOptimizer):
    """``h += g^2; x -= lr * g / (sqrt(h) + eps)``.

    Args:
        lr: Learning rate.
        weight_decay: As for all row optimizers.
        eps: Keeps the division finite.
        initial_accumulator: ``h`` before the first step.
    """

    eps: float = 1e-10
    initial_accumulator: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eps", "initial_accumulator"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected at least 0.")

    def state_width(self, dim: int) -> int:
        """A sum for every value."""
        return dim

    def initial_state(
        self, num_rows: int, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """``initial_accumulator`` everywhere."""
        shape = num_rows, self.state_width(dim)
        return torch.full(shape, self.initial_accumulator, dtype=dtype, device=device)

    def _step(self, values: Tensor, state: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        state = self._accumulate(state, gradients)
        return values.addcdiv(gradients, state.sqrt().add_(self.eps), value=-self.lr), state

    def _accumulate(self, state: Tensor, gradients: Tensor) -> Tensor:
        return state.addcmul(gradients, gradients)  # rounds as torch's does


@dataclass
class RowwiseAdagrad(Adagrad):
    """Adagrad with the mean of ``g^2`` over the row: one number of state.

    Args:
        lr: Learning rate.
        weight_decay: As for all row optimizers.
        eps: Keeps the division finite.
        initial_accumulator: ``h`` before the first step.
    """

    def state_width(self, dim: int) -> int:
        """A sum for the row."""
        return 1

    def _accumulate(self, state: Tensor, gradients: Tensor) -> Tensor:
        return state + (gradients * gradients).mean(dim=1, keepdim=True)


@dataclass
class Adam(RowOptimizer):
    """Adam whose steps are those of the row.

    State: the first moment, the second one, and the number of steps, exact up to 16.7 million in float32.

    Args:
        lr: Learning rate.
        weight_decay: As for all row optimizers; added to the gradient, as in ``torch.optim.Adam``.
        betas: Decay rates of the moments.
        eps: Keeps the division finite.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas!r}: expected two numbers of at least 0 and below 1.")
        if self.eps < 0:
            raise ValueError(f"eps={self.eps!r}: expected at least 0.")

    def state_width(self, dim: int) -> int:
        """Two moments for every value, one count."""
        return 2 * dim + 1

    def _step(self, values: Tensor, state: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        dim = values.shape[1]
        first, second, steps = state.split([dim, state.shape[1] - dim - 1, 1], dim=1)
        first = first.lerp(gradients, 1 - self.betas[0])
        second = second * self.betas[1] + self._square(gradients) * (1 - self.betas[1])
        steps = steps + 1
        divisor = (second / _bias_correction(self.betas[1], steps)).sqrt().add_(self.eps)
        new = values.addcdiv(first / _bias_correction(self.betas[0], steps), divisor, value=-self.lr)
        return new, torch.cat([first, second, steps], dim=1)

    def _square(self, gradients: Tensor) -> Tensor:
        return gradients * gradients


@dataclass
class RowwiseAdam(Adam):
    """Adam with the mean of ``g^2`` over the row: nearly half of Adam's state.

    Args:
        lr: Learning rate.
        weight_decay: As for all row optimizers.
        betas: Decay rates of the moments.
        eps: Keeps the division finite.
    """

    def state_width(self, dim: int) -> int:
        """The first moment for every value, the second one for the row, one count."""
        return dim + 2

    def _square(self, gradients: Tensor) -> Tensor:
        return (gradients * gradients).mean(dim=1, keepdim=True)


def _bias_correction(beta: float, steps: Tensor) -> Tensor:
    """``1 - beta^steps``; subtracted in float32, it has lost three digits at the first step with ``beta=0.999``."""
    if beta == 0:
        return torch.ones_like(steps)
    return -torch.expm1(steps * math.log(beta))
