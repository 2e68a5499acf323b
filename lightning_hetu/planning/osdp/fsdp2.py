"""What FSDP2 allocates and frees, and when: its runtime played without tensors.

OSDP (arXiv 2209.13258) counts model states and one gathered copy. What a step of torch's FSDP2 really needs depends on
when it gathers, copies and frees, so this follows its runtime method by method. All that is assumed of torch's
internals is in this file, read in ``torch/distributed/fsdp/_fully_shard`` of torch 2.13 and checked against measured
steps:

* A gather fills a flat buffer, which is then copied into parameters. In forward the flat buffer stays until the next
  gather has been issued, so that two are alive; the root frees the last one when it returns.
* In backward the flat buffer is freed at once, but the unit that ran before in forward is gathered ahead, and its flat
  buffer waits while this unit computes.
* Parameters gathered in another dtype, and offloaded ones, are first copied into a buffer of the rank's own part.
* ``replicate`` copies its parameters from forward to backward as well.
* Resharding to fewer ranks (``zdp-k``) copies the part that is kept before the rest is freed.
* The input of a reduce-scatter stays until the next unit reduces. Of the gradients that were copied into it, the last
  parameter's lives until the reduction returns, because a loop variable still names it.
* ``replicate`` copies the reduction's input once more to divide it, and holds the buffer of its all-reduce until
  backward ends.
* A unit none of whose inputs has a gradient, such as an embedding, and the root reduce at the very end of backward, in
  the order of the module tree.

The order of allocations and frees is that of the host, on the CPU and on CUDA alike: CUDA's allocator counts bytes when
the host asks for them, and FSDP2 keeps references instead of telling the allocator of other streams. Where the two
differ is in :class:`Runtime`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Category = Literal["parameters", "gradients", "optimizer", "gathered", "transient", "activations", "base"]


@dataclass(frozen=True)
class Runtime:
    """Where devices and process groups differ in what a step allocates.

    Args:
        gather_copies: Temporary copies of its output that an all-gather makes: 1 for gloo, 0 for NCCL.
        reduce_scatter_copies: Temporary copies of its input that a reduce-scatter makes: 1 for gloo, 0 for NCCL.
        pads_gradients: Whether gradients whose first dimension the ranks do not divide are copied once more before a
            reduce-scatter. CUDA has a kernel that pads.
        casts_copy: Whether a sum in place of two dtypes first copies what is added. CUDA converts as it adds.
        host_counts: Whether what is offloaded lies in the same memory, as it does on the CPU.
        optimizer_each: Temporary copies of a local parameter that the optimizer makes while it updates that one. Adam,
            one parameter after another: 2.
        optimizer_before: Copies of the parameter before it that are still there. Adam: 1.
        optimizer_all: Temporary copies of all local parameters that the optimizer makes. Adam with ``foreach``: 1.
        stale_gradients: Whether the gradients of the step before are there in the first forward, as with Lightning,
            which frees them between forward and backward.

    Raises:
        ValueError: If a number is negative.
    """

    gather_copies: float = 1.0
    reduce_scatter_copies: float = 1.0
    pads_gradients: bool = True
    casts_copy: bool = True
    host_counts: bool = True
    optimizer_each: float = 2.0
    optimizer_before: float = 1.0
    optimizer_all: float = 0.0
    stale_gradients: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"runtime.{name}={value!r}: expected a number of at least 0.")


GLOO = Runtime()
"""The CPU with gloo."""
NCCL = Runtime(
    gather_copies=0.0,
    reduce_scatter_copies=0.0,
    pads_gradients=False,
    casts_copy=False,
    host_counts=False,
    optimizer_each=0.0,
    optimizer_before=0.0,
    optimizer_all=1.0,
)
"""CUDA with NCCL; the optimizer with ``foreach``, torch's choice there."""


Key = tuple[str, int]


