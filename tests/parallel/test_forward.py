"""Models that run their own forward compute under a plan what one process computes."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetu.parallel.batch import batch_samples, local_dp, shard_rows
from lightning_hetu.parallel.build import check_plan_fits_model, synchronize_initial_state
from lightning_hetu.parallel.clip import clip_gradients_by_norm
from lightning_hetu.parallel.forward_build import build_forward_stage
from lightning_hetu.parallel.forward_executor import ForwardExecutor
from lightning_hetu.parallel.forward_trace import UncuttableModelError, trace_forward, trace_structure
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin, call_model
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.plan import HybridPlan
from tests.models.tiny_transformers import tiny_batch, tiny_model

SAMPLES = 8


class Module(PipelineMixin, nn.Module):
    pipeline_model = "model"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        torch.manual_seed(0)
        self.model = Toy() if kind == "toy" else tiny_model(kind)
        if kind == "toy":
            self.tensor_parallel_plan = {"model.stack.*.up": "colwise", "model.stack.*.down": "rowwise"}


def plan_of(text: str, world: int, stages: tuple[int, ...], microbatches: int) -> HybridPlan:
    rows = [LayerStrategy.parse(word) for word in text.split()]
    return HybridPlan(
        world_size=world, global_batch_size=SAMPLES, num_microbatches=microbatches, stages=stages,
        embedding=rows[0], layers=tuple(rows[1:-1]), head=rows[-1], schedule="1f1b",
    )  # fmt: skip


def train(module: Module, plan: HybridPlan, engine: ForwardExecutor | None) -> dict[str, Any]:
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, foreach=engine is None)
    losses, norms, gradients = [], [], {}
    for step in range(3):
        batch = batch_of(module.kind, step)
        if engine is not None:
            rows = shard_rows(SAMPLES, plan.num_microbatches, local_dp(plan), engine.mesh.data_index(local_dp(plan)))
            batch = {key: value[rows] for key, value in batch.items()}
        loss = module.pipeline_step(batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {n: full(p.grad) for n, p in module.named_parameters() if p.grad is not None}
        norms.append(float(clip_gradients_by_norm(
            [p for p in module.parameters() if p.grad is not None], 0.5,
            engine.mesh.pipeline.get_group() if engine is not None and plan.pipeline_parallel_size > 1 else None,
        )))  # fmt: skip
        optimizer.step()
    weights = {n: full(p) for n, p in module.named_parameters(remove_duplicate=False)}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def batch_of(kind: str, seed: int = 0) -> dict[str, Tensor]:
    if kind != "toy":
        return tiny_batch(kind, SAMPLES, seed)
    tokens = torch.randint(11, (SAMPLES, 7), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def on_ranks(rank: int, kind: str, plan: HybridPlan) -> dict[str, Any]:
    torch.manual_seed(rank)
    module = Module(kind)
    reference = copy.deepcopy(module)
    structure = trace_structure(module, batch_of(kind))
    check_plan_fits_model(plan, structure, module)
    synchronize_initial_state(module)
    mesh = PlanMesh(plan, "cpu")
    stage = build_forward_stage(module, structure, plan, mesh)
    engine = ForwardExecutor(module, stage, plan, mesh, torch.device("cpu"))
    module._pipeline_engine = engine
    found = train(module, plan, engine)
    expected = train(reference, plan, None)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    names = dict(expected["weights"])
    assert list(found["weights"]) == [name for name in names if name in found["weights"]]
    scale = max(float(g.norm()) for g in expected["gradients"].values())
    seen = 0
    for name, gradient in found["gradients"].items():
        other = expected["gradients"][name]
        seen += 1
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")
    assert seen
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, names[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    return {"names": sorted(found["weights"]), "losses": found["losses"]}


SLOW = pytest.mark.slow
TIED = "dp4-zero3 dp4-zero2 dp2-tp2-zero2 dp2-tp2-ddp dp2-tp2-zero3 dp4 dp4-zero3"
SIX = "dp2 dp2-zero3 dp2 dp2-zero2 dp2-recompute dp2 dp2-zero3 dp2"


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        pytest.param("gpt2", marks=SLOW),
        "bert",
        "t5",
        pytest.param("bart", marks=SLOW),
        pytest.param("qwen3-moe", marks=SLOW),
        pytest.param("vit", marks=SLOW),
        "swin",
    ],
)
def test_two_uneven_stages_equal_one_process(ranks: Any, kind: str) -> None:
    """Losses, norms, gradients and weights; every parameter is kept by some stage."""
    count = len(trace_structure(Module(kind), tiny_batch(kind, SAMPLES)).blocks)
    layers = ["dp2-zero3", "dp2-zero2", "dp2-ddp-recompute"] * count
    plan = plan_of(" ".join(["dp2-zero2", *layers[:count], "dp2-zero2"]), 4, (count - 2, 2), 2)
    results = ranks(4).run(on_ranks, kind, plan)
    held = {name for result in results for name in result["names"]}
    assert held == {name for name, _ in Module(kind).named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        # blocks with other layouts than what is around them, and the head split
        pytest.param(
            "llama",
            plan_of("dp2-tp2 dp4-zero3 dp2-tp2-zero2 dp2-tp2-recompute dp4-ddp dp4-zero3 dp2-tp2", 8, (3, 2), 2),
            id="mixed",
        ),
        # tied embeddings and a norm per head
        pytest.param("qwen3", plan_of(TIED, 8, (2, 3), 2), id="tied", marks=SLOW),
        pytest.param("qwen3", plan_of(TIED, 4, (5,), 2), id="tied-in-one-stage"),
        # three stages: cuts inside of encoder and decoder
        pytest.param("t5", plan_of(SIX, 6, (2, 2, 2), 4), id="encoder-decoder", marks=SLOW),
        # the decoder's table in a stage between those of the encoder's and the head
        pytest.param("t5", plan_of(SIX, 8, (1, 2, 2, 1), 4), id="four-stages"),
        pytest.param(
            "toy", plan_of("dp4 dp2-tp2 dp4-zero3 dp2-tp2-recompute dp2-tp2 dp4", 8, (2, 2), 2), id="shared-by-samples"
        ),
    ],
)
def test_mixed_layouts_equal_one_process(ranks: Any, kind: str, plan: HybridPlan) -> None:
    """Data and tensor parallelism of every block on its own."""
    ranks(plan.world_size).run(on_ranks, kind, plan)


class ToyBlock(nn.Module):
    """Adds a bias that is the same for all samples, and can be split."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 6, 8)) if first else None
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.bias is not None:
            bias = self.bias * 2
        assert bias is not None
        return hidden + self.down(torch.relu(self.up(hidden + bias))), bias


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.positions = nn.Embedding(7, 8)
        self.stack = nn.ModuleList(ToyBlock(index == 0) for index in range(4))
        self.out = nn.Linear(8, 11)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden, bias = torch.tanh(self.table(tokens) + self.positions.weight[: tokens.shape[1]]), None
        for block in self.stack:
            hidden, bias = block(hidden, bias)
        logits = self.out(hidden)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Skips(nn.Module):
    """A later block uses what an earlier one returned."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.blocks:
            x = block(x + (kept[-2] if len(kept) > 1 else 0))
            kept.append(x)
        return x.sum()


class Remembers(nn.Module):
    """What follows the blocks uses values that only the first stage has, with no gradient to tell."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = kept = self.table(x)
        for block in self.blocks:
            x = block(x)
        kept = kept.detach() if self.kind == "detached" else kept.argmax(dim=1, keepdim=True)
        return self.out(x * kept).sum()


