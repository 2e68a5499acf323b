"""Prices what a layer computes on a device that is not there: the roofline model.

Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model for multicore architectures":
a kernel takes as long as its arithmetic or its traffic with the memory, whichever is longer. Every operation of a run
on fake tensors is one kernel, as in torch without compilation, and takes
``max(operations / achieved rate, bytes / achieved bandwidth)`` and a constant on top.

Fake tensors cannot pretend to be on CUDA where torch is built without it (autograd asks the missing device for its
streams, and the process ends), so the run is one on the CPU. What is a single kernel on CUDA only is replaced:

* attention, which never writes its scores (FlashAttention-2, arXiv 2307.08691, section 3), whatever its mask, dropout
  or precision;
* RMSNorm;
* dropout, whose mask has one byte per element.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from lightning_hetu.planning.presets import DEVICE_PRESETS, KERNEL_SECONDS, Arithmetic, DevicePreset
from lightning_hetu.profiling._case import LayerCase, gradient_sink

_aten = torch.ops.aten

# They hand out memory, or fill it with a constant, as the profiler's stand-in for the next layer does.
_FREE = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten.full}
# They read of their first argument what the others point to.
_LOOKUPS = {_aten.embedding, _aten.gather, _aten.index, _aten.index_select, _aten.nll_loss_forward}
_CONVOLUTIONS = {_aten.convolution, _aten.convolution_backward, _aten._convolution}


class Roofline(TorchDispatchMode):
    """Adds up the seconds of all operations inside the mode.

    Those that torch can count (``torch.utils.flop_counter.register_flop_formula`` adds others) cost arithmetic; all
    cost what they read and write.

    Args:
        device: Where they would run.
    """

    def __init__(self, device: DevicePreset) -> None:
        super().__init__()
        self.device = device
        self.seconds = 0.0
        self.operations = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        operation = getattr(func, "overloadpacket", func)
        if not outputs or operation in _FREE or (not _changes_inputs(func) and _is_view(inputs, outputs)):
            return result
        moved = sum(map(_written, outputs))
        for tensor in inputs:
            read = _read(tensor)
            if operation in _LOOKUPS and tensor is args[0]:
                entries = sum(other.numel() for other in inputs if other is not tensor)
                read = min(read, max(moved, entries * tensor.element_size()))
            moved += read
        count = flop_registry.get(operation)
        operations = 0.0 if count is None else float(count(*args, **kwargs, out_val=result))
        if operations:
            arithmetic = _arithmetic(inputs[0].dtype, convolution=operation in _CONVOLUTIONS)
            attention = "attention" in str(operation)
            rate = self.device.attention_flops if attention else self.device.matmul_flops
            self.add(moved, operations, rate(arithmetic))
        else:
            self.add(moved)
        return result

    def add(self, num_bytes: float, operations: float = 0.0, rate: float = 1.0) -> None:
        """Adds a kernel of so many bytes read and written, and so many operations at a rate per second."""
        self.operations += operations
        self.seconds += max(operations / rate, num_bytes / self.device.copy_bandwidth) + KERNEL_SECONDS


class FusedKernels(TorchFunctionMode):
    """Runs attention, RMSNorm and dropout as one kernel each, for their memory and price; they compute nothing.

    Args:
        roofline: Where the kernels are added; ``None`` is nowhere.
    """

    def __init__(self, roofline: Roofline | None = None) -> None:
        super().__init__()
        self.roofline = roofline

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.rms_norm or func is torch.rms_norm:
            return self._rms_norm(*args, **kwargs)
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is Tensor.backward:
            # The mode is off inside what it handles, but what is computed again in backward needs it: hence the engine
            # itself, because torch.autograd.backward would be handled once more.
            with self:
                engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
                loss = args[0]
                return engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def cast(tensor: Tensor | None) -> Tensor | None:
            # Autocast happens below this mode.
            if tensor is None or not tensor.is_floating_point() or not torch.is_autocast_enabled(tensor.device.type):
                return tensor
            return tensor.to(torch.get_autocast_dtype(tensor.device.type))

        rows, columns = query.shape[-2], key.shape[-2]
        # Tiles above the diagonal are skipped.
        square = min(rows, columns)
        pairs = square * (square + 1) // 2 + (rows - square) * columns if is_causal else rows * columns
        batch = query.shape[:-2]
        if not enable_gqa:
            batch = torch.broadcast_shapes(batch, key.shape[:-2], value.shape[:-2])
        inputs = [cast(tensor) for tensor in (query, key, value, attn_mask)]
        return _Attention.apply(self.roofline, pairs, batch, *inputs)  # type: ignore[no-any-return]

    def _rms_norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if weight is not None and weight.dtype != input.dtype:
            # CUDA has no kernel for it either.
            return F.rms_norm(input, normalized_shape, weight, eps)
        return _RMSNorm.apply(self.roofline, len(tuple(normalized_shape)), input, weight)  # type: ignore[no-any-return]

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0 or inplace:
            return F.dropout(input, p, training, inplace)
        return _Dropout.apply(self.roofline, input)  # type: ignore[no-any-return]


def layer_seconds(case: LayerCase, samples: int, device: DevicePreset) -> tuple[float, float]:
    """Seconds of forward and of backward of a layer on ``device``; to be called in fake mode.

    Args:
        case: The layer.
        samples: Number of samples.
        device: The device.
    """
    forward, both = _run(case, samples, device)
    return forward[0], both[0] - forward[0]


def layer_operations(case: LayerCase, samples: int) -> tuple[float, float]:
    """Floating-point operations of matrix products and attention in forward and in backward; in fake mode.

    Args:
        case: The layer.
        samples: Number of samples.
    """
    forward, both = _run(case, samples, next(iter(DEVICE_PRESETS.values())))
    return forward[1], both[1] - forward[1]


def _run(case: LayerCase, samples: int, device: DevicePreset) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds and operations after forward, and after backward."""
    roofline = Roofline(device)
    with case.autocast():
        arguments = case.prepare(samples)
        with FusedKernels(roofline), roofline:
            output = case.call(arguments)
        forward = roofline.seconds, roofline.operations
        loss = gradient_sink(output)
    del output, arguments
    if loss is not None:
        with FusedKernels(roofline), roofline:  # the former for what is computed again
            loss.backward()
    del loss
    case.clear_gradients()
    return forward, (roofline.seconds, roofline.operations)


