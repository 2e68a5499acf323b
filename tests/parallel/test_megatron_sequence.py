"""Megatron sequence parallelism computes what one process computes, and says where it cannot be used."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hetu.models.gpt import GPTBlock, GPTConfig
from lightning_hetu.parallel.build import build_module, check_plan_fits_model
from lightning_hetu.parallel.megatron_sequence import (
    SequenceRegions,
    apply_sequence_parallel,
    sequence_parallel_degrees,
    sequence_regions,
)
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.recompute import apply_recompute
from lightning_hetu.parallel.sequence_cut import cut_activation
from lightning_hetu.parallel.structure import find_structure
from lightning_hetu.parallel.tensor import apply_tensor_parallel
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan
from tests.parallel import test_executor, test_forward

MIXED = (
    "dp4-zero3 dp2-tp2-zero2-sequence dp4-zero3 dp2-tp2-zero3-sequence-recompute dp2-tp2-ddp-sequence dp2-tp2-zero2"
    " tp4-sequence dp4-ddp"
)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [(6,), (3, 3)], ids=["one-stage", "two-stages"])
def test_gpt_equals_one_process(ranks: Any, stages: tuple[int, ...]) -> None:
    """Losses, norms, gradients and weights, next to layers without it, accumulated over microbatches."""
    text = MIXED
    if len(stages) == 2:
        text = "dp2 dp2-zero3 tp2-sequence dp2 tp2-sequence-recompute tp2-sequence tp2 tp2"
    plan = test_executor.plan_of(text, 4, stages, 2)
    results = ranks(4).run(test_executor.compare_with_one_process, plan, {})
    for rank, problems in enumerate(results):
        assert not problems, f"rank {rank}: {problems}"


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        (
            "llama",
            "dp2-tp2 dp4-zero3 dp2-tp2-zero2-sequence dp2-tp2-ddp-sequence-recompute dp2-tp2-zero3-sequence"
            " dp2-tp2-zero3 dp2-tp2",
        ),
        # tied embeddings and a norm per head, which works on whole sequences
        pytest.param(
            "qwen3",
            "dp4 dp2-tp2-zero2-sequence dp2-tp2-zero3-sequence-recompute dp4 dp2-tp2-ddp-sequence dp2-tp2 dp4",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["llama", "qwen3"],
)
def test_transformers_equal_one_process(ranks: Any, kind: str, plan: str) -> None:
    """Blocks that are given their tokens by name and count by the shape of what they are given."""
    ranks(4).run(test_forward.on_ranks, kind, test_forward.plan_of(plan, 4, (5,), 2))


class Collectives(TorchDispatchMode):
    """Counts the collectives of DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it does is seen
        if func.namespace == "_c10d_functional" and not func.__name__.startswith(("wait", "_wrap")):
            self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def block_of(bias: bool = False, frozen: tuple[str, ...] = (), **options: Any) -> GPTBlock:
    torch.manual_seed(0)
    block = GPTBlock(GPTConfig(vocab_size=8, max_seq_len=8, num_layers=1, num_heads=4, dim=16, **options))
    if bias:
        block.mlp.up, block.mlp.down = nn.Linear(16, 64), nn.Linear(64, 16)
    for name in frozen:
        block.get_parameter(name).requires_grad_(False)
    return block


