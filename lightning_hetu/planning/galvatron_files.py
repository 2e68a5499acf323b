"""Reads the profile files of the released Galvatron (PKU-DAIR/Hetu-Galvatron).

Sizes in these files are MB of 2**20 bytes, times are milliseconds, bandwidths GB/s, and keys are text. Several releases
wrote several variants of the keys; all that are known are read:

* ``layertype_0_bsz8_seq2048``, ``layertype_0_bsz8`` and ``layertype_0`` for the forward time of one layer and sample,
  ``layertype_other_...`` for embedding and head together, and the raw ``layernum[2]_bsz8_seq2048`` they come from;
* ``layertype_0_sp`` or ``layertype_0`` and ``other_memory_pp_off_sp`` or ``other_memory_pp_off`` for memory with or
  without Megatron sequence parallelism; sequence keys ``2048``, ``[512,512]`` and ``512_512``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_hetu.planning.cluster import ClusterSpec, Collective, CollectiveCost
from lightning_hetu.planning.enumeration import check_device_count

MEGABYTE = 2**20
_FIT_SAMPLES = 8
"""Batch sizes a profile needs before the release fits a line through them."""

_KNOWN_SIZES = {"llama2-7b": (32, 4096), "llama-7b": (32, 4096), "llama2-13b": (40, 5120), "llama2-70b": (80, 8192)}
"""Layers and hidden size by model name: the profile files themselves hold neither."""


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds of a collective by MB of the message, and the straight line through them."""

    points: Mapping[float, float]

    def milliseconds(self, megabytes: float) -> float:
        """The measured point of exactly this size, otherwise the fitted line."""
        if megabytes in self.points:
            return self.points[megabytes]
        slope, intercept = self._line
        return slope * megabytes + intercept

    @cached_property
    def _line(self) -> tuple[float, float]:
        sizes = sorted(self.points)
        slope, intercept = np.polyfit(sizes, [self.points[size] for size in sizes], 1)
        return float(slope), float(intercept)


@dataclass(frozen=True)
class GalvatronLayer:
    """One layer type.

    Args:
        count: Layers of this type.
        hidden_size: Width of its activations.
        sequence_length: Length of its sequence.
        forward: Slope and intercept of the forward milliseconds over samples.
        parameter_megabytes: Parameters at 4 bytes each, not sharded.
        activations: MB per sample by tensor- or sequence-parallel degree.
        checkpoint: MB per sample of a recomputed layer.
    """

    count: int
    hidden_size: int
    sequence_length: int
    forward: tuple[float, float]
    parameter_megabytes: float
    activations: Mapping[int, float]
    checkpoint: float | None


@dataclass(frozen=True)
class VocabMemory:
    """MB of embedding and head by degree: model states, and activations per sample."""

    model_states: Mapping[int, float]
    activations: Mapping[int, float]


@dataclass(frozen=True)
class GalvatronProfile:
    """Everything the released cost model reads from its files; made by :func:`load_galvatron_profiles`.

    Args:
        num_devices: Devices in total.
        layers: One entry per layer type, in model order.
        vocab_forward: Slope and intercept of the forward milliseconds of embedding and head over samples.
        vocab_single: Memory of embedding and head without a pipeline.
        vocab_first: Memory of the embedding in the first stage.
        vocab_last: Memory of the head in the last stage.
        all_reduce: ms per MB by group size and whether its ranks are neighbors.
        p2p: ms per MB by number of stages.
        overlap: Slowdown of computation and communication that overlap.
        all_reduce_latency: By group size.
        all_to_all_latency: By group size.
        mixed_precision: Whether training is in bf16 or fp16.
        sequence_parallel: Whether tensor parallelism comes with Megatron sequence parallelism.
        name: Name of the model.
    """

    num_devices: int
    layers: tuple[GalvatronLayer, ...]
    vocab_forward: tuple[float, float]
    vocab_single: VocabMemory
    vocab_first: VocabMemory
    vocab_last: VocabMemory
    all_reduce: Mapping[tuple[int, bool], float]
    p2p: Mapping[int, float]
    overlap: float
    all_reduce_latency: Mapping[int, LatencyTable]
    all_to_all_latency: Mapping[int, LatencyTable]
    mixed_precision: bool
    sequence_parallel: bool
    name: str

    @property
    def num_layers(self) -> int:
        """Layers of all types."""
        return sum(layer.count for layer in self.layers)


