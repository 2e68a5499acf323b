"""Models that only know their whole step: blocks by themselves, the rest by subtraction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hetu.models.gpt_module import GPTLightningModule
from lightning_hetu.parallel.structure import ModelStructure, find_structure
from lightning_hetu.profiling import profile_model, profile_step


class Layer(nn.Module):
    """Called with a position table and a mask that all samples share, partly by keyword; returns a tuple."""

    tensor_parallel_plan = {"up": "colwise", "down": "rowwise"}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, table: Tensor, *, mask: Tensor, flag: bool = False) -> tuple[Tensor, None]:
        assert flag
        return x + self.down(F.gelu(self.up(x + table))) * mask, None


class Plain(nn.Module):
    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.before = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.BatchNorm1d(width)
        self.after = nn.Linear(width, 1)
        self.table = nn.Parameter(torch.zeros(5, width))

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.before(batch["x"])
        mask = torch.ones(5, 1)
        for layer in self.layers:
            x, _ = layer(x, self.table, mask=mask, flag=True)
        return F.mse_loss(self.after(self.norm(x.mean(1))).squeeze(-1), batch["y"])


BATCH = {"x": torch.randn(6, 5, 32), "y": torch.randn(6)}


def test_plain_module() -> None:
    module = Plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    profile = profile_step(module, find_structure(module), module.step, BATCH, repeats=1, max_tp=2)
    assert (profile.pipeline, profile.microbatches, profile.split_vocab) == (False, False, False)
    assert profile.layers == (0, 0, 0)
    block = profile.layer_types[0]
    assert [samples for samples, _ in block.forward_time] == [1, 2, 4, 6]
    assert block.boundary_bytes == 5 * 32 * 4
    # Kept: x + table, up's output, gelu's output. The mask belongs to all samples, down's output is not needed again.
    assert block.activation_bytes[1] == pytest.approx(9 * 5 * 32 * 4, rel=0.01)
    assert block.activation_bytes[2] == pytest.approx(5 * 5 * 32 * 4, rel=0.01)
    assert profile.head.parameter_bytes + 3 * block.parameter_bytes == sum(p.nbytes for p in module.parameters())
    assert profile.embedding.parameter_bytes == 0 and profile.embedding.forward_seconds(6) == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_parts_add_up_to_the_whole_of_a_model_with_pipeline_support() -> None:
    module = GPTLightningModule(64, max_seq_len=32, num_layers=3, dim=64)
    structure = find_structure(module)
    inputs, target = module.example_batch(4)
    parts = profile_model(module, structure, inputs, target)
    whole = profile_step(
        module, ModelStructure(structure.blocks), lambda b: module.pipeline_loss(module(b[0]), b[1]), (inputs, target)
    )
    assert whole.layer_types[0].activation_bytes == parts.layer_types[0].activation_bytes
    ends = (parts.embedding, parts.head)
    kept = sum(end.activation_bytes[1] for end in ends)
    assert whole.head.activation_bytes[1] == pytest.approx(kept, rel=0.05)
    assert whole.head.backward_transient[1] == pytest.approx(parts.head.backward_transient[1], rel=0.05)
    assert whole.head.parameter_bytes == sum(end.parameter_bytes for end in ends)


def test_errors() -> None:
    module = Plain()
    structure = find_structure(module)
    with pytest.raises(ValueError, match=r"run\(batch\) returned shape \[6\]"):
        profile_step(module, structure, lambda batch: module.before(batch["x"]).mean((1, 2)), BATCH)
    with pytest.raises(ValueError, match="block 'layers.0' did not run"):
        profile_step(module, structure, lambda batch: module.before(batch["x"]).mean(), BATCH)
    with pytest.raises(ValueError, match="without a tensor"):
        profile_step(module, structure, module.step, {"x": 1})
