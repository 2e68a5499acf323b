"""``adamw``: the reference and the optimizer against torch's, what a case cannot say, and what is refused."""

from __future__ import annotations

import copy
import inspect
import io
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hetu_kernels
from hetu_kernels._common.registry import op_spec
from hetu_kernels._common.testing import check_case
from hetu_kernels.optim.adamw_ref import adamw_reference
from tests._ranks import RankPool

SHAPES = [(5, 7), (1,), (), (3, 2, 4), (0,)]


def parameters(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype).to(device)) for shape in SHAPES]


def set_gradients(params: list[Tensor], seed: int, *, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale
        param.grad = grad.to(param.device, param.dtype)


def assert_same_parameters(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-6) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def lists_of(params: list[Tensor]) -> list[list[Tensor]]:
    grads = [param.grad for param in params]
    return [params, grads, *([torch.zeros_like(p) for p in params] for _ in range(2))]


@pytest.mark.parametrize("maximize", [False, True])
def test_reference_is_torch_adamw(maximize: bool) -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    numbers: dict[str, Any] = {
        "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.2, "maximize": maximize
    }  # fmt: skip
    optimizer = torch.optim.AdamW(theirs, **numbers)
    set_gradients(ours, 0)
    lists = lists_of(ours)
    step = torch.zeros((), dtype=torch.float64)
    for seed in range(4):
        set_gradients(theirs, seed)
        optimizer.step()
        set_gradients(ours, seed)
        adamw_reference(lists[0], [p.grad for p in ours], lists[2], lists[3], step, **numbers)
    assert_same_parameters(ours, theirs, 1e-12)
    assert step == 4


def test_reference_clips_as_torch_does() -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.3)
    optimizer = torch.optim.AdamW(theirs, lr=0.1, eps=0.1)
    optimizer.step()
    found = adamw_reference(*lists_of(ours), torch.zeros(()), lr=0.1, eps=0.1, max_norm=0.3)
    torch.testing.assert_close(found, norm)
    assert_same_parameters(ours, theirs, 1e-12)


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_ten_steps_are_those_of_torch(mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups, a parameter that has no gradient every other time, a schedule."""
    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", mode)
    found = []
    for kind in (torch.optim.AdamW, hetu_kernels.AdamW):
        params = parameters(device=device)
        optimizer = kind([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.5}], lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for seed in range(10):
            set_gradients(params, seed)
            if seed % 2:
                params[3].grad = None
            optimizer.step()
            scheduler.step()
        found.append((params, optimizer))
    (theirs, expected), (ours, actual) = found
    assert_same_parameters(ours, theirs)
    a, b = actual.state_dict(), expected.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for number, state in b["state"].items():
        assert a["state"][number].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(a["state"][number][name].cpu(), value.cpu(), rtol=1e-6, atol=1e-7)


@pytest.mark.interpret
@pytest.mark.parametrize("torch_first", [False, True])
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
def test_checkpoints_go_both_ways(torch_first: bool, how: dict[str, bool], device: torch.device) -> None:
    def make(ours: bool, params: list[Tensor]) -> torch.optim.Optimizer:
        return hetu_kernels.AdamW(params, lr=0.1) if ours else torch.optim.AdamW(params, lr=0.1, **how)

    expected = parameters(device=device)
    optimizer = torch.optim.AdamW(expected, lr=0.1)
    for seed in range(4):
        set_gradients(expected, seed)
        optimizer.step()
    params = parameters(device=device)
    optimizer = make(not torch_first, params)
    for seed in range(4):
        set_gradients(params, seed)
        optimizer.step()
        if seed == 1:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = make(torch_first, params)
            optimizer.load_state_dict(torch.load(file))
    assert_same_parameters(params, expected)


@pytest.mark.interpret
def test_a_loaded_checkpoint_is_not_counted_on(device: torch.device) -> None:
    params = parameters(device=device)
    optimizer = torch.optim.AdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    ours = hetu_kernels.AdamW(params)
    ours.load_state_dict(saved)
    ours.step()
    assert saved["state"][0]["step"] == 1
    assert ours.state[params[0]]["step"] == 2
    again = copy.deepcopy(ours)
    assert again.state[again.param_groups[0]["params"][0]]["step"] == 2


@pytest.mark.interpret
@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_scaler_leaves_scale_and_overflow_to_the_step(unscale: bool, device: torch.device) -> None:
    found = []
    for kind in (torch.optim.AdamW, hetu_kernels.AdamW):
        params = parameters(device=device)
        optimizer = kind(params, lr=0.1, eps=0.1)  # with a small one, the scale would make no difference
        scaler = torch.amp.GradScaler(device.type, init_scale=64.0, growth_interval=2)
        scaler.scale(torch.zeros((), device=device))
        for seed in range(5):
            set_gradients(params, seed, scale=scaler.get_scale())
            if seed == 2:
                params[1].grad.fill_(torch.inf)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        found.append((params, scaler.get_scale(), optimizer.state[params[0]]["step"].item()))
    assert_same_parameters(found[1][0], found[0][0])
    assert found[0][1:] == found[1][1:] == (128.0, 4.0)


@pytest.mark.interpret
def test_closure_and_learning_rates_as_tensors(device: torch.device) -> None:
    found = []
    for kind, lr in ((torch.optim.AdamW, 0.1), (hetu_kernels.AdamW, 0.1), (hetu_kernels.AdamW, torch.tensor(0.1))):
        params = parameters(device=device)
        optimizer = kind(params, lr=lr)

        def closure(params: list[Tensor] = params) -> Tensor:
            assert torch.is_grad_enabled()
            set_gradients(params, 0)
            return torch.tensor(7.0)

        assert optimizer.step(closure) == 7.0
        found.append(params)
    assert_same_parameters(found[1], found[0])
    assert_same_parameters(found[2], found[0])


@pytest.mark.interpret
def test_aligned_tensors_are_one_launch_and_misaligned_ones_another(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors as torch allocates them; in the cases of all operators nothing is aligned."""
    from hetu_kernels.optim import _adamw_kernels

    seen: list[list[bool]] = []
    tables = _adamw_kernels._tables

    def spy(rows: tuple[int, ...], *others: Any) -> Any:
        seen.append([any(address % 16 for address in rows[i : i + 5]) for i in range(0, len(rows), 8)])
        return tables(rows, *others)

    launched: list[bool] = []
    launch = _adamw_kernels._Group

    def group(*key: Any) -> Any:
        launched.append(key[-1])
        return launch(*key)

    monkeypatch.setattr(_adamw_kernels, "_tables", spy)
    monkeypatch.setattr(_adamw_kernels, "_Group", group)
    sizes = (5, 3000, 1024)
    found = []
    for kind in (torch.optim.AdamW, hetu_kernels.AdamW):
        torch.manual_seed(0)
        params = [torch.randn(size, device=device) for size in sizes] + [torch.randn(2001, device=device)[1:]]
        optimizer = kind(params, lr=0.1)
        set_gradients(params, 0)
        optimizer.step()
        found.append(params)
    assert seen == [[False, False, False, True]]
    assert launched == [True, False]
    assert_same_parameters(found[1], found[0])


@pytest.mark.interpret
def test_layouts_that_agree_are_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from hetu_kernels.optim import _adamw_kernels

    copied: list[int] = []
    laid_out = _adamw_kernels._laid_out_alike

    def spy(tensors: Any, copies: list[Any]) -> Any:
        made = laid_out(tensors, copies)
        copied.append(sum(a is not b for a, b in zip(tensors, made, strict=True)))
        return made

    monkeypatch.setattr(_adamw_kernels, "_laid_out_alike", spy)
    found = []
    for kind in (torch.optim.AdamW, hetu_kernels.AdamW):
        torch.manual_seed(0)
        base = torch.randn(4, 9, device=device)
        params = [
            torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last),  # all alike
            torch.randn(6, 4, device=device).t(),  # the gradient is not
            base[:, 2:5],  # holes: moments are dense
        ]
        optimizer = kind(params, lr=0.1)
        for seed in range(2):
            set_gradients(params, seed)
            params[0].grad = params[0].grad.to(memory_format=torch.channels_last)
            params[1].grad = params[1].grad.contiguous()
            optimizer.step()
        found.append([*params, base])
    assert copied[:3] == [0, 1, 1]
    assert_same_parameters(found[1], found[0])


