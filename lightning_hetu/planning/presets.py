"""Clusters described by their name: ``cluster_preset("2x8xH100-80GB")`` is a :class:`ClusterSpec` without any device.

The figures of a :class:`DevicePreset` are those of the vendor's data sheets, dense (without sparsity) and in powers of
1000. What a program reaches of them is in the constants below and in the two fractions of a preset: each says where it
is from. Measure a cluster that you have; these descriptions are for one that you do not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from lightning_hetu.planning.cluster import ClusterSpec
from lightning_hetu.planning.topology import Link, Topology

LinkKind = Literal["nvlink", "pcie"]
Arithmetic = Literal["half", "tf32", "float32"]

NVLINK_FRACTION = 0.82
"""Share of the NVLink bandwidth that collectives reach: 370 of 450 GB/s on 8 H100 with NCCL's rings
(github.com/NVIDIA/nccl-tests/issues/212, answer of an NCCL developer). All-reduces in the switches (NVLink SHARP) are
faster still, and are left out."""

PCIE_FRACTION = 0.76
"""Share of the PCIe bandwidth: NCCL reckons with 12.0 of the 15.75 GB/s of PCIe 3.0 x16 (``PCI_BW`` in
src/graph/topo.h). Hosts whose processors cannot carry all devices at once reach less."""

NETWORK_FRACTION = 0.92
"""Share of a network adapter's line rate: 46 of 50 GB/s of a 400 Gb/s adapter
(github.com/NVIDIA/nccl-tests/issues/290, answer of an NCCL developer: 46 to 48 GB/s)."""

NVLINK_LATENCY = 3.4e-6
"""Seconds per hop of a ring inside a node over NVLink: what NCCL's own model has for its protocol for large messages
(``hwLat``, ring, Simple, in src/graph/tuning.cc of NCCL 2.2x)."""

PCIE_LATENCY = 5.7e-6
"""The same over PCIe."""

NETWORK_LATENCY = 14e-6
"""The same over the network."""

MEMORY_FRACTION = 0.9
"""Share of the memory bandwidth that kernels which only move data reach, for buffers of 100 MB and more: what the
Calculon simulator has for A100 (github.com/calculon-ai/calculon, systems/a100_80g.json). Assumed for the others."""

SUSTAINED_FRACTION = 0.85
"""Rate of the large matrix products of a model, over a whole step, to that of the best shape in a short run, which
``matmul_fraction`` is measured with: other shapes fill the device less well, and the power limit lowers the clock.
Assumed."""

KERNEL_SECONDS = 4e-6
"""Seconds that every kernel takes beyond its work: launch, first wave and last wave. Assumed."""

_MATMUL_SOURCE = (
    "bf16, best shape: github.com/stas00/ml-engineering, compute/accelerator, Maximum Achievable Matmul FLOPS table"
)
_AS_H100 = "assumed: as H100"
_A100_SHEET = "NVIDIA A100 data sheet nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf, column SXM"
_DGX_SHEET = "docs.nvidia.com, DGX BasePOD reference architecture: 8 ConnectX-7 of 400 Gb/s per system"


@dataclass(frozen=True)
class DevicePreset:
    """One kind of device, and the nodes it usually comes in.

    Args:
        name: Name, for example ``"H100-80GB"``.
        memory: Bytes of memory as the data sheet counts them, 10**9 to the GB.
        half_flops: Dense peak of bf16 or fp16 matrix products that add up in fp32, in operations per second.
        tf32_flops: That of TF32 matrix products; ``float32_flops`` where the device has none.
        float32_flops: That of fp32 outside the matrix units.
        memory_bandwidth: Bytes per second of the device memory.
        link: What connects the devices of a node.
        link_bandwidth: Bytes per second of it per device and direction: half of what data sheets add up.
        network_bandwidth: Bytes per second and direction of one network adapter.
        nics_per_node: Network adapters of a full node.
        devices_per_node: Devices of a full node.
        matmul_fraction: Share of the peak that the best shape of matrix product reaches.
        attention_fraction: Share of the peak that fused attention reaches.
        sources: Where the figures are from, by name of the field.
    """

    name: str
    memory: int
    half_flops: float
    tf32_flops: float
    float32_flops: float
    memory_bandwidth: float
    link: LinkKind
    link_bandwidth: float
    network_bandwidth: float
    nics_per_node: int = 8
    devices_per_node: int = 8
    matmul_fraction: float = 0.8
    attention_fraction: float = 0.5
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        rates = ("memory", "half_flops", "tf32_flops", "float32_flops", "memory_bandwidth", "link_bandwidth")
        for name in (*rates, "network_bandwidth", "nics_per_node", "devices_per_node"):
            if not getattr(self, name) > 0:
                raise ValueError(f"DevicePreset {self.name!r}: {name}={getattr(self, name)!r}, expected more than 0.")
        for name in ("matmul_fraction", "attention_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"DevicePreset {self.name!r}: {name}={getattr(self, name)!r}, expected more than 0 and at most 1."
                )
        if self.link not in get_args(LinkKind):
            raise ValueError(
                f"DevicePreset {self.name!r}: link={self.link!r}, expected one of {', '.join(get_args(LinkKind))}."
            )

    def peak_flops(self, arithmetic: Arithmetic) -> float:
        """Dense peak of the data sheet, in operations per second."""
        return {"half": self.half_flops, "tf32": self.tf32_flops, "float32": self.float32_flops}[arithmetic]

    def matmul_flops(self, arithmetic: Arithmetic) -> float:
        """Operations per second that large matrix products reach."""
        return self.peak_flops(arithmetic) * self.matmul_fraction * SUSTAINED_FRACTION

    def attention_flops(self, arithmetic: Arithmetic) -> float:
        """Operations per second that fused attention reaches."""
        return self.peak_flops(arithmetic) * self.attention_fraction

    @property
    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written together, that kernels which only move data reach."""
        return self.memory_bandwidth * MEMORY_FRACTION

    def cluster(
        self,
        nodes: int = 1,
        devices_per_node: int | None = None,
        *,
        inter_node_gbit: float | None = None,
        nics_per_node: int | None = None,
    ) -> ClusterSpec:
        """A cluster of these devices.

        Args:
            nodes: Number of nodes, a power of two.
            devices_per_node: Devices of each, a power of two; by default a full node.
            inter_node_gbit: Line rate of one network adapter in 10**9 bits per second, if not the usual one.
            nics_per_node: Network adapters of a node; by default the usual share of a full node's, at least one.

        Raises:
            ValueError: If a number is out of range.
        """
        devices = self.devices_per_node if devices_per_node is None else devices_per_node
        for name, value in (("nodes", nodes), ("devices_per_node", devices)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name}={value!r}: expected a power of two (1, 2, 4, ...).")
        if devices > self.devices_per_node:
            raise ValueError(f"devices_per_node={devices}: a node has at most {self.devices_per_node} {self.name}.")
        if inter_node_gbit is not None and not inter_node_gbit > 0:
            raise ValueError(f"inter_node_gbit={inter_node_gbit!r}: expected a positive number.")
        network = self.network_bandwidth if inter_node_gbit is None else inter_node_gbit * 1e9 / 8
        fraction, latency = {
            "nvlink": (NVLINK_FRACTION, NVLINK_LATENCY),
            "pcie": (PCIE_FRACTION, PCIE_LATENCY),
        }[self.link]
        if nics_per_node is None:
            nics_per_node = max(1, self.nics_per_node * devices // self.devices_per_node)
        return ClusterSpec(
            num_devices=nodes * devices,
            devices_per_node=devices,
            device_memory=self.memory,
            device=self.name,
            topology=Topology(
                devices_per_node=devices,
                intra_node=Link(self.link_bandwidth * fraction, latency),
                inter_node=Link(network * NETWORK_FRACTION, NETWORK_LATENCY),
                nics_per_node=nics_per_node,
            ),
        )


_PRESETS = (
    DevicePreset(
        name="A100-40GB",
        memory=40 * 10**9,
        half_flops=312e12,
        tf32_flops=156e12,
        float32_flops=19.5e12,
        memory_bandwidth=1.555e12,
        link="nvlink",
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        matmul_fraction=0.869,
        attention_fraction=0.6,
        sources={
            "memory": _A100_SHEET,
            "half_flops": _A100_SHEET,
            "tf32_flops": _A100_SHEET,
            "float32_flops": _A100_SHEET,
            "memory_bandwidth": "NVIDIA A100 data sheet of 2020 (40GB): 1,555 GB/s",
            "link_bandwidth": _A100_SHEET + ": NVLink 600 GB/s both directions together",
            "network_bandwidth": "NVIDIA DGX A100 data sheet: 8 ConnectX-6 of 200 Gb/s",
            "matmul_fraction": _MATMUL_SOURCE + ": 271.2 of 312 TFLOP/s",
            "attention_fraction": "FlashAttention-2, arXiv 2307.08691, abstract: 50 to 73 percent",
        },
    ),
    DevicePreset(
        name="A100-80GB",
        memory=80 * 10**9,
        half_flops=312e12,
        tf32_flops=156e12,
        float32_flops=19.5e12,
        memory_bandwidth=2.039e12,
        link="nvlink",
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        matmul_fraction=0.869,
        attention_fraction=0.6,
        sources={
            "memory": _A100_SHEET,
            "half_flops": _A100_SHEET,
            "tf32_flops": _A100_SHEET,
            "float32_flops": _A100_SHEET,
            "memory_bandwidth": _A100_SHEET + ": 2,039 GB/s",
            "link_bandwidth": _A100_SHEET + ": NVLink 600 GB/s both directions together",
            "network_bandwidth": "NVIDIA DGX A100 data sheet: 8 ConnectX-6 of 200 Gb/s",
            "matmul_fraction": _MATMUL_SOURCE + ": 271.2 of 312 TFLOP/s",
            "attention_fraction": "FlashAttention-2, arXiv 2307.08691, abstract: 50 to 73 percent",
        },
    ),
    DevicePreset(
        name="H100-80GB",
        memory=80 * 10**9,
        half_flops=989.4e12,
        tf32_flops=494.7e12,
        float32_flops=66.9e12,
        memory_bandwidth=3.35e12,
        link="nvlink",
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        matmul_fraction=0.803,
        attention_fraction=0.35,
        sources={
            "memory": "www.nvidia.com/en-us/data-center/h100, column H100 SXM",
            "half_flops": "the same: 1,979 with sparsity, half of it dense; 989.4 in the H100 architecture white paper",
            "tf32_flops": "the same: 989 with sparsity",
            "float32_flops": "the same: 67; 66.9 in the white paper",
            "memory_bandwidth": "the same: 3.35 TB/s",
            "link_bandwidth": "the same: NVLink 900 GB/s both directions together",
            "network_bandwidth": _DGX_SHEET,
            "matmul_fraction": _MATMUL_SOURCE + ": 794.5 of 989 TFLOP/s",
            "attention_fraction": "FlashAttention-3, arXiv 2407.08608, abstract: 35 percent with FlashAttention-2,"
            " which torch has",
        },
    ),
    DevicePreset(
        name="H200-141GB",
        memory=141 * 10**9,
        half_flops=989.4e12,
        tf32_flops=494.7e12,
        float32_flops=66.9e12,
        memory_bandwidth=4.8e12,
        link="nvlink",
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        matmul_fraction=0.803,
        attention_fraction=0.35,
        sources={
            "memory": "www.nvidia.com/en-us/data-center/h200, column H200 SXM",
            "half_flops": "the same: as H100 SXM",
            "tf32_flops": "the same: as H100 SXM",
            "float32_flops": "the same: as H100 SXM",
            "memory_bandwidth": "the same: 4.8 TB/s",
            "link_bandwidth": "the same: NVLink 900 GB/s both directions together",
            "network_bandwidth": _DGX_SHEET,
            "matmul_fraction": _MATMUL_SOURCE + ": as H100",
            "attention_fraction": "as H100",
        },
    ),
    DevicePreset(
        name="B200-180GB",
        memory=180 * 10**9,
        half_flops=2250e12,
        tf32_flops=1125e12,
        float32_flops=75e12,
        memory_bandwidth=8e12,
        link="nvlink",
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        matmul_fraction=0.776,
        attention_fraction=0.35,
        sources={
            "memory": "docs.nvidia.com, DGX B200 user guide: 1,440 GB of 8 devices (the chip alone is sold as 192 GB)",
            "half_flops": "www.nvidia.com/en-us/data-center/hgx, HGX B200: 36 PFLOP/s of 8 with sparsity",
            "tf32_flops": "the same: 18 PFLOP/s of 8 with sparsity",
            "float32_flops": "the same: 600 TFLOP/s of 8",
            "memory_bandwidth": "NVIDIA DGX B200 data sheet: 64 TB/s of 8 devices",
            "link_bandwidth": "docs.nvidia.com, DGX B200 user guide: NVLink 14.4 TB/s of 8, both directions together",
            "network_bandwidth": _DGX_SHEET,
            "matmul_fraction": _MATMUL_SOURCE + ": 1745 of 2250 TFLOP/s",
            "attention_fraction": _AS_H100,
        },
    ),
    DevicePreset(
        name="RTX4090-24GB",
        memory=24 * 10**9,
        half_flops=165.2e12,
        tf32_flops=82.6e12,
        float32_flops=82.6e12,
        memory_bandwidth=1.008e12,
        link="pcie",
        link_bandwidth=31.5e9,
        network_bandwidth=12.5e9,
        nics_per_node=1,
        sources={
            "memory": "NVIDIA Ada GPU architecture white paper, appendix A",
            "half_flops": "the same: 165.2 with FP32 accumulation, 330.3 with FP16",
            "tf32_flops": "the same",
            "float32_flops": "the same",
            "memory_bandwidth": "the same",
            "link_bandwidth": "PCIe 4.0 x16: 16 lanes of 16 GT/s in 128b/130b code",
            "network_bandwidth": "assumed: one adapter of 100 Gb/s per node",
            "matmul_fraction": _AS_H100,
            "attention_fraction": "assumed",
        },
    ),
    DevicePreset(
        name="TITAN-RTX-24GB",
        memory=24 * 10**9,
        half_flops=130e12,
        tf32_flops=16.3e12,
        float32_flops=16.3e12,
        memory_bandwidth=672e9,
        link="pcie",
        link_bandwidth=15.75e9,
        network_bandwidth=12.5e9,
        nics_per_node=1,
        attention_fraction=0.3,
        sources={
            "memory": "www.nvidia.com/en-us/deep-learning-ai/products/titan-rtx",
            "half_flops": "the same: 130 TFLOP/s, of fp16 (this generation has no bf16 units)",
            "tf32_flops": "this generation has no TF32: as fp32",
            "float32_flops": "NVIDIA Turing architecture: 4608 cores at 1.77 GHz",
            "memory_bandwidth": "the same page: 672 GB/s",
            "link_bandwidth": "PCIe 3.0 x16: 16 lanes of 8 GT/s in 128b/130b code; bridges between pairs are left out",
            "network_bandwidth": "assumed: one adapter of 100 Gb/s per node",
            "matmul_fraction": _AS_H100,
            "attention_fraction": "assumed: FlashAttention-2 does not run on this generation",
        },
    ),
)

DEVICE_PRESETS: Mapping[str, DevicePreset] = MappingProxyType({preset.name: preset for preset in _PRESETS})
"""All known devices by name."""

_CLUSTER = re.compile(r"(?:(?P<nodes>\d+)x)?(?P<devices>\d+)x(?P<name>\S+)", re.IGNORECASE)


def device_preset(name: str | DevicePreset) -> DevicePreset:
    """The device of a name, in any case.

    Raises:
        ValueError: If it is not known.
    """
    if isinstance(name, DevicePreset):
        return name
    for known, preset in DEVICE_PRESETS.items():
        if str(name).strip().upper() == known.upper():
            return preset
    raise ValueError(f"device={name!r}: expected one of {', '.join(DEVICE_PRESETS)}.")


def cluster_preset(text: str, *, inter_node_gbit: float | None = None, nics_per_node: int | None = None) -> ClusterSpec:
    """A described cluster.

    Args:
        text: ``[NODESx]DEVICESxNAME``, in any case. ``"2x8xH100-80GB"`` are two nodes of eight. Without ``NODES``, up
            to a full node is one node, and more devices fill full ones: ``"128xA100-80GB"`` are 16 nodes of eight.
        inter_node_gbit: Line rate of one network adapter in 10**9 bits per second, if not the usual one.
        nics_per_node: Network adapters that the devices of a node share, if not the usual number.

    Raises:
        ValueError: If the text cannot be read, or a number is not a power of two.
    """
    match = _CLUSTER.fullmatch(str(text).strip())
    known = {name.upper() for name in DEVICE_PRESETS}
    if match is None or match["name"].upper() not in known:
        raise ValueError(
            f"cluster={text!r}: expected [NODESx]DEVICESxNAME such as '2x8xH100-80GB', where NAME is one of"
            f" {', '.join(DEVICE_PRESETS)}."
        )
    preset = device_preset(match["name"])
    devices = int(match["devices"])
    nodes = int(match["nodes"]) if match["nodes"] else max(1, -(-devices // preset.devices_per_node))
    per_node = devices if match["nodes"] or nodes == 1 else preset.devices_per_node
    try:
        if per_node * nodes != (nodes * devices if match["nodes"] else devices):
            raise ValueError(f"{devices} devices: expected a power of two (1, 2, 4, ...).")
        return preset.cluster(nodes, per_node, inter_node_gbit=inter_node_gbit, nics_per_node=nics_per_node)
    except ValueError as error:
        raise ValueError(f"cluster={text!r}: {error}") from error