@dataclass
class Tensor:
    """One parameter of a group, in elements.

    Args:
        key: Name of its operator, and its position among the operator's shapes.
        whole: Its size.
        padded: Its size with the first dimension padded to a multiple of the ranks.
        local: What the first rank holds of it when sharded, without padding.
        trained: Whether it gets a gradient.
    """

    key: Key
    whole: int
    padded: int
    local: int
    trained: bool = True


class Memory:
    """Bytes alive by category and by owner, and the most since the last look.

    Args:
        categories: Names of the categories.
        owners: Number of owners; what nobody owns has the number -1.
    """

    def __init__(self, categories: Sequence[str], owners: int = 0) -> None:
        self.now: dict[str, int] = dict.fromkeys(categories, 0)
        self.owned = [0] * (owners + 1)
        self.total = 0
        self.most = 0
        self.at_most = dict(self.now)
        self.owned_at_most = list(self.owned)

    def add(self, category: Category, size: float, owner: int = -1) -> None:
        """Adds bytes, or frees them if negative."""
        size = math.ceil(size)
        self.now[category] += size
        self.owned[owner] += size
        self.total += size
        if self.total > self.most:
            self._note_most()

    def look(self) -> tuple[dict[str, int], list[int]]:
        """The bytes by category and by owner when most were alive since the last look."""
        found = self.at_most, self.owned_at_most
        self._note_most()
        return found

    def _note_most(self) -> None:
        self.most = self.total
        self.at_most = dict(self.now)
        if len(self.owned) > 1:
            self.owned_at_most = list(self.owned)


class Shared:
    """What all groups below one root share."""

    def __init__(self, memory: Memory, runtime: Runtime, ranks: int) -> None:
        self.memory = memory
        self.runtime = runtime
        self.ranks = ranks
        self.flat = (0, -1)  # bytes of the last gather in forward, and whose they are
        self.reduced = (0, -1)  # likewise the input of the last reduction
        self.order: list[Group] = []  # in which groups ran forward

    def free_flat(self) -> None:
        """Frees the flat buffer that forward has kept."""
        size, owner = self.flat
        self.memory.add("transient", -size, owner)
        self.flat = (0, -1)

    def free_reduced(self) -> None:
        """Frees the input of the last reduction."""
        size, owner = self.reduced
        self.memory.add("transient", -size, owner)
        self.reduced = (0, -1)