def load_galvatron_profiles(
    model_dir: str | Path,
    hardware_dir: str | Path,
    *,
    num_devices: int = 8,
    devices_per_node: int | None = None,
    num_layers: int | Sequence[int] | None = None,
    hidden_size: int | Sequence[int] | None = None,
    sequence_length: int | Sequence[int] | None = None,
) -> tuple[GalvatronProfile, ClusterSpec]:
    """Reads a model and a hardware directory of the released Galvatron.

    The pair goes straight into :func:`~lightning_hetu.planning.search` with ``cost_model="galvatron3"``. The official
    command line counts a GB as 1024 MB, so its 36 GB are ``memory_budget="36GiB"`` here::

        profile, cluster = load_galvatron_profiles("llama2-7b_seq2048", "hardware")
        plan = search(profile, cluster, memory_budget="36GiB", global_batch_size=16, cost_model="galvatron3")

    Args:
        model_dir: Directory with one ``computation_profiling_*.json`` and one ``memory_profiling_*.json``.
        hardware_dir: Directory with the bandwidth, overlap and ``sp_time`` files.
        num_devices: Devices in total.
        devices_per_node: Devices of one node; all of them if not given.
        num_layers: Layers, one number per layer type. Taken from a plan file in ``model_dir`` if not given.
        hidden_size: Width, one number per layer type. Taken from the file name or the model's name if not given.
        sequence_length: Length, one number per layer type. Taken from the memory profile if not given.

    Returns:
        The profile, and the same hardware as a cluster for the other cost models.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file lacks an entry, or a size is neither given nor known.
    """
    check_device_count(num_devices)
    per_node = devices_per_node or num_devices
    model, hardware = Path(model_dir), Path(hardware_dir)
    times_path = _only_file(model, "computation_profiling_*.json")
    memory_path = _only_file(model, "memory_profiling_*.json")
    times, memory = read_json(times_path), read_json(memory_path)
    name = re.sub(r"^memory_profiling_(bf16|fp16|fp32)_|(_all)?\.json$", "", memory_path.name)

    matches = [re.match(r"layertype_(\d+)", key) for key in memory]
    num_types = max((int(match.group(1)) for match in matches if match), default=-1) + 1
    if not num_types:
        raise ValueError(f"{memory_path}: no entry 'layertype_0' or 'layertype_0_sp'.")
    sequence_parallel = "layertype_0_sp" in memory
    suffix = "_sp" if sequence_parallel else ""
    lengths = _per_type("sequence_length", sequence_length, num_types)
    lengths = lengths or [_any_sequence(memory, f"layertype_{i}{suffix}", memory_path) for i in range(num_types)]
    counts = _per_type("num_layers", num_layers, num_types) or _known_layers(model, name, num_types)
    widths = _per_type("hidden_size", hidden_size, num_types) or _known_width(name, num_types)

    layers = []
    for i in range(num_types):
        entry = _at_sequence(memory, f"layertype_{i}{suffix}", [lengths[i]], memory_path)
        activations = entry["tp_activation_per_bsz_dict"]
        layers.append(
            GalvatronLayer(
                count=counts[i],
                hidden_size=widths[i],
                sequence_length=lengths[i],
                forward=_forward_line(times, rf"layertype_{i}", lengths[i], times_path),
                parameter_megabytes=float(entry["parameter_size"]),
                activations=_by_degree(activations),
                checkpoint=None if "checkpoint" not in activations else float(activations["checkpoint"]),
            )
        )

    def vocab(key: str) -> VocabMemory:
        entry = _at_sequence(memory, f"other_memory_{key}{suffix}", lengths, memory_path)
        return VocabMemory(_by_degree(entry["model_states"]), _by_degree(entry["activation"]))

    nodes = f"{num_devices // per_node}nodes_{per_node}gpus_per_node"
    bandwidth = read_json(hardware / f"allreduce_bandwidth_{nodes}.json")
    latency = read_json(_latency_file(hardware, nodes))
    profile = GalvatronProfile(
        num_devices=num_devices,
        layers=tuple(layers),
        vocab_forward=_forward_line(times, r"layertype_other(?:_\d+)?", lengths[0], times_path),
        vocab_single=vocab("pp_off"),
        vocab_first=vocab("pp_on_first"),
        vocab_last=vocab("pp_on_last"),
        all_reduce=_all_reduce_costs(bandwidth, num_devices),
        p2p={
            int(key.rsplit("_", 1)[1]): 1.0 / value
            for key, value in read_json(hardware / f"p2p_bandwidth_{nodes}.json").items()
        },
        overlap=float(read_json(hardware / "overlap_coefficient.json")["overlap_coe"]),
        all_reduce_latency=_latency_tables(latency, "allreduce"),
        all_to_all_latency=_latency_tables(latency, "all2all"),
        mixed_precision="_fp32_" not in memory_path.name,
        sequence_parallel=sequence_parallel,
        name=name,
    )
    return profile, _as_cluster(profile, per_node)


