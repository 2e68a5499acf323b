"""The memory of a layer, derived from the lives of its tensors, is what the allocator sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_hetu.profiling import MemoryMeter
from lightning_hetu.profiling._case import LayerCase
from lightning_hetu.profiling._tracker import split_parameters, trace_memory
from tests.profiling._on_ranks import gpt_part, metered


def case_of(module: nn.Module, inputs: torch.Tensor, **options: Any) -> LayerCase:
    return LayerCase(
        name="layer",
        module=module,
        call=lambda arguments: module(arguments[0]),
        arguments=(inputs,),
        batch=inputs.shape[0],
        **options,
    )


def largest_gradient(module: nn.Module) -> int:
    return max(parameter.nbytes for parameter in module.parameters())


class Recomputed(nn.Module):
    """Checkpoints its own inside, which hides what is saved from the usual hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inside, x, use_reentrant=False)


@pytest.mark.parametrize("role", ["block", "embedding", "head"])
def test_equals_the_allocator(role: str) -> None:
    case = gpt_part(role)
    memory = trace_memory(case, case.batch)[1]
    kept, forward, backward = metered(case)
    assert memory.kept == pytest.approx(kept, abs=64)
    assert memory.forward_extra == pytest.approx(forward - kept, abs=64)
    # The allocator also sees the newest gradient of a parameter before it is added to the one that is there.
    largest = largest_gradient(case.module)
    assert backward - largest - 64 <= memory.backward_extra <= backward + 64
    case.clear_gradients()
    loss = case.forward(case.batch)
    with MemoryMeter() as meter:
        loss.backward()
    expected = memory.backward_extra + memory.backward_gradients
    assert expected - 64 <= meter.peak <= expected + largest + 64


def test_tensors_between_layers_are_counted_by_the_layer_that_keeps_them() -> None:
    rows, width = 8, 16
    size = rows * width * 4
    inputs = torch.randn(rows, width)

    class Relu(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x)

    # A linear layer saves its input, a ReLU its output; adding a constant saves nothing.
    assert trace_memory(case_of(nn.Linear(width, width), inputs), rows)[1].kept == pytest.approx(size, abs=8)
    assert trace_memory(case_of(Relu(), inputs), rows)[1].kept == pytest.approx(size, abs=8)
    both = nn.Sequential(Relu(), nn.Linear(width, width))
    assert trace_memory(case_of(both, inputs), rows)[1].kept == pytest.approx(size, abs=8)
    both = nn.Sequential(nn.Linear(width, width), Relu())
    assert trace_memory(case_of(both, inputs), rows)[1].kept == pytest.approx(2 * size, abs=8)


def test_recomputation_inside_a_layer_keeps_its_input_only() -> None:
    module, inputs = Recomputed(), torch.randn(8, 32)
    memory = trace_memory(case_of(module, inputs), 8)[1]
    assert memory.kept == pytest.approx(inputs.nbytes, abs=64)
    assert memory.backward_extra > 2 * inputs.nbytes


def test_views_parameters_buffers_and_gradients_do_not_count() -> None:
    module = nn.BatchNorm1d(16)
    inputs = torch.randn(8, 16)
    wide = torch.randn(100, 16)
    memory = trace_memory(case_of(module, inputs), 8)[1]
    assert memory.kept == pytest.approx(inputs.nbytes + 2 * 16 * 4, abs=64)
    # A row slice of a larger batch counts as the rows it has.
    assert trace_memory(case_of(module, wide), 8)[1].kept == pytest.approx(memory.kept, abs=64)
    assert module.weight.grad is None


def test_a_frozen_layer_with_no_gradient_to_pass_keeps_nothing() -> None:
    module = nn.Linear(16, 16).requires_grad_(False)
    memory = trace_memory(case_of(module, torch.randn(8, 16), input_requires_grad=False), 8)[1]
    assert memory.kept == 0 and memory.backward_extra == 0 and memory.forward_extra > 0


def mlp_case(hidden: Callable[[torch.Tensor], torch.Tensor]) -> LayerCase:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            up, gate = self.up(x), self.gate(x)  # both before either is used
            return x + self.down(hidden(up) * gate)

    plan = {"up": "colwise", "gate": "colwise", "down": "rowwise"}
    return case_of(Layer(), torch.randn(8, 16), plan=plan, tp_degrees=(1, 2, 4))


def test_what_depends_on_split_weights_is_split() -> None:
    case = mlp_case(F.silu)
    assert set(split_parameters(case)) == {"up.weight", "up.bias", "gate.weight", "gate.bias", "down.weight"}
    memory = trace_memory(case, 8)
    whole, split = 8 * 16 * 4, 8 * 64 * 4
    # The input is whole. Split: both linear outputs, silu's output, and the product.
    for tp in (1, 2, 4):
        assert memory[tp].kept == pytest.approx(whole + 4 * split / tp, abs=64)


def test_casts_of_weights_are_split_like_the_weights() -> None:
    module = nn.Linear(64, 256, bias=False)
    case = case_of(
        module,
        torch.randn(4, 64),
        plan={"": "colwise"},
        tp_degrees=(1, 2),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )
    memory = trace_memory(case, 4)
    cast = 256 * 64 * 2
    assert memory[1].kept == pytest.approx(cast + 4 * 64 * 2, abs=64)
    assert memory[2].kept == pytest.approx(cast / 2 + 4 * 64 * 2, abs=64)