class Group:
    """The parameters that are gathered together: torch's ``FSDPParamGroup``.

    Args:
        shared: What it shares with others.
        mode: ``dp``, ``z2``, ``zdp``, ``zdp-k`` or ``off``.
        kept: Ranks over which parameters stay sharded between forward and backward.
        tensors: Its parameters.
        stored: Bytes per element as stored.
        gathered: Bytes per gathered element.
        reduced: Bytes per reduced element.
        owner: Number of the operator.
        members: Names of its operators. As torch does for a group of several modules, it acts in front of the first
            that is called and behind the last one.
    """

    def __init__(
        self,
        shared: Shared,
        mode: str,
        kept: int,
        tensors: Sequence[Tensor],
        stored: int,
        gathered: int,
        reduced: int,
        owner: int = -1,
        members: Sequence[str] = (),
    ) -> None:
        self.shared = shared
        self.owner = owner
        self.members = tuple(members)
        self.to_run: set[str] = set()
        self.first = self.last = ""  # of the members in forward
        self.mode = mode
        self.kept = kept
        self.tensors = list(tensors)
        self.known = {tensor.key: tensor for tensor in self.tensors}
        self.stored, self.gathered, self.reduced = stored, gathered, reduced
        self.ranks = 1 if mode == "dp" else shared.ranks
        self.host = mode == "off" and not shared.runtime.host_counts
        self.state: Literal["sharded", "fewer", "whole"] = "sharded"
        self.training: Literal["idle", "forward", "before", "after"] = "idle"
        self.pending: int | None = None  # flat buffer of a gather whose result was not taken yet
        self.uses: list[int] = []
        self.gradients: dict[Key, int] = {}
        self.accumulated: dict[Key, int] = {}
        self.sharded_gradients = 0
        self.has_gradients = False
        self.held = 0
        self.reduces = True
        self.reshards = True

    def add(self, category: Category, size: float) -> None:
        """Adds bytes, or frees them if negative."""
        self.shared.memory.add(category, size, self.owner)

    def pulse(self, category: Category, size: float) -> None:
        """Bytes that are freed again at once."""
        self.add(category, size)
        self.add(category, -math.ceil(size))

    def elements(self, tensor: Tensor) -> int:
        """Elements of a parameter as the group gathers and reduces it."""
        return tensor.whole if self.ranks == 1 else tensor.padded

    @property
    def size(self) -> int:
        """Elements that a collective moves."""
        return sum(map(self.elements, self.tensors))

    def local(self, tensor: Tensor) -> int:
        """Elements of a parameter that the first rank updates."""
        return tensor.whole if self.ranks == 1 else tensor.local

    def unshard(self) -> None:
        """Starts a gather."""
        if self.pending is not None or self.state == "whole":
            return
        if self.ranks == 1:
            self.pending = 0
            return
        runtime, flat = self.shared.runtime, self.size * self.gathered
        among = self.kept if self.state == "fewer" else self.ranks
        own = flat // among if self.gathered != self.stored or self.host else 0
        self.add("transient", own)
        self.add("transient", flat)
        self.pulse("transient", flat * runtime.gather_copies)
        self.add("transient", -own)
        self.pending = flat

    def wait(self) -> None:
        """Takes the result of a gather."""
        if self.pending is None:
            return
        forward = self.training == "forward"
        if forward:
            self.shared.free_flat()
        copied = 0
        for tensor in self.tensors:
            size = self.elements(tensor) * self.gathered
            if self.ranks == 1 and (self.gathered != self.stored or self.host):
                self.add("transient", size)
                self.add("transient", -copied)
                copied = size
            self.add("gathered", size)
        self.add("transient", -copied)
        if self.state == "fewer":
            self.add("gathered", -self._fewer())
        self.state = "whole"
        if forward and self.ranks > 1:
            self.shared.flat = (self.pending, self.owner)
        else:
            self.add("transient", -self.pending)
        self.pending = None

    def reshard(self) -> None:
        """Frees what was gathered, as far as the mode wants it."""
        if self.state == "sharded":
            return
        if self.training == "forward":
            if self.mode in ("dp", "z2"):
                return
            if self.mode.startswith("zdp-"):
                for tensor in self.tensors:
                    size = self.elements(tensor) * self.gathered
                    self.add("gathered", size // self.kept)
                    self.add("gathered", -size)
                self.state = "fewer"
                return
        self.add("gathered", -(self._fewer() if self.state == "fewer" else self.size * self.gathered))
        self.state = "sharded"

    def _fewer(self) -> int:
        return sum(self.elements(tensor) * self.gathered // self.kept for tensor in self.tensors)

    def enter(self, recomputes: bool, name: str = "") -> None:
        """The forward of a module begins."""
        if self.to_run:
            return
        self.to_run = set(self.members)
        self.first = self.first if recomputes else name
        if recomputes and self.training == "before":
            self.unshard()
            self.wait()
            return
        self.training = "forward"
        self.unshard()
        self.wait()

    def leave(self, recomputes: bool, name: str = "") -> None:
        """The forward of a module ends."""
        self.to_run.discard(name)
        if self.to_run:
            return
        self.last = self.last if recomputes else name
        if recomputes and self.training == "before":
            return
        if not recomputes:
            self.reshard()
            self.uses.append(len(self.shared.order))
            self.shared.order.append(self)
        self.training = "idle"

    def before_backward(self, name: str = "") -> None:
        """The first gradient of an output of a module is there."""
        if self.training == "before" or name != self.last:
            return
        self.training = "before"
        self.unshard()
        self.wait()
        if self.uses and (use := self.uses.pop()) > 0:
            self.shared.order[use - 1].unshard()

    def gradient(self, key: Key) -> None:
        """Autograd has made the gradient of a parameter."""
        self.add("gradients", self.known[key].whole * self.gathered)

    def accumulate(self, key: Key) -> None:
        """The gradient is given to the parameter, or added to one that is there."""
        size = self.known[key].whole * self.gathered
        if key in self.gradients:
            self.add("gradients", -size)
        self.gradients[key] = size

    def after_inputs(self, name: str = "") -> None:
        """The gradients of all inputs of a module are there."""
        if name == self.first:
            self.after_backward()

    def after_backward(self) -> None:
        """Backward of the group is over."""
        self.training = "after"
        for key, size in self.accumulated.items():
            if key in self.gradients:
                self.pulse("transient", size if self.shared.runtime.casts_copy else 0)
                self.add("gradients", -self.gradients.pop(key))
        if not self.reduces:
            if self.reshards:
                self.reshard()
            if self.reduced != self.gathered:
                for key, size in self.gradients.items():
                    self.accumulated[key] = self.known[key].whole * self.reduced
                    self.add("gradients", self.accumulated[key])
                    self.add("gradients", -size)
                self.gradients.clear()
            return
        sizes = {**self.gradients, **self.accumulated}
        self.gradients.clear()
        self.accumulated.clear()
        if self.reshards:
            self.reshard()
        self.shared.free_reduced()
        if sizes:
            self._reduce(sizes)

    def _reduce(self, sizes: dict[Key, int]) -> None:
        runtime = self.shared.runtime
        self.add("gradients", -self.held)
        self.held = 0
        tensors = [tensor for tensor in self.tensors if tensor.key in sizes]
        count = sum(map(self.elements, tensors))
        flat, output = count * self.reduced, count // self.ranks * self.reduced
        self.add("transient", flat)
        if runtime.pads_gradients:
            padded = [tensor for tensor in tensors if self.elements(tensor) != tensor.whole]
            self.pulse("transient", sum(sizes[t.key] // t.whole * self.elements(t) for t in padded))
        last = sizes[tensors[-1].key] if self.ranks > 1 else 0
        self.add("gradients", last - sum(sizes.values()))
        self.add("gradients", output)
        if self.ranks > 1:
            self.pulse("transient", flat * runtime.reduce_scatter_copies)
        else:
            self.pulse("transient", flat)
        held = output if self.mode == "dp" else 0
        if self.stored != self.reduced:
            cast = count // self.ranks * self.stored
            self.add("gradients", cast)
            self.add("gradients", held - output)
            output = cast
        elif not self.has_gradients:
            held = 0  # it is the gradient
        self.add("gradients", -last)
        if self.has_gradients or self.host:
            if self.stored == self.reduced and held:
                held = output
            else:
                self.add("gradients", -output)
        else:
            self.sharded_gradients = output
        self.has_gradients = True
        self.held = held
        self.shared.reduced = (flat, self.owner)

    def finish_backward(self) -> None:
        """All of backward has ended."""
        if self.training != "after":
            self.after_backward()
        self.training = "idle"
        self.add("gradients", -self.held)
        self.held = 0
        if self.pending is not None:
            self.add("transient", -self.pending)
            self.pending = None
        self.uses.clear()
        self.to_run.clear()

    def free_gradients(self) -> None:
        """The gradients of the step before are freed."""
        self.add("gradients", -self.sharded_gradients)
        self.sharded_gradients, self.has_gradients = 0, False


def finish_backward(shared: Shared, groups: Sequence[Group]) -> None:
    """What the root does when autograd is done.

    Args:
        shared: What the groups share.
        groups: All groups in the order of the module tree.
    """
    for group in groups:
        group.finish_backward()
    shared.order.clear()
    shared.free_reduced()
