"""Clusters described by name: what the text means, and that the figures fit together."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from lightning_hetu.planning import ClusterSpec, LayerProfile, ModelProfile, search
from lightning_hetu.planning.presets import (
    DEVICE_PRESETS,
    NETWORK_FRACTION,
    NVLINK_FRACTION,
    SUSTAINED_FRACTION,
    DevicePreset,
    cluster_preset,
    device_preset,
)


@pytest.mark.parametrize(
    ("text", "devices", "per_node", "name"),
    [
        ("2x8xH100-80GB", 16, 8, "H100-80GB"),
        ("8xH100-80GB", 8, 8, "H100-80GB"),
        ("128xA100-80GB", 128, 8, "A100-80GB"),
        ("16xA100-40GB", 16, 8, "A100-40GB"),
        ("4xH200-141GB", 4, 4, "H200-141GB"),
        ("1xb200-180gb", 1, 1, "B200-180GB"),
        (" 4X2Xrtx4090-24gb ", 8, 2, "RTX4090-24GB"),
        ("2x8xTITAN-RTX-24GB", 16, 8, "TITAN-RTX-24GB"),
    ],
)
def test_text(text: str, devices: int, per_node: int, name: str) -> None:
    spec = cluster_preset(text)
    assert (spec.num_devices, spec.devices_per_node, spec.device) == (devices, per_node, name)
    assert spec.device_memory == DEVICE_PRESETS[name].memory == int(name.rsplit("-", 1)[1][:-2]) * 10**9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xH100", r"expected \[NODESx\]DEVICESxNAME such as '2x8xH100-80GB', where NAME is one of A100-40GB, .*RTX"),
        ("H100-80GB", "such as '2x8xH100-80GB'"),
        ("2x2x8xH100-80GB", "such as '2x8xH100-80GB'"),
        ("", "cluster='': expected"),
        ("3x8xH100-80GB", "cluster='3x8xH100-80GB': nodes=3: expected a power of two"),
        ("6xH100-80GB", "devices_per_node=6: expected a power of two"),
        ("24xH100-80GB", "nodes=3: expected a power of two"),
        ("20xH100-80GB", "20 devices: expected a power of two"),
        ("0x8xH100-80GB", "nodes=0"),
        ("2x16xH100-80GB", "devices_per_node=16: a node has at most 8 H100-80GB"),
    ],
)
def test_errors_in_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        cluster_preset(text)
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="inter_node_gbit=0"):
        cluster_preset("8xH100-80GB", inter_node_gbit=0)
    with pytest.raises(ValueError, match="nics_per_node=16"):
        cluster_preset("8xH100-80GB", nics_per_node=16)
    with pytest.raises(ValueError, match="device='H900': expected one of A100-40GB, "):
        device_preset("H900")
    good = DEVICE_PRESETS["H100-80GB"]
    for change, message in (
        ({"half_flops": 0}, "half_flops=0"),
        ({"matmul_fraction": 1.5}, "matmul_fraction=1.5"),
        ({"link": "wire"}, "link='wire', expected one of nvlink, pcie"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(good, **change)  # type: ignore[arg-type]


def test_network() -> None:
    """Line rates are in bits, and half a node has half of the adapters unless told otherwise."""
    usual = cluster_preset("2x8xH100-80GB").topology
    slow = cluster_preset("2x8xH100-80GB", inter_node_gbit=100, nics_per_node=1).topology
    half = cluster_preset("2x4xH100-80GB").topology
    lone = cluster_preset("2x2xTITAN-RTX-24GB").topology
    assert usual is not None and slow is not None and half is not None and lone is not None
    assert usual.inter_node.bytes_per_second == pytest.approx(50e9 * NETWORK_FRACTION) and usual.nics_per_node == 8
    assert slow.inter_node.bytes_per_second == pytest.approx(12.5e9 * NETWORK_FRACTION) and slow.nics_per_node == 1
    assert half.nics_per_node == 4 and lone.nics_per_node == 1
    assert usual.intra_node.bytes_per_second == pytest.approx(450e9 * NVLINK_FRACTION)


def test_all_reduce_of_eight_h100_has_the_measured_bus_bandwidth() -> None:
    """NCCL's rings reach 370 GB/s on large messages (nccl-tests issue 212)."""
    seconds = cluster_preset("8xH100-80GB").seconds("all_reduce", 8, 8 << 30)
    assert 2 * 7 / 8 * (8 << 30) / seconds == pytest.approx(370e9, rel=0.02)


@pytest.mark.parametrize("preset", DEVICE_PRESETS.values(), ids=lambda preset: preset.name)
def test_figures_are_plausible_and_sourced(preset: DevicePreset) -> None:
    """No figure is off by a unit, and each says where it is from."""
    assert 100e12 < preset.half_flops < 3e15 and preset.half_flops >= preset.tf32_flops >= preset.float32_flops
    assert 0.5e12 < preset.memory_bandwidth < 10e12 and 10e9 < preset.link_bandwidth < 1e12
    assert 10e9 < preset.network_bandwidth < 100e9
    given = {field.name for field in fields(preset)} - {"name", "link", "nics_per_node", "devices_per_node", "sources"}
    assert set(preset.sources) == given and all(preset.sources.values())
    assert preset.matmul_flops("half") == pytest.approx(preset.half_flops * preset.matmul_fraction * SUSTAINED_FRACTION)
    assert preset.attention_flops("half") < preset.matmul_flops("half")
    assert device_preset(preset.name.lower()) is device_preset(preset) is preset


def test_files() -> None:
    for text in ("2x8xH100-80GB", "8xTITAN-RTX-24GB"):
        spec = cluster_preset(text)
        assert ClusterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_slow_networks_put_the_border_of_two_stages_between_the_nodes() -> None:
    """Activations cross a slow network instead of parameters (takeaway 1 of Galvatron); a fast one carries both."""
    block = LayerProfile(
        "block",
        parameter_bytes=3 * 10**9,
        tp_parameter_bytes=3 * 10**9,
        forward_time=((1, 0.012),),
        activation_bytes={1: 2e9, 2: 1e9, 4: 0.5e9, 8: 0.25e9, 16: 0.125e9},
        boundary_bytes=64e6,
        tp_degrees=(1, 2, 4, 8, 16),
    )
    end = LayerProfile("end", 10**9, forward_time=((1, 0.001),), boundary_bytes=64e6)
    profile = ModelProfile((block,), (0,) * 16, end, end, precision="bf16-mixed")
    plans = []
    for gbit in (400, 25):
        spec = cluster_preset("2x8xH100-80GB", inter_node_gbit=gbit)
        plans.append(search(profile, spec, memory_budget="70GB", global_batch_size=16))
    fast, slow = plans
    assert fast.prediction is not None and slow.prediction is not None
    assert fast.stages == (16,) and len(slow.stages) == 2
    assert fast.prediction.iteration_time < slow.prediction.iteration_time
