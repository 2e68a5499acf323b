"""Profiles of models with pipeline support: what is measured, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hetu.models.gpt import GPT, GPTConfig
from lightning_hetu.models.gpt_module import GPTLightningModule
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin
from lightning_hetu.parallel.structure import ModelStructure, find_structure
from lightning_hetu.planning.profile import ModelProfile
from lightning_hetu.profiling import MemoryMeter, estimate_model, profile_model
from lightning_hetu.profiling._layers import group_layers
from lightning_hetu.profiling.model import checked_sizes, optimizer_state_bytes


def small_gpt(**options: int | float) -> GPTLightningModule:
    return GPTLightningModule(64, **{"max_seq_len": 16, "num_layers": 3, "dim": 32, **options})


def profiled(module: nn.Module, batch: tuple[Tensor, Tensor], **options: object) -> ModelProfile:
    return profile_model(module, find_structure(module), *batch, repeats=1, **options)


class Block(nn.Module):
    """A block with everything that running it could change."""

    def __init__(self, width: int, hidden: int, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.up, self.norm, self.down = nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.relu(self.norm(self.up(x)))))


class MixedModule(PipelineMixin, nn.Module):
    """Blocks of two sizes, and an output layer that may be the input table."""

    pipeline_embedding, pipeline_blocks, pipeline_head = "table", "blocks", "head"

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Linear(6, 8, bias=False)
        self.blocks = nn.ModuleList(Block(8, hidden, index) for index, hidden in enumerate((16, 32, 16, 32)))
        self.head = nn.Linear(8, 6, bias=False) if not tied else Transposed(self.table)

    def pipeline_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)


class Transposed(nn.Module):
    def __init__(self, table: nn.Linear) -> None:
        super().__init__()
        self.weight = table.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_gpt_profile() -> None:
    module = small_gpt()
    steps: list[tuple[int, int]] = []
    profile = profile_model(
        module,
        find_structure(module),
        *module.example_batch(3),
        repeats=1,
        max_tp=8,
        progress=lambda done, total, _: steps.append((done, total)),
    )
    block = profile.layer_types[0]
    assert profile.layers == (0, 0, 0) and len(profile.layer_types) == 1
    assert (profile.pipeline, profile.microbatches, profile.split_vocab) == (True, True, True)
    assert [samples for samples, _ in block.forward_time] == [1, 2, 4]
    times = [seconds for _, seconds in block.forward_time]
    assert times == sorted(times) and times[0] > 0 and block.backward_ratio > 0
    blocks = [module.get_submodule(name) for name in find_structure(module).blocks]
    assert block.parameter_bytes == sum(p.nbytes for p in blocks[0].parameters())
    linears = [child for child in blocks[0].modules() if isinstance(child, nn.Linear)]
    assert block.tp_parameter_bytes == sum(child.weight.nbytes for child in linears)
    assert block.tp_degrees == (1, 2, 4) and set(block.activation_bytes) == {1, 2, 4}
    assert block.boundary_bytes == 16 * 32 * 4
    assert block.boundary_bytes < block.activation_bytes[4] < block.activation_bytes[2] < block.activation_bytes[1]
    assert profile.embedding.boundary_bytes == 16 * 8
    assert profile.embedding.tp_parameter_bytes == 64 * 32 * 4
    total = profile.embedding.parameter_bytes + 3 * block.parameter_bytes + profile.head.parameter_bytes
    assert total == sum(p.nbytes for p in module.parameters())
    assert ModelProfile.from_dict(profile.to_dict()) == profile
    assert [done for done, _ in steps] == list(range(steps[0][1]))


def test_parts_add_up_to_the_memory_of_a_whole_step() -> None:
    module = small_gpt(max_seq_len=64, dim=64, num_layers=4)
    samples = 4
    inputs, target = module.example_batch(samples)
    profile = profiled(module, (inputs, target))
    rows = [profile.embedding, *(profile.block(index) for index in range(profile.num_layers)), profile.head]
    kept = [row.activation_bytes[1] * samples for row in rows]
    before = [sum(kept[:index]) for index in range(len(rows))]
    forward = [b + k + row.forward_transient[1] * samples for b, k, row in zip(before, kept, rows, strict=True)]
    # Gradients are made from the head down.
    gradients = [sum(row.parameter_bytes for row in rows[index:]) for index in range(len(rows))]
    backward = [
        b + k + g + row.backward_transient[1] * samples
        for b, k, g, row in zip(before, kept, gradients, rows, strict=True)
    ]

    def step() -> None:
        embedding, blocks, head = module.pipeline_modules()
        hidden = embedding(inputs)
        for block in blocks:
            hidden = block(hidden)
        loss = module.pipeline_loss(head(hidden), target)
        del hidden
        loss.backward()

    step()
    module.zero_grad()
    with MemoryMeter() as meter:
        step()
    assert max(*forward, *backward) == pytest.approx(meter.peak, rel=0.03)


def test_module_and_random_state_stay_as_they_were() -> None:
    module = MixedModule()
    module.blocks[1].eval()
    for parameter in list(module.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = [parameter.grad for parameter in module.parameters()]
    flags = [child.training for child in module.modules()]
    batch = torch.randn(4, 6), torch.randn(4, 6)
    random = torch.get_rng_state()
    profiled(module, batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(now is was for now, was in zip([p.grad for p in module.parameters()], gradients, strict=True))
    assert [child.training for child in module.modules()] == flags
    assert not any(len(child._forward_hooks) or len(child._forward_pre_hooks) for child in module.modules())


def test_an_evaluated_module_is_profiled_in_training_mode() -> None:
    module = small_gpt(dropout=0.5)
    batch = module.example_batch(2)
    training = profiled(module, batch).layer_types[0].activation_bytes
    module.eval()
    assert profiled(module, batch).layer_types[0].activation_bytes == training
    assert not any(child.training for child in module.modules())


def test_kinds_of_blocks() -> None:
    module = MixedModule()
    assert group_layers(module, find_structure(module).blocks) == ([0, 1, 0, 1], [0, 1])
    profile = profiled(module, (torch.randn(4, 6), torch.randn(4, 6)))
    assert profile.layers == (0, 1, 0, 1)
    assert [layer.name for layer in profile.layer_types] == ["Block-0", "Block-1"]
    assert profile.layer_types[0].parameter_bytes < profile.layer_types[1].parameter_bytes
    module.blocks[2].dropout.p = 0.25  # a setting that is no position
    assert group_layers(module, find_structure(module).blocks)[0] == [0, 1, 2, 1]
    module.blocks[3].up.requires_grad_(False)
    assert group_layers(module, find_structure(module).blocks)[0] == [0, 1, 2, 3]


def test_shared_parameters_keep_the_model_in_one_stage() -> None:
    profile = profiled(MixedModule(tied=True), (torch.randn(4, 6), torch.randn(4, 6)))
    assert (profile.pipeline, profile.split_vocab, profile.microbatches) == (False, False, True)
    assert profile.head.parameter_bytes == 0 and profile.embedding.parameter_bytes == 6 * 8 * 4


def test_frozen_parts() -> None:
    module = small_gpt()
    module.model.embedding.requires_grad_(False)
    module.model.blocks[0].requires_grad_(False)
    profile = profiled(module, module.example_batch(2))
    assert profile.layers == (0, 1, 1)
    frozen, trained = profile.layer_types
    assert profile.embedding.trainable_fraction == frozen.trainable_fraction == 0.0
    assert profile.embedding.backward_ratio == frozen.backward_ratio == frozen.activation_bytes[1] == 0.0
    assert trained.trainable_fraction == 1.0 and trained.activation_bytes[1] > 0


def test_mixed_precision_halves_what_is_computed_in_bfloat16() -> None:
    module = small_gpt()
    batch = module.example_batch(4)
    full = profiled(module, batch).layer_types[0]
    mixed = profiled(module, batch, precision="bf16-mixed")
    assert mixed.precision == "bf16-mixed"
    assert mixed.layer_types[0].activation_bytes[1] < 0.9 * full.activation_bytes[1]


def test_parts_on_the_meta_device_are_profiled_and_stay_there() -> None:
    with torch.device("meta"):
        module = small_gpt()
    batch = small_gpt().example_batch(2)
    profile = profiled(module, batch, device="cpu")
    assert all(parameter.is_meta for parameter in module.parameters())
    assert profile.layer_types[0].activation_bytes == profiled(small_gpt(), batch).layer_types[0].activation_bytes


def test_estimate_has_the_measured_memory_and_counted_times() -> None:
    module = small_gpt()
    structure = find_structure(module)
    inputs, target = module.example_batch(4)
    measured = profile_model(module, structure, inputs, target, repeats=1, max_tp=4)
    estimated = estimate_model(module, structure, inputs, target, flops_per_second=1e9, max_tp=4)
    for ours, theirs in (
        (estimated.embedding, measured.embedding),
        (estimated.layer_types[0], measured.layer_types[0]),
        (estimated.head, measured.head),
    ):
        for name in ("activation_bytes", "forward_transient", "backward_transient", "parameter_bytes", "tp_degrees"):
            assert getattr(ours, name) == getattr(theirs, name), name
    with torch.device("meta"):
        empty = small_gpt()
    assert estimate_model(empty, structure, inputs.to("meta"), target, flops_per_second=1e9, max_tp=4) == estimated
    block = estimated.layer_types[0]
    products = 2 * 4 * 16 * 12 * 32**2  # 12 dim^2 weights, a product and a sum for each of 4 * 16 tokens
    assert products <= block.forward_seconds(4) * 1e9 <= 1.5 * products
    assert 1.8 <= block.backward_ratio <= 2.6


def test_time_of_larger_layers_is_larger() -> None:
    module = GPT(GPTConfig(64, max_seq_len=32, num_layers=1, dim=32))
    wide = GPT(GPTConfig(64, max_seq_len=32, num_layers=1, dim=256))
    structure = ModelStructure(("blocks.0",), "embedding", "head")
    inputs = torch.randint(64, (4, 32))
    slow, fast = (profile_model(item, structure, inputs, repeats=3).layer_types[0] for item in (wide, module))
    assert slow.forward_seconds(4) > 2 * fast.forward_seconds(4)


def test_sizes() -> None:
    assert checked_sizes(None, 1, 1) == (1, 2, 4)
    assert checked_sizes(None, 6, 1) == (1, 2, 4, 6)
    assert checked_sizes((8, 2, 2), 6, 1) == (2, 8)
    with pytest.raises(ValueError, match=r"batch_sizes=\[0, 2\]"):
        checked_sizes((0, 2), 6, 1)
    with pytest.raises(ValueError, match="repeats=0"):
        checked_sizes(None, 6, 0)


def test_optimizer_states() -> None:
    parameter = [nn.Parameter(torch.zeros(2))]
    assert optimizer_state_bytes() == optimizer_state_bytes(torch.optim.AdamW) == optimizer_state_bytes("Adam") == 2
    assert optimizer_state_bytes(torch.optim.Adam(parameter, amsgrad=True)) == 3
    assert optimizer_state_bytes(torch.optim.SGD(parameter, lr=0.1)) == optimizer_state_bytes("SGD") == 0
    assert optimizer_state_bytes(torch.optim.SGD(parameter, lr=0.1, momentum=0.9)) == 1


def test_errors() -> None:
    module = small_gpt()
    with pytest.raises(ValueError, match="profile it with profile_step"):
        profile_model(module, ModelStructure(find_structure(module).blocks), *module.example_batch(2))
    with pytest.raises(ValueError, match="flops_per_second=0"):
        estimate_model(module, find_structure(module), *module.example_batch(2), flops_per_second=0)
