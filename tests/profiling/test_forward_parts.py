"""Profiles of models that run their own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hetu.parallel.forward_trace import trace_structure
from lightning_hetu.planning import cluster_preset, search
from lightning_hetu.profiling import estimate_model, profile_model
from tests.models.tiny_transformers import tiny_batch, tiny_model
from tests.parallel.test_forward import Module


def total_bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize(
    ("kind", "layers", "tied"),
    [
        ("llama", (0,) * 5, False),
        ("qwen3", (0,) * 5, True),
        ("gpt2", (0,) * 5, True),
        ("t5", (0, 1, 1, 2, 3, 3), True),
        ("vit", (0,) * 5, False),
    ],
)
def test_parts_make_up_the_model(kind: str, layers: tuple[int, ...], tied: bool) -> None:
    """Alike blocks are one kind; every parameter is in one part, a tied table in both that use it."""
    module, batch = Module(kind), tiny_batch(kind, 4)
    structure = trace_structure(module, batch)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    modules = dict(module.named_modules())
    measured = profile_model(module, structure, batch, batch_sizes=(2, 4), repeats=1, max_tp=2)
    described = estimate_model(module, structure, batch, device="H100-80GB", max_tp=2)
    table = module.model.get_input_embeddings().weight if tied else torch.empty(0)
    for profile in (measured, described):
        assert profile.layers == layers
        blocks = sum(profile.block(index).parameter_bytes for index in range(len(layers)))
        parts = profile.embedding.parameter_bytes + blocks + profile.head.parameter_bytes
        assert parts == total_bytes(module) + table.numel() * table.element_size()
        assert not profile.split_vocab and profile.pipeline
    for one, other in zip(
        (measured.embedding, *measured.layer_types, measured.head),
        (described.embedding, *described.layer_types, described.head),
        strict=True,
    ):
        assert one.parameter_bytes == other.parameter_bytes
        assert one.boundary_bytes == other.boundary_bytes
        assert set(one.tp_forward_time) == set(other.tp_forward_time)
    assert (2 in measured.block(0).tp_forward_time) == (kind in ("llama", "qwen3"))
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in module.named_parameters())
    assert all(modules[name] is found for name, found in module.named_modules())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


def test_activations_sent_between_stages_are_counted() -> None:
    """A decoder block is sent its hidden states, the encoder's, and the position bias of all samples."""
    module, batch = Module("t5"), tiny_batch("t5", 4)
    structure = trace_structure(module, batch)
    profile = estimate_model(module, structure, batch, device="H100-80GB")
    hidden, encoder, heads = 8 * 32 * 4, 16 * 32 * 4, 4
    first, later = profile.block(3).boundary_bytes, profile.block(4).boundary_bytes
    assert first == hidden + encoder
    # of all 4 samples together: the bias of self attention and the zeros of cross attention
    assert later == hidden + encoder + heads * (8 * 8 + 8 * 16) * 4 / 4


@pytest.mark.parametrize("kind", ["llama", "t5", "swin"])
def test_plans_for_devices_that_are_not_there(kind: str) -> None:
    """From a configuration on the meta device to a plan."""
    with torch.device("meta"):
        module: Any = Module(kind)
    batch = tiny_batch(kind, 8)
    structure = trace_structure(module, batch)
    profile = estimate_model(module, structure, batch, device="A100-80GB", precision="bf16-mixed", max_tp=4)
    plan = search(profile, cluster_preset("4xA100-80GB"), memory_budget="1GiB", global_batch_size=8)
    assert plan.embedding == plan.head
    assert plan.num_layers == len(structure.blocks)


def test_keys_and_values_are_not_kept_while_profiling() -> None:
    """A model as transformers builds it keeps them, and they would grow with every timed run."""
    module, batch = Module("llama"), tiny_batch("llama", 4)
    module.model = tiny_model("llama", use_cache=True)
    structure = trace_structure(module, batch)
    profile = profile_model(module, structure, batch, batch_sizes=(2, 4), repeats=2)
    assert profile.block(0).forward_seconds(4) > 0
    assert module.model(**batch).past_key_values is None
