"""One pipeline stage of a model that runs its own forward.

Every stage calls the whole model. The blocks and modules of other stages are stand-ins that return zeros of the right
shape; the first block of a stage is given what the earlier stage sent, and a stage ends where the first block of the
next one would start. What the forward computes in between (masks, position tables) every stage computes for itself, so
models need no pipeline code of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from lightning_hetu.parallel.batch import batch_samples
from lightning_hetu.parallel.forward_trace import BlockCall, ForwardTrace, fake_copy
from lightning_hetu.parallel.mesh import PlanMesh
from lightning_hetu.parallel.pipeline_mixin import call_model
from lightning_hetu.parallel.relayout import relayout, relayout_shared
from lightning_hetu.parallel.stage import stage_autocast
from lightning_hetu.parallel.transformers_compat import forget_fake_tensors, steady_masks


class StageEnd(Exception):
    """Ends a forward where the next stage begins; carries what that stage needs."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors


class StandIn(nn.Module):
    """Takes the place of a module that another stage runs: returns zeros, in the shapes that module would return.

    Args:
        module: The module. Its parameters are no parameters of the stand-in, which shows zeros in their place; other
            attributes are seen through it.
        device: Where the model computes.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.__dict__["_module"] = module  # no child: its parameters must not be counted here
        self.__dict__["_device"] = torch.device(device)
        self.__dict__["_outputs"] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__["_module"], name)
        if isinstance(value, Tensor) and value.is_meta:
            return torch.zeros((), dtype=value.dtype, device=self.__dict__["_device"]).expand(value.shape)
        return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the shapes and dtypes that the module returns for such arguments; no gradient flows through."""
        leaves, spec = tree_flatten((args, kwargs))
        plain = bool | int | float | str | torch.dtype | torch.device | None
        described = [
            (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x if isinstance(x, plain) else type(x)
            for x in leaves
        ]
        autocast = torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
        key = repr((described, spec, autocast, self.training))
        if key not in self._outputs:
            self._outputs[key] = self._shapes(leaves, spec)
        # A tensor of its own each time: which one it is tells what is put in its place.
        return tree_map_only(Tensor, lambda x: _zeros(tuple(x.shape), x.dtype, x.device).detach(), self._outputs[key])

    def _shapes(self, leaves: Sequence[Any], spec: Any) -> Any:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = tensors[0].device if tensors else self.__dict__["_device"]
        module = self.__dict__["_module"]
        with torch.no_grad():
            if torch._guards.detect_fake_mode(tensors) is not None:
                args, kwargs = tree_unflatten(leaves, spec)
                return module(*args, **kwargs)
            with forget_fake_tensors(), FakeTensorMode(allow_non_fake_inputs=True):
                copied = fake_copy(module, device).train(self.training)

                def fake(value: Any) -> Any:
                    if not isinstance(value, Tensor):
                        return value
                    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

                args, kwargs = tree_map(fake, tree_unflatten(leaves, spec))
                output = copied(*args, **kwargs)
            # one value shown in all places: it takes no memory
            return tree_map_only(
                Tensor, lambda x: torch.zeros((), dtype=x.dtype, device=device).expand(x.shape), output
            )


@functools.lru_cache(maxsize=16)
def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


class Segment:
    """Runs the part of a model's forward between two blocks, with stand-ins for the rest already in place.

    Args:
        model: The model.
        trace: What its forward does.
        first: First block of the segment; at 0 it starts at the inputs.
        last: Behind the last block of the segment; at ``len(trace.calls)`` it ends with what the forward returns.
    """

    def __init__(self, model: nn.Module, trace: ForwardTrace, first: int, last: int) -> None:
        self.model = model
        self.trace = trace
        self.first = first
        self.last = last
        self.received: tuple[Tensor, ...] = ()
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.handles: list[Any] = []
        for call in trace.calls[first:last]:
            block = model.get_submodule(call.name)
            self.handles.append(block.register_forward_pre_hook(partial(self._enter, call), with_kwargs=True))
        if last < len(trace.calls):
            following = trace.calls[last]
            block = model.get_submodule(following.name)
            self.handles.append(block.register_forward_pre_hook(partial(self._end, following), with_kwargs=True))

    def run(self, call: Callable[[], Any], received: tuple[Tensor, ...]) -> Any:
        """What the forward returns, or a :class:`StageEnd` with the tensors for the next segment.

        Args:
            call: Calls the model.
            received: What the earlier segment gave.
        """
        self.received = received
        self.replaced = {}
        try:
            return call()
        except StageEnd as end:
            return end
        finally:
            self.received = ()
            self.replaced = {}

    def remove(self) -> None:
        """Takes the hooks off the model again."""
        for handle in self.handles:
            handle.remove()

    def _enter(self, call: BlockCall, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        leaves, spec = tree_flatten((args, kwargs))
        if call is self.trace.calls[self.first] and self.first > 0:
            for index, tensor in zip(call.crossing, _used(call, self.received), strict=True):
                self.replaced[id(leaves[index])] = leaves[index], tensor
        self.check(call, leaves)
        changed = [self.move(call, i, leaf) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]
        moved: tuple[Any, Any] = tree_unflatten(changed, spec)
        return moved

    def _end(self, call: BlockCall, module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves = tree_leaves((args, kwargs))
        tensors = tuple(self.leave(call, index, leaves[index]) for index in call.crossing)
        if torch.is_grad_enabled():
            # The schedule expects a gradient for every tensor it sends.
            tensors = tuple(tensor if tensor.requires_grad else tensor.requires_grad_() for tensor in tensors)
        raise StageEnd(tensors)

    def check(self, call: BlockCall, leaves: Sequence[Any]) -> None:
        """Refuses arguments that this segment cannot deal with."""

    def move(self, call: BlockCall, index: int, leaf: Tensor) -> Tensor:
        """What the block is given in place of its argument ``leaf``."""
        known = self.replaced.get(id(leaf))
        return leaf if known is None else known[1]

    def leave(self, call: BlockCall, index: int, leaf: Tensor) -> Tensor:
        """What is sent to the next segment for the argument ``leaf`` of its first block."""
        known = self.replaced.get(id(leaf))
        return leaf if known is None else known[1]


def _used(call: BlockCall, received: Sequence[Tensor]) -> list[Tensor]:
    """What a stage was sent, those without a gradient cut off from the graph.

    The schedule sends a gradient back for every tensor. For those that no gradient flows through it is zero.
    """
    flows = [leaf.gradient for index in call.crossing if (leaf := call.leaves[index]) is not None]
    others = [tensor for tensor, flow in zip(received, flows, strict=True) if tensor.requires_grad and not flow]
    used = []
    for tensor, flow in zip(received, flows, strict=True):
        if tensor.requires_grad and flow:
            tensor, others = _Received.apply(tensor, *others), []
        used.append(tensor if flow else tensor.detach())
    return used


class _Received(torch.autograd.Function):
    """Gives out its first argument, whose gradient can be sent back; the others get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others]
        return gradients[0].contiguous(), *zeros


class _StageSegment(Segment):
    """A segment whose blocks have layouts of their own."""

    def __init__(self, stage: ForwardStage, first: int, last: int) -> None:
        super().__init__(stage.model, stage.trace, first, last)
        self.stage = stage
        self.mesh = stage.mesh
        self.moved: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.agreed: dict[tuple[str, Any], tuple[bool, ...]] = {}
        self.positions = {call.name: position for position, call in enumerate(self.trace.calls)}
        for position in range(first, last):
            call = self.trace.calls[position]
            if not call.hands_over and stage.degrees[position] != stage.outside_dp:
                block = self.model.get_submodule(call.name)
                self.handles.append(block.register_forward_hook(partial(self._to_outside, position)))

    def run(self, call: Callable[[], Any], received: tuple[Tensor, ...]) -> Any:
        self.moved = {}
        try:
            return super().run(call, received)
        finally:
            self.moved = {}

    def check(self, call: BlockCall, leaves: Sequence[Any]) -> None:
        # Moving a tensor takes all ranks: whether there is one must not depend on a rank's own rows.
        if self.stage.degrees[self.position(call)] == self.stage.outside_dp:
            return
        found = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        key = call.name, self.stage.shapes
        if key not in self.agreed:
            everywhere: list[Any] = [None] * self.mesh.plan.devices_per_stage
            torch.distributed.all_gather_object(everywhere, found, group=self.mesh.stage_group)
            if len(set(everywhere)) == 1:
                self.agreed[key] = found
        if self.agreed.get(key) != found:
            raise ValueError(
                f"{call.name} is not given the same arguments in every batch and on every rank (a mask that is left out"
                " where it hides nothing, say), so its data-parallel degree cannot differ from that of what is around"
                f" it: pin one, for example pins={{'layers': 'dp{self.stage.outside_dp}-zero3'}}."
            )

    def position(self, call: BlockCall) -> int:
        """Number of the block."""
        return self.positions[call.name]

    def move(self, call: BlockCall, index: int, leaf: Tensor) -> Tensor:
        target = self.stage.degrees[self.position(call)]
        return self._relayout(call, index, leaf, target)

    def leave(self, call: BlockCall, index: int, leaf: Tensor) -> Tensor:
        # A stage must not send what it was sent, or a parameter, itself: the schedule detaches outputs in place.
        sent = self._relayout(call, index, leaf, self.stage.output_dp)
        return sent.clone(memory_format=torch.contiguous_format)

    def _relayout(self, call: BlockCall, index: int, leaf: Tensor, target: int) -> Tensor:
        description = call.leaves[index]
        if description is None:  # a mask, say, that another batch did without; its layout is right, see `check`
            return leaf
        if id(leaf) in self.replaced:
            _, tensor = self.replaced[id(leaf)]
            source = self.stage.input_dp
        elif description.source is not None and self.trace.calls[description.source].hands_over:
            tensor, source = leaf, self.stage.degrees[description.source]
        else:
            tensor, source = leaf, self.stage.outside_dp
        if source == target:
            return tensor
        if not description.batched and not description.gradient:
            return tensor
        key = id(tensor), target
        if key not in self.moved:
            change = relayout if description.batched else relayout_shared
            self.moved[key] = tensor, change(tensor, self.mesh, source, target)
        return self.moved[key][1]

    def _to_outside(self, position: int, module: nn.Module, args: Any, output: Any) -> Any:
        source, target = self.stage.degrees[position], self.stage.outside_dp
        rows = self.stage.rows(source)

        def back(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[0] != rows:
                return relayout_shared(tensor, self.mesh, source, target) if tensor.requires_grad else tensor
            return relayout(tensor, self.mesh, source, target)

        return tree_map_only(Tensor, back, output)


class ForwardStage(nn.Module):
    """The part of a model with its own forward that one rank runs.

    Args:
        model: The model, with stand-ins for what other stages run.
        trace: What its forward does.
        bounds: First block of the stage, and behind its last.
        degrees: Data-parallel degree of every block of the model.
        mesh: Meshes of the plan.
        outside_dp: Batch shards of the inputs, and of all that runs outside of the blocks.
        input_dp: Batch shards of what the stage is sent.
        output_dp: Batch shards of what it sends.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: ForwardTrace,
        bounds: tuple[int, int],
        degrees: Sequence[int],
        mesh: PlanMesh,
        outside_dp: int,
        input_dp: int,
        output_dp: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.trace = trace
        self.degrees = list(degrees)
        self.mesh = mesh
        self.outside_dp = outside_dp
        self.input_dp = input_dp
        self.output_dp = output_dp
        self.autocast_dtype: torch.dtype | None = None
        self.removed: Any = None
        self.tied: Any = None
        self.microbatches: list[Any] = []
        self.microbatch = 0
        self.samples = 0
        self.shapes: Any = None
        self.finish: Callable[[Any, int], Tensor] | None = None
        self.moves_masks = any(degree != outside_dp for degree in self.degrees[slice(*bounds)])
        self.segment = _StageSegment(self, *bounds)

    def rows(self, dp: int) -> int:
        """Rows of the microbatch that is running, under ``dp`` batch shards."""
        return self.samples * self.outside_dp // dp

    def check_running(self, *_: Any) -> None:
        """Refuses a call of the model that does not come from a stage.

        Raises:
            ValueError: Always then; the other ranks do not take part.
        """
        if not self.microbatches:
            raise ValueError(
                "the model was called directly, but this process has only its stage of it: use self.pipeline_step(...)"
                " for a loss and self.pipeline_forward(...) for outputs, in evaluation too."
            )

    def forward(self, *received: Tensor) -> Any:
        """Runs microbatch number ``self.microbatch``.

        Args:
            received: What the earlier stage sent; ignored in the first stage.

        Returns:
            What the next stage is sent; in the last stage what ``finish`` makes of the model's output.
        """
        inputs = self.microbatches[self.microbatch]
        self.samples = batch_samples(inputs)
        device = next(leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        # Without layouts to change no rank needs to know what the others have.
        masks = steady_masks if self.moves_masks else nullcontext
        with stage_autocast(device.type, self.autocast_dtype), masks():
            result = self.segment.run(partial(call_model, self.model, inputs), received)
            if isinstance(result, StageEnd):
                return result.tensors
            assert self.finish is not None
            return self.finish(result, self.microbatch)