# ---- pieces of the profiles ---------------------------------------------------------------------------------------


def _only_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{folder}: no file {pattern}.")
    # Of several granularities, the one of whole layers.
    return next((path for path in found if path.stem.endswith("_all")), found[0])


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        ValueError: If it does not.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected an object, got {type(data).__name__}.")
    return data


def _per_type(name: str, value: int | Sequence[int] | None, num_types: int) -> list[int] | None:
    if value is None:
        return None
    values = [value] * num_types if isinstance(value, int) else list(value)
    if len(values) != num_types:
        raise ValueError(f"{name}={value!r}: expected one number per layer type, {num_types}.")
    return values


def _any_sequence(memory: Mapping[str, Any], key: str, path: Path) -> int:
    """The longest single sequence length an entry was measured at."""
    lengths = [int(text) for text in memory.get(key, {}) if str(text).isdigit()]
    if not lengths:
        raise ValueError(f"{path}: entry {key!r} has no sequence length, give sequence_length.")
    return max(lengths)


def _known_layers(folder: Path, name: str, num_types: int) -> list[int]:
    plans = sorted(folder.glob("galvatron_config_*.json"))
    if num_types == 1 and plans:
        return [len(str(read_json(plans[0])["tp_sizes_enc"]).split(","))]
    if num_types == 1 and name in _KNOWN_SIZES:
        return [_KNOWN_SIZES[name][0]]
    raise ValueError(f"num_layers: model {name!r} is not known, give the number of layers of its {num_types} type(s).")


def _known_width(name: str, num_types: int) -> list[int]:
    match = re.search(r"hidden(\d+)", name)
    if match:
        return [int(match.group(1))] * num_types
    if name in _KNOWN_SIZES:
        return [_KNOWN_SIZES[name][1]] * num_types
    raise ValueError(f"hidden_size: model {name!r} is not known, give the width of its {num_types} layer type(s).")


def _by_degree(table: Mapping[str, Any]) -> dict[int, float]:
    return {int(degree): float(size) for degree, size in table.items() if str(degree).isdigit()}


def _at_sequence(memory: Mapping[str, Any], key: str, lengths: Iterable[int], path: Path) -> Mapping[str, Any]:
    """An entry's value at the given sequence lengths, in any spelling of the key."""
    wanted = list(lengths)
    for text, value in memory.get(key, {}).items():
        if [int(number) for number in re.findall(r"\d+", str(text))] in (wanted, wanted[:1]):
            if not isinstance(value, Mapping):
                break
            return value
    raise ValueError(f"{path}: entry {key!r} has no sequence length {wanted}.")


def _forward_line(times: Mapping[str, float], prefix: str, length: int, path: Path) -> tuple[float, float]:
    """Slope and intercept of forward milliseconds over samples.

    With eight batch sizes or more a least-squares line; otherwise a line through zero, from the largest batch size. If
    only other sequence lengths were measured, a quadratic fit (linear for embedding and head) over them at batch size
    1.
    """
    pattern = re.compile(prefix + r"(?:_bsz(\d+))?(?:_seq\[?(\d+)[\d,]*\]?)?")
    points: dict[int, dict[int, float]] = {}
    for key, value in _derived_times(times).items():
        match = pattern.fullmatch(key)
        if match:
            points.setdefault(int(match.group(2) or length), {})[int(match.group(1) or 1)] = float(value)
    here = points.get(length, {})
    if len(here) >= _FIT_SAMPLES:
        slope, intercept = np.polyfit(list(here), [size * value for size, value in here.items()], 1)
        return float(slope), float(intercept)
    if here:
        return here[max(here)], 0.0
    single = {seq: batches[1] for seq, batches in points.items() if 1 in batches}
    degree = 1 if "other" in prefix else 2
    if len(single) > degree:
        return float(np.polyval(np.polyfit(list(single), list(single.values()), degree), length)), 0.0
    raise ValueError(f"{path}: no forward time '{prefix}' at sequence length {length}.")


