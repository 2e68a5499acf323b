"""The parts of a model that runs its own forward, handed out one by one with real inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_hetu.parallel.batch import batch_samples
from lightning_hetu.parallel.forward_stage import Segment, StageEnd, StandIn
from lightning_hetu.parallel.pipeline_mixin import call_model
from lightning_hetu.parallel.structure import ModelStructure, outermost
from lightning_hetu.parallel.tensor_plan import (
    outside_tensor_parallel_degrees,
    outside_tensor_parallel_plan,
    tensor_parallel_degrees,
    tensor_parallel_plan,
)
from lightning_hetu.planning.profile import LayerProfile
from lightning_hetu.profiling._case import LayerCase
from lightning_hetu.profiling._isolation import AutocastFactory
from lightning_hetu.profiling._layers import group_layers
from lightning_hetu.profiling._operators import with_operators
from lightning_hetu.profiling._sequence import with_sequence_degrees


class _Replay(StandIn):
    """Returns tensors like those that the module has returned for a batch of ``rows``, without computing anything."""

    def __init__(self, module: nn.Module, output: Any, rows: int, samples: Callable[[], int]) -> None:
        super().__init__(module)
        self.__dict__["_output"], self.__dict__["_rows"], self.__dict__["_samples"] = output, rows, samples

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def like(known: Tensor) -> Tensor:
            shape = list(known.shape)
            if shape and shape[0] == self._rows:
                shape[0] = self._samples()
            return torch.empty(shape, dtype=known.dtype, device=known.device)

        return tree_map_only(Tensor, like, self._output)


class _Given(StandIn):
    """Returns what it was told to: the output of the last block."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._given

    def give(self, output: Any) -> None:
        self.__dict__["_given"] = output


