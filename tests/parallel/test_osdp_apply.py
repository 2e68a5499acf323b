"""An OSDP plan in effect trains what one process trains, and communicates what the cost table says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hetu.models import GPTLightningModule
from lightning_hetu.parallel.clip import clip_gradients_by_norm, squared_norm_of_offloaded
from lightning_hetu.parallel.materialize import check_can_be_materialized
from lightning_hetu.parallel.osdp.apply import (
    apply_osdp,
    check_parameters,
    check_plan,
    plain_parameters,
    set_last_micro_step,
)
from lightning_hetu.parallel.osdp.discover import ROOT, Unit, find_units
from lightning_hetu.parallel.osdp.engine import reduce_plain_gradients
from lightning_hetu.planning.osdp import Operator, OperatorCosts, OperatorPlan, OSDPPlan, Ring
from lightning_hetu.planning.osdp.buckets import with_buckets
from lightning_hetu.profiling import MemoryMeter

WIDTH, WORDS, LENGTH, BATCH = 24, 30, 6, 8


class Adapted(nn.Module):
    """A frozen layer with a small trained one beside it, as in LoRA."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.base = nn.Linear(size, size).requires_grad_(False)
        self.down, self.up = nn.Linear(size, 2, bias=False), nn.Linear(2, size, bias=False)
        self.strength = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.strength * self.up(self.down(x))


class Odd(nn.Module):
    """What real models have and wrapping code forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        # It uses its child's weight and never calls it. A bias of keys would have no gradient but rounding.
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.adapted = Adapted(WIDTH)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Linear(5, 3)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.uneven = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, WIDTH))
        self.tiny = nn.Linear(WIDTH, 1)  # fewer rows than ranks
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.place
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + self.scale * torch.tanh(self.twice(torch.tanh(self.twice(x)))) + self.nothing.sum()
        x = x + self.uneven(x) + self.adapted(x)
        return self.head(x * torch.sigmoid(self.tiny(x)))


def units_of(model: nn.Module, tokens: Tensor) -> tuple[Unit, ...]:
    with torch.no_grad():
        return find_units(model, lambda: model(tokens))


def operator_of(model: nn.Module, unit: Unit) -> Operator:
    plain = {name for name, _ in plain_parameters(model)}
    names = [name for name in unit.parameters if name not in plain]
    parameters = [model.get_parameter(name) for name in names]
    shapes = tuple(tuple(parameter.shape) for parameter in parameters)
    return Operator(unit.name, shapes=shapes, trained=any(p.requires_grad for p in parameters), kind=unit.kind)


def planned(
    model: nn.Module, units: tuple[Unit, ...], world: int, modes: list[str], accumulate: int, accumulation: Any
) -> OSDPPlan:
    """The units with these modes in turn, and the collectives that the cost table has for them."""
    link = Ring(1e-9, 0.0, 1e-9)
    costs = OperatorCosts(world, link, tuple(set(modes)), micro_steps=accumulate, accumulation=accumulation)
    rows = []
    for index, unit in enumerate(units):
        mode = modes[index % len(modes)]
        mode = "z2" if unit.name == ROOT and mode == "dp" else mode
        parts = ((mode, 1),)
        unused = unit.name == "unused"
        collectives = () if unused else costs.collectives(operator_of(model, unit), parts)
        rows.append(OperatorPlan(unit.name, parts, collectives=collectives))
    plan = OSDPPlan(world, tuple(rows), micro_steps=accumulate, accumulation=accumulation, batch_size=BATCH // world)
    # Small ones, so that there are several; LoRA's parts are in one with a module that another unit is inside of.
    joinable = {unit.name for unit in units} - {ROOT, "unused"}
    return with_buckets(plan, [operator_of(model, unit) for unit in units], joinable, costs.dtypes, 1500)


class Collectives(TorchDispatchMode):
    """Counts what is communicated, as the cost table names it."""

    NAMES = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self.NAMES.get(str(func).split(".")[1]) if str(func).startswith("c10d.") else None
        if name is not None:
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            whole = args[1] if name == "reduce_scatter" else tensors[0]
            boxed = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
            key = name, torch.distributed.ProcessGroup.unbox(boxed).size()
            self.calls[key] += 1
            self.bytes[key] += whole.numel() * whole.element_size()
        return func(*args, **(kwargs or {}))


def batches(steps: int) -> Tensor:
    return torch.randint(0, WORDS, (steps, BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def train_one(steps: int, accumulate: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Odd()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, norms = [], []
    for step, tokens in enumerate(batches(steps * accumulate)):
        loss = loss_of(model, tokens)
        losses.append(loss.item())
        (loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def train_many(rank: int, world: int, cases: list[tuple[list[str], int, str, int]]) -> list[Any]:
    return [_train(rank, world, *case) for case in cases]


def _train(rank: int, world: int, modes: list[str], accumulate: int, accumulation: str, steps: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    model = Odd()
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    units = units_of(model, batches(1)[0][rows])
    plan = planned(model, units, world, modes, accumulate, accumulation)
    mesh = init_device_mesh("cpu", (world,))
    group = mesh.get_group()
    root = apply_osdp(model, units, plan, mesh)
    optimizer = torch.optim.Adam(root.parameters(), lr=3e-3)
    losses, norms, counted = [], [], Collectives()
    for step, tokens in enumerate(batches(steps * accumulate)):
        last = (step + 1) % accumulate == 0
        set_last_micro_step(root, plan, last=last)
        watch = counted if step // accumulate == 1 else Collectives()  # in the first one FSDP prepares itself
        with watch:
            loss = loss_of(root, tokens[rows])
            (loss / accumulate / world).backward()
        shown = loss.detach().clone()
        torch.distributed.all_reduce(shown)
        losses.append(shown.item() / world)
        if last:
            reduce_plain_gradients(model, group)
            norms.append(float(clip_gradients_by_norm(root.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    weights = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}
    expected = {(c.op, c.ranks): (c.calls, c.bytes) for c in plan.collectives}
    found = {key: (calls, counted.bytes[key]) for key, calls in counted.calls.items()}
    return losses, norms, weights, found, expected


CASES = {
    2: [
        (["dp", "z2", "zdp"], 4, "last", 50),
        (["dp"], 2, "last", 4),
        (["zdp", "dp"], 2, "every", 4),
        (["z2", "zdp", "off"], 3, "hold", 4),
    ],
    4: [(["zdp-2", "dp", "z2", "zdp", "off"], 4, "last", 50), (["z2", "dp", "zdp-2"], 2, "hold", 4)],
}


@pytest.mark.parametrize("world", [2, 4])
def test_training_equals_one_process(ranks: Any, world: int) -> None:
    """Losses of 50 steps with accumulation and clipping, gradient norms, weights; and collectives, to the byte."""
    for case, result in zip(CASES[world], ranks(world).run(train_many, world, CASES[world])[0], strict=True):
        modes, accumulate, accumulation, steps = case
        losses, norms, weights, found, expected = result
        wanted = train_one(steps, accumulate)
        assert losses == pytest.approx(wanted[0], rel=1e-5), case
        assert norms == pytest.approx(wanted[1], rel=1e-4), case
        for name, weight in weights.items():
            torch.testing.assert_close(weight, wanted[2][name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert found == expected, case


class Skipping(nn.Module):
    """Leaves its second layer out when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, skips: bool = False) -> Tensor:
        x = self.first(x)
        return self.third(x if skips else self.second(x))


