"""The parts of a model with pipeline support, handed out one by one with real inputs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_hetu.parallel.structure import ModelStructure
from lightning_hetu.parallel.tensor_plan import tensor_parallel_degrees, tensor_parallel_plan
from lightning_hetu.planning.plan import Schedule
from lightning_hetu.planning.profile import LayerProfile
from lightning_hetu.profiling._case import LayerCase, tensor_bytes
from lightning_hetu.profiling._forward_parts import ForwardParts
from lightning_hetu.profiling._isolation import AutocastFactory
from lightning_hetu.profiling._layers import group_layers
from lightning_hetu.profiling._operators import with_operators
from lightning_hetu.profiling._sequence import with_sequence_degrees

_log = logging.getLogger(__name__)


class ModelParts:
    """The parts of a model with pipeline support, ready to be measured one by one.

    What it says of the whole model has the names of :class:`~lightning_hetu.planning.profile.ModelProfile`.

    Args:
        module: The whole module.
        structure: Where its parts are.
        autocast: What forward runs under.
        max_tp: Largest tensor-parallel degree of interest.
    """

    def __init__(
        self,
        module: nn.Module,
        structure: ModelStructure,
        autocast: AutocastFactory,
        max_tp: int,
    ) -> None:
        self.module = module
        self.structure = structure
        self.autocast = autocast
        self.max_tp = max_tp
        self.layers, self.first = group_layers(module, structure.blocks)
        self.count = len(self.first) + 2
        self.tied_bytes = 0
        self.schedules: tuple[str, ...] = get_args(Schedule)
        owner: dict[int, str] = {}  # a parameter that two parts share belongs to the first
        shared = False
        for _, name in structure.rows():
            assert name is not None
            for parameter in module.get_submodule(name).parameters():
                shared |= owner.setdefault(id(parameter), name) != name
        self._owner = owner
        self.pipeline = self.split_vocab = not shared
        if shared:
            _log.info("%s shares parameters between layers: it is kept in one stage.", type(module).__name__)

    def profiles(
        self,
        inputs: Tensor,
        target: Any,
        put: Callable[[nn.Module], nn.Module],
        measure: Callable[[LayerCase], LayerProfile],
    ) -> tuple[LayerProfile, tuple[LayerProfile, ...], LayerProfile]:
        """Profiles of the embedding, one block of every kind, and the head.

        Args:
            inputs: A batch as the embedding takes it.
            target: What the loss compares with; ``None`` leaves it out.
            put: Gives the part itself, or a copy that can run.
            measure: Profiles a part.
        """
        rows = self.structure.rows()
        hidden: Any = inputs
        profiles = []
        trained = False
        for position, (_, name) in enumerate(rows):
            part = self.module.get_submodule(str(name))
            kind = self.layers[position - 1] if 0 < position < len(rows) - 1 else None
            if kind is None or position - 1 == self.first[kind]:
                last = position == len(rows) - 1
                here = put(part)
                # A kind that also occurs further up gets a gradient there if anything below it is trained.
                needs_gradient = trained or (kind is not None and self._trained_before_last(kind))
                case = self._case(str(name), here, hidden, target if last else None, kind)
                if kind is not None:
                    case = with_sequence_degrees(case, self.module, str(name), ((hidden,), {}), self.max_tp)
                    case = with_operators(case)
                profiles.append(measure(replace(case, input_requires_grad=needs_gradient)))
                if not last:
                    hidden = self._run(str(name), here, hidden)
            trained |= any(parameter.requires_grad for parameter in part.parameters())
        return profiles[0], tuple(profiles[1:-1]), profiles[-1]

    def _run(self, name: str, here: nn.Module, hidden: Tensor) -> Tensor:
        with torch.no_grad(), self.autocast():
            output = here(hidden)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{name} returned a {type(output).__name__}: a layer with pipeline support takes one tensor and returns"
                " one."
            )
        return output

    def _case(self, name: str, here: nn.Module, hidden: Tensor, target: Any, kind: int | None) -> LayerCase:
        def call(arguments: tuple[Any, ...]) -> Any:
            output = here(arguments[0])
            if target is None:
                return output
            return self.module.pipeline_loss(output, arguments[1])  # type: ignore[operator]

        part = self.module.get_submodule(name)
        owned = {key for key, parameter in part.named_parameters() if self._owner[id(parameter)] == name}
        title = type(part).__name__
        batch = hidden.shape[0]
        return LayerCase(
            name=f"{title}-{kind}" if kind is not None and len(self.first) > 1 else title,
            module=here,
            call=call,
            arguments=(hidden,) if target is None else (hidden, target),
            batch=batch,
            plan=tensor_parallel_plan(self.module, name),
            tp_degrees=tensor_parallel_degrees(self.module, name, self.max_tp),
            boundary_bytes=tensor_bytes(hidden, batch),
            parameters={key: parameter for key, parameter in here.named_parameters() if key in owned},
            autocast=self.autocast,
        )

    def _trained_before_last(self, kind: int) -> bool:
        last = max(index for index, layer in enumerate(self.layers) if layer == kind)
        below = [str(self.structure.embedding), *self.structure.blocks[:last]]
        return any(p.requires_grad for name in below for p in self.module.get_submodule(name).parameters())


def model_parts(
    module: nn.Module,
    structure: ModelStructure,
    autocast: AutocastFactory,
    max_tp: int,
) -> ModelParts | ForwardParts:
    """The parts of a model with pipeline support, of either kind."""
    kind = ModelParts if structure.trace is None else ForwardParts
    return kind(module, structure, autocast, max_tp)


def place(part: nn.Module, device: torch.device) -> nn.Module:
    """``part`` itself where it is on ``device``, else a copy there; meta tensors are allocated and reset."""
    tensors = [*part.parameters(), *part.buffers()]
    if all(_same_device(tensor.device, device) for tensor in tensors):
        return part
    on_meta = any(tensor.is_meta for tensor in tensors)
    copied = copy.deepcopy(part)
    copied = copied.to_empty(device=device) if on_meta else copied.to(device)
    if on_meta:
        with torch.no_grad():
            for tensor in [*copied.parameters(), *copied.buffers()]:
                tensor.zero_()
        for child in copied.modules():
            reset = getattr(child, "reset_parameters", None)
            if callable(reset):
                reset()
    return copied


def _same_device(one: torch.device, other: torch.device) -> bool:
    # Without an index it is the current device.
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)


def device_of(value: Any) -> torch.device:
    """Where the first tensor of a nesting is."""
    return next((item.device for item in tree_leaves(value) if isinstance(item, Tensor)), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """All tensors of a nesting on ``device``."""
    return tree_map(lambda item: item.to(device) if isinstance(item, Tensor) else item, value)
