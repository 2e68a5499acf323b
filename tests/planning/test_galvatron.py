"""The files and predictions of the released Galvatron 3 are reproduced."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_hetu.planning import (
    ClusterSpec,
    GalvatronCostModel,
    GalvatronProfile,
    HybridPlan,
    NoFeasiblePlanError,
    evaluate,
    load_galvatron_profiles,
    memory_breakdown,
    read_galvatron_plan,
    search,
    write_galvatron_plan,
)

_DEFAULT = Path(__file__).parents[3] / "shared" / "data" / "galvatron_profiles"
DATA = Path(os.environ.get("HETU_GALVATRON_PROFILES", _DEFAULT))
PLAN = DATA / "llama2-7b_seq2048" / "galvatron_config_llama2-7b_1nodes_8gpus_per_node_36GB_bf16.json"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no official profiles in {DATA}; set HETU_GALVATRON_PROFILES to their folder"
)
MIB = 2**20


@pytest.fixture(scope="module")
def llama() -> tuple[GalvatronProfile, ClusterSpec]:
    return load_galvatron_profiles(DATA / "llama2-7b_seq2048", DATA / "hardware", num_devices=8)


@needs_data
def test_the_shipped_plan_gets_its_official_prediction(llama: tuple[GalvatronProfile, ClusterSpec]) -> None:
    """The release predicts 1.0860 s, 14.732 samples/s and 36757 MB for it, 7372 MB of them reserved."""
    profile, cluster = llama
    plan = read_galvatron_plan(PLAN)
    assert str(plan.embedding) == "dp4-sp2-zero3"
    assert sum(layer.recompute for layer in plan.layers) == 20
    prediction = evaluate(plan, profile, cluster, "galvatron3", memory_budget="36GiB")
    assert prediction.iteration_time == pytest.approx(1.0860, abs=5e-5)
    assert 16 / prediction.iteration_time == pytest.approx(14.732, abs=5e-4)
    assert prediction.stage_memory == (36757 * MIB,)
    assert evaluate(plan, profile, cluster, "galvatron3").stage_memory == ((36757 - 7372) * MIB,)
    assert sum(memory_breakdown(plan, profile, cluster, 0, "galvatron3").values()) == (36757 - 7372) * MIB


@needs_data
@pytest.mark.parametrize("scale", [None, 1e-7])
def test_our_search_is_at_least_as_good(llama: tuple[GalvatronProfile, ClusterSpec], scale: float | None) -> None:
    """The whole official search at 36 GB (of 1024 MB) and batch 16; it takes the release 42 to 133 s."""
    profile, cluster = llama
    model = GalvatronCostModel(profile, **({} if scale is None else {"reshard_scale": scale}))
    start = time.perf_counter()
    plan = search(profile, cluster, memory_budget="36GiB", global_batch_size=16, cost_model=model, alternatives=False)
    print(f"\nsearched in {time.perf_counter() - start:.2f} s", file=sys.stderr)
    shipped = evaluate(read_galvatron_plan(PLAN), profile, cluster, model)
    assert plan.prediction is not None
    assert plan.prediction.iteration_time <= shipped.iteration_time * (1 + 1e-12)
    assert max(plan.prediction.stage_memory) <= 36 * 2**30
    assert (plan.num_microbatches, plan.pipeline_parallel_size) == (1, 1)
    assert {layer.dp_type for layer in plan.layers} == {"zero3"} and {layer.tp for layer in plan.layers} == {1}
    assert sum(layer.recompute for layer in plan.layers) == 20


@needs_data
def test_pipelines_and_tensor_parallelism_are_found_where_memory_is_short(
    llama: tuple[GalvatronProfile, ClusterSpec],
) -> None:
    """The smallest feasible budget of this cost model is true as well, to the MB."""
    profile, cluster = llama
    with pytest.raises(NoFeasiblePlanError) as error:
        search(profile, cluster, memory_budget="8GiB", global_batch_size=16, cost_model="galvatron3")
    least = error.value.smallest_feasible_budget
    plan = search(profile, cluster, memory_budget=least, global_batch_size=16, cost_model="galvatron3")
    assert plan.prediction is not None
    assert max(plan.prediction.stage_memory) <= least
    assert plan.prediction == evaluate(plan, profile, cluster, "galvatron3", memory_budget=least)
    with pytest.raises(NoFeasiblePlanError):
        search(profile, cluster, memory_budget=least - MIB, global_batch_size=16, cost_model="galvatron3")
    assert "galvatron3" in plan.explain()


@needs_data
def test_a_budget_above_20_gb_is_searched_without_its_reserve(llama: tuple[GalvatronProfile, ClusterSpec]) -> None:
    """A fifth is kept aside above 20 GB; the smallest budget that holds a peak accounts for that."""
    model = GalvatronCostModel(llama[0])
    assert model.reserve(20 * 2**30) == 0
    assert model.reserve(36 * 2**30) == 7372 * MIB
    for megabytes in (1000, 20 * 1024, 21 * 1024 - 1, 21 * 1024, 29385, 60000):
        budget = model.budget_for(megabytes * MIB)
        assert budget - model.reserve(budget) >= megabytes * MIB
        smaller = budget - MIB
        assert smaller - model.reserve(smaller) < megabytes * MIB


@needs_data
def test_the_vit_profiles_of_four_devices_are_read() -> None:
    """Files without sequence parallelism and with one batch size; latencies come from the 8-device file."""
    profile, cluster = load_galvatron_profiles(DATA / "vit-1280", DATA / "hardware", num_devices=4, num_layers=32)
    layer = profile.layers[0]
    assert (layer.hidden_size, layer.sequence_length, layer.count) == (1280, 197, 32)
    assert not profile.sequence_parallel and profile.mixed_precision
    assert layer.forward == (pytest.approx(0.20539), 0.0)
    assert set(profile.p2p) == {2, 4} and cluster.num_devices == 4
    plan = search(profile, cluster, memory_budget="8GiB", global_batch_size=64, cost_model="galvatron3")
    assert plan.prediction is not None and plan.num_layers == 32
    with pytest.raises(ValueError, match="num_layers: model 'hidden1280_head16' is not known"):
        load_galvatron_profiles(DATA / "vit-1280", DATA / "hardware", num_devices=4)


@needs_data
def test_plans_are_written_as_the_release_reads_them(tmp_path: Path) -> None:
    """The shipped file is written back with the same meaning, under both names of the vocabulary's sharding."""
    plan = read_galvatron_plan(PLAN)
    path = write_galvatron_plan(plan, tmp_path / "plan.json")
    assert read_galvatron_plan(path) == plan
    shipped, written = json.loads(PLAN.read_text()), json.loads(path.read_text())
    assert {key: written[key] for key in shipped} == shipped
    assert written["vocab_sdp"] == written["embed_sdp"] == 1 and written["world_size"] == 8