def train_around_skips(rank: int) -> tuple[list[float], list[float]]:
    """Losses with evaluations and steps in between that leave a member of the bucket out, and those of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    out = []
    for parallel in (True, False):
        torch.manual_seed(0)
        model = root = Skipping()
        units = find_units(model, lambda m=model: m(torch.ones(2, 4)))
        if parallel:
            rows = tuple(OperatorPlan(unit.name, (("dp", 1),), bucket="first") for unit in units)
            root = apply_osdp(model, units, OSDPPlan(2, rows), init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.Adam(root.parameters(), lr=0.1)
        losses = []
        for step in range(4):
            with torch.no_grad():
                root(torch.ones(2, 4), skips=True)
            loss = root(torch.full((2, 4), 1.0 + step), skips=step == 2).square().mean()
            (loss / (2 if parallel else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        out.append(losses)
    return out[0], out[1]


def test_members_of_a_bucket_may_be_left_out(ranks: Any) -> None:
    """By an evaluation, or by a training step of all ranks; the next step is right again."""
    for losses, wanted in ranks(2).run(train_around_skips):
        assert losses == pytest.approx(wanted, rel=1e-6)


def test_buckets_of_plans_are_checked() -> None:
    """A bucket is for whole replicated operators of the model, in one dtype."""
    model = Skipping()
    units = find_units(model, lambda: model(torch.ones(2, 4)))
    rows = tuple(OperatorPlan(unit.name, (("dp", 1),), bucket="fourth") for unit in units)
    with pytest.raises(ValueError, match="bucket 'fourth' of 'first': they cannot be reduced together"):
        check_plan(units, OSDPPlan(2, rows))
    with pytest.raises(ValueError, match="operator 'x': bucket='y': only whole operators in mode dp have one"):
        OperatorPlan("x", (("zdp", 1),), bucket="y")


def norm_of_shards(rank: int) -> tuple[float, float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(5, 3), torch.randn(4), torch.randn(1, 2)]
    placed = [distribute_tensor(x, mesh, [p]) for x, p in zip(whole, (Shard(0), Replicate(), Shard(0)), strict=True)]
    return float(squared_norm_of_offloaded(placed)), float(sum(x.square().sum() for x in whole))


def test_norm_of_offloaded_gradients(ranks: Any) -> None:
    """Shards are added over ranks, copies are counted once, empty shards count nothing."""
    for found, wanted in ranks(2).run(norm_of_shards):
        assert found == pytest.approx(wanted, rel=1e-6)


def test_units_of_odd_parameters() -> None:
    """Who uses a parameter decides: tied weights, bypassed children, modules called twice, small and unused ones."""
    found = {unit.name: unit for unit in units_of(Odd(), batches(1)[0])}
    assert set(found[ROOT].parameters) >= {"words.weight", "place", "scale", "nothing", "twice.weight", "twice.bias"}
    assert found["attention"].parameters == ("attention.in_proj_weight", "attention.out_proj.weight")
    assert found["uneven.0"].leaf and not found["attention"].leaf
    assert found["unused"].parameters == ("unused.weight", "unused.bias")
    assert list(found)[-1] == "unused"
    assert sum(len(unit.parameters) for unit in found.values()) == len(list(Odd().parameters()))


def test_whole_modules() -> None:
    """Classes that are to be taken as a whole are one unit each; unknown ones are refused."""
    model, tokens = Odd(), batches(1)[0]
    found = {u.name for u in find_units(model, lambda: model(tokens), whole=["Sequential", "Adapted"])}
    assert {"uneven", "adapted"} <= found and not any(name.startswith(("uneven.", "adapted.")) for name in found)
    with pytest.raises(ValueError, match="whole='Block': no module of the model is one; classes are Adapted, "):
        find_units(model, lambda: model(tokens), whole=["Block"])


def train_from_meta(rank: int, world: int) -> Any:
    """Losses of a model that was built without memory, its initial weights, and the most bytes while they came."""
    from torch.distributed.device_mesh import init_device_mesh

    options = {"vocab_size": WORDS, "max_seq_len": LENGTH, "num_layers": 8, "num_heads": 2, "dim": 64}
    tokens = batches(1)[0]
    rows = tokens[rank * BATCH // world : (rank + 1) * BATCH // world]
    plain = GPTLightningModule(**options)
    with torch.no_grad():
        units = find_units(plain, lambda: plain.pipeline_step(rows, rows))
    with torch.device("meta"):
        model = GPTLightningModule(**options)
    check_can_be_materialized(model)
    plan = OSDPPlan(world, tuple(OperatorPlan(unit.name, (("zdp", 1),)) for unit in units))
    size = sum(parameter.nbytes for parameter in model.parameters())
    torch.manual_seed(rank)  # ranks draw differently, and end up with the same
    with MemoryMeter() as meter:
        root = apply_osdp(model, units, plan, init_device_mesh("cpu", (world,)))
    initial = {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}
    model.forward = lambda values: model.pipeline_step(values, values)  # type: ignore[method-assign]
    mine = root(rows)
    (mine / world).backward()
    norm = clip_gradients_by_norm(root.parameters(), 1e9)
    plain.load_state_dict(initial)
    loss = plain.pipeline_step(tokens, tokens)
    loss.backward()
    wanted = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    gathered = mine.detach().clone()
    torch.distributed.all_reduce(gathered)
    return meter.peak / size, float(gathered) / world, loss.item(), float(norm), float(wanted), initial


def test_models_without_memory_are_filled_unit_by_unit(ranks: Any) -> None:
    """Built on the meta device: never whole on any rank, the same weights on all, and a model like any other."""
    results = ranks(2).run(train_from_meta, 2)
    for peak, loss, wanted_loss, norm, wanted_norm, initial in results:
        assert peak < 0.75, "half of the model, and one unit"
        assert loss == pytest.approx(wanted_loss, rel=1e-5) and norm == pytest.approx(wanted_norm, rel=1e-5)
        for name, weight in initial.items():
            assert torch.equal(weight, results[0][5][name]) and weight.std() > 0 or weight.unique().tolist() == [1.0]


def test_modules_without_initial_weights_are_named() -> None:
    with torch.device("meta"):
        model = Odd()
    with pytest.raises(ValueError, match="the module is on the meta device, and Odd has no reset_parameters"):
        check_can_be_materialized(model)


class Momentum(nn.Module):
    """Changes a parameter in its step."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.k.weight.mul_(0.9).add_(self.q.weight, alpha=0.1)
        return self.q(x) + self.k(x)


