"""Profiles of described devices: what the roofline counts, and that attention never has a score matrix."""

from __future__ import annotations

import copy
import resource
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_hetu.models.gpt_module import GPTLightningModule
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin
from lightning_hetu.parallel.structure import find_structure
from lightning_hetu.planning.presets import KERNEL_SECONDS, device_preset
from lightning_hetu.planning.profile import ModelProfile
from lightning_hetu.profiling import estimate_model
from lightning_hetu.profiling._roofline import FusedKernels, Roofline

H100 = device_preset("H100-80GB")
MIB = 2**20


def gpt(**options: int) -> GPTLightningModule:
    sizes = {"vocab_size": 512, "max_seq_len": 512, "num_layers": 1, "num_heads": 4, "dim": 256}
    with torch.device("meta"):
        return GPTLightningModule(**{**sizes, **options})


def estimated(module: GPTLightningModule, samples: int = 1, **options: object) -> ModelProfile:
    tokens = torch.empty(samples, module.model.config.max_seq_len, dtype=torch.int64, device="meta")
    settings = {"device": "H100-80GB", "precision": "bf16-mixed", **options}
    return estimate_model(module, find_structure(module), tokens, tokens, **settings)  # type: ignore[arg-type]


def test_operations_cost_their_arithmetic_or_their_traffic() -> None:
    """Hand-computed: a large product, a small one, elementwise, a lookup; views and empty tensors are free."""
    half, single = H100.matmul_flops("half"), H100.matmul_flops("float32")
    with FakeTensorMode():

        def seconds(run: object) -> float:
            with Roofline(H100) as roofline:
                run()  # type: ignore[operator]
            return roofline.seconds

        wide, narrow = torch.empty(4096, 4096, dtype=torch.bfloat16), torch.empty(4096, 1, dtype=torch.bfloat16)
        table, indices = torch.empty(10**6, 64), torch.zeros(32, dtype=torch.int64)
        assert seconds(lambda: wide @ wide) == pytest.approx(2 * 4096**3 / half + KERNEL_SECONDS)
        whole = wide.float()
        assert seconds(lambda: whole @ whole) == pytest.approx(2 * 4096**3 / single + KERNEL_SECONDS)
        moved = (4096**2 + 2 * 4096) * 2
        assert seconds(lambda: wide @ narrow) == pytest.approx(moved / H100.copy_bandwidth + KERNEL_SECONDS)
        assert seconds(lambda: wide + wide) == pytest.approx(2 * 2 * 4096**2 / H100.copy_bandwidth + KERNEL_SECONDS)
        assert seconds(lambda: F.embedding(indices, table)) == pytest.approx(
            (2 * 32 * 64 * 4 + 32 * 8) / H100.copy_bandwidth + KERNEL_SECONDS
        )
        assert seconds(lambda: wide.t()[:, :8].expand(4096, 8).view(-1, 8)) == 0
        assert seconds(lambda: torch.empty_like(wide)) == 0


