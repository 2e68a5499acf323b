"""One tensor-parallel rank is timed with its own part of the weights."""

from __future__ import annotations

import torch

from lightning_hetu.models.gpt import GPT, GPTConfig
from lightning_hetu.profiling._case import LayerCase
from lightning_hetu.profiling._tensor_parallel import one_of


def test_the_layer_shrinks_and_comes_back() -> None:
    """Inside, split weights are a half and outputs keep their shape; afterwards everything is as before."""
    model = GPT(GPTConfig(vocab_size=16, max_seq_len=8, num_layers=1, num_heads=4, dim=32))
    inputs = torch.randn(3, 8, 32)
    for part, name in ((model.blocks[0], "attention.query.weight"), (model.head, "linear.weight")):
        plan = type(part).tensor_parallel_plan
        before = {name: (id(p), p.detach().clone()) for name, p in part.named_parameters()}
        whole = part(inputs)
        case = LayerCase("layer", part, call=part, arguments=inputs, batch=3, plan=plan, tp_degrees=(1, 2))
        with one_of(case, 2):
            assert part.get_parameter(name).numel() * 2 == before[name][1].numel()
            assert part(inputs).shape == whole.shape
        for key, parameter in part.named_parameters():
            assert id(parameter) == before[key][0] and torch.equal(parameter, before[key][1])
        torch.testing.assert_close(part(inputs), whole)
