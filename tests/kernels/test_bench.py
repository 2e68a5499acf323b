"""The benchmark's promises, on a clock that the tests move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from hetu_kernels._common import bench as bench_timing
from hetu_kernels._common import bench_peers, config
from hetu_kernels._common.bench import Meter, Settings, Trial, host_time, measure_limits, peak_memory, take_turns
from hetu_kernels._common.bench_peers import difference
from hetu_kernels._common.bench_report import OURS, Row, one_line, speeds
from hetu_kernels._common.bench_run import DeviceLostError, run_benchmark
from hetu_kernels._common.registry import OpSpec
from tests.kernels._bench import LIMITS, SHORT, Device, by_name, make_spec, measure, taking, trial


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(bench_timing, "_MAX_SAMPLES", 40)  # what does not move the clock is called as often
    return Device()


# Timing


def test_implementations_take_turns(device: Device) -> None:
    """A B A B: each round warms up and measures every one of them, so that a slow minute is slow for all."""
    a, b = trial(device, "a", 1.0), trial(device, "b", 2.0)
    take_turns([a, b], device, SHORT)
    turns = [name for name, _ in groupby(name for name in device.log if name != "flush")]
    assert turns == ["a", "b"] * SHORT.rounds
    assert (len(a.times), len(b.times)) == (40, 20), "each is measured for 40 ms in all"
    assert a.quantiles() == pytest.approx((1.0, 1.0, 1.0))
    assert b.quantiles() == pytest.approx((2.0, 2.0, 2.0))


def test_cache_is_emptied_before_every_call_and_preparation_is_not_timed(device: Device) -> None:
    one = trial(device, "a", 1.0)
    take_turns([one], device, SHORT)
    assert device.log == ["flush", "a"] * (len(device.log) // 2)
    assert one.times == pytest.approx([1.0] * len(one.times))  # 7 ms of preparation, 0.1 of emptying


def test_quantiles_are_of_all_rounds(device: Device) -> None:
    one = Trial("a", lambda: None, lambda _: None, times=[float(ms) for ms in range(101)])
    assert one.quantiles() == pytest.approx((50.0, 20.0, 80.0))


def test_very_short_calls_are_not_repeated_for_seconds(device: Device) -> None:
    one = trial(device, "a", 1e-3)
    take_turns([one], device, SHORT)
    assert len(one.times) == 40


def test_once_is_once(device: Device) -> None:
    one = trial(device, "a", 3.0)
    take_turns([one], device, Settings.once())
    assert device.log == ["flush", "a"]
    assert one.times == pytest.approx([3.0])


def test_trial_that_raises_is_given_up_and_the_others_go_on(device: Device) -> None:
    calls = iter(range(100))

    def call(_: Any) -> None:
        device.work(1.0)
        if next(calls) == 20:
            raise MemoryError("no more\nof it")

    bad, good = Trial("bad", lambda: None, call), trial(device, "good", 1.0)
    told: list[tuple[str, str]] = []
    take_turns([bad, good], device, SHORT, lambda name, reason: told.append((name, reason)))
    assert told == [("bad", "MemoryError: no more")] and bad.reason == "MemoryError: no more"
    assert good.reason is None and len(good.times) == 40


def test_memory_counts_what_the_preparation_leaves_behind(device: Device) -> None:
    device.allocate(1000)  # the arguments

    def prepare() -> None:
        device.allocate(5000)  # comes and goes
        device.memory -= 4900

    def call(_: Any) -> None:
        device.allocate(30)
        device.memory -= 30

    assert peak_memory(Trial("a", prepare, call), device) == 100 + 30
    assert peak_memory(Trial("a", lambda: None, lambda _: None), Meter()) is None


def test_host_time_is_the_median_until_the_call_returns(device: Device) -> None:
    assert host_time(trial(device, "a", 1.0, 5.0, 2.0), device, SHORT) == pytest.approx(2000.0)


def test_limits_count_bytes_read_and_written_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    limits = measure_limits(Meter(lambda: next(ticks) * 1e-3), Settings.once())  # every call takes 1 ms
    assert limits.copy_gb_s == pytest.approx(2 * 4 * 2**18 / 1e-3 / 1e9)
    assert limits.matmul_tflop_s == pytest.approx(2 * 64**3 / 1e-3 / 1e12)


# Rows


def test_speeds_are_compared_with_the_nearer_limit() -> None:
    assert speeds((2 * 10**9, 0), 1.0, LIMITS) == {
        "gb_s": pytest.approx(2000), "bound": "memory", "limit": 4000.0, "percent_of_limit": pytest.approx(50)
    }  # fmt: skip
    both = speeds((2 * 10**9, 600 * 10**9), 1.0, LIMITS)
    assert (both["bound"], both["limit"], both["percent_of_limit"]) == ("compute", 800.0, pytest.approx(75))
    assert (both["gb_s"], both["tflop_s"]) == (pytest.approx(2000), pytest.approx(600))
    assert speeds((4 * 10**9, 600 * 10**9), 1.0, LIMITS)["percent_of_limit"] == pytest.approx(100)
    assert speeds((0, 0), 1.0, LIMITS) == {}


def test_each_pass_has_its_own_work_and_both_has_the_sum(device: Device) -> None:
    class Timed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            device.work(1.0)
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            device.work(4.0)
            return 2 * grad

    spec = make_spec(lambda x: Timed.apply(x), differentiable=("x",))
    ours = {row.pass_: row for row in measure(spec, device) if row.implementation == OURS}
    assert list(ours) == ["forward", "backward", "both", "no_grad"]
    assert [row.ms for row in ours.values()] == pytest.approx([1.0, 4.0, 5.0, 1.0])
    assert [row.gb_s for row in ours.values()] == pytest.approx([1000.0, 500.0, 600.0, 1000.0])
    assert [row.tflop_s or 0.0 for row in ours.values()] == pytest.approx([1000.0, 0.0, 200.0, 1000.0])
    assert ours["forward"].percent_of_limit == pytest.approx(125)
    assert ours["backward"].percent_of_limit == pytest.approx(12.5)


def test_operators_without_gradients_have_forward_only(device: Device) -> None:
    rows = measure(make_spec(taking(device, 1.0)), device)
    assert {row.pass_ for row in rows} == {"forward"}


def test_shapes_of_inference_are_timed_without_gradients_only(device: Device) -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return 2 * x

    spec = make_spec(function, differentiable=("x",))
    rows = run_benchmark(spec, replace(spec.benchmarks()[0], backward=False), device, LIMITS, SHORT)
    assert {row.pass_ for row in rows} == {"no_grad"}
    assert seen[0] and not any(seen[1:])  # but for the comparison


def test_ratios_are_to_ours_and_to_the_fastest_peer_that_agrees(device: Device) -> None:
    spec = make_spec(
        taking(device, 2.0),
        torch_eager=lambda _: taking(device, 4.0),
        fast=lambda _: taking(device, 3.0),
        wrong=lambda _: taking(device, 1.0, scale=2.1),
    )
    rows = by_name(measure(spec, device))
    assert rows["torch eager"].ratio_to_ours == pytest.approx(2.0)
    assert rows["wrong"].ratio_to_ours == pytest.approx(0.5)
    assert (rows[OURS].best_peer, rows[OURS].ratio_to_best) == ("fast", pytest.approx(1.5))
    assert rows["wrong"].agrees is False and "relative rms error 0.05" in str(rows["wrong"].reason)
    assert rows["fast"].agrees is True and rows["fast"].reason is None


def test_peers_that_cannot_run_become_rows_with_their_reasons(device: Device) -> None:
    def missing(_: dict[str, Any]) -> Any:
        raise ImportError("No module named 'fast_kernels'")

    def refuses(x: Tensor) -> Tensor:
        raise RuntimeError("needs a newer GPU\nand more")

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ValueError("no gradients today")

    spec = make_spec(
        taking(device, 1.0), differentiable=("x",), torch_eager=lambda _: taking(device, 2.0),
        missing=missing, refuses=lambda _: refuses, half=lambda _: lambda x: Odd.apply(x),
    )  # fmt: skip
    rows = measure(spec, device)
    forward, backward = by_name(rows), by_name(rows, "backward")
    assert forward["missing"] == Row(
        "double", "small", "all", "missing", reason="ImportError: No module named 'fast_kernels'"
    )
    assert (forward["refuses"].pass_, forward["refuses"].reason) == ("all", "RuntimeError: needs a newer GPU")
    assert forward["half"].ms is not None
    assert (backward["half"].ms, backward["half"].reason) == (None, "ValueError: no gradients today")
    assert forward[OURS].ms is not None and backward["torch eager"].ms is not None
    assert not any(row.failed for row in rows)


def test_ours_failing_is_a_failed_row_and_peers_are_timed_all_the_same(device: Device) -> None:
    def broken(x: Tensor) -> Tensor:
        raise AssertionError

    rows = by_name(measure(make_spec(broken, torch_eager=lambda _: taking(device, 2.0)), device))
    assert rows[OURS].failed and rows[OURS].reason == "AssertionError"
    eager = rows["torch eager"]
    assert (eager.ms, eager.agrees, eager.ratio_to_ours) == (pytest.approx(2.0), None, None)


def test_gradients_of_peers_are_not_said_to_agree_where_ours_has_none(device: Device) -> None:
    spec = make_spec(lambda x: 2 * x.detach(), differentiable=("x",), torch_eager=lambda _: lambda x: 2 * x)
    rows = measure(spec, device)
    assert by_name(rows, "backward")[OURS].failed
    assert by_name(rows)["torch eager"].agrees is True
    assert by_name(rows, "backward")["torch eager"].agrees is None


def test_arguments_that_cannot_be_made_are_a_failed_row(device: Device) -> None:
    spec = make_spec(taking(device, 1.0))
    benchmark = replace(spec.benchmarks()[0], make=lambda device, tiny: 1 // 0)
    (row,) = run_benchmark(spec, benchmark, device, LIMITS, SHORT)
    assert row.failed and row.reason == "arguments: ZeroDivisionError: integer division or modulo by zero"


def test_without_peers_there_is_torch_eager_or_the_reference_in_its_place(device: Device) -> None:
    peers = {"torch_eager": lambda _: taking(device, 2.0), "liger": lambda _: taking(device, 1.0)}
    with_eager = measure(make_spec(taking(device, 1.0), **peers), device, peers=False)
    assert set(by_name(with_eager)) == {OURS, "torch eager"}
    without = measure(make_spec(taking(device, 1.0), liger=peers["liger"]), device, peers=False)
    assert set(by_name(without)) == {OURS, "reference (eager)"}


def test_tiny_on_a_cpu_runs_all_peers_but_those_that_compile(device: Device) -> None:
    peers = {name: lambda _: taking(device, 1.0) for name in ("torch_eager", "torch.compile", "liger")}
    spec = make_spec(taking(device, 1.0), **peers)
    rows = by_name(measure(spec, device, Settings.once(), peers=False))
    assert rows["liger"].ms is not None
    assert rows["torch.compile"].ms is None and "--peers" in str(rows["torch.compile"].reason)
    assert by_name(measure(spec, device, Settings.once(), peers=True))["torch.compile"].ms is not None


def test_operators_that_write_into_their_arguments_are_compared_from_the_same_start(device: Device) -> None:
    def in_place(x: Tensor) -> Tensor:
        return x.mul_(2.0).clone()

    rows = by_name(measure(make_spec(in_place, torch_eager=lambda _: in_place, liger=lambda _: in_place), device))
    assert [row.agrees for row in rows.values()] == [True, True, True]


def test_peers_that_are_built_around_their_arguments_are_timed_on_those_of_the_benchmark(device: Device) -> None:
    def build(arguments: dict[str, Any]) -> Callable[..., Tensor]:
        def peer(x: Tensor) -> Tensor:
            assert x.data_ptr() == arguments["x"].data_ptr()
            return 2 * x

        return peer

    assert by_name(measure(make_spec(taking(device, 1.0), torch_eager=build), device))["torch eager"].reason is None


def test_gradients_are_compared_and_a_missing_one_is_a_difference(device: Device) -> None:
    def spec(peer: Callable[..., Any]) -> OpSpec:
        return make_spec(taking(device, 1.0), differentiable=("x",), torch_eager=lambda _: peer)

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * grad

    rows = measure(spec(lambda x: WrongGradient.apply(x)), device)
    assert by_name(rows)["torch eager"].agrees is True
    assert by_name(rows, "backward")["torch eager"].agrees is False
    assert "gradient of x" in str(by_name(rows, "both")["torch eager"].reason)

    extra = torch.zeros(4, requires_grad=True)
    rows = measure(spec(lambda x: 2 * x.detach() + extra), device)
    assert by_name(rows, "backward")["torch eager"].reason == "no gradient of x"


def test_backward_gets_the_same_gradients_every_time_although_kernels_write_over_them(device: Device) -> None:
    seen = []

    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(grad.clone())
            return grad.mul_(2)

    measure(make_spec(lambda x: Careless.apply(x), differentiable=("x",)), device, Settings.once())
    assert len(seen) > 3 and all(torch.equal(grad, seen[0]) for grad in seen)


def test_configurations_of_matrix_kernels_are_in_our_rows_only(device: Device) -> None:
    def function(x: Tensor) -> Tensor:
        config.tuned("matrix_kernel", ("bf16",), x.device, config.Config({"BM": 64}, 8, 3))
        return 2 * x

    rows = by_name(measure(make_spec(function, torch_eager=lambda _: function), device))
    assert rows[OURS].config == {"matrix_kernel": {"blocks": {"BM": 64}, "num_warps": 8, "num_stages": 3}}
    assert rows["torch eager"].config is None


def test_lost_device_error_in_a_check_names_who_broke_it(device: Device) -> None:
    def wild(x: Tensor) -> Tensor:
        device.broken = True
        return 2 * x

    with pytest.raises(DeviceLostError, match="double, small, wild: RuntimeError: CUDA error"):
        measure(make_spec(taking(device, 1.0), wild=lambda _: wild), device)


# Agreement


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (torch.tensor([[1.0, 2.0, 3.0]]), None),
        (torch.tensor([1.0, 2.0, 3.01]), None),
        (torch.tensor([1.0, 2.0, 4.0]), "y: relative rms error 0.27"),
        (torch.tensor([2.0, 2.0, 3.0]), "y: relative rms error 0.27"),
        (torch.tensor([1.0, 2.0]), "y has shape [2], ours [3]"),
        (torch.tensor([1.0, float("nan"), 3.0]), "y is not finite in other places"),
    ],
)
def test_difference_of_floats(monkeypatch: pytest.MonkeyPatch, theirs: Tensor, expected: str | None) -> None:
    monkeypatch.setattr(bench_peers, "_CHUNK", 2)
    text = difference("y", torch.tensor([1.0, 2.0, 3.0]), theirs)
    assert text is None if expected is None else str(text).startswith(expected.removesuffix(" in other places"))


def test_difference_of_special_values() -> None:
    inf = torch.tensor([1.0, float("-inf")])
    assert difference("y", inf, inf.clone()) is None
    assert difference("y", torch.zeros(3), torch.zeros(3)) is None
    assert difference("y", torch.zeros(3), torch.ones(3)) is not None
    assert difference("y", torch.arange(4), torch.arange(4, dtype=torch.int32)) is None
    assert difference("y", torch.arange(4), torch.tensor([0, 1, 2, 4])) == "y: 25.0% of the elements differ"
    assert difference("y", torch.zeros(0), torch.zeros(0)) is None


def test_reasons_fit_a_line() -> None:
    assert one_line(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert one_line(KeyError()) == "KeyError"
    assert (
        one_line(ValueError("backend raised:\n\nno compiler\nSet a variable"))
        == "ValueError: backend raised: no compiler"
    )
    assert len(one_line(ValueError("x" * 1000))) == 160
