"""Data parallelism of one layer on FSDP2: replicated (HSDP with shards of one), ZeRO-2 or ZeRO-3.

Gradients are summed, never averaged, over the data-parallel ranks of a layer. Layers with different degrees would
otherwise be scaled by different factors, without any error; the loss is normalized over the global batch instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_hetu.parallel.experts import shared_parameters
from lightning_hetu.parallel.mesh import Layout
from lightning_hetu.parallel.tensor import SharedInput
from lightning_hetu.planning.layer_strategy import DataParallelType


def apply_data_parallel(
    layer: nn.Module, layout: Layout, dp_type: DataParallelType, sharded: Sequence[str] = ()
) -> None:
    """Wraps ``layer`` in place.

    Args:
        layer: A layer whose tensor parallelism and recomputation are already applied.
        layout: Its meshes.
        dp_type: ``ddp`` copies parameters, ``zero2`` gathers them from forward until the last backward, ``zero3``
            gathers them around each use.
        sharded: Names of modules inside that are ``zero3``, each by itself, whatever the rest is.
    """
    for name in sharded:
        operator = layer.get_submodule(name)
        apply_data_parallel(operator, layout, "zero3")
        _share_input_first(operator)
    mesh = layout.replicate if dp_type == "ddp" else layout.data
    fully_shard(
        layer, mesh=mesh, reshard_after_forward=dp_type == "zero3", ignored_params=shared_parameters(layer) or None
    )
    layer._hetu_dp_type = dp_type  # type: ignore[assignment]
    sum_gradients(layer)


def _share_input_first(operator: nn.Module) -> None:
    """Lets column-parallel modules see their common input before FSDP gives each a tensor of its own in its place."""
    for key, hook in operator._forward_pre_hooks.items():
        if isinstance(getattr(hook, "__self__", None), SharedInput):
            operator._forward_pre_hooks.move_to_end(key, last=False)  # type: ignore[attr-defined]
            return


def sum_gradients(module: nn.Module) -> None:
    """Makes one FSDP module reduce gradients by summing."""
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM


def fsdp_modules(root: nn.Module) -> Iterator[FSDPModule]:
    """All FSDP modules below and including ``root``."""
    return (module for module in root.modules() if isinstance(module, FSDPModule))


def prepare_backward(root: nn.Module, *, last: bool) -> None:
    """Sets what each layer does at the end of the coming backward of one microbatch.

    Sharded layers reduce-scatter the gradients of every microbatch, so only shards are ever kept. Replicated layers
    keep full gradients anyway: they add up locally and are all-reduced once, in the last microbatch. ZeRO-3 frees its
    gathered parameters after each backward; the others keep them until the last, since the next microbatch needs them.
    """
    for module in fsdp_modules(root):
        dp_type = getattr(module, "_hetu_dp_type", "zero3")
        module.set_is_last_backward(last)
        module.set_requires_gradient_sync(last or dp_type != "ddp", recurse=False)
        module.set_reshard_after_backward(last or dp_type == "zero3", recurse=False)
