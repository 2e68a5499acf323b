"""The layers of a model are found, or the message says what there is."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_hetu.models.gpt import GPT, GPTConfig
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin
from lightning_hetu.parallel.structure import find_structure
from lightning_hetu.parallel.tensor_plan import tensor_parallel_degrees, tensor_parallel_plan


class Pipelined(PipelineMixin, nn.Module):
    pipeline_embedding, pipeline_blocks, pipeline_head = "net.embedding", "net.blocks", "net.head"

    def __init__(self) -> None:
        super().__init__()
        self.net = GPT(GPTConfig(vocab_size=16, max_seq_len=4, num_layers=3, num_heads=4, dim=8))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
        self.encoder = nn.Module()
        self.encoder.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        self.activations = nn.Sequential(nn.ReLU(), nn.ReLU())


def test_pipeline_modules_say_where_their_parts_are() -> None:
    """A module with pipeline support is taken at its word."""
    structure = find_structure(Pipelined())
    assert structure.pipeline
    assert structure.blocks == ("net.blocks.0", "net.blocks.1", "net.blocks.2")
    assert (structure.embedding, structure.head) == ("net.embedding", "net.head")


def test_largest_container_of_equal_modules_is_found() -> None:
    """Elsewhere the blocks are the children of the container that holds the most parameters."""
    structure = find_structure(Plain())
    assert structure.blocks == tuple(f"encoder.layers.{i}" for i in range(3)) and not structure.pipeline
    assert find_structure(Plain(), "small").blocks == tuple(f"small.{i}" for i in range(4))


@pytest.mark.parametrize(
    ("module", "blocks", "words"),
    [
        (Plain(), "encoder.blocks", ["blocks='encoder.blocks'", "'encoder.layers'", "'small'"]),
        (Plain(), "encoder.layers.0", ["holds no modules"]),
        (nn.Linear(2, 2), None, ["blocks=None", "no list of two or more"]),
    ],
)
def test_missing_blocks_are_explained(module: nn.Module, blocks: Any, words: list[str]) -> None:
    """One line names the argument and the containers that exist."""
    with pytest.raises(ValueError) as error:
        find_structure(module, blocks)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_tensor_parallel_plans() -> None:
    """Plans come from the layer or, by pattern, from the root; degrees divide heads and sizes."""
    root = Pipelined()
    assert tensor_parallel_plan(root, "net.blocks.1")["attention.query"] == "colwise"
    assert tensor_parallel_degrees(root, "net.blocks.1", 8) == (1, 2, 4)
    plain = Plain()
    assert tensor_parallel_plan(plain, "encoder.layers.0") == {} and tensor_parallel_degrees(plain, "small.0", 8) == (
        1,
    )
    plain.tensor_parallel_plan = {"encoder.*.0": "sideways"}  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'sideways'.*colwise"):
        tensor_parallel_plan(plain, "encoder.layers.0")
