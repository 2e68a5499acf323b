"""Profilers find with which degrees the sequence of a block can be cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hetu.parallel.forward_trace import UncuttableModelError, trace_structure
from lightning_hetu.parallel.structure import ModelStructure, find_structure
from lightning_hetu.planning.profile import ModelProfile
from lightning_hetu.profiling import estimate_model, profile_model, profile_step
from tests.parallel import test_executor, test_forward


def case_of(kind: str) -> tuple[Any, ModelStructure, Any, Any]:
    """Module, structure, inputs and target."""
    if kind == "gpt":
        module = test_executor.Model()
        inputs, target = test_executor.batches(1)[0]
        return module, find_structure(module), inputs, target
    module = test_forward.Module(kind)
    batch = test_forward.batch_of(kind)
    return module, trace_structure(module, batch), batch, None


def degrees_of(profile: ModelProfile) -> list[tuple[tuple[int, ...], ...]]:
    return [(row.sequence_degrees, row.ulysses_degrees, row.context_degrees) for row in profile.layer_types]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gpt", ((2, 4), (2, 4), (2, 4))),
        # two groups of heads for tensor parallelism; padding makes a mask, which a ring has not
        ("llama", ((2,), (2, 4), ())),
        ("vit", ((), (2, 4), ())),
        pytest.param("swin", ((), (), ()), marks=pytest.mark.slow),  # windows
    ],
)
def test_measured_and_estimated_models_have_them(kind: str, expected: tuple[tuple[int, ...], ...]) -> None:
    """All kinds of blocks, but neither embedding nor head; by running them, or by shapes alone."""
    module, structure, inputs, target = case_of(kind)
    options: dict[str, Any] = {"max_tp": 4, "optimizer": "AdamW"}
    measured = profile_model(module, structure, inputs, target, batch_sizes=[1], repeats=1, **options)
    estimated = estimate_model(module, structure, inputs, target, device="H100-80GB", **options)
    for profile in (measured, estimated):
        assert set(degrees_of(profile)) == {expected}
        for row in (profile.embedding, profile.head):
            assert not (row.sequence_degrees or row.ulysses_degrees or row.context_degrees)
        assert ModelProfile.from_dict(profile.to_dict()) == profile


def test_kinds_of_blocks_differ() -> None:
    """T5's first block makes the bias of all; those of its decoder attend to the encoder."""
    module, structure, inputs, target = case_of("t5")
    profile = profile_model(module, structure, inputs, target, batch_sizes=[1], repeats=1, max_tp=4)
    found = [profile.block(index).ulysses_degrees for index in range(profile.num_layers)]
    assert found == [(), (2, 4), (2, 4), (), (), ()]


def test_experts_with_a_loss_of_their_own_are_not_cut() -> None:
    """It is over what the routers of all tokens say."""
    module, structure, inputs, target = case_of("qwen3-moe")
    profile = estimate_model(module, structure, inputs, target, device="H100-80GB", max_tp=4)
    assert [row.ulysses_degrees for row in profile.layer_types] == [(2, 4)]
    module.model.config.output_router_logits = True
    with pytest.raises(UncuttableModelError, match="Qwen3MoeForCausalLM has output_router_logits=True"):
        trace_structure(module, inputs)
    blocks = ModelStructure(tuple(f"model.model.layers.{index}" for index in range(5)))
    whole = profile_step(module, blocks, lambda batch: module.model(**batch).loss, inputs, max_tp=4, repeats=1)
    assert {(row.sequence_degrees, row.ulysses_degrees) for row in whole.layer_types} == {((), ())}


def test_blocks_that_count_positions_are_not_cut() -> None:
    """The value tells, where there is one; the shape does not."""
    module, structure, inputs, target = case_of("gpt")
    for block in module.model.blocks:
        block.register_forward_pre_hook(lambda _, args: args[0] + torch.arange(args[0].shape[1])[:, None])
    profile = profile_model(module, structure, inputs, target, batch_sizes=[1], repeats=1, max_tp=4)
    assert degrees_of(profile) == [((), (), ())]