def parallelize_block(block: GPTBlock, mode: str) -> None:
    """``mode`` is ``tensor`` parallel, ``sequence`` parallel, or that ``recomputed``."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plan = dict(block.tensor_parallel_plan)
    if mode == "tensor":
        apply_tensor_parallel(block, mesh, plan)
        return
    regions = sequence_regions(nn.ModuleDict({"block": block}), "block")
    cut = apply_sequence_parallel(block, mesh, plan, regions, recompute=mode == "recomputed")
    if mode == "recomputed":
        apply_recompute(block)
    cut_activation(block, cut, "block")


def run_block(
    rank: int, mode: str, options: dict[str, Any] | None = None, dtype: Any = None, length: int = 8
) -> dict[str, Any]:
    """Output, gradients and collectives of one block, and whether it keeps what the MLP is given."""
    block = block_of(**options or {})
    if mode != "one":
        parallelize_block(block, mode)
    torch.manual_seed(1)
    inputs = torch.randn(2, length, 16, requires_grad=True)
    entered: list[Any] = []
    block.mlp.up.register_forward_pre_hook(lambda _, args: entered.append((storage_of(args[0]), args[0].dtype)))
    with Collectives() as forward, torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        output = block(inputs)
    storage, given = entered.pop(0)
    kept = storage() is not None
    with Collectives() as backward:
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {
        "tensors": {
            "output": output.detach(),
            "input": inputs.grad,
            **{name: test_executor.full(gradient) for name, gradient in gradients.items()},
        },
        "counts": [dict(forward.counts), dict(backward.counts)],
        "kept": kept,
        "entered": given,
    }


def storage_of(tensor: Any) -> Any:
    return weakref.ref((tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage())


def test_collectives_and_what_is_kept(ranks: Any) -> None:
    """All-gather and reduce-scatter in the place of all-reduce; what is gathered is not kept but gathered again."""
    expected = {
        "tensor": [{"all_reduce": 2}, {"all_reduce": 2}],
        # the layer's output; in backward its input's gradient, and what the two products gather once more
        "sequence": [
            {"all_gather_into_tensor": 3, "reduce_scatter_tensor": 2},
            {"all_gather_into_tensor": 5, "reduce_scatter_tensor": 2},
        ],
        # the forward that is run again ends before its last sum
        "recomputed": [
            {"all_gather_into_tensor": 3, "reduce_scatter_tensor": 2},
            {"all_gather_into_tensor": 5, "reduce_scatter_tensor": 3},
        ],
    }
    for mode, counts in expected.items():
        found = ranks(2).run(run_block, mode)[0]
        assert found["counts"] == counts, mode
        assert found["kept"] == (mode == "tensor")


@pytest.mark.parametrize("mode", ["sequence", "recomputed"])
def test_a_block_with_dropout_biases_and_frozen_norms(ranks: Any, mode: str) -> None:
    """Dropout draws what one process draws; biases behind the sum count once; what is frozen stays frozen."""
    options = {"dropout": 0.3, "bias": True, "frozen": ("mlp_norm.weight",)}
    expected = run_block(0, "one", options)["tensors"]
    assert "mlp_norm.weight" not in expected and "mlp.down.bias" in expected
    for found in ranks(2).run(run_block, mode, options):
        assert found["tensors"].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found["tensors"][name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("mode", ["sequence", "recomputed"])
@pytest.mark.parametrize("length", [7, 1])
def test_lengths_that_do_not_divide(ranks: Any, mode: str, length: int) -> None:
    """The last rank has fewer tokens, or none."""
    options = {"dropout": 0.3}
    expected = run_block(0, "one", options, None, length)["tensors"]
    for found in ranks(2).run(run_block, mode, options, None, length):
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found["tensors"][name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_autocast_gathers_what_the_products_use(ranks: Any) -> None:
    """In bf16 half as much is sent, and kept, and the result is that of one process to bf16 rounding."""
    expected = run_block(0, "one", {}, torch.bfloat16)["tensors"]
    found = ranks(2).run(run_block, "sequence", {}, torch.bfloat16)[0]
    assert found["entered"] == torch.bfloat16 and not found["kept"]
    for name, tensor in expected.items():
        assert (found["tensors"][name] - tensor).norm() < 0.02 * tensor.norm(), name


def error_of_block(rank: int, length: int, change: str) -> str:
    block = block_of()
    if change == "mixes tokens":
        block.mlp.register_forward_hook(lambda _, args, output: output.mean(1, keepdim=True))
    elif change == "returns all":
        block.mlp.register_forward_hook(lambda _, args, output: output + args[0])
    elif change == "uses weights":
        block.register_forward_pre_hook(lambda _, args: args[0] * block.mlp_norm.weight)
    parallelize_block(block, "sequence")
    shape = (2, length, 16) if change != "flat" else (length, 16)
    try:
        block(torch.randn(shape))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("length", "change", "words"),
    [
        (8, "flat", ["block", "[8, 16]", "[samples, sequence, hidden]"]),
        (8, "mixes tokens", ["mlp", "[2, 1, 16] for 4 tokens"]),
        (2, "returns all", ["mlp", "[2, 2, 16] for 1 tokens"]),
        (8, "uses weights", ["mixed torch.Tensor and DTensor"]),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(ranks: Any, length: int, change: str, words: list[str]) -> None:
    """Never computed wrongly: one line names the layer, what it got, and the remedy."""
    for message in ranks(2).run(error_of_block, length, change):
        assert all(word in message for word in words), message
        assert change == "uses weights" or "\n" not in message


class Scaled(GPTBlock):
    """A block with a parameter of its own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(config.dim))