def write(folder: Path, name: str, data: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(data))


@pytest.fixture
def invented(tmp_path: Path) -> tuple[Path, Path]:
    """A small made-up model and cluster of two devices in the official format, in its rarer spellings."""
    model, hardware = tmp_path / "model", tmp_path / "hardware"
    times = {"layernum[2]_bsz4_seq16": 24.0, "layernum[4]_bsz4_seq16": 40.0}
    vocab = {"[16]": {"model_states": {"1": 100.0, "2": 60.0}, "activation": {"1": 5.0, "2": 3.0}}}
    memory = {
        "layertype_0": {"16": {"parameter_size": 40.0, "tp_activation_per_bsz_dict": {"1": 10.0, "checkpoint": 1.0}}},
        **{f"other_memory_{name}": vocab for name in ("pp_off", "pp_on_first", "pp_on_last")},
    }
    write(model, "computation_profiling_fp32_tiny_all.json", times)
    write(model, "memory_profiling_fp32_tiny_all.json", memory)
    write(hardware, "allreduce_bandwidth_1nodes_2gpus_per_node.json", {"allreduce_size_2_consec_1": 100.0})
    write(hardware, "p2p_bandwidth_1nodes_2gpus_per_node.json", {"pp_size_2": 50.0})
    write(hardware, "overlap_coefficient.json", {"overlap_coe": 1.2})
    latency = {f"{op}_size_2_{n}MB_time": 0.1 + 0.01 * n for op in ("allreduce", "all2all") for n in (1, 2, 4, 8)}
    write(hardware, "sp_time_1nodes_2gpus_per_node.json", latency)
    return model, hardware


