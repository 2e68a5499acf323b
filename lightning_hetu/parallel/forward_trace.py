"""Reads from one run of a model's own forward where it can be cut into pipeline stages.

The run is on fake tensors: nothing is computed. It tells in which order the blocks are called, with which arguments,
and what runs outside of them. From that follows what a stage must be sent: every tensor a block is given that another
stage cannot compute for itself. A model whose later blocks use something else of the earlier ones (a skip connection)
cannot be cut in between.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from lightning_hetu.parallel.batch import batch_samples
from lightning_hetu.parallel.pipeline_mixin import PipelineMixin, call_model
from lightning_hetu.parallel.structure import ModelStructure, children_of, children_of_one_class
from lightning_hetu.parallel.transformers_compat import (
    collects_router_logits,
    disable_caches,
    forget_fake_tensors,
    use_batched_experts,
)

_SAMPLES = (2, 3)
"""Batch sizes of the two runs: what grows with them has the batch in dimension 0."""
_JOINING_SHARE = 0.2
"""Blocks of another class are cut, too, where they hold at least this share of the parameters of the largest class."""
_ELSEWHERE = "{} a tensor of shape {} whose batch is not in dimension 0: such a model cannot be cut."
_aten = torch.ops.aten


@dataclass(frozen=True)
class Leaf:
    """A tensor among the arguments of a block.

    Args:
        source: Which block call returned it; ``None`` where it was made outside of the blocks.
        batched: Whether the batch is in dimension 0; else it is the same for all samples.
        gradient: Whether a gradient flows through it.
        crosses: Whether another stage cannot compute it for itself: it depends on parameters, or on a module that has
            some.
    """

    source: int | None
    batched: bool
    gradient: bool
    crosses: bool


@dataclass(frozen=True)
class BlockCall:
    """One call of a block.

    Args:
        name: Full name of the block.
        leaves: Its arguments, flattened (positional ones first); ``None`` for what is no tensor.
        hands_over: Whether what it returns goes straight into the next block.
    """

    name: str
    leaves: tuple[Leaf | None, ...]
    hands_over: bool

    @property
    def crossing(self) -> tuple[int, ...]:
        """Which leaves an earlier stage must send to run this block: what depends on parameters, or on a block."""
        return tuple(i for i, leaf in enumerate(self.leaves) if leaf is not None and leaf.crosses)


@dataclass(frozen=True)
class ForwardTrace:
    """What one run of a model's forward did.

    Args:
        calls: The blocks in the order they ran.
        outside: Full names of the modules outside of the blocks that have parameters or buffers of their own and ran,
            with the number of blocks that had run before: 0 belongs to the first stage, ``len(calls)`` to the last.
    """

    calls: tuple[BlockCall, ...]
    outside: Mapping[str, int]

    @property
    def blocks(self) -> tuple[str, ...]:
        """Full names of the blocks in the order they run."""
        return tuple(call.name for call in self.calls)

    def modules_at(self, first: int, last: int) -> list[str]:
        """Modules outside of the blocks that run behind block ``first - 1`` and before block ``last``.

        Those between two stages run in the earlier one, which stops when it comes to the first block of the later.
        """
        return [name for name, position in self.outside.items() if first <= position < last]


class UncuttableModelError(ValueError):
    """A model's forward is no chain of blocks; the message says where it is not."""


def trace_structure(module: nn.Module, inputs: Any, blocks: str | None = None) -> ModelStructure:
    """Where the layers of a :class:`PipelineMixin` are whose model runs its own forward.

    Args:
        module: The whole module; it names its ``pipeline_model``.
        inputs: A batch as ``pipeline_step`` is given it; only shapes and dtypes count.
        blocks: Dotted paths of the containers of the blocks, separated by commas; by default they are found.

    Raises:
        ValueError: If ``pipeline_model`` or ``blocks`` name nothing that is there.
        UncuttableModelError: If the model is no chain of blocks.
    """
    assert isinstance(module, PipelineMixin)
    path = module.pipeline_model
    try:
        model = module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"pipeline_model={path!r}: {type(module).__name__} has no such module.") from None
    disable_caches(model)
    if collects_router_logits(model):
        raise UncuttableModelError(
            f"{type(model).__name__} has output_router_logits=True: its loss needs what the routers of all blocks say,"
            " so it cannot be cut. Set it to False, or go on with one stage."
        )
    names = None
    if blocks is not None:
        full = [name for container in blocks.split(",") for name in children_of(module, container.strip())]
        outside = [name for name in full if not name.startswith(f"{path}.")]
        if outside:
            raise ValueError(f"blocks={blocks!r}: {outside[0]!r} is not inside of pipeline_model={path!r}.")
        names = [name[len(path) + 1 :] for name in full]
    trace = trace_forward(model, call_model, inputs, names)
    return ModelStructure(tuple(f"{path}.{name}" for name in trace.blocks), model=path, trace=trace)


