"""``python -m hetu_kernels.bench``: reports, pictures, errors, and every operator's benchmarks at their tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hetu_kernels import bench
from hetu_kernels._common import bench as bench_timing
from hetu_kernels._common import bench_plot, bench_run, config
from hetu_kernels._common.bench import CudaMeter
from hetu_kernels._common.bench_report import OURS, Report, goals, table
from hetu_kernels._common.registry import OpSpec, op_names, op_spec
from tests.kernels._bench import LIMITS, Device, make_spec, synthetic, taking

ROOT = Path(__file__).parents[2]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(bench_timing, "_MAX_SAMPLES", 40)  # what does not move the clock is called as often
    return Device()


def test_report_survives_json(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    synthetic().save(file)
    loaded = Report.load(file)  # with numbers cut to six digits
    loaded.save(tmp_path / "again.json")
    assert Report.load(tmp_path / "again.json") == loaded
    assert replace(loaded, rows=[]) == replace(synthetic(), rows=[])
    for row, original in zip(loaded.rows, synthetic().rows, strict=True):
        for name, value in vars(original).items():
            read = getattr(row, name)
            assert read == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    fields = json.loads(file.read_text())
    assert {"device", "arch", "versions", "date", "command", "limits", "rows"} <= set(fields)
    row = fields["rows"][0]
    assert (row["op"], row["benchmark"], row["pass"], row["implementation"]) == ("double", "small", "forward", OURS)
    assert (row["ms"], row["percent_of_limit"], row["best_peer"], row["ratio_to_best"]) == (1.0, 25.0, "torch eager", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "again.json"}


def test_table_says_what_did_not_run_and_what_is_wrong() -> None:
    text = table(synthetic(tiny=True))
    assert "GPU 9000 (sm_90)" in text and "these times mean nothing" in text
    lines = text.splitlines()
    assert sum("ImportError: none" in line for line in lines) == 2
    assert all("DISAGREES" in line for line in lines if " fishy " in line)
    assert any("25.0" in line and "2.00x the speed of torch eager" in line for line in lines)


@pytest.mark.parametrize("form", ["svg", "png"])
def test_plots_are_made_from_a_report_alone(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    synthetic().save(tmp_path / "r.json")
    assert (
        bench.main(["--from-json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p"), "--plot-format", form]) == 0
    )
    first = (tmp_path / "p" / f"kernels_double.{form}").read_bytes()
    assert len(first) > 1000
    bench.main(["--from-json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p"), "--plot-format", form])
    assert (tmp_path / "p" / f"kernels_double.{form}").read_bytes() == first, "the same numbers make another file"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, device: Device) -> Callable[..., int]:
    """Runs the command on the pretended device over one pretended operator."""

    def run(spec: OpSpec, *arguments: str) -> int:
        monkeypatch.setattr(bench, "op_names", lambda: (spec.name,))
        monkeypatch.setattr(bench, "op_spec", lambda name: spec)
        monkeypatch.setattr(bench, "measure_limits", lambda meter, settings: LIMITS)
        monkeypatch.setattr(bench, "_meter", lambda options: device)
        return bench.main(list(arguments))

    return run


def test_interrupted_run_keeps_what_it_has_and_goes_on(
    command: Callable[..., int], device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "folder" / "report.json"
    sizes: list[int] = []

    def function(x: Tensor) -> Tensor:
        if len(x) == 1000 and not sizes.count(1000):
            sizes.append(len(x))
            raise KeyboardInterrupt
        sizes.append(len(x))
        return taking(device, 1.0)(x)

    spec = make_spec(function)
    assert command(spec, "--json", str(file)) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: interrupted") and "--resume" in error
    assert {row.benchmark for row in Report.load(file).rows} == {"small"}
    sizes.append(0)
    assert command(spec, "--json", str(file), "--resume") == 0
    assert 4 not in sizes[sizes.index(0) :], "what was finished ran again"
    assert {row.benchmark for row in Report.load(file).rows} == {"small", "large"}
    assert Report.load(file).command == f"python -m hetu_kernels.bench --json {file} --resume"


def test_device_that_is_lost_is_blamed_on_the_right_peer_and_the_run_can_go_on(
    command: Callable[..., int], device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    calls = iter(range(10**6))

    def wild(x: Tensor) -> Tensor:
        device.broken = next(calls) > 5  # only in the second round, long after ours has been measured
        return taking(device, 1.0)(x)

    spec = make_spec(taking(device, 1.0), torch_eager=lambda _: taking(device, 2.0), wild=lambda _: wild)
    assert command(spec, "--peers", "--json", str(file)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "does not answer after double, small, wild" in error and "--resume" in error
    (row,) = Report.load(file).rows
    assert (row.implementation, row.ms) == ("wild", None) and "illegal memory access" in str(row.reason)
    device.broken = False

    def calm(x: Tensor) -> Tensor:
        assert len(x) != 4, "tried again"
        return taking(device, 1.0)(x)

    spec = make_spec(taking(device, 1.0), torch_eager=lambda _: taking(device, 2.0), wild=lambda _: calm)
    assert command(spec, "--peers", "--json", str(file), "--resume") == 0
    rows = Report.load(file).rows
    assert [(row.benchmark, row.ms is None) for row in rows if row.implementation == "wild"] == [
        ("small", True),
        ("large", False),
    ]
    assert {row.benchmark for row in rows if row.implementation == OURS} == {"small", "large"}


def test_resume_refuses_a_report_of_another_device(
    command: Callable[..., int], device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic().save(tmp_path / "report.json")
    assert command(make_spec(taking(device, 1.0)), "--json", str(tmp_path / "report.json"), "--resume") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "device=GPU 9000, this run has cpu" in error


def test_exit_status_is_1_if_ours_fails(
    command: Callable[..., int], device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    def function(x: Tensor) -> Tensor:
        if len(x) == 4:
            raise RuntimeError("out of registers")
        return taking(device, 1.0)(x)

    assert command(make_spec(function)) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "failed: double, small, all: RuntimeError: out of registers"
    assert "large" in out, "the run went on"


def test_progress_is_a_line_per_benchmark(
    command: Callable[..., int], device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    command(make_spec(taking(device, 1.0)))
    assert capsys.readouterr().err.splitlines() == ["[1/2, 0:00] double, small", "[2/2, 0:00] double, large"]


def test_tune_turns_tuning_on_and_adds_to_the_tables(
    command: Callable[..., int], device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(config.AUTOTUNE_VARIABLE, raising=False)
    monkeypatch.setattr(config, "_tuned_here", {})
    (tmp_path / "sm_90.json").write_text('{"old|bf16": {"blocks": {}, "num_warps": 4, "num_stages": 2}}')

    def function(x: Tensor) -> Tensor:
        assert os.environ[config.AUTOTUNE_VARIABLE] == "1"
        config._tuned_here["sm_90", "new", "bf16"] = config.Config({"BM": 32}, 8, 3)
        return taking(device, 1.0)(x)

    monkeypatch.setenv(config.AUTOTUNE_VARIABLE, "0")  # so that it is put back
    assert command(make_spec(function), "--tune", "--tables", str(tmp_path)) == 0
    tables = json.loads((tmp_path / "sm_90.json").read_text())
    assert tables["new|bf16"] == {"blocks": {"BM": 32}, "num_warps": 8, "num_stages": 3}
    assert "old|bf16" in tables


@pytest.mark.parametrize(("named", "chosen"), [("cuda", 0), ("cuda:1", 1)])
def test_gpu_is_chosen_and_kernels_may_not_fall_back(monkeypatch: pytest.MonkeyPatch, named: str, chosen: int) -> None:
    """The part of the GPU's side that can be seen without one."""
    current, empty = [0], torch.empty
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: current.__setitem__(0, index), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: empty(*size, **options))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("LIGHTNING_HETU_KERNELS", "auto")
    meter = bench._meter(bench._parser().parse_args(["--device", named]))
    assert isinstance(meter, CudaMeter) and meter.device == torch.device("cuda", chosen)
    assert os.environ["LIGHTNING_HETU_KERNELS"] == "triton"
    for variable, value, words in (
        ("LIGHTNING_HETU_KERNELS", "reference", "compared with itself"),
        ("TRITON_INTERPRET", "1", "interpreted"),
    ):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=words):
            bench._meter(bench._parser().parse_args([]))
    with pytest.raises(ValueError, match="there are 2 GPUs"):
        bench._meter(bench._parser().parse_args(["--device", "cuda:2"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda"], "--device cpu --tiny"),
        (["--tune"], "--device cuda: torch finds no GPU"),
        (["--device", "cuda:1"], "--device cuda:1: torch finds no GPU"),
        (["--device", "cpu"], "only with --tiny"),
        (["--device", "tpu"], "expected cuda, cuda:<number> or cpu"),
        (["--device", "cpu", "--tiny", "--tune"], "--tune: needs a GPU"),
        (["no_such_op"], "op='no_such_op': expected one of"),
        (["--goals", "no_such_op"], "op='no_such_op'"),
        (["--resume"], "--resume: needs --json"),
        (["--rep", "0"], "--rep 0: expected"),
        (["--rep", "fast"], "argument --rep"),
        (["--from-json", "/no/such/file.json"], "No such file"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = bench.main(arguments)
    except SystemExit as stopped:
        status = stopped.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.startswith("error: ") and words in err and len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_folders_run_on_whatever_device_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """All operators of a mixture of experts beside torch, at tiny shapes where there is no GPU."""
    assert bench.main(["moe"]) == 0
    out, err = capsys.readouterr()
    assert "no GPU: every benchmark is called at its tiny shape" in err
    for name in ("topk_gate", "permute", "unpermute", "grouped_gemm"):
        assert name in out
    assert "swiglu" not in out and "torch eager" in out


def test_file_that_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(("", "[]", '{"rows": 3}', '{"limits": null, "rows": [], "what": 1}')):
        (tmp_path / f"{number}.json").write_text(text)
        assert bench.main(["--from-json", str(tmp_path / f"{number}.json")]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "is no report of hetu_kernels.bench" in error


def test_plotting_without_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_plot, "can_plot", lambda: False)
    assert bench.main(["--plot", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "lightning-hetu[plot]" in error


def test_every_benchmark_and_peer_runs_at_its_tiny_shape(tmp_path: Path) -> None:
    """On the CPU, without triton's interpreter: ours is its reference there, and peers that need a GPU say so."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "hetu_kernels.bench", "--device", "cpu", "--tiny", "--json", str(tmp_path / "r.json")],
        env={**environment, "PYTHONPATH": os.pathsep.join(["kernels", environment.get("PYTHONPATH", "")])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = Report.load(tmp_path / "r.json").rows
    timed = {(row.op, row.benchmark, row.pass_, row.implementation) for row in rows if row.ms is not None}
    for name in op_names():
        spec = op_spec(name)
        eager = [peer for peer in spec.peers if "eager" in peer.lower()] or ["reference (eager)"]
        for benchmark in spec.benchmarks():
            passes = bench_run.passes_of(spec, benchmark, benchmark.make(torch.device("cpu"), True))
            for pass_ in passes:
                for implementation in (OURS, *eager):
                    assert (name, benchmark.name, pass_, implementation) in timed, implementation
            of_it = {row.implementation for row in rows if (row.op, row.benchmark) == (name, benchmark.name)}
            assert of_it >= {OURS, *spec.peers}, "a peer is missing, and nothing says why"
    assert not [f"{r.op}, {r.benchmark}, {r.implementation}: {r.reason}" for r in rows if r.agrees is False]


def test_goals_are_in_the_documentation() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert goals(map(op_spec, op_names())) in text, (
        "replace the table by what python -m hetu_kernels.bench --goals prints"
    )


@pytest.mark.gpu
def test_benchmark_runs_on_a_gpu(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "hetu_kernels.bench", "add_rms_norm", "--peers", "--rep", "20",
         "--json", str(tmp_path / "r.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["kernels", os.environ.get("PYTHONPATH", "")])},
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = Report.load(tmp_path / "r.json")
    assert report.limits is not None and report.limits.copy_gb_s > 100 and report.limits.matmul_tflop_s > 10
    measured = [row for row in report.rows if row.ms is not None]
    assert {row.implementation for row in measured} >= {OURS, "torch eager", "torch.compile"}
    for row in measured:
        assert row.agrees, row
        assert row.percent_of_limit is not None and 1 < row.percent_of_limit < 150, row
        assert row.peak_bytes and row.host_us, row