@pytest.mark.interpret
@pytest.mark.parametrize("odd", ["params", "grads", "exp_avgs", "exp_avg_sqs", "master_params"])
@pytest.mark.parametrize("layout", ["transposed", "holes"])
def test_one_of_the_tensors_may_be_laid_out_differently(odd: str, layout: str, device: torch.device) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "master_params")
    expected = {name: [torch.rand(4, 6)] for name in names}
    ours = {name: [tensors[0].to(device, copy=True)] for name, tensors in expected.items()}
    if layout == "transposed":
        ours[odd] = [ours[odd][0].t().contiguous().t()]
    else:
        ours[odd] = [torch.zeros(4, 9, device=device)[:, 1:7].copy_(ours[odd][0])]
    hetu_kernels.adamw(**ours, step=torch.zeros((), device=device), lr=0.1)
    adamw_reference(**expected, step=torch.zeros(()), lr=0.1)
    for name in names:
        assert_same_parameters([ours[name][0].cpu()], expected[name], 1e-5)


@pytest.mark.interpret
def test_more_chunks_and_steps_than_lanes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that adds up norms and counts steps loops over both."""
    from hetu_kernels.optim import _adamw_kernels

    monkeypatch.setattr(_adamw_kernels, "_PREPARE_BLOCK", 4)
    spec = op_spec("adamw")
    for name in ("many tensors", "chunks", "a step for each"):
        (case,) = (case for case in spec.cases() if case.name == name)
        check_case(spec, case, torch.float32, device)
    (case,) = (case for case in spec.cases() if case.name == "many tensors")
    made = case.make(torch.float32, torch.Generator().manual_seed(0))
    expected = copy.deepcopy(made)
    for arguments in (made, expected):
        arguments["step"] = [torch.tensor(float(i)) for i in range(len(arguments["params"]))]
    on_device = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), made)
    hetu_kernels.adamw(**on_device)
    adamw_reference(**expected)
    for name in ("params", "step"):
        assert_same_parameters([t.cpu() for t in on_device[name]], expected[name], 1e-5)


@pytest.mark.interpret
def test_a_counter_given_twice_counts_once(device: torch.device) -> None:
    params = parameters(device=device)[:2]
    set_gradients(params, 0)
    step = torch.zeros((), device=device)
    assert hetu_kernels.adamw(*lists_of(params), [step, step], lr=0.1) is None
    assert step == 1


@pytest.mark.interpret
def test_autograd_is_told_of_the_change(device: torch.device) -> None:
    """A backward that needs the old value of a parameter fails instead of taking the new one."""
    params = parameters(device=device)[:1]
    loss = params[0].square().sum()
    set_gradients(params, 0)
    hetu_kernels.AdamW(params).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
def test_step_can_be_captured_in_a_graph() -> None:
    """Also where gradients have other addresses than when the step was run before."""
    ours, theirs = parameters(device="cuda"), parameters(device="cuda")
    optimizer, expected = hetu_kernels.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for params in (ours, theirs):
        set_gradients(params, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for param in ours:
            param.grad = param.grad * 1.0
        optimizer.step()
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        expected.step()
    assert_same_parameters(ours, theirs)
    assert optimizer.state[ours[0]]["step"] == 3


@pytest.mark.interpret
def test_tables_are_made_again_only_for_other_addresses(device: torch.device) -> None:
    from hetu_kernels.optim import _adamw_kernels

    _adamw_kernels._cached_tables.cache_clear()
    params = parameters(device=device)
    optimizer = hetu_kernels.AdamW(params)
    set_gradients(params, 0)
    for _ in range(3):
        optimizer.step()
    assert _adamw_kernels._cached_tables.cache_info().misses == 1
    keep = [param.grad for param in params]
    set_gradients(params, 1)
    optimizer.step()
    assert _adamw_kernels._cached_tables.cache_info().misses == 2
    del keep


def arguments_of(**changes: Any) -> dict[str, Any]:
    params = [torch.randn(3, 2), torch.randn(4)]
    names = ("grads", "exp_avgs", "exp_avg_sqs")
    made = {"params": params, **{name: [torch.ones_like(p) for p in params] for name in names}}
    return {**made, "step": torch.zeros(()), "lr": 0.1, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grads": [torch.ones(3, 2)]}, ValueError, "grads has 1 tensors, expected 2, one for each of params"),
        ({"exp_avgs": [torch.ones(3, 2), torch.ones(5)]}, ValueError,
         r"exp_avgs\[1\] has shape \[5\], expected that of params, \[4\]"),
        ({"master_params": []}, ValueError, "master_params has 0 tensors, expected 2"),
        ({"exp_avg_sqs": [torch.ones(3, 2), torch.ones(4, dtype=torch.long)]}, TypeError,
         r"exp_avg_sqs\[1\] has dtype torch.int64, expected float32"),
        ({"exp_avgs": [torch.ones(3, 2).double(), torch.ones(4)]}, TypeError,
         r"exp_avgs\[0\] has dtype torch.float64, params\[0\] torch.float32: float64 does not mix"),
        ({"grads": [torch.ones(3, 2).to_sparse(), torch.ones(4)]}, TypeError,
         r"grads\[0\] has layout torch.sparse_coo"),
        ({"step": torch.zeros((), dtype=torch.float16)}, TypeError, "step has dtype torch.float16, expected one of"),
        ({"step": torch.zeros(2)}, ValueError, r"step has shape \[2\], expected one element"),
        ({"step": [torch.zeros(())] * 3}, ValueError, "step has 3 tensors, expected one, or 2"),
        ({"step": []}, ValueError, "step has 0 tensors, expected one, or 2"),
        ({"step": [torch.zeros(()), torch.zeros((), dtype=torch.int32)]}, TypeError,
         r"step\[1\] has dtype torch.int32"),
        ({"found_inf": torch.zeros(3)}, ValueError, r"found_inf has shape \[3\], expected one element"),
        ({"lr": -1.0}, ValueError, "lr=-1.0, expected 0 or more"),
        ({"eps": -1.0}, ValueError, "eps=-1.0, expected 0 or more"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay=nan, expected 0 or more"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas=\(0.9, 1.0\), expected two numbers from 0 to below 1"),
        ({"max_norm": 0.0}, ValueError, "max_norm=0.0, expected a positive number, or None"),
        ({"max_norm": "1"}, TypeError, "max_norm='1', expected a positive number, or None"),
        ({"master_params": [torch.ones(3, 2), torch.ones(4).bfloat16()]}, TypeError,
         r"master_params\[1\] has dtype torch.bfloat16, expected torch.float32"),
        ({"step": 3.0}, TypeError, "step is a float, expected a list of tensors"),
        ({"step": [3.0]}, TypeError, r"step\[0\] is a float, expected a tensor"),
        ({"grads": [None, torch.ones(4)]}, TypeError, r"grads\[0\] is None, expected a tensor"),
        ({"params": torch.ones(2, 3)}, TypeError, "params is a (Tensor|Parameter), expected a list of tensors"),
        ({"params": (torch.ones(size) for size in (3, 4))}, TypeError, "params is a generator, expected a list"),
        ({"lr": "0.1"}, TypeError, "lr='0.1', expected 0 or more"),
        ({"eps": None}, TypeError, "eps is None, expected 0 or more"),
        ({"betas": 0.9}, ValueError, "betas=0.9, expected two numbers"),
        ({"betas": (torch.tensor(0.9), 0.99)}, TypeError, r"betas\[0\] is a Tensor, expected a number"),
        ({"maximize": None}, TypeError, "maximize is None, expected True or False"),
        ({"grads": [torch.ones(3, 2), torch.ones(4, device="meta")]}, ValueError,
         r"grads\[1\] is on meta, params\[0\] on cpu"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"adamw: {message}"):
        hetu_kernels.adamw(**arguments_of(**changes))


def test_distributed_tensors_are_refused() -> None:
    class Fake(Tensor):
        def to_local(self) -> Tensor:
            raise NotImplementedError

    params = [torch.randn(3, 2), torch.randn(4).as_subclass(Fake)]
    with pytest.raises(TypeError, match=r"params\[1\] is a DTensor, expected a plain tensor: pass .*to_local\(\)"):
        hetu_kernels.adamw(**arguments_of(params=params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amsgrad": True}, "AdamW: group 0 has amsgrad=True, expected False"),
        ({"lr": -0.1}, "AdamW: lr=-0.1, expected 0 or more"),
        ({"betas": (1.5, 0.9)}, r"AdamW: betas=\(1.5, 0.9\)"),
        ({"betas": (torch.tensor(1.5), 0.9)}, r"AdamW: betas=\(1.5, 0.9\)"),
        ({"betas": (torch.zeros((), device="meta"), 0.9)}, r"AdamW: betas\[0\] has shape \[\] on meta, expected a num"),
        ({"differentiable": True}, "AdamW: group 0 has differentiable=True, expected False"),
    ],
)
def test_optimizer_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hetu_kernels.AdamW(parameters(), **changes)


def test_optimizer_refuses_later() -> None:
    optimizer = hetu_kernels.AdamW(parameters()[:1])
    with pytest.raises(ValueError, match="group 1 has amsgrad=True"):
        optimizer.add_param_group({"params": parameters()[1:], "amsgrad": True})
    assert len(optimizer.param_groups) == 1
    params = parameters()[:1]
    params[0].grad = torch.ones(5, 7).to_sparse()
    with pytest.raises(TypeError, match="a gradient is torch.sparse_coo of torch.float32"):
        hetu_kernels.AdamW(params).step()


def test_a_checkpoint_that_is_refused_changes_nothing() -> None:
    params, others = parameters(), parameters()
    ours, theirs = hetu_kernels.AdamW(params, lr=0.1), torch.optim.AdamW(others, lr=0.2, amsgrad=True)
    for optimizer, tensors in ((ours, params), (theirs, others)):
        set_gradients(tensors, 0)
        optimizer.step()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="AdamW: group 0 has amsgrad=True, expected False"):
        ours.load_state_dict(theirs.state_dict())
    after = ours.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, state in before["state"].items():
        assert after["state"][number].keys() == state.keys()
        assert all(torch.equal(after["state"][number][name], value) for name, value in state.items())
    set_gradients(params, 1)
    ours.step()


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_arguments_are_those_of_torch(mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also tensors as decays of the moments, which torch takes."""
    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", mode)
    found = []
    for kind in (torch.optim.AdamW, hetu_kernels.AdamW):
        assert inspect.signature(kind).parameters.keys() == inspect.signature(torch.optim.AdamW).parameters.keys()
        params = parameters(device=device)
        betas = (torch.tensor(0.8), torch.tensor(0.95)) if kind is hetu_kernels.AdamW else (0.8, 0.95)
        optimizer = kind(params, lr=0.1, betas=betas, differentiable=False)
        for seed in range(2):
            set_gradients(params, seed)
            optimizer.step()
        found.append(params)
    assert_same_parameters(found[1], found[0])