class _Attention(torch.autograd.Function):
    """Memory and price of FlashAttention-2, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        roofline: Roofline | None,
        pairs: int,
        batch: torch.Size,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        # As the kernel lays it out: heads of one position together, so that merging them copies nothing.
        rows = query.shape[-2]
        shape = [*batch[:-1], rows, *batch[-1:], value.shape[-1]]
        output = query.new_empty(shape).transpose(-2, -3) if batch else query.new_empty(shape)
        statistics = query.new_empty([*batch, rows], dtype=torch.float32)
        pairs *= batch.numel()
        ctx.roofline, ctx.pairs = roofline, pairs
        ctx.save_for_backward(query, key, value, mask, output, statistics)
        products = query.shape[-1] + value.shape[-1]
        _add_attention(roofline, 2 * pairs * products, (query, key, value, mask, output, statistics))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, mask, output, statistics = ctx.saved_tensors
        # Sums of rows, and the query's gradient in full precision until it is complete.
        scratch = [query.new_empty(tensor.shape, dtype=torch.float32) for tensor in (statistics, query)]
        made = [torch.empty_like(tensor) for tensor in (query, key, value)]
        # The scores once more, then the gradients of scores, query and key; and those of weights and value.
        products = 3 * query.shape[-1] + 2 * value.shape[-1]
        moved = (query, key, value, mask, output, statistics, *gradients, *scratch, *made)
        _add_attention(ctx.roofline, 2 * ctx.pairs * products, moved)
        return None, None, None, *made, torch.empty_like(mask) if ctx.needs_input_grad[6] else None


class _RMSNorm(torch.autograd.Function):
    """Memory and price of one kernel forward and one backward."""

    @staticmethod
    def forward(ctx: Any, roofline: Roofline | None, dimensions: int, input: Tensor, weight: Tensor | None) -> Tensor:
        output = torch.empty_like(input)
        scale = input.new_empty(input.shape[: input.ndim - dimensions], dtype=torch.float32)
        ctx.roofline = roofline
        ctx.save_for_backward(input, weight, scale)
        if roofline is not None:
            roofline.add(sum(map(_read, (input, output))))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        input, weight, _ = ctx.saved_tensors
        made = [None if tensor is None else torch.empty_like(tensor) for tensor in (input, weight)]
        if ctx.roofline is not None:
            ctx.roofline.add(sum(map(_read, (input, gradients[0], made[0]))))
        return None, None, *made


class _Dropout(torch.autograd.Function):
    """Memory and price of one kernel forward and one backward."""

    @staticmethod
    def forward(ctx: Any, roofline: Roofline | None, input: Tensor) -> Tensor:
        output, mask = torch.empty_like(input), torch.empty_like(input, dtype=torch.bool)
        ctx.roofline = roofline
        ctx.save_for_backward(mask)
        if roofline is not None:
            roofline.add(sum(map(_read, (input, output, mask))))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (mask,) = ctx.saved_tensors
        made = torch.empty_like(gradients[0])
        if ctx.roofline is not None:
            ctx.roofline.add(sum(map(_read, (gradients[0], mask, made))))
        return None, made


def _add_attention(roofline: Roofline | None, operations: float, moved: Iterable[Tensor | None]) -> None:
    if roofline is not None:
        tensors = [tensor for tensor in moved if tensor is not None]
        rate = roofline.device.attention_flops(_arithmetic(tensors[0].dtype))
        roofline.add(sum(map(_read, tensors)), operations, rate)


def _arithmetic(dtype: torch.dtype, *, convolution: bool = False) -> Arithmetic:
    """Which units compute, by torch's own settings for float32."""
    if dtype.itemsize <= 2:
        return "half"
    if dtype == torch.float32:
        tf32 = torch.backends.cudnn.allow_tf32 if convolution else torch.get_float32_matmul_precision() != "highest"
        return "tf32" if tf32 else "float32"
    return "float32"


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a nesting, each once."""
    return list({id(item): item for item in tree_flatten(value)[0] if isinstance(item, Tensor)}.values())


def _changes_inputs(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable


def _is_view(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    there = {tensor.untyped_storage()._cdata for tensor in inputs if tensor.layout == torch.strided}
    return all(tensor.layout == torch.strided and tensor.untyped_storage()._cdata in there for tensor in outputs)


def _written(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _read(tensor: Tensor) -> int:
    """Bytes of a tensor; what is expanded is read once."""
    whole = _written(tensor)
    return min(whole, tensor.untyped_storage().nbytes()) if tensor.layout == torch.strided else whole