def trace_forward(
    model: nn.Module, run: Callable[[nn.Module, Any], Any], inputs: Any, blocks: Sequence[str] | None = None
) -> ForwardTrace:
    """Runs the forward of ``model`` on fake tensors.

    Args:
        model: The model, on any device; it is not changed.
        run: Calls a model: ``run(model, inputs)``; what it returns must lead to the loss.
        inputs: A batch, any nesting of tensors; those with as many rows as most have are batched.
        blocks: Names of the blocks, in any order; by default they are found.

    Raises:
        UncuttableModelError: If a block runs twice or not at all, or the blocks do not form a chain.
    """
    with forget_fake_tensors(), FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        copied = fake_copy(model)
        for parameter in copied.parameters():
            # What is not trained must reach later stages just the same.
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            if blocks is None:
                blocks = _find_blocks(copied, lambda: run(copied, fake_batch(inputs, _SAMPLES[0])))
            first = _Run(copied, blocks, check=True)
            second = _Run(copied, blocks)
            first(run, fake_batch(inputs, _SAMPLES[0]))
            second(run, fake_batch(inputs, _SAMPLES[1]))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UncuttableModelError(
                f"{type(model).__name__} decides by the values in a tensor what to compute ({error}): such a model"
                " cannot be looked at without running it, and cannot be cut."
            ) from error
    return _combine(model, blocks, first, second)


