"""Blocks with some operators in zero3 train what one process trains, in the memory that was predicted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hetu.models import GPTLightningModule
from lightning_hetu.parallel.build import check_plan_fits_model, parallelize
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.operator_groups import operator_groups
from lightning_hetu.parallel.structure import find_structure
from lightning_hetu.planning import ClusterSpec, evaluate
from lightning_hetu.profiling import estimate_model, profile_model, profile_step
from tests.benchmarks.plan_accuracy import Setup, measure
from tests.strategies._runs import Blocks, Small, loader, plan_of, train

SOME = "sharded(attention.query,attention.value,mlp.up)"
PIPELINE = plan_of(
    f"dp2-zero2 dp2-zero2-{SOME} dp2-ddp-sharded(mlp.up)-recompute dp2-zero2-sharded(attention.out,mlp.down)-recompute"
    f" dp2-ddp-{SOME} dp2-ddp",
    4,
    (2, 2),
    4,
)
TENSOR = plan_of(
    f"dp4-zero2 dp2-tp2-zero2-{SOME} dp2-tp2-zero2-sharded(attention.key,mlp.down)-sequence dp2-sp2-ddp-sharded(mlp.up)"
    " dp2-tp2-ddp-sharded(attention,mlp.up)-sequence-recompute dp4-zero2",
    4,
    (4,),
    2,
)
PLAIN = plan_of("dp4-zero2 dp4-zero2-sharded(up) dp4-ddp-sharded(down,up) dp2-tp2-zero2-sharded(down)-recompute"
                " dp4-zero3 dp4-zero2", 4, (4,))  # fmt: skip
QUICK = {
    "evaluate": False,
    "shuffle": False,
    "gradient_clip_val": 0.1,
    "limit_train_batches": 3,
    "limit_val_batches": 1,
}


def same(actual: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Losses of all ranks, and the weights of all stages."""
    weights: dict[str, Tensor] = {}
    for result in actual:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        weights |= result["weights"]
    assert set(weights) == set(expected["weights"])
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_training_equals_one_process(ranks: Any, tmp_path: Path) -> None:
    """Under pipelines, tensor and sequence parallelism and recomputation; a checkpoint goes on under another plan."""
    expected = train(0, str(tmp_path / "one"), None, QUICK)
    first = ranks(4).run(train, str(tmp_path / "pipeline"), PIPELINE, QUICK)
    same(first, expected)
    resumed = {**QUICK, "ckpt_path": str(tmp_path / "pipeline" / "epoch=0.ckpt")}
    rest = ranks(4).run(train, str(tmp_path / "tensor"), TENSOR, resumed)
    same(rest, {**expected, "losses": expected["losses"][3:]})