class BatchSecond(nn.Module):
    """Works on [features, batch]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.T
        for block in self.blocks:
            x = block(x)
        return x.sum()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x.sum()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Skips(), "block 'blocks.2' uses what block 'blocks.0' has"),
        (Twice(), "block 'blocks.0' runs twice"),
        (Remembers("detached"), "what follows the last block uses what the part before the blocks has computed"),
        (Remembers("argmax"), "what follows the last block uses what the part before the blocks has computed"),
        (BatchSecond(), "block 'blocks.0' returns a tensor of shape .4, 2. whose batch is not in dimension 0"),
        (nn.Sequential(nn.Linear(4, 4)), "no list of two or more equal modules"),
    ],
    ids=["skip", "twice", "detached", "indices", "batch-second", "no-blocks"],
)
def test_models_that_are_no_chain_are_refused(model: nn.Module, said: str) -> None:
    with pytest.raises(UncuttableModelError, match=said):
        trace_forward(model, call_model, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("kind", "blocks", "outside"),
    [
        ("llama", [f"model.layers.{i}" for i in range(5)], ["model.embed_tokens", "model.norm", "lm_head"]),
        ("qwen3-moe", [f"model.layers.{i}" for i in range(5)], ["model.embed_tokens", "model.norm", "lm_head"]),
        ("gpt2", [f"transformer.h.{i}" for i in range(5)], ["transformer.wte", "transformer.ln_f"]),
        ("bert", [f"bert.encoder.layer.{i}" for i in range(5)], ["bert.embeddings.word_embeddings"]),
        ("vit", [f"vit.layers.{i}" for i in range(5)], ["vit.embeddings", "vit.layernorm", "classifier"]),
        ("t5", [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in range(3)], ["lm_head"]),
        # blocks of two classes
        ("bart", [f"model.{part}.layers.{i}" for part in ("encoder", "decoder") for i in range(3)], ["lm_head"]),
        (
            "swin",
            [f"swin.encoder.layers.{i}.blocks.{j}" for i in range(3) for j in range(2)],
            ["swin.encoder.layers.0.downsample.norm"],
        ),
    ],
)
def test_blocks_are_found(kind: str, blocks: list[str], outside: list[str]) -> None:
    """In the order they run, wherever they stand."""
    structure = trace_structure(Module(kind), tiny_batch(kind, 4))
    assert structure.blocks == tuple(f"model.{name}" for name in blocks)
    found = [*structure.modules("embedding"), *structure.modules("head")]
    assert {f"model.{name}" for name in outside} <= set(found)


def test_fake_tensors_do_not_stay_in_the_model() -> None:
    """transformers keeps position indices of BEiT in a cache of the whole process."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        use_shared_relative_position_bias=True,
    )  # fmt: skip
    model = transformers.BeitForImageClassification(config)
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16), "labels": torch.zeros(2, dtype=torch.long)}
    with suppress(UncuttableModelError):
        trace_forward(model, call_model, batch)
    assert type(model(**batch).loss) is Tensor


def test_samples_of_a_batch() -> None:
    """What most tensors have in dimension 0, wherever they stand."""
    weights, tokens = torch.ones(6), torch.ones(3, 6)
    assert batch_samples({"weights": weights, "tokens": tokens, "labels": tokens}) == 3
    assert batch_samples([tokens, weights]) == 3
    with pytest.raises(ValueError, match="without a tensor that has a batch dimension"):
        batch_samples({"x": torch.tensor(1.0)})


def test_the_batch_does_not_need_to_be_computed() -> None:
    """A model on the meta device is traced too."""
    with torch.device("meta"):
        module = Module("llama")
    assert len(trace_structure(module, tiny_batch("llama", 4)).blocks) == 5