def _sharded(rank: int, mode: str) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    os.environ["LIGHTNING_HETU_KERNELS"] = mode
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(5, 4), torch.randn(3, 2), torch.randn(1, 2)]
    params = [
        torch.nn.Parameter(distribute_tensor(tensor, mesh, [placement]))
        for tensor, placement in zip(whole, (Shard(0), Replicate(), Shard(0)), strict=True)
    ]
    optimizer = hetu_kernels.AdamW(params, lr=0.1)
    for _ in range(2):
        for param in params:
            param.grad = distribute_tensor(torch.randn(param.shape), mesh, param.placements)
        optimizer.step()
    wrong = params[0]
    wrong.grad = distribute_tensor(torch.randn(wrong.shape), mesh, [Replicate()])
    with pytest.raises(ValueError, match="a gradient is placed"):
        optimizer.step()
    os.environ["LIGHTNING_HETU_KERNELS"] = "auto"
    return [param.detach().full_tensor() for param in params]


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_sharded_parameters_are_updated_shard_by_shard(mode: str, ranks: Callable[[int], RankPool]) -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(tensor) for tensor in (torch.randn(5, 4), torch.randn(3, 2), torch.randn(1, 2))]
    optimizer = torch.optim.AdamW(params, lr=0.1)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
    for found in ranks(2).run(_sharded, mode):
        assert_same_parameters(found, [param.detach() for param in params])