class Direct(nn.Module):
    """A block whose split layers are its own."""

    tensor_parallel_plan: ClassVar[dict[str, str]] = {"up": "colwise", "down": "rowwise"}

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)


class Whole(GPTBlock):
    """A block that is not split."""

    tensor_parallel_plan: ClassVar[dict[str, str]] = {}


class Odd(GPTBlock):
    """A block whose attention has a norm on whole sequences, or on parts of them: who knows."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.attention.norm = nn.LayerNorm(config.dim)


@pytest.mark.parametrize(
    ("block", "plan", "words"),
    [
        (Scaled, "tp2-sequence", ["plan.layers[0]=tp2-sequence", "model.blocks.0.scale", "-sequence"]),
        (Odd, "tp2-sequence", ["plan.layers[0]=", "model.blocks.0.attention.norm.weight"]),
        (Direct, "tp2-sequence", ["plan.layers[0]=", "model.blocks.0", "submodules"]),
        (Whole, "tp2-sequence", ["plan.layers[0]=", "tensor_parallel_plan"]),
        (GPTBlock, "head", ["plan.head=tp2-sequence", "only the sequences of blocks"]),
    ],
)
def test_models_that_cannot_be_cut_are_refused(block: Any, plan: str, words: list[str]) -> None:
    """In one line, before anything is changed."""
    model = test_executor.Model()
    model.model.blocks[0] = block(model.model.config)
    rows = ["tp2", *["tp2"] * test_executor.LAYERS, "tp2-sequence" if plan == "head" else "tp2"]
    if plan != "head":
        rows[1] = plan
    with pytest.raises(ValueError) as error:
        check_plan_fits_model(test_executor.plan_of(" ".join(rows), 2, (6,), 1), find_structure(model), model)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_layers_and_degrees_are_found() -> None:
    """Norms, and the modules that gather."""
    model = test_executor.Model()
    found = sequence_regions(model, "model.blocks.1")
    assert found == SequenceRegions(("attention", "mlp"), ("attention_norm", "mlp_norm"))
    assert sequence_parallel_degrees(model, "model.blocks.1", (1, 2, 4)) == (2, 4)
    assert sequence_parallel_degrees(model, "model.head", (1, 2, 4)) == ()


class Plain(nn.Module):
    """A model without pipeline support."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        self.blocks = nn.ModuleList(block_of() for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def run_plain_model(rank: int) -> None:
    torch.manual_seed(0)
    model = Plain()
    reference = copy.deepcopy(model)
    rows = [LayerStrategy.parse(text) for text in ("dp2-zero3", "tp2-sequence", "dp2", "tp2-sequence-recompute")]
    plan = HybridPlan(2, 4, 1, stages=(3,), embedding=rows[0], layers=tuple(rows[1:]), head=rows[0])
    mesh = PlanMesh(plan, "cpu")
    tokens = torch.randint(8, (4, 8))
    mine = slice(2 * rank, 2 * rank + 2)
    expected = reference(tokens)
    expected.pow(2).sum().backward()
    wrapper = build_module(model, find_structure(model, "blocks"), plan, mesh)
    output = wrapper(tokens[mine])
    output.pow(2).sum().backward()
    torch.testing.assert_close(output, expected[mine])
    for name, parameter in model.named_parameters():
        gradient = reference.get_parameter(name).grad
        torch.testing.assert_close(test_executor.full(parameter.grad), gradient, rtol=1e-5, atol=1e-4)
    wrapper.eval()
    with torch.inference_mode():
        torch.testing.assert_close(wrapper(tokens[mine]), expected[mine])


def test_any_model_equals_one_process(ranks: Any) -> None:
    """Layouts change before the sequence is cut; evaluation works too."""
    ranks(2).run(run_plain_model)