def test_raw_times_and_other_spellings_are_read(invented: tuple[Path, Path]) -> None:
    """Per-layer times are computed from whole-model ones: (40 - 24) / 4 samples / 2 layers, and what remains."""
    profile, _ = load_galvatron_profiles(*invented, num_devices=2, num_layers=3, hidden_size=8)
    assert profile.layers[0].forward == (2.0, 0.0) and profile.vocab_forward == (2.0, 0.0)
    assert not profile.mixed_precision and not profile.sequence_parallel
    assert profile.all_reduce[2, False] == profile.all_reduce[2, True] == 0.01


def test_formulas_on_numbers_that_can_be_checked_by_hand(invented: tuple[Path, Path]) -> None:
    """Time and memory of fp32 layers under zero3 and zero2, written out."""
    profile, cluster = load_galvatron_profiles(*invented, num_devices=2, num_layers=3, hidden_size=8)
    plan = HybridPlan.uniform("dp2-zero3", num_layers=3, global_batch_size=4)
    prediction = evaluate(plan, profile, cluster, "galvatron3")
    message = 2 * (1 / 2) * 40.0 * 0.01  # ms of the gradient message
    forward, backward = 4.0, 8.0
    layer = forward + backward + message / 2
    gather = 100 / 4 * 0.01 * (1 / 2) * 0.5  # of embedding and head, hidden behind their computation
    vocab = (gather + (4 * 1.2 - gather) / 1.2) + (gather + (8 * 1.2 - gather) / 1.2)
    tail = 3 * message * (1.2 - 1) - vocab
    assert tail < 0
    assert prediction.iteration_time == pytest.approx((3 * layer + vocab) / 1e3)
    share = 1 / 2 + 0.003
    # Whole MB per row: ceil(100.48), ceil(60.3) and the context of the runtime.
    assert 4 * 40 * share + 20 == pytest.approx(100.48) and 100 * share + 10 == pytest.approx(60.3)
    assert prediction.stage_memory[0] == (3 * 101 + 61 + 1024) * MIB
    zero2 = HybridPlan.uniform("dp2-zero2", num_layers=3, global_batch_size=4)
    rest = 3 / 4 * share + 1 / 4
    assert 4 * 40 * rest + 20 == pytest.approx(120.36) and 100 * rest + 10 == pytest.approx(72.725)
    assert evaluate(zero2, profile, cluster, "galvatron3").stage_memory[0] == (3 * 121 + 73 + 1024) * MIB


def test_errors_name_the_file_and_the_entry(invented: tuple[Path, Path], tmp_path: Path) -> None:
    """What is missing or malformed in the official files is said with their names."""
    model, hardware = invented
    with pytest.raises(ValueError, match="hidden_size: model 'tiny' is not known"):
        load_galvatron_profiles(model, hardware, num_devices=2, num_layers=3)
    with pytest.raises(ValueError, match="no sequence length \\[32\\]"):
        load_galvatron_profiles(model, hardware, num_devices=2, num_layers=3, hidden_size=8, sequence_length=32)
    with pytest.raises(FileNotFoundError, match="computation_profiling"):
        load_galvatron_profiles(hardware, hardware, num_devices=2)
    (hardware / "overlap_coefficient.json").write_text("{")
    with pytest.raises(ValueError, match="overlap_coefficient.json: not JSON"):
        load_galvatron_profiles(model, hardware, num_devices=2, num_layers=3, hidden_size=8)
    write(tmp_path, "plan.json", {"pp_deg": 1})
    with pytest.raises(ValueError, match="world_size: neither"):
        read_galvatron_plan(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="plan.json.*tp_sizes_enc"):
        read_galvatron_plan(tmp_path / "plan.json", world_size=2)


def test_what_the_format_cannot_say_is_refused(tmp_path: Path) -> None:
    """One layout for embedding and head, one type of data parallelism besides zero3."""
    plan = HybridPlan.uniform("dp2-zero2", num_layers=2, global_batch_size=2)
    with pytest.raises(ValueError, match="the format has one for both"):
        write_galvatron_plan(replace(plan, head=replace(plan.head, dp=1, tp=2)), tmp_path / "plan.json")
    with pytest.raises(ValueError, match="ddp and zero2"):
        write_galvatron_plan(
            replace(plan, layers=(plan.layers[0], replace(plan.layers[1], dp_type="ddp"))), tmp_path / "p"
        )