def _derived_times(times: Mapping[str, float]) -> dict[str, float]:
    """The per-layer times of a file; computed from the raw whole-model times where the file has only those."""
    derived = {key: value for key, value in times.items() if key.startswith("layertype")}
    raw: dict[tuple[int, int], dict[int, float]] = {}
    for key, value in times.items():
        match = re.fullmatch(r"layernum\[?(\d+)\]?_bsz(\d+)_seq(\d+)", key)
        if match:
            count, batch, length = map(int, match.groups())
            raw.setdefault((batch, length), {})[count] = value
    for (batch, length), totals in raw.items():
        few, many = min(totals), max(totals)
        if few < many:
            layer = (totals[many] - totals[few]) / batch / (many - few)
            derived.setdefault(f"layertype_0_bsz{batch}_seq{length}", layer)
            other = max(totals[few] / batch - layer * few, 0.0)
            derived.setdefault(f"layertype_other_bsz{batch}_seq{length}", other)
    return derived


def _all_reduce_costs(bandwidth: Mapping[str, float], num_devices: int) -> dict[tuple[int, bool], float]:
    """ms per MB by group size and neighborhood; the whole world was measured in one arrangement only."""
    costs = {(1, True): 0.0, (1, False): 0.0}
    for key, value in bandwidth.items():
        match = re.fullmatch(r"allreduce_size_(\d+)_consec_([01])", key)
        if match:
            costs[int(match.group(1)), match.group(2) == "1"] = 1.0 / value
    if num_devices > 1:
        costs.setdefault((num_devices, False), costs[num_devices, True])
    return costs


def _latency_file(folder: Path, nodes: str) -> Path:
    """The latency file of this cluster, or of another one: groups inside a node are the same there."""
    exact = folder / f"sp_time_{nodes}.json"
    return exact if exact.exists() else _only_file(folder, "sp_time_*.json")


def _latency_tables(latency: Mapping[str, float], op: str) -> dict[int, LatencyTable]:
    tables: dict[int, dict[float, float]] = {}
    for key, value in latency.items():
        match = re.fullmatch(rf"{op}_size_(\d+)_(\d+)MB_time", key)
        if match:
            tables.setdefault(int(match.group(1)), {})[float(match.group(2))] = float(value)
    return {size: LatencyTable(points) for size, points in tables.items()}


def _as_cluster(profile: GalvatronProfile, devices_per_node: int) -> ClusterSpec:
    """The same hardware in this package's form. A gather or a scatter takes half of an all-reduce."""

    def points(table: LatencyTable, share: float) -> tuple[tuple[int, float], ...]:
        return tuple((int(size * MEGABYTE), share * ms / 1e3) for size, ms in sorted(table.points.items()))

    costs: list[CollectiveCost] = []
    shares: tuple[tuple[Collective, float], ...] = (("all_reduce", 1.0), ("all_gather", 0.5), ("reduce_scatter", 0.5))
    for size, table in profile.all_reduce_latency.items():
        costs += [CollectiveCost(op, size, True, points(table, share)) for op, share in shares]
    for size, table in profile.all_to_all_latency.items():
        costs.append(CollectiveCost("all_to_all", size, True, points(table, 1.0)))
    if profile.p2p:
        per_byte = profile.p2p[min(profile.p2p)] / MEGABYTE / 1e3
        costs.append(CollectiveCost("p2p", 2, False, ((0, 0.0), (MEGABYTE, MEGABYTE * per_byte))))
    return ClusterSpec(profile.num_devices, devices_per_node, tuple(costs), overlap_slowdown=profile.overlap)
