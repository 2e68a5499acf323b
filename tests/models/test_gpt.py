"""The GPT is right as a model, and can be cut, sharded and materialized as its documentation says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hetu.models.gpt import GPT, GPTBlock, GPTConfig, GPTEmbedding, GPTHead

CONFIG = GPTConfig(vocab_size=24, max_seq_len=10, num_layers=2, num_heads=4, dim=16)


def written_reference(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The same network from its weights alone, head by head and without fused operators."""

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * gain

    weights = dict(model.named_parameters())
    length = tokens.shape[1]
    x = weights["embedding.token.weight"][tokens] + weights["embedding.position.weight"][:length]
    hidden_future = torch.ones(length, length, dtype=torch.bool).triu(1)
    size = CONFIG.dim // CONFIG.num_heads
    for layer in range(CONFIG.num_layers):

        def weight(name: str, layer: int = layer) -> torch.Tensor:
            return weights[f"blocks.{layer}.{name}.weight"]

        y = norm(x, weight("attention_norm"))
        heads = []
        for head in range(CONFIG.num_heads):
            rows = slice(head * size, (head + 1) * size)
            query, key, value = (y @ weight(f"attention.{name}")[rows].T for name in ("query", "key", "value"))
            scores = (query @ key.transpose(1, 2) / size**0.5).masked_fill(hidden_future, float("-inf"))
            heads.append(scores.softmax(-1) @ value)
        x = x + torch.cat(heads, -1) @ weight("attention.out").T
        x = x + F.gelu(norm(x, weight("mlp_norm")) @ weight("mlp.up").T) @ weight("mlp.down").T
    return norm(x, weights["head.norm.weight"]) @ weights["head.linear.weight"].T


def randomized(model: GPT) -> GPT:
    """Larger weights than the initial ones, so that every term of the network counts."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_logits_equal_a_written_reference() -> None:
    model = randomized(GPT(CONFIG)).double()
    tokens = torch.randint(CONFIG.vocab_size, (3, 7))
    torch.testing.assert_close(model(tokens), written_reference(model, tokens))


def test_a_token_does_not_see_the_future() -> None:
    model = randomized(GPT(CONFIG))
    tokens = torch.randint(CONFIG.vocab_size, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_exactly_three_children_each_mapping_one_tensor_to_one() -> None:
    model = GPT(CONFIG)
    assert [name for name, _ in model.named_children()] == ["embedding", "blocks", "head"]
    x = torch.randint(CONFIG.vocab_size, (2, 6))
    shapes = []
    for layer in (model.embedding, *model.blocks, model.head):
        x = layer(x)
        shapes.append(tuple(x.shape))
    assert shapes == [(2, 6, 16)] * 3 + [(2, 6, 24)]


def test_input_and_output_tables_are_not_tied() -> None:
    model = GPT(CONFIG)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_materializing_a_meta_model_gives_the_same_weights_as_building_it() -> None:
    torch.manual_seed(3)
    built = GPT(CONFIG)
    with torch.device("meta"):
        model = GPT(CONFIG)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(3)
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    for (name, expected), actual in zip(built.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, actual), name
    assert not list(model.buffers())


@pytest.mark.parametrize("layer_class", [GPTEmbedding, GPTBlock, GPTHead])
def test_tensor_parallel_plans_name_existing_modules(layer_class: type[nn.Module]) -> None:
    layer = layer_class(CONFIG)
    for name, style in layer.tensor_parallel_plan.items():
        expected = nn.Embedding if style == "vocab_rowwise" else nn.Linear
        assert isinstance(layer.get_submodule(name), expected)
    named = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert named <= set(layer.tensor_parallel_plan)


@pytest.mark.parametrize(
    ("layer_class", "divisor"), [(GPTEmbedding, 24), (GPTBlock, 4), (GPTHead, 24)], ids=["embedding", "block", "head"]
)
def test_tensor_parallel_divisor(layer_class: type[nn.Module], divisor: int) -> None:
    assert layer_class(CONFIG).tensor_parallel_divisor == divisor


def test_a_block_runs_with_a_share_of_its_heads_and_columns() -> None:
    """Two halves of a block, cut along its plan by hand, add up to the whole."""
    whole = randomized(GPT(CONFIG)).blocks[0]
    x = torch.randn(2, 5, CONFIG.dim)
    attention_sum, mlp_sum = torch.zeros_like(x), torch.zeros_like(x)
    y = whole.attention_norm(x)
    for half in range(2):
        shard = GPTBlock(CONFIG)
        for name, style in shard.tensor_parallel_plan.items():
            dim = 0 if style == "colwise" else 1
            weight = whole.get_submodule(name).weight.chunk(2, dim)[half]
            shard.get_submodule(name).weight = nn.Parameter(weight.detach().clone())
        attention_sum += shard.attention(y)
        mlp_sum += shard.mlp(y)
    torch.testing.assert_close(attention_sum, whole.attention(y))
    torch.testing.assert_close(mlp_sum, whole.mlp(y))


def test_dropout_acts_in_training_only() -> None:
    block = GPTBlock(GPTConfig(vocab_size=8, dim=16, dropout=0.5))
    x = torch.randn(2, 5, 16)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide dim=16"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{"vocab_size": 24, "dim": 16, **change})


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="11 tokens exceeds max_seq_len=10"):
        GPT(CONFIG)(torch.zeros(1, 11, dtype=torch.int64))


def test_initial_weights_have_the_documented_deviation() -> None:
    model = GPT(GPTConfig(vocab_size=512, dim=256, num_layers=2, num_heads=2))
    block = model.blocks[0]
    expected = {
        model.embedding.token: 0.02,
        block.attention.query: 256**-0.5,
        block.attention.out: 256**-0.5 / 2,
        block.mlp.down: 1024**-0.5 / 2,
        model.head.linear: 256**-0.5,
    }
    for module, deviation in expected.items():
        assert module.weight.std().item() == pytest.approx(deviation, rel=0.03)
