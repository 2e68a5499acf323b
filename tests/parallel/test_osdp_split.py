"""Operators in slices compute, train and checkpoint as whole ones do, with a fraction of the gathered memory."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_hetu.parallel import checkpoint as ckpt
from lightning_hetu.parallel.checkpoint_files import PARAMETER_GROUPS_KEY
from lightning_hetu.parallel.consolidate import consolidate
from lightning_hetu.parallel.optimizers import GroupNames, parameter_groups, parameter_names, rebind
from lightning_hetu.parallel.osdp.merged import MergedSlices, SlicedState
from lightning_hetu.parallel.osdp.split import (
    SlicedOperator,
    SlicePart,
    cuts_of,
    slice_parts,
    split_modules,
    split_operator,
)
from lightning_hetu.planning.osdp import Operator
from lightning_hetu.profiling import MemoryMeter

Cuts = Mapping[str, tuple[int, Any]]


def conv1d(inputs: int, outputs: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer


def indices(*shape: int) -> Tensor:
    return torch.randint(11, shape)


LAYERS: dict[str, tuple[Callable[[], nn.Module], list[Callable[[], Tensor]]]] = {
    "linear": (
        lambda: nn.Linear(9, 13),
        [lambda: torch.randn(9), lambda: torch.randn(3, 9), lambda: torch.randn(2, 3, 9), lambda: torch.randn(0, 3, 9)],
    ),
    "narrow linear without bias": (
        lambda: nn.Linear(13, 9, bias=False),
        [lambda: torch.randn(13), lambda: torch.randn(4, 13), lambda: torch.randn(3, 2, 13).transpose(0, 1)],
    ),
    "embedding": (
        lambda: nn.Embedding(11, 8),
        [
            lambda: torch.tensor(3),
            lambda: indices(5),
            lambda: indices(2, 5),
            lambda: indices(2, 5, 2),
            lambda: indices(0),
        ],
    ),
    "embedding with padding": (lambda: nn.Embedding(11, 8, padding_idx=-4), [lambda: indices(4, 30).int()]),
    "conv1d": (
        lambda: nn.Conv1d(8, 9, 3, stride=2, padding="valid"),
        [lambda: torch.randn(2, 8, 7), lambda: torch.randn(8, 7), lambda: torch.randn(0, 8, 7)],
    ),
    "conv2d": (
        lambda: nn.Conv2d(9, 8, 3, padding=1, dilation=2, padding_mode="circular", bias=False),
        [lambda: torch.randn(2, 9, 6, 5), lambda: torch.randn(9, 6, 5)],
    ),
    "conv3d": (lambda: nn.Conv3d(8, 9, 3, padding="same"), [lambda: torch.randn(2, 8, 3, 4, 2)]),
    "transformers Conv1D": (
        lambda: conv1d(7, 10),
        [lambda: torch.randn(2, 3, 7), lambda: torch.randn(4, 7), lambda: torch.randn(7)],
    ),
}


def joined(operator: SlicedOperator, read: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """What ``read`` gives for every slice, as one tensor per parameter of the whole module."""
    own = dict(operator.named_parameters())
    found = {}
    for name, parts in operator.parts().items():
        values = [read(own[part.name]) for part in parts]
        found[name] = torch.cat(values, parts[0].dim)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_slices_compute_what_the_whole_does(name: str) -> None:
    """Outputs and all gradients, in double precision so that nothing but the order of sums can differ."""
    make, inputs = LAYERS[name]
    whole = make().double()
    assert cuts_of(whole)
    for cut in cuts_of(whole):
        for slices in range(1, 9):
            operator = split_operator(copy.deepcopy(whole), slices, cut)
            assert len(operator.slices) == slices
            for make_input in inputs:
                x = make_input()
                xs = [x, x]
                if x.is_floating_point():
                    xs = [x.double().requires_grad_(), x.double().requires_grad_()]
                expected, found = whole(xs[0]), operator(xs[1])
                assert found.shape == expected.shape and found.dtype == expected.dtype
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
                weights = torch.randn_like(expected)
                whole.zero_grad()
                operator.zero_grad()
                (expected * weights).sum().backward()
                (found * weights).sum().backward()
                gradients = joined(operator, lambda parameter: parameter.grad)
                for own, parameter in whole.named_parameters():
                    torch.testing.assert_close(gradients[own], parameter.grad, rtol=1e-12, atol=1e-13)
                if x.is_floating_point():
                    torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=1e-12, atol=1e-13)
                    with torch.no_grad():  # and without a gradient of the input
                        torch.testing.assert_close(operator(xs[1]), expected, rtol=1e-12, atol=1e-13)
                    (operator(x.double()) * weights).sum().backward()
                    for own, value in joined(operator, lambda parameter: parameter.grad).items():
                        torch.testing.assert_close(value, 2 * gradients[own], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_slices_are_those_of_the_planner(name: str) -> None:
    """Shapes, order and cuts as ``Operator`` describes them, with the values of the whole parameter."""
    whole = LAYERS[name][0]()
    shapes = tuple(tuple(parameter.shape) for parameter in whole.parameters())
    for cut in cuts_of(whole):
        for slices in range(2, 9):
            operator = split_operator(copy.deepcopy(whole), slices, cut)
            planned = Operator("layer", shapes=shapes, cuts=(cut,), max_slices=slices).slice_shapes(slices)
            assert tuple(tuple(tuple(p.shape) for p in piece.parameters()) for piece in operator.slices) == planned
            for own, value in joined(operator, lambda parameter: parameter.detach()).items():
                assert torch.equal(value, whole.get_parameter(own))


def test_the_wanted_cut_comes_first() -> None:
    """Along the larger side; a side of one is not cut."""
    assert cuts_of(nn.Linear(3, 4)) == ("output", "input") == cuts_of(nn.Linear(4, 4))
    assert cuts_of(nn.Linear(4, 3)) == ("input", "output")
    assert cuts_of(nn.Linear(4, 1)) == ("input",) and cuts_of(nn.Linear(1, 4)) == ("output",)
    assert cuts_of(nn.Linear(1, 1)) == ()
    assert cuts_of(OwnWeights(3, 4, bias=False)) == ("output", "input")
    assert cuts_of(nn.Embedding(9, 4)) == ("input", "output")
    assert cuts_of(nn.Conv2d(4, 9, 3)) == ("output", "input")
    assert cuts_of(conv1d(9, 4)) == ("input",)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_gives_the_dtype_of_the_whole(name: str) -> None:
    """Under bf16-mixed outputs have the dtype and about the values of the whole, gradients those of parameters."""
    make, inputs = LAYERS[name]
    whole, x = make(), inputs[0]()
    for cut in cuts_of(whole):
        operator = split_operator(copy.deepcopy(whole), 3, cut)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = whole(x), operator(x)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
        found.float().sum().backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in operator.parameters())


def test_autocast_converts_the_input_once() -> None:
    """Slices that each kept a converted input would need more memory than they save."""
    operator = split_operator(nn.Linear(64, 64, bias=False), 8, "output")
    x = torch.randn(512, 64, requires_grad=True) + 0.0  # autocast itself remembers what it made of a leaf
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        held = operator(x)
    assert sum(kept.values()) <= 512 * 64 * 2 + 64 * 64 * 2 + 1024
    del held


def test_an_input_cut_keeps_no_partial_sums() -> None:
    """The sum is made in place: two outputs are alive at most, however many slices there are."""
    operator = split_operator(nn.Linear(64, 256), 16, "input")
    x = torch.randn(512, 64, requires_grad=True)
    operator(x)
    with MemoryMeter() as meter:
        out = operator(x)
    assert meter.peak <= 2.1 * out.nbytes


def test_indices_outside_of_the_table_are_errors() -> None:
    """Masking does not hide what the whole table would refuse."""
    operator = split_operator(nn.Embedding(10, 4), 3, "output")
    for index in (-1, 10):
        with pytest.raises(IndexError):
            operator(torch.tensor([0, index]))


class Subclass(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnWeights(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def changed(layer: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    change(layer)
    return layer


@pytest.mark.parametrize(
    "module",
    [
        Subclass(4, 4),
        nn.LayerNorm(4),
        nn.Bilinear(4, 4, 4),
        nn.LazyLinear(4),
        nn.ConvTranspose1d(4, 4, 2),
        nn.Conv1d(4, 4, 2, groups=2),
        nn.Embedding(9, 4, max_norm=1.0),
        nn.Embedding(9, 4, scale_grad_by_freq=True),
        nn.Embedding(9, 4, sparse=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        changed(nn.Linear(4, 4), lambda m: m.register_forward_hook(lambda *_: None)),
        changed(nn.Linear(4, 4), lambda m: m.register_forward_pre_hook(lambda *_: None)),
        changed(nn.Linear(4, 4), lambda m: m.register_full_backward_hook(lambda *_: None)),
        changed(nn.Linear(4, 4), lambda m: m.register_state_dict_post_hook(lambda *_: None)),
        changed(nn.Linear(4, 4), lambda m: m.weight.register_hook(lambda gradient: gradient)),
        changed(nn.Linear(4, 4), lambda m: m.register_buffer("mask", torch.ones(4))),
        changed(nn.Linear(4, 4), lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(4)))),
        changed(nn.Linear(4, 4), lambda m: m.add_module("lora", nn.Linear(4, 2))),
        changed(nn.Linear(4, 4), lambda m: setattr(m, "forward", lambda x: x)),
        changed(nn.Linear(4, 4), lambda m: m.compile()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_may_compute_something_else_are_not_cut(module: nn.Module) -> None:
    assert cuts_of(module) == ()
    with pytest.raises(ValueError, match="cannot be split: expected a linear, embedding") as error:
        split_operator(module, 2, "output")
    assert "\n" not in str(error.value)


def test_what_cannot_be_split_is_named_in_one_line() -> None:
    shared = nn.Linear(4, 4)
    tied = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    tied[1].weight = tied[0].weight
    root = nn.ModuleDict({"a": shared, "b": shared, "tied": tied, "own": nn.Linear(4, 6), "one": nn.Linear(4, 1)})
    before = list(root.modules())
    for name, wanted, words in [
        ("none", (2, "output"), "'none' cannot be split: expected the name of a module"),
        ("", (2, "output"), "'' cannot be split: expected the name of a module"),
        ("a", (2, "output"), "'a' cannot be split: it is used under several names, a, b."),
        ("tied.1", (2, "output"), "its weight is tied to another parameter"),
        ("own", (7, "output"), "'own': slices=7: expected an integer from 1 to 6"),
        ("own", (5, "input"), "'own': slices=5: expected an integer from 1 to 4"),
        ("own", (0, "output"), "slices=0: expected an integer"),
        ("own", (2.0, "output"), "slices=2.0: expected an integer"),
        ("own", (2, "rows"), "cut='rows': expected one of output, input."),
        ("one", (2, "output"), "'one': cut='output': expected one of input."),
    ]:
        with pytest.raises(ValueError) as error:
            split_modules(root, {"own": (2, "output"), name: wanted})
        assert words in str(error.value) and "\n" not in str(error.value)
        assert list(root.modules()) == before


def test_a_sliced_model_still_says_what_it_is() -> None:
    """Attributes, text, modes and parts; the memory of the whole parameters is gone."""
    root = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Embedding(7, 5, padding_idx=1)))
    root[0].weight.requires_grad_(False)
    root[0].note = "mine"
    root.eval()
    held = list(root.parameters())
    parts = split_modules(root, {"0": (2, "input"), "1.0": (3, "output")})
    assert (
        parts
        == slice_parts(root)
        == {
            "0.weight": [SlicePart("0.slices.0.weight", 1, 0, 2), SlicePart("0.slices.1.weight", 1, 2, 2)],
            "0.bias": [SlicePart("0.slices.0.bias", 0, 0, 6)],
            "1.0.weight": [
                SlicePart("1.0.slices.0.weight", 0, 0, 3),
                SlicePart("1.0.slices.1.weight", 0, 3, 2),
                SlicePart("1.0.slices.2.weight", 0, 5, 2),
            ],
        }
    )
    assert {name for name, _ in root.named_parameters()} == {part.name for its in parts.values() for part in its}
    assert (root[0].in_features, root[0].out_features, root[0].note) == (4, 6, "mine")
    assert (root[1][0].num_embeddings, root[1][0].embedding_dim, root[1][0].padding_idx) == (7, 5, 1)
    assert root[0].extra_repr() == "Linear(in_features=4, out_features=6, bias=True), slices=2, cut='input'"
    assert [p.requires_grad for p in root[0].parameters()] == [False, True, False]
    assert not any(module.training for module in root.modules())
    assert sum(parameter.untyped_storage().nbytes() for parameter in held) == 0
    with pytest.raises(AttributeError, match="'weight' of Linear.* is cut into 2 slices"):
        _ = root[0].weight
    assert cuts_of(root[0]) == () == cuts_of(root[0].slices[0])


def test_slices_are_cut_and_initialized_without_memory() -> None:
    """On the meta device; parameters reset afterwards are distributed as in the whole module."""
    with torch.device("meta"):
        root = nn.Sequential(nn.Linear(256, 64), nn.Conv1d(64, 8, 4), nn.Embedding(50, 8, padding_idx=20))
    split_modules(root, {"0": (8, "input"), "1": (4, "input"), "2": (4, "output")})
    assert all(parameter.is_meta for parameter in root.parameters())
    root.to_empty(device="cpu")
    for module in root.modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            module.reset_parameters()
    for layer in root[:2]:
        for parameter in layer.parameters():  # uniform below 1 / sqrt(256), for the linear layer and the convolution
            assert 0.8 / 16 < parameter.abs().max() <= 1 / 16
    table = joined(root[2], lambda parameter: parameter.detach())["weight"]
    assert (table[20] == 0).all() and 0.8 < table.std() < 1.2


# ------------------------------------------------------------------ optimizers


def test_groups_know_parameters_by_their_whole_names() -> None:
    """Before and after the model is cut; a group is given all slices in order, and must have all of them."""
    root = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    optimizer = torch.optim.SGD([{"params": [root[1].weight, root[0].weight]}, {"params": [root[0].bias]}], lr=0.1)
    names = parameter_names([optimizer], root)
    assert names == [[["1.weight", "0.weight"], ["0.bias"]]]
    parts = split_modules(root, {"0": (2, "input"), "1": (2, "output")})
    rebind(optimizer, names[0], dict(root.named_parameters()), parts)
    first, second = root[0].slices, root[1].slices
    expected = [[second[0].weight, second[1].weight, first[0].weight, first[1].weight], [first[0].bias]]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in group] for group in expected
    ]
    assert parameter_names([optimizer], root) == names
    assert parameter_names([torch.optim.SGD(nn.Linear(2, 2).parameters())], root) is None
    halves = torch.optim.SGD([{"params": [first[0].weight]}, {"params": [first[1].weight]}])
    with pytest.raises(ValueError, match="SGD: a parameter group has 1 of the 2 slices of '0.weight'"):
        parameter_names([halves], root)


def test_states_of_other_shapes_are_refused() -> None:
    """Row and column sums belong to the slices; they are no part of sums over the whole."""
    root = nn.Sequential(nn.Linear(4, 6))
    split_modules(root, {"0": (2, "input")})
    state = SlicedState(root)
    with pytest.raises(ValueError, match="'state.0.weight.rows': slices of shapes .* cannot be joined") as error:
        state.merge({f"state.0.slices.{i}.weight.rows": torch.ones(6, 1) for i in range(2)}, ("state.",))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="'state.0.weight.rows' is there for 1 of 2 slices"):
        state.merge({"state.0.slices.1.weight.rows": torch.ones(6, 2)}, ("state.",))
    with pytest.raises(ValueError, match=r"'0.weight' of shape \(6, 1\) cannot be cut") as error:
        state.split({"0.weight": torch.ones(6, 1)})
    assert "\n" not in str(error.value)
    merged = state.merge({f"0.slices.{i}.weight": torch.ones(6, 2) for i in range(2)})["0.weight"]
    assert merged.shape == (6, 4) and repr(merged) == "MergedSlices(shape=(6, 4), slices=2, dim=1)"
    with pytest.raises(RuntimeError, match="a tensor in slices is only saved and loaded"):
        merged + 1


def test_slices_of_a_single_process_are_saved_whole(tmp_path: Path) -> None:
    """Plain tensors, too; and a checkpoint of the whole loads into slices."""
    whole, root = nn.Sequential(nn.Linear(5, 7)), nn.Sequential(nn.Linear(5, 7))
    split_modules(root, {"0": (3, "input")})
    state = SlicedState(root)
    dcp.save(state.merge(root.state_dict()), checkpoint_id=tmp_path / "slices", no_dist=True)
    into = whole.state_dict()
    dcp.load(into, checkpoint_id=tmp_path / "slices", no_dist=True)
    expected = joined(root[0], lambda parameter: parameter.detach().clone())
    assert torch.equal(whole[0].weight, expected["weight"]) and torch.equal(whole[0].bias, expected["bias"])
    nn.init.zeros_(root[0].slices[2].weight)
    merged = state.merge(root.state_dict())
    dcp.load(merged, checkpoint_id=tmp_path / "slices", no_dist=True)
    root.load_state_dict(state.split(merged))
    assert torch.equal(joined(root[0], lambda parameter: parameter.detach())["weight"], expected["weight"])


# ------------------------------------------------------------------ on several ranks


class Model(nn.Module):
    """Every kind of operator, with sizes that no number of slices or ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 7, 3, padding=1)
        self.up = nn.Linear(7, 17)
        self.norm = nn.LayerNorm(17)
        self.down = nn.Linear(17, 5, bias=False)
        self.gpt = conv1d(5, 6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(6, 11)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.conv(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        hidden = self.down(self.norm(F.gelu(self.up(hidden))))
        return self.head(self.frozen(self.gpt(hidden))) * self.scale


FIRST: Cuts = {
    "table": (3, "output"),
    "conv": (2, "input"),
    "up": (4, "output"),
    "down": (5, "input"),
    "gpt": (2, "input"),
    "frozen": (2, "output"),
}
SECOND: Cuts = {
    "table": (2, "input"),
    "conv": (3, "output"),
    "up": (2, "input"),
    "frozen": (3, "input"),
    "head": (6, "output"),
}
WHOLE: Cuts = {}
BATCH = 8


def new_model(seed: int = 0) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model()
    decayed = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed}]
    return model, torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def parallel(cuts: Cuts, seed: int = 0) -> tuple[Model, torch.optim.Optimizer, list[GroupNames]]:
    """The model in slices, every slice in the next of three modes, and the names of the optimizer's groups."""
    model, optimizer = new_model(seed)
    names = parameter_names([optimizer], model)
    order = [name for name, _ in model.named_parameters()]
    parts = split_modules(model, cuts)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    number = 0
    for name, layer in model.named_children():
        if name == "norm":
            continue  # stays with the root
        for piece in layer.slices if isinstance(layer, SlicedOperator) else [layer]:
            if number % 3 == 2:
                replicate(piece, mesh=mesh)
            else:
                fully_shard(piece, mesh=mesh, reshard_after_forward=number % 3 == 0)
            number += 1
    fully_shard(model, mesh=mesh)
    rebind(optimizer, names[0], dict(model.named_parameters()), parts)
    assert parameter_groups(model, [optimizer], order, names) == names
    return model, optimizer, names


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, rank: int, of: int) -> list[float]:
    """Steps ``first`` to ``last`` on this rank's rows of a batch that depends on the step alone."""
    losses = []
    for step in range(first, last):
        tokens = torch.randint(11, (BATCH, 5), generator=torch.Generator().manual_seed(step))
        mine = tokens[rank * BATCH // of : (rank + 1) * BATCH // of]
        loss = F.cross_entropy(model(mine).flatten(0, 1), (mine * 3 % 11).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def full(value: Any) -> Any:
    if isinstance(value, MergedSlices):
        return torch.cat([full(part) for part in value.slices], value.along)
    if isinstance(value, DTensor):
        return value.full_tensor().clone()  # a replicated one would be the tensor that is trained on
    return value.clone() if isinstance(value, Tensor) else value


def content(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All states under their names in the whole model, whole."""
    state = ckpt.model_state(model)
    flat = ckpt.optimizer_state(model, optimizer)
    return {name: full(value) for name, value in {**state, **flat}.items()}


def train_and_save(rank: int, cuts: Cuts, folder: str) -> tuple[dict[str, Any], list[float]]:
    model, optimizer, names = parallel(cuts)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        losses = train(model, optimizer, 0, 5, rank, dist.get_world_size())
    # FSDP2 warns of modules that return views: its hooks are lost when those are changed in place.
    assert not any("Slice" in str(warning.message) for warning in noted)
    state = {"state_dict": ckpt.model_state(model), "optimizer_0": ckpt.optimizer_state(model, optimizer)}
    ckpt.save_folder(state, {"epoch": 1, PARAMETER_GROUPS_KEY: names}, "{}", Path(folder))
    return content(model, optimizer), losses


def save_all(rank: int, folders: Mapping[str, Cuts]) -> dict[str, tuple[dict[str, Any], list[float]]]:
    return {folder: train_and_save(rank, cuts, folder) for folder, cuts in folders.items()}


def load_and_train(rank: int, cuts: Cuts, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """States after loading a folder or a file, and after two more steps."""
    model, optimizer, names = parallel(cuts, seed=7)
    if Path(source).is_dir():
        ckpt.load_folder(model, [optimizer], Path(source), names)
    else:
        ckpt.load_full(model, [optimizer], torch.load(source), names)
    loaded = content(model, optimizer)
    train(model, optimizer, 5, 7, rank, dist.get_world_size())
    return loaded, content(model, optimizer)


def load_all(rank: int, cases: list[tuple[Cuts, str]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [load_and_train(rank, cuts, source) for cuts, source in cases]


def by_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """States of an ordinary model and optimizer, copied, in the form of :func:`content`."""
    found: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            found |= {f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"}
            found |= {f"state.{name}.{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 0.0) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            assert list(found[name]) == list(value) if isinstance(value, tuple) else found[name] == value, name
        elif tolerance:
            torch.testing.assert_close(
                found[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert found[name].shape == value.shape and torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """One process without slices: states after 5 steps, a file of then, states after 7 steps, losses."""
    model, optimizer = new_model()
    losses = train(model, optimizer, 0, 5, 0, 1)
    middle = by_names(model, optimizer)
    file = str(tmp_path_factory.mktemp("plain") / "model.ckpt")
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, file)
    train(model, optimizer, 5, 7, 0, 1)
    return [middle, file, by_names(model, optimizer), losses]


@pytest.fixture(scope="module")
def saved(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[Any]]]:
    """Folders written by two ranks in slices and without, and what each of them had."""
    paths = {kind: str(tmp_path_factory.mktemp("saved") / f"{kind}.ckpt") for kind in ("first", "whole")}
    found = ranks(2).run(save_all, {paths["first"]: FIRST, paths["whole"]: WHOLE})
    return {kind: (path, [rank[path] for rank in found]) for kind, path in paths.items()}


# Adam divides by the root of squares near zero, so rounding in gradients shows larger in weights.
ROUNDING = 2e-5


def test_training_in_slices_is_training(saved: dict[str, tuple[str, list[Any]]], reference: list[Any]) -> None:
    """Five AdamW steps on two ranks, with sharded and replicated slices beside each other, equal those of one."""
    middle, _, _, losses = reference
    for found, _ in saved["first"][1]:
        assert_same(found, middle, ROUNDING)
    mean = torch.tensor([losses for _, losses in saved["first"][1]]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses), rtol=0, atol=1e-5)


def test_a_checkpoint_loads_under_any_plan(
    ranks: Any, saved: dict[str, tuple[str, list[Any]]], reference: list[Any]
) -> None:
    """Four ranks have, to the bit, what two had in other slices or none, or one in a plain file, and go on from there.

    The file is that of an ordinary Trainer. Going on shows that every slice counts its steps alone.
    """
    middle, file, end, _ = reference
    (first, [(first_state, _), _]), (whole, [(whole_state, _), _]) = saved["first"], saved["whole"]
    cases = [(SECOND, first), (WHOLE, first), (FIRST, whole), (FIRST, file)]
    for found in ranks(4).run(load_all, cases):
        for (loaded, later), expected in zip(found, (first_state, first_state, whole_state, middle), strict=True):
            assert_same(loaded, expected)
            assert_same(later, end, ROUNDING)


def test_a_folder_becomes_a_plain_file(
    saved: dict[str, tuple[str, list[Any]]], reference: list[Any], tmp_path: Path
) -> None:
    """Consolidated, it loads into the bare module and its optimizer, exactly, and training goes on."""
    folder, (first, _) = saved["first"]
    checkpoint = torch.load(consolidate(folder, tmp_path / "one.ckpt"), weights_only=True)
    model, optimizer = new_model(seed=3)
    model.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    assert_same(by_names(model, optimizer), first[0])
    train(model, optimizer, 5, 7, 0, 1)
    assert_same(by_names(model, optimizer), reference[2], ROUNDING)


def load_wrong(rank: int, folder: str) -> list[str]:
    """What is said of a checkpoint that lacks a parameter in slices, or has another shape of it."""
    messages = []
    for name, layer in (("extra", nn.Linear(6, 4)), ("head", nn.Linear(6, 12))):
        model, _ = new_model()
        setattr(model, name, layer)
        split_modules(model, {name: (2, "input")})
        for load in (
            lambda model=model: ckpt.load_folder(model, [], Path(folder)),
            lambda model=model: ckpt.load_full(model, [], {"state_dict": Model().state_dict()}, None),
        ):
            try:
                load()
            except ValueError as error:
                messages.append(str(error))
    return messages


def test_other_models_are_named_by_whole_parameters(ranks: Any, saved: dict[str, tuple[str, list[Any]]]) -> None:
    for messages in ranks(2).run(load_wrong, saved["first"][0]):
        assert len(messages) == 4 and not any("slices" in text or "\n" in text for text in messages)
        assert all("has no 'extra.bias'" in text for text in messages[:2])
        assert all("'head." in text and "has another shape" in text for text in messages[2:])


# ------------------------------------------------------------------ memory

INPUTS, OUTPUTS, ROWS = 512, 512, 8


def transient(mesh: DeviceMesh, slices: int, cut: Any, table: bool) -> tuple[float, float]:
    """Peaks of forward and of backward beyond what was there before, in bytes of the whole weight."""
    layer = nn.Embedding(INPUTS * OUTPUTS // 64, 64) if table else nn.Linear(INPUTS, OUTPUTS, bias=False)
    root = nn.Sequential(layer)
    size = layer.weight.nbytes
    split_modules(root, {"0": (slices, cut)})
    for piece in root[0].slices:
        fully_shard(piece, mesh=mesh)
    fully_shard(root, mesh=mesh)
    assert not isinstance(root[0], FSDPModule)
    x = torch.randint(INPUTS, (ROWS,)) if table else torch.randn(ROWS, INPUTS, requires_grad=slices != 8)
    root(x).sum().backward()  # FSDP sets itself up in its first pass
    peaks = []
    for _ in range(3):
        root.zero_grad()
        x.grad = None
        gc.collect()
        for _ in range(4):  # the collectives' threads let go of a buffer when they take up other work
            dist.barrier()
        with MemoryMeter() as forward:
            loss = root(x).sum()
            time.sleep(0.01)
        with MemoryMeter() as backward:
            loss.backward()
        peaks.append((forward.peak / size, backward.peak / size))
    return sorted(peaks)[1]


def transients(rank: int) -> dict[tuple[str, bool, int], tuple[float, float]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cases = [(cut, table, slices) for cut in ("output", "input") for table in (False, True) for slices in (1, 4, 8)]
    return {(cut, table, slices): transient(mesh, slices, cut, table) for cut, table, slices in cases}


def test_gathered_memory_falls_with_the_number_of_slices(ranks: Any) -> None:
    """Two or three slices are alive at a time, with their gradients; also where no gradient of the input is asked for.

    Forward holds a slice and the buffers of this and the previous gathering. Backward holds two slices, their gradients
    and what is reduced, and in the end the rank's share of all gradients. Activations are a thirtieth of the weight.
    """
    share, activations = 1 / 2, 1 / 16
    for found in ranks(2).run(transients):
        for (cut, table, slices), (forward, backward) in found.items():
            if slices > 1:
                whole = found[cut, table, 1]
                assert forward <= 3 / slices + activations
                assert backward <= 4 / slices + share + activations
                assert forward < 0.6 * whole[0] and backward < 0.6 * whole[1]