def test_float32_products_follow_the_setting_of_torch() -> None:
    """TF32 units count when torch is told to use them."""
    before = torch.get_float32_matmul_precision()
    times = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            times.append(sequence_profile(nn.Linear(2048, 2048), 8192, 2048).layer_types[0].forward_seconds(1))
    finally:
        torch.set_float32_matmul_precision(before)
    rates = [H100.matmul_flops("float32"), H100.matmul_flops("tf32")]
    assert times == pytest.approx([2 * 8192 * 2048**2 / rate + KERNEL_SECONDS for rate in rates])


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.1}, {"masked": True}, {"grouped": True}, {"value_dim": 32}])
def test_attention_costs_its_products_whatever_its_options(options: dict[str, object]) -> None:
    """Two products forward and five backward over the pairs that are computed, at the rate of fused attention."""
    causal = "masked" not in options
    heads, rows, dim, value_dim = 8, 4096, 64, int(str(options.get("value_dim", 64)))
    key_heads = 2 if "grouped" in options else heads
    arguments = {"is_causal": causal, "dropout_p": options.get("dropout_p", 0.0), "enable_gqa": key_heads < heads}
    with FakeTensorMode():
        roofline = Roofline(H100)
        query = torch.empty(2, heads, rows, dim, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(2, key_heads, rows, dim, dtype=torch.bfloat16, requires_grad=True)
        value = torch.empty(2, key_heads, rows, value_dim, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.empty(rows, rows, dtype=torch.bfloat16) if "masked" in options else None
        with FusedKernels(roofline):
            output = F.scaled_dot_product_attention(query, key, value, mask, **arguments)  # type: ignore[arg-type]
            forward = roofline.seconds
            output.sum().backward()
    assert output.shape == (2, heads, rows, value_dim) and output.transpose(1, 2).is_contiguous()
    assert [x.grad.shape for x in (query, key, value) if x.grad is not None] == [query.shape, key.shape, value.shape]
    pairs = 2 * heads * (rows * (rows + 1) // 2 if causal else rows**2)
    rate = H100.attention_flops("half")
    assert forward == pytest.approx(2 * pairs * (dim + value_dim) / rate + KERNEL_SECONDS)
    backward = roofline.seconds - forward
    assert backward == pytest.approx(2 * pairs * (3 * dim + 2 * value_dim) / rate + KERNEL_SECONDS)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        # Dropout would make torch write out the scores on a CPU.
        return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1).transpose(1, 2).flatten(2)


class Sequence(PipelineMixin, nn.Module):
    pipeline_embedding, pipeline_blocks, pipeline_head = "embedding", "blocks", "head"

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList([block])

    def pipeline_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)


def sequence_profile(block: nn.Module, rows: int, width: int = 64, **options: object) -> ModelProfile:
    with torch.device("meta"):
        module, inputs = Sequence(block, width), torch.empty(1, rows, 4)
    return estimate_model(module, find_structure(module), inputs, inputs, **{"device": H100, **options})  # type: ignore[arg-type]


def test_attention_has_no_score_matrix_in_memory() -> None:
    """What it keeps and needs grows with the sequence and not with its square; on a CPU the scores are there."""
    lengths, activation, scores = (1024, 4096), 64 * 4, 4 * 4
    for name, most in (("activation_bytes", 4), ("forward_transient", 3), ("backward_transient", 8)):
        small, large = (getattr(sequence_profile(Attention(), n).layer_types[0], name)[1] for n in lengths)
        assert large == pytest.approx(4 * small, rel=1e-3) and large <= most * lengths[1] * activation, name
    on_cpu = sequence_profile(Attention(), lengths[1], device="cpu", flops_per_second=1e12).layer_types[0]
    assert on_cpu.activation_bytes[1] > scores * lengths[1] ** 2


def test_rms_norm_is_one_kernel() -> None:
    """It keeps its input and one number per row, where the CPU keeps the scaled input as well."""
    rows, width = 1024, 64
    fused = sequence_profile(nn.RMSNorm(width), rows).layer_types[0]
    # The profiler's stand-ins for the layers around it are a few bytes.
    assert fused.activation_bytes[1] == pytest.approx(rows * (width + 1) * 4, abs=16)
    moved = 2 * rows * width * 4
    assert fused.forward_seconds(1) == pytest.approx(moved / H100.copy_bandwidth + KERNEL_SECONDS)
    on_cpu = sequence_profile(nn.RMSNorm(width), rows, device="cpu", flops_per_second=1.0).layer_types[0]
    assert on_cpu.activation_bytes[1] > 1.9 * fused.activation_bytes[1]


def test_dropout_is_one_kernel() -> None:
    """It keeps a byte per element, and none where it drops nothing."""
    elements = 1024 * 64
    fused = sequence_profile(nn.Dropout(0.1), 1024).layer_types[0]
    assert fused.activation_bytes[1] == pytest.approx(elements, abs=16)
    assert fused.forward_seconds(1) == pytest.approx(9 * elements / H100.copy_bandwidth + KERNEL_SECONDS)
    assert sequence_profile(nn.Dropout(0.0), 1024).layer_types[0].activation_bytes[1] < 16


def test_time_is_linear_in_large_batches() -> None:
    """Twice the samples take twice as long, once what is paid per microbatch is small."""
    block = estimated(gpt(max_seq_len=2048, dim=1024), 64).layer_types[0]
    assert block.forward_seconds(64) == pytest.approx(2 * block.forward_seconds(32), rel=0.02)
    assert block.forward_seconds(64) < 64 * block.forward_seconds(1)
    assert 1.8 < block.backward_ratio < 2.6


def test_faster_devices_are_faster() -> None:
    names = ("B200-180GB", "H100-80GB", "A100-80GB", "TITAN-RTX-24GB")
    times = [
        sequence_profile(nn.Linear(2048, 2048), 8192, 2048, device=name, precision="bf16-mixed")
        .layer_types[0]
        .forward_seconds(1)
        for name in names
    ]
    assert times == sorted(times) and times[-1] > 4 * times[0]
    # More bandwidth with the same arithmetic is faster where memory limits, and changes nothing that is kept.
    usual, quick = (
        sequence_profile(nn.GELU(), 8192, device=device).layer_types[0]
        for device in (H100, replace(H100, memory_bandwidth=1e15))
    )
    assert quick.forward_seconds(1) < usual.forward_seconds(1)
    assert quick.activation_bytes == usual.activation_bytes


def test_tensor_parallel_ranks_are_priced_with_their_own_shapes() -> None:
    """A part of the weights takes more than its share of the time, since norms and residuals do not shrink."""
    block = estimated(gpt(dim=1024, num_heads=8), 2, max_tp=4).layer_types[0]
    assert set(block.tp_forward_time) == {2, 4} and set(block.activation_bytes) == {1, 2, 4}
    whole = block.forward_seconds(2)
    assert whole / 2 < block.forward_seconds(2, 2) < whole and whole / 4 < block.forward_seconds(2, 4)


class Recomputed(nn.Module):
    """A block that recomputes itself, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_models_that_recompute_by_themselves() -> None:
    """What is computed again in backward is fused there, too, and is paid for."""
    plain, again = (sequence_profile(block, 4096).layer_types[0] for block in (Attention(), Recomputed()))
    assert again.activation_bytes[1] < 0.5 * plain.activation_bytes[1]
    assert again.forward_seconds(1) == pytest.approx(plain.forward_seconds(1))
    assert again.backward_ratio == pytest.approx(plain.backward_ratio + 1, rel=0.02)


def test_models_of_70_billion_parameters_need_no_memory() -> None:
    """The time and memory of its estimate, and a block that reaches what H100 reach in training, or a little more."""
    module = gpt(vocab_size=128256, max_seq_len=4096, num_layers=80, num_heads=64, dim=8192)
    assert sum(parameter.numel() for parameter in module.parameters()) > 65e9
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    profile = estimated(module)
    assert time.perf_counter() - begin < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB  # KiB: 1 GiB
    assert all(parameter.is_meta for parameter in module.parameters())
    block = profile.layer_types[0]
    seconds = block.forward_seconds(1) * (1 + block.backward_ratio)
    operations = 6 * 12 * 8192**2 * 4096 + 3 * 2 * 2 * (4096 * 4097 // 2) * 8192
    # Whole runs on many devices reach 0.38 to 0.47 (arXiv 2407.21783, section 3.3.2; Megatron-LM's README).
    assert 0.45 < operations / seconds / H100.half_flops < 0.7
    assert block.parameter_bytes == 4 * (12 * 8192**2 + 2 * 8192)
    scores = 64 * 4096**2 * 2
    weights = 2 * 12 * 8192**2  # autocast's copies, kept for backward
    assert block.activation_bytes[1] < weights + scores


def test_the_module_is_not_changed() -> None:
    module = gpt()
    before = copy.deepcopy(module.state_dict())
    estimated(module, max_tp=2)
    assert module.state_dict().keys() == before.keys()
    assert all(parameter.is_meta and parameter.grad is None for parameter in module.parameters())
    assert [p.shape for p in module.state_dict().values()] == [p.shape for p in before.values()]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"flops_per_second=1.0: leave it out, device='H100-80GB' has rates"):
        estimated(gpt(), flops_per_second=1.0)
    with pytest.raises(ValueError, match="device='cpu' without flops_per_second: give that, or one of A100-40GB"):
        estimated(gpt(), device="cpu")
    with pytest.raises(ValueError, match="device='H900': expected one of A100-40GB"):
        estimated(gpt(), device="H900")


def test_a_batch_that_is_no_power_of_two_is_estimated() -> None:
    """The batch itself is one of the sizes, also below the largest power of two that is tried."""
    model = GPTLightningModule(64, max_seq_len=16, num_layers=2, num_heads=2, dim=32)
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    profile = estimate_model(model, find_structure(model), tokens, tokens, device="H100-80GB")
    assert [samples for samples, _ in profile.block(0).forward_time] == [1, 2, 3, 4]