class ForwardParts:
    """What runs before the blocks, one block of every kind, and what runs behind them with the loss.

    Has the interface of :class:`~lightning_hetu.profiling._parts.ModelParts`.
    """

    def __init__(
        self,
        module: nn.Module,
        structure: ModelStructure,
        autocast: AutocastFactory,
        max_tp: int,
    ) -> None:
        assert structure.trace is not None and structure.model is not None
        self.module = module
        self.structure = structure
        self.trace = structure.trace
        self.autocast = autocast
        self.max_tp = max_tp
        self.layers, self.first = group_layers(module, structure.blocks)
        self.count = len(self.first) + 2
        self.pipeline, self.split_vocab = True, False
        self.schedules: tuple[str, ...] = ("1f1b", "gpipe")
        model = module.get_submodule(structure.model)
        named = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in named.items()}
        self.rows_of: dict[str, set[str]] = {"embedding": set(), "head": set()}
        for field, found in self.rows_of.items():
            for full in structure.modules(field):
                own = module.get_submodule(full)._parameters.values()
                found |= {names[id(parameter)] for parameter in own if parameter is not None}
        idle = set(named) - self.rows_of["embedding"] - self.rows_of["head"]
        inside = tuple(f"{call.name}." for call in self.trace.calls)
        self.rows_of["head"] |= {name for name in idle if not name.startswith(inside)}
        self.tied_bytes = sum(
            named[name].numel() * named[name].element_size()
            for name in self.rows_of["embedding"] & self.rows_of["head"]
        )
        """Bytes of parameters that serve both before and behind the blocks."""

    def profiles(
        self,
        inputs: Any,
        target: Any,
        put: Callable[[nn.Module], nn.Module],
        measure: Callable[[LayerCase], LayerProfile],
    ) -> tuple[LayerProfile, tuple[LayerProfile, ...], LayerProfile]:
        """As of :meth:`ModelParts.profiles`, from a batch as ``pipeline_step`` is given it."""
        rows = batch_samples(inputs)
        model = put(self.module.get_submodule(str(self.structure.model)))
        seen = _Observed(model, self.structure, self.first, rows)
        with self.autocast():
            seen.run(inputs)
        trained = any(p.requires_grad for n, p in model.named_parameters() if n in self.rows_of["embedding"])
        embedding = measure(self._before(model, inputs, rows))
        types = []
        for kind, index in enumerate(self.first):
            last = max(i for i, layer in enumerate(self.layers) if layer == kind)
            below = trained or any(
                p.requires_grad for call in self.trace.calls[:last] for p in model.get_submodule(call.name).parameters()
            )
            types.append(measure(self._block(model, index, seen.arguments[index], rows, below, kind)))
        trained |= any(p.requires_grad for c in self.trace.calls for p in model.get_submodule(c.name).parameters())
        head = measure(self._behind(model, inputs, target, seen, rows, trained))
        return embedding, tuple(types), head

    def _case(self, model: nn.Module, field: str, rows: int, **options: Any) -> LayerCase:
        prefix = f"{self.structure.model}."
        part = {name.removeprefix(prefix) for name in self.structure.modules(field)}
        plan = outside_tensor_parallel_plan(self.module, self.structure)
        plan = {name.removeprefix(prefix): style for name, style in plan.items()}
        owned = self.rows_of[field]
        return LayerCase(
            name=f"{type(model).__name__} {'before' if field == 'embedding' else 'behind'} its blocks",
            module=model,
            batch=rows,
            plan={name: style for name, style in plan.items() if name in part},
            tp_degrees=outside_tensor_parallel_degrees(self.module, self.structure, self.max_tp) if plan else (1,),
            parameters={name: p for name, p in model.named_parameters() if name in owned},
            autocast=self.autocast,
            **options,
        )

    def _before(self, model: nn.Module, inputs: Any, rows: int) -> LayerCase:
        def call(arguments: tuple[Any]) -> Any:
            segment = Segment(model, self.trace, 0, 0)
            try:
                result = segment.run(partial(call_model, model, arguments[0]), ())
            finally:
                segment.remove()
            assert isinstance(result, StageEnd)
            return result.tensors

        return self._case(
            model,
            "embedding",
            rows,
            call=call,
            arguments=(inputs,),
            input_requires_grad=False,
            boundary_bytes=_bytes(tree_flatten(inputs)[0], rows),
        )

    def _block(
        self, model: nn.Module, index: int, arguments: tuple[Any, Any], rows: int, needs_gradient: bool, kind: int
    ) -> LayerCase:
        call, name = self.trace.calls[index], self.structure.blocks[index]
        block = model.get_submodule(call.name)
        leaves, spec = tree_flatten(arguments)
        for position, leaf in enumerate(call.leaves):
            if leaf is not None and isinstance(leaves[position], Tensor):
                leaves[position] = leaves[position].detach().requires_grad_(leaf.gradient and needs_gradient)
        sent = [leaves[position] for position in call.crossing]
        title = type(block).__name__
        case = LayerCase(
            name=f"{title}-{kind}" if len(self.first) > 1 else title,
            module=block,
            call=lambda given: block(*given[0], **given[1]),
            arguments=torch.utils._pytree.tree_unflatten(leaves, spec),
            batch=rows,
            input_requires_grad=None,
            plan=tensor_parallel_plan(self.module, name),
            tp_degrees=tensor_parallel_degrees(self.module, name, self.max_tp),
            boundary_bytes=_bytes(sent, rows),
            autocast=self.autocast,
        )
        return with_operators(with_sequence_degrees(case, self.module, name, case.arguments, self.max_tp))

    def _behind(
        self, model: nn.Module, inputs: Any, target: Any, seen: _Observed, rows: int, needs_gradient: bool
    ) -> LayerCase:
        count = [rows]
        blocks = len(self.trace.calls)
        last = self.trace.calls[-1].name
        given = _Given(model.get_submodule(last))
        places: dict[str, nn.Module] = {last: given}
        for name, output in seen.outputs.items():
            if name != last and self.trace.outside.get(name, 0) < blocks:
                places[name] = _Replay(model.get_submodule(name), output, rows, lambda: count[0])

        def call(arguments: tuple[Any, Any, Any]) -> Tensor:
            batch, compared, output = arguments
            count[0] = batch_samples(batch)
            given.give(output)
            with _in_place(model, places):
                returned = call_model(model, batch)
            loss: Tensor = self.module.pipeline_loss(returned, batch if target is None else compared)  # type: ignore[operator]
            return loss

        def detached(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(needs_gradient and tensor.is_floating_point())

        output = tree_map_only(Tensor, detached, seen.outputs[last])
        sent = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        return self._case(
            model,
            "head",
            rows,
            call=call,
            arguments=(inputs, target, output),
            input_requires_grad=None,
            boundary_bytes=_bytes(sent[:1], rows),
        )


class _Observed:
    """One run of the model: what the blocks are given, and what every part returns."""

    def __init__(self, model: nn.Module, structure: ModelStructure, first: list[int], rows: int) -> None:
        assert structure.trace is not None
        self.model = model
        self.trace = structure.trace
        self.wanted = {self.trace.calls[index].name: index for index in first}
        self.arguments: dict[int, tuple[Any, Any]] = {}
        self.outputs: dict[str, Any] = {}

    def run(self, inputs: Any) -> None:
        """Runs it without gradients."""
        handles = []
        blocks = [call.name for call in self.trace.calls]
        for name in blocks:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
        outside = [name for name in self.trace.outside if self.model.get_submodule(name)._parameters]
        for name in (*blocks, *outside):
            handles.append(self.model.get_submodule(name).register_forward_hook(partial(self._leave, name)))
        try:
            with torch.no_grad():
                call_model(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name in self.wanted:
            self.arguments[self.wanted[name]] = (args, kwargs)

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name == self.trace.calls[-1].name:
            self.outputs[name] = output
        else:  # its shapes are enough
            self.outputs[name] = tree_map_only(Tensor, _shape, output)


def _shape(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that takes no memory."""
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


@contextmanager
def _in_place(model: nn.Module, places: dict[str, nn.Module]) -> Iterator[None]:
    """Puts other modules into the model for as long as the context lasts."""
    before: list[tuple[nn.Module, str, nn.Module | None]] = []
    try:
        for name in outermost(places):
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            before.append((parent, child, parent._modules[child]))
            parent._modules[child] = places[name]
        yield
    finally:
        for parent, child, module in before:
            parent._modules[child] = module


def _bytes(tensors: list[Any], rows: int) -> float:
    """Bytes per sample of tensors; those that are the same for all samples count once per batch."""
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor)) / rows