class Aliased(nn.Module):
    """Keeps a parameter in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.tables = [self.emb.weight]


class EvaluatedOnly(nn.Module):
    """Ties a weight to a module that the step does not call, and reads the dtype of a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.dec.weight = self.enc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.enc(x).to(self.out.weight.dtype))


def test_what_shards_would_lose_is_refused() -> None:
    """Writes inside of the step, gradient hooks, parameters held elsewhere: one line each that names them."""
    moving, x = Momentum(), torch.ones(2, 4)
    with pytest.raises(ValueError, match="parameter 'k.weight' is changed inside of the step"):
        find_units(moving, lambda: moving(x))
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(ValueError, match="parameter '0.weight' has a gradient hook"):
        check_parameters(hooked)
    with pytest.raises(ValueError, match="attribute 'tables' of the module holds parameter 'emb.weight'"):
        check_parameters(Aliased())
    check_parameters(nn.Sequential(nn.LSTM(4, 4), Odd()))


def test_ties_and_reads_outside_of_the_step() -> None:
    """A weight that evaluation uses elsewhere stays tied; a layer whose weight is asked for its dtype is not cut."""
    model, x = EvaluatedOnly(), torch.ones(2, 4)
    found = {unit.name: unit for unit in find_units(model, lambda: model(x))}
    assert "enc.weight" in found[ROOT].parameters
    assert not found["out"].leaf