def fake_copy(part: nn.Module, device: torch.device | str = "cpu", shared: Iterable[Any] = ()) -> nn.Module:
    """The module with fake tensors for its parameters and buffers; to be called in fake mode.

    Args:
        part: The module.
        device: Where the fake tensors claim to be.
        shared: Objects that the copy refers to as the module does.
    """
    memo: dict[int, Any] = {id(item): item for item in shared}
    for tensor in chain(part.parameters(), part.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = empty
    copied = copy.deepcopy(part, memo).train()
    use_batched_experts(copied)
    return copied


def fake_batch(inputs: Any, samples: int, device: torch.device | str = "cpu") -> Any:
    """The batch with ``samples`` rows; to be called in fake mode."""
    rows = batch_samples(inputs)

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = list(value.shape)
        if shape and shape[0] == rows:
            shape[0] = samples
        return torch.empty(shape, dtype=value.dtype, device=device)

    return tree_map(fake, inputs)


_CONSTANTS = {
    _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty, _aten.new_empty_strided,
    _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.empty_like,
}  # fmt: skip
"""Operations that look at the shape of their input only."""


class _Origins(TorchDispatchMode):
    """Follows through all operations of a run where values come from that not every stage has.

    Those are the parameters, and whatever a module with parameters returns. Each comes from a step: the number of
    blocks that had been entered when it was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self._steps: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.first_use: dict[int, int] = {}

    def steps(self, tensor: Any) -> frozenset[int]:
        """The steps that a value comes from; empty where every stage can compute it."""
        found: frozenset[int] = self._steps.get(tensor, frozenset())
        return found | {self.step} if isinstance(tensor, nn.Parameter) else found

    def mark(self, values: Any, steps: frozenset[int]) -> None:
        """Says where values come from."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                self._steps[tensor] = steps

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if getattr(func, "overloadpacket", func) not in _CONSTANTS:
            steps: frozenset[int] = frozenset()
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    steps |= self.steps(tensor)
                if isinstance(tensor, nn.Parameter):
                    self.first_use.setdefault(id(tensor), self.step)
            if steps:
                self.mark(result, steps)
        return result


class _Run:
    """One observed run.

    Args:
        model: A copy of fake tensors.
        blocks: Names of its blocks.
        check: Whether to refuse what is no chain of blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], check: bool = False) -> None:
        self.model = model
        self.blocks = list(blocks)
        self.check = check
        self.order: list[str] = []
        self.arguments: list[list[Any]] = []
        self.sources: list[list[int | None]] = []
        self.depends: list[list[bool]] = []
        self.outputs: list[list[Any]] = []
        self.outside: dict[str, int] = {}
        self.returned: dict[int, tuple[Tensor, int]] = {}
        self.origins = _Origins()

    def __call__(self, run: Callable[[nn.Module, Any], Any], inputs: Any) -> None:
        inside = {id(part) for name in self.blocks for part in self.model.get_submodule(name).modules()}
        handles = []
        for name in self.blocks:
            block = self.model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True, prepend=True))
            handles.append(block.register_forward_hook(self._leave))
        for name, part in self.model.named_modules():
            if id(part) not in inside and (part._parameters or part._buffers):
                handles.append(part.register_forward_pre_hook(partial(self._outside, name)))
                if part._parameters and name:
                    handles.append(part.register_forward_hook(self._replaced))
        try:
            with self.origins:
                output = run(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        for name, part in self.model.named_modules():
            # A table that is looked into without calling its module belongs to where that happens.
            uses = [self.origins.first_use[id(p)] for p in part._parameters.values() if id(p) in self.origins.first_use]
            if uses and name not in self.outside and id(part) not in inside:
                self.outside[name] = min(uses)
        missing = [name for name in self.blocks if name not in self.order]
        if missing:
            raise UncuttableModelError(f"block {missing[0]!r} did not run: name the container of the blocks that do.")
        if self.check:
            self._check_chain("what follows the last block", tree_leaves(_plain(output)))

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in self.order:
            raise UncuttableModelError(f"block {name!r} runs twice in one forward: a model that does cannot be cut.")
        leaves, spec = tree_flatten((args, kwargs))
        if self.check:
            self._check_chain(f"block {name!r}", leaves)
        self.order.append(name)
        self.origins.step = len(self.order)
        self.arguments.append(leaves)
        self.sources.append([self._source(leaf) for leaf in leaves])
        self.depends.append([isinstance(leaf, Tensor) and bool(self.origins.steps(leaf)) for leaf in leaves])
        if not self.check:
            return None
        # A fresh start before every block: what reaches back further is then seen.
        return tree_unflatten([self._marked(leaf) for leaf in leaves], spec)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs.append(tree_leaves(output))
        for leaf in self.outputs[-1]:
            if isinstance(leaf, Tensor):
                self.returned[id(leaf)] = leaf, len(self.order) - 1
        self._replaced(module, args, output)

    def _replaced(self, module: nn.Module, args: Any, output: Any) -> None:
        # A stage without this module has nothing but the shapes of what it returns.
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.origins.mark(leaf, self.origins.steps(leaf) | {len(self.order)})

    def _outside(self, name: str, module: nn.Module, args: Any) -> None:
        self.outside.setdefault(name, len(self.order))

    def _source(self, leaf: Any) -> int | None:
        known = self.returned.get(id(leaf))
        return None if known is None else known[1]

    def _marked(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not self.origins.steps(leaf):
            return leaf
        marker = leaf.detach().requires_grad_(leaf.requires_grad)
        self.origins.mark(marker, frozenset((len(self.order),)))
        return marker

    def _check_chain(self, here: str, leaves: Sequence[Any]) -> None:
        """What is used from here on must come from the block just run, or have been among its arguments too."""
        before = {id(leaf) for leaf in self.arguments[-1]} if self.arguments else set()
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or id(leaf) in before:
                continue
            earlier = self.origins.steps(leaf) - {len(self.order)}
            if earlier:
                step = min(earlier)
                what = f"block {self.order[step - 1]!r}" if step else "the part before the blocks"
                raise UncuttableModelError(
                    f"{here} uses what {what} has computed or was given, which is not the one before it: the"
                    " model is no chain of blocks and cannot be cut."
                )


def _plain(output: Any) -> Any:
    """An output with attributes (a dataclass, say) as a dictionary."""
    if isinstance(output, Mapping):
        return dict(output)
    return vars(output) if hasattr(output, "__dict__") and not isinstance(output, Tensor) else output


def _combine(model: nn.Module, blocks: Sequence[str], first: _Run, second: _Run) -> ForwardTrace:
    if first.order != second.order or [len(a) for a in first.arguments] != [len(a) for a in second.arguments]:
        raise UncuttableModelError("the order of the blocks depends on the batch size: the model cannot be cut.")
    for name, ones, twos in zip(second.order, first.outputs, second.outputs, strict=True):
        for one, two in zip(ones, twos, strict=True):
            if isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape[1:] != two.shape[1:]:
                raise UncuttableModelError(_ELSEWHERE.format(f"block {name!r} returns", list(one.shape)))
    calls = []
    for position, name in enumerate(second.order):
        leaves: list[Leaf | None] = []
        for one, two, source in zip(
            first.arguments[position], second.arguments[position], second.sources[position], strict=True
        ):
            if not isinstance(one, Tensor) or not isinstance(two, Tensor):
                leaves.append(None)
                continue
            if one.shape[1:] != two.shape[1:]:
                raise UncuttableModelError(_ELSEWHERE.format(f"block {name!r} is given", list(one.shape)))
            ratio = (one.shape[0], two.shape[0]) if one.ndim else (0, 0)
            batched = ratio[0] != ratio[1]
            if batched and ratio[0] * _SAMPLES[1] != ratio[1] * _SAMPLES[0]:
                raise UncuttableModelError(
                    f"block {name!r} is given a tensor of {ratio[0]} rows for {_SAMPLES[0]} samples and {ratio[1]} for"
                    f" {_SAMPLES[1]}: expected the batch in dimension 0."
                )
            depends = second.depends[position][len(leaves)]
            if position and depends and not two.is_floating_point():
                raise UncuttableModelError(
                    f"block {name!r} is given a tensor of {two.dtype} that an earlier block or module computed: only"
                    " floating point can be sent between stages."
                )
            leaves.append(Leaf(source, batched, two.requires_grad, depends))
        calls.append((name, tuple(leaves)))
    done = []
    for position, (name, found) in enumerate(calls):
        following = calls[position + 1][1] if position + 1 < len(calls) else ()
        hands_over = any(leaf is not None and leaf.source == position for leaf in following)
        done.append(BlockCall(name, found, hands_over))
    return ForwardTrace(tuple(done), second.outside)


def _find_blocks(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """The class whose modules stand in containers and hold the most parameters; all of them, wherever they are.

    Blocks that are chains of equal blocks themselves (the stages of a Swin transformer) are opened: more places to cut.
    Other classes that hold a good part of the parameters join them where all are one chain: an encoder and a decoder.
    """
    groups = children_of_one_class(model)
    if not groups:
        raise UncuttableModelError(
            f"{type(model).__name__} has no list of two or more equal modules to parallelize. Name it, for example"
            ' blocks="model.layers".'
        )
    chosen = max(groups, key=lambda group: group.parameters)
    nested = [
        group
        for group in groups
        if group.parameters >= 0.8 * chosen.parameters
        and len(group.names) > len(chosen.names)
        and all(any(name.startswith(f"{outer}.") for outer in chosen.names) for name in group.names)
    ]
    opened = (group for group in sorted(nested, key=lambda g: len(g.names)) if _is_chain(model, group.names, run))
    chosen = next(opened, chosen)
    position = {name: index for index, (name, _) in enumerate(model.named_modules())}
    names = list(chosen.names)
    for group in sorted(groups, key=lambda group: -group.parameters):
        if group.parameters < _JOINING_SHARE * chosen.parameters or any(
            _overlap(a, b) for a in names for b in group.names
        ):
            continue
        together = sorted([*names, *group.names], key=position.__getitem__)
        if _is_chain(model, together, run, check=True):
            names = together
    return names


def _overlap(one: str, other: str) -> bool:
    """Whether a module is, or is inside of, another one."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _is_chain(model: nn.Module, names: Sequence[str], run: Callable[[], Any], *, check: bool = False) -> bool:
    """Whether each module of a container is given what the one before it returned.

    With ``check`` also whether the containers form a chain.
    """
    watch = _Run(model, names, check=check)
    try:
        watch(lambda _model, _inputs: run(), None)
    except UncuttableModelError:
        return False
    for call, name in enumerate(watch.order):
        parent, _, child = name.rpartition(".")
        if child != "0" and (call == 0 or call - 1 not in watch.sources[call]):
            return False
        if child != "0" and watch.order[call - 1].rpartition(".")[0] != parent:
            return False
    return True
