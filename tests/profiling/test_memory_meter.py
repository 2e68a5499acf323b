"""The meter counts every byte that torch allocates, and knows when tensors from before are freed."""

from __future__ import annotations

import pytest
import torch

from lightning_hetu.profiling import MemoryMeter


def bytes_tensor(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def test_peak_is_exact() -> None:
    with MemoryMeter() as meter:
        kept = bytes_tensor(1_000)
        dropped = bytes_tensor(3_000)
        del dropped
        last = bytes_tensor(2_500)
        del last
    assert (meter.baseline, meter.peak, meter.kept, meter.total) == (0, 4_000, 1_000, 4_000)
    del kept


def test_nothing_allocated_is_nothing() -> None:
    with MemoryMeter() as meter:
        pass
    assert meter.peak <= 1 and meter.kept <= 1


def test_baseline_counts_storages_once_and_notices_their_release() -> None:
    old, stays = bytes_tensor(5_000), bytes_tensor(100)
    meter = MemoryMeter(tensors=[old, stays, stays[5:], old[::2]])
    with meter:
        first = bytes_tensor(1_000)
        del old
        second = bytes_tensor(7_000)
        del second
    assert meter.baseline == 5_100
    assert meter.peak == 1_000 - 5_000 + 7_000
    assert meter.total == 8_100
    assert meter.kept == 1_000 - 5_000
    del first


def test_autograd_is_seen() -> None:
    """Gradients and temporaries of C++ autograd: x is kept, exp saves its result, backward makes two more."""
    leaf = torch.ones(1_000, requires_grad=True)
    with MemoryMeter() as forward:
        loss = leaf.exp().sum()
    assert forward.kept == 4_000 + 4
    with MemoryMeter() as backward:
        loss.backward()
    assert backward.peak >= 4_000
    assert leaf.grad is not None


def test_what_is_left_from_one_measurement_does_not_enter_the_next() -> None:
    with MemoryMeter():
        left = bytes_tensor(9_000)
    with MemoryMeter(tensors=[left]) as meter:
        del left
        new = bytes_tensor(500)
    # The allocator knew of it, and so did the meter: it is freed once.
    assert (meter.peak, meter.kept, meter.baseline) == (1, 500 - 9_000, 9_000)
    del new
    later = bytes_tensor(9_000)
    with MemoryMeter() as meter:
        del later
    assert meter.kept == -9_000


def test_a_second_profiler_is_refused() -> None:
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(RuntimeError, match="another torch profiler is running"),
        MemoryMeter(),
    ):
        pass