def test_plain_modules_equal_one_process(ranks: Any, tmp_path: Path) -> None:
    """A module that runs its own forward, with accumulated gradients."""
    options = {**QUICK, "module": "blocks", "accumulate_grad_batches": 2, "limit_train_batches": 4}
    expected = train(0, str(tmp_path / "one"), None, options)
    same(ranks(4).run(train, str(tmp_path / "four"), PLAIN, options), expected)


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = str(func).split(".")[:2]
        if space in ("c10d", "_c10d_functional"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def collectives(rank: int, strategies: list[str]) -> list[dict[str, int]]:
    """Collectives of a forward and a backward of one block, the second ones: FSDP prepares itself in the first."""
    found = []
    for text in strategies:
        plan = plan_of(f"dp4-zero2 {text} dp4-zero2", 4, (1,))
        module = Small(num_layers=1)
        mesh = PlanMesh(plan, "cpu")
        name = find_structure(module).blocks[0]
        parallelize(module, name, plan.layers[0], mesh)
        block, x = module.get_submodule(name), torch.randn(2, 8, 32, requires_grad=True)
        block(x).sum().backward()
        with Collectives() as watch:
            block(x).sum().backward()
        found.append(dict(watch.calls))
    return found


def test_operators_communicate_as_priced(ranks: Any) -> None:
    """Each operator is gathered in forward and in backward, also where the block is recomputed, and reduced alone.

    Tensor-parallel layers still sum the gradient of their common input once, not once for each of them.
    """
    texts = ["dp4-zero2", "dp4-zero2-sharded(mlp.up)", "dp4-zero2-sharded(attention.query,mlp.down,mlp.up)-recompute"]
    texts += ["dp2-tp2-zero2", f"dp2-tp2-zero2-{SOME}"]
    zero2, one, three, tensor, sharded = ranks(4).run(collectives, texts)[0]
    gathers, reductions = "_allgather_base_", "_reduce_scatter_base_"
    assert (zero2[gathers], zero2[reductions]) == (1, 1)
    assert (one[gathers], one[reductions]) == (1 + 2, 1 + 1)
    assert (three[gathers], three[reductions]) == (1 + 2 * 3, 1 + 3)
    assert sharded["all_reduce"] == tensor["all_reduce"] > 0


def test_predicted_memory_is_measured(ranks: Any) -> None:
    """Every stage's peak in a real training step is within 10 % of the prediction."""
    every = "sharded(attention.key,attention.out,attention.query,attention.value,mlp.down,mlp.up)"
    plan = plan_of(
        f"dp2-zero2 dp2-zero2-sharded(mlp.down,mlp.up)-recompute dp2-ddp-sharded(mlp.up) dp2-zero2-{every}"
        " dp2-zero2-sharded(mlp.down,mlp.up) dp2-zero3",
        4,
        (2, 2),
        4,
    )
    sizes = {"vocab_size": 128, "max_seq_len": 64, "num_layers": 4, "num_heads": 4, "dim": 128}
    setup = Setup(sizes, {"mixed": plan})
    module = GPTLightningModule(**sizes)
    tokens = torch.randint(128, (2, 65))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    profile = estimate_model(module, find_structure(module), *batch, flops_per_second=1e9)
    cluster = ClusterSpec.from_bandwidth(4, gigabytes_per_second=1)
    _, measured = ranks(4).run(measure, setup, plan, 3, 1, timeout=300)[0]
    predicted = evaluate(plan, profile, cluster).stage_memory
    for stage, (expected, actual) in enumerate(zip(predicted, measured, strict=True)):
        assert expected == pytest.approx(actual, rel=0.10), f"stage {stage}: predicted {expected}, measured {actual}"


# ---- which operators there are --------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A block with modules that cannot be gathered on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.once, self.twice, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.mixed = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])
        self.tied, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.tied.weight
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.mixed[1](self.mixed[0](self.twice(self.twice(self.once(x)))))
        return self.drop(self.other(self.tied(x + self.experts[0](x) * self.experts[1](x))))


def test_operators_of_an_odd_block() -> None:
    """Those that are called once per forward and are alone in using their parameters, in the order of their calls."""
    block = Odd()
    found = operator_groups(block, lambda: block(torch.randn(2, 3, 8)))
    assert list(found) == ["attention", "once", "mixed.0", "mixed.1"]
    assert found["once"] == 4 * (64 + 8) and found["attention"] == 4 * (4 * 64 + 32)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("ffn", "'ffn' is no module inside of the layer, expected one such as norm, up, down"),
        ("odd.experts.0", "'odd.experts.0' is one of several modules of a kind, such as experts"),
        ("odd.experts", "'odd.experts' is a ModuleList, which is never called: name the modules in it"),
        ("odd.attention.out_proj", "is a part of MultiheadAttention, which uses its parameters without calling it"),
        ("odd.tied", "'odd.tied' shares a parameter with 'odd.other'"),
        ("odd.drop", "'odd.drop' has no parameters"),
        ("odd,odd.once", "'odd.once' is a part of 'odd', which is sharded as well: leave out one of them"),
    ],
)
def test_plans_that_do_not_fit_are_refused(names: str, message: str) -> None:
    """One line says which block, which operator, and why."""
    module = Blocks()
    module.net.layers[2].odd = Odd()
    sharded = f"dp4-zero2-sharded({names})"
    plan = plan_of(f"dp4-zero2 dp4-zero2 dp4-zero2 {sharded} dp4-zero2 dp4-zero2", 4, (4,))
    with pytest.raises(ValueError) as error:
        check_plan_fits_model(plan, find_structure(module), module)
    text = str(error.value)
    assert text.startswith("plan.layers[2]=dp4-zero2-sharded(") and "in net.layers.2, " in text
    assert message in text and "\n" not in text


def test_only_blocks_have_operators() -> None:
    """Embedding and head are one group each."""
    module = Small()
    plan = plan_of("dp4-zero2-sharded(table) dp4 dp4 dp4 dp4 dp4", 4, (4,))
    with pytest.raises(ValueError, match=r"plan.embedding=dp4-zero2-sharded\(table\): only blocks can have operators"):
        check_plan_fits_model(plan, find_structure(module), module)


def test_profilers_find_the_operators() -> None:
    """All three the same, in the order of calls; together they are nearly all of the block."""
    names = ["attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down"]
    module, batch = Small(), next(iter(loader()))
    structure = find_structure(module)
    measured = profile_model(module, structure, *batch, batch_sizes=(2,), repeats=1).layer_types[0]
    described = estimate_model(module, structure, *batch, flops_per_second=1e9).layer_types[0]
    assert list(measured.operators) == names and measured.operators == described.operators
    assert measured.operators["mlp.up"] == 4 * 4 * 32 * 32
    assert 0.9 < sum(measured.operators.values()) / measured.parameter_bytes < 1
    plain = Blocks()
    whole = profile_step(plain, find_structure(plain), plain._loss, batch, batch_sizes=(2,), repeats=1).layer_types[0]
    assert list(whole.operators) == ["norm", "up", "down"], "even the norm is more than a hundredth here"
    assert whole.operators["up"] == 4 * (16 * 64 + 64)
