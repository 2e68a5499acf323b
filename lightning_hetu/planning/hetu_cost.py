"""Cost model of this package's own executor: FSDP2, tensor and sequence parallelism, pipeline schedules.

Follows the estimator of Galvatron (arXiv 2211.13878, section 3.3) and differs where our runtime differs:

* Tensor parallelism keeps activations replicated between layers: two all-reduces per direction and layer. With sequence
  parallelism (arXiv 2205.05198, section 4.2.2) each is an all-gather and a reduce-scatter, and the layer's output and
  the gradient of its input are gathered.
* A layer whose sequence is cut otherwise, by Ulysses (arXiv 2309.14509) or ring attention (arXiv 2310.01889), takes its
  part of a whole input and gathers its output as well; its weights are shared out like those of data parallelism.
* Sharded layers reduce-scatter their gradients in every microbatch, so only shards are kept. ``ddp`` accumulates full
  gradients and reduces them once per step, in the last microbatch.
* ``zero3`` gathers parameters in forward and in backward of every microbatch, ``zero2`` once per step, ``ddp`` never.
  Recomputation does not gather once more: it runs with the parameters already there for backward.
* A row may have operators that are ``zero3`` while the rest of it is not (OSDP, arXiv 2209.13258). It is then priced by
  parts: each operator is gathered and reduced as a group of its own, with a message and a latency of its own.
* Experts that ranks share out (GShard, arXiv 2006.16668) are on their ranks for good: they are neither gathered nor
  reduced, but every use sends rows to them and back by all-to-all.
* Peak memory has the temporary buffers of FSDP2 in it, see :class:`HetuConstants`.
* Processes that share the cores of a host slow each other down.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Literal, NamedTuple

from lightning_hetu.planning.cluster import ClusterSpec
from lightning_hetu.planning.cost_model import Bytes, CostModel, RowCost, RowMemory, Setting, byte_vector
from lightning_hetu.planning.enumeration import layer_strategies
from lightning_hetu.planning.layer_strategy import DataParallelType, LayerStrategy
from lightning_hetu.planning.profile import LayerProfile, ModelProfile

_ULYSSES_EXCHANGES = 4
"""All-to-alls of a layer in one direction: queries, keys, values and output."""


@dataclass(frozen=True)
class HetuConstants:
    """What the executor adds to the textbook; every number can be calibrated.

    The gather and reduce factors count sizes of one row's parameters. They reproduce storage traces of FSDP2 in torch
    2.13 (CPU, gloo, 4 ranks, 6 equal blocks, AdamW; fp32 and bf16 compute) to within 3 percent.

    Args:
        gathered_ratio: Bytes of a gathered parameter per byte of parameter. The executor computes in bf16 by autocast
            and gathers what is stored; with FSDP's own mixed precision it would be 0.5.
        reduced_ratio: Bytes of a full-size gradient in reduction and accumulation per byte of parameter.
        zero3_forward_gather: Gathered sizes alive in a ``zero3`` forward: its own copy and the flat buffers of this and
            the previous gather.
        zero2_forward_gather: The same for ``zero2`` on top of the copy it keeps.
        zero3_backward_gather: Gathered sizes alive in a ``zero3`` backward: its own copy and the prefetched one.
        reduce_every_microbatch: Whether ``zero2`` and ``zero3`` reduce gradients in every microbatch. Otherwise they
            accumulate full-size gradients and reduce in the last one, as ``ddp`` always does.
        backward_reduce: Full-size gradients alive in a backward that reduces: the gradient and the flat buffer.
        lingering_reduce: Flat buffers of a reduction alive while the backward of the next row runs.
        ddp_keeps_copy: Whether ``ddp`` keeps a second full copy of its parameters from forward to backward, as FSDP2's
            ``replicate`` does, also over one rank.
        gradients_during_forward: Whether the gradients of the previous step are still alive in forward. Lightning's own
            loop clears them between forward and backward; our strategy clears them before forward.
        accumulates: Whether gradients of earlier batches are kept meanwhile (``accumulate_grad_batches`` above 1):
            shards with pipeline support, full ones without.
        optimizer_transient: Temporary bytes of the optimizer step per byte of local parameters.
        tp_forward_reduces: All-reduces of a tensor-parallel block in forward.
        tp_backward_reduces: The same in backward.
        tp_recompute_reduces: The same in recomputation.
        tp_embedding_reduces: All-reduces of a tensor-parallel embedding, forward and backward together.
        tp_head_reduces: All-reduces of a tensor-parallel head, forward and backward together.
        overlap_gathers: Whether parameter gathers overlap with computation, where the cluster overlaps at all: FSDP2
            prefetches the next one in both directions.
        context_bytes: Bytes per device taken by the runtime itself.
        optimizer_seconds_per_byte: Seconds of the optimizer step per byte of local parameters.
    """

    gathered_ratio: float = 1.0
    reduced_ratio: float = 1.0
    zero3_forward_gather: float = 3.0
    zero2_forward_gather: float = 2.0
    zero3_backward_gather: float = 2.0
    reduce_every_microbatch: bool = True
    backward_reduce: float = 2.0
    lingering_reduce: float = 1.0
    ddp_keeps_copy: bool = True
    gradients_during_forward: bool = False
    accumulates: bool = False
    optimizer_transient: float = 0.25
    tp_forward_reduces: int = 2
    tp_backward_reduces: int = 2
    tp_recompute_reduces: int = 2
    tp_embedding_reduces: int = 1
    tp_head_reduces: int = 1
    overlap_gathers: bool = True
    context_bytes: int = 0
    optimizer_seconds_per_byte: float = 0.0


@dataclass(frozen=True)
class _Part:
    """Parameters of a row that have one type of data parallelism.

    Args:
        dp_type: The type.
        shards: Ranks that share them out, 1 for copies.
        sizes: Bytes of each group that is gathered and reduced on its own, on one tensor-parallel rank.
        trained: Share of them that is trained.
    """

    dp_type: DataParallelType
    shards: int
    sizes: tuple[float, ...]
    trained: float

    @cached_property
    def total(self) -> float:
        """Bytes of all groups."""
        return sum(self.sizes)

    @cached_property
    def largest(self) -> float:
        """Bytes of the largest group."""
        return max(self.sizes)


class _ExpertShare(NamedTuple):
    """A rank's share of the experts of one row.

    Args:
        parameters: Bytes.
        trained: Bytes of those of them that are trained.
        ranks: Ranks that share them out.
    """

    parameters: float
    trained: float
    ranks: int


class _Traffic(NamedTuple):
    """Seconds of data parallelism of one row, if nothing ran beside it.

    Args:
        gather: Gathering the parameters that are gathered around each use, in one direction.
        gather_once: Gathering those that are gathered once per step.
        reduce: Reducing the gradients that are reduced in every microbatch.
        reduce_last: Reducing those that are reduced in the last one only.
    """

    gather: float
    gather_once: float
    reduce: float
    reduce_last: float


class _ParameterBytes(NamedTuple):
    """What the parameters of one row take in a step, in bytes per device.

    Args:
        parameters: At rest.
        trained: Those of them that are trained.
        copy: Gathered copies from forward to backward.
        accumulated: Gradients between two microbatches.
        forward: Gathered sizes alive while the forward runs.
        backward: The same of backward.
        new: Full gradients that the backward has made when the most is alive in it.
        lingering: Flat buffer of a reduction that is still there while a backward runs.
        reduced: Gradients and flat buffers of the largest reduction, over what is gone by then.
    """

    parameters: float
    trained: float
    copy: float
    accumulated: float
    forward: float
    backward: float
    new: float
    lingering: float
    reduced: float


class HetuCostModel(CostModel):
    """Prices rows for our executor.

    Args:
        profile: The model.
        cluster: The devices.
        constants: Properties of the executor.
    """

    name = "hetu"

    def __init__(self, profile: ModelProfile, cluster: ClusterSpec, constants: HetuConstants | None = None) -> None:
        self.profile = profile
        self.cluster = cluster
        self.constants = constants or HetuConstants()
        self.num_layers = profile.num_layers
        self.num_devices = cluster.num_devices
        self.pipeline = profile.pipeline
        self.microbatches = profile.microbatches
        self.split_vocab = profile.split_vocab
        self._gathered = self.constants.gathered_ratio
        self._reduced = self.constants.reduced_ratio
        self._memory_cache: dict[object, RowMemory] = {}
        own = profile.head.parameter_bytes - profile.tied_bytes
        self._head_without_table = replace(
            profile.head, parameter_bytes=own, tp_parameter_bytes=min(profile.head.tp_parameter_bytes, own)
        )

    def layer(self, row: int) -> LayerProfile:
        """Profile of a row."""
        if row == 0:
            return self.profile.embedding
        return self.profile.head if row > self.num_layers else self.profile.block(row - 1)

    def _layer_of_plan(self, row: int, setting: Setting) -> LayerProfile:
        """Profile of a row; a head in one stage with the embedding has none of what the two share."""
        layer = self.layer(row)
        if row <= self.num_layers or not self.profile.tied_bytes or setting.num_stages > 1:
            return layer
        return self._head_without_table

    def row_kind(self, row: int) -> Hashable:
        """Embedding, head, or the layer type."""
        return {0: "embedding", self.num_layers + 1: "head"}.get(row) or self.profile.layers[row - 1] + 1

    def strategies(self, row: int, setting: Setting) -> list[LayerStrategy]:
        """What the executor runs; embedding and head without recomputation and with whole sequences."""
        layer = self.layer(row)
        if not 0 < row <= self.num_layers:
            return layer_strategies(setting.devices_per_stage, tp_degrees=layer.tp_degrees, recompute=(False,))
        return layer_strategies(
            setting.devices_per_stage,
            tp_degrees=layer.tp_degrees,
            sequence_degrees=layer.sequence_degrees,
            ulysses_degrees=layer.ulysses_degrees,
            context_degrees=layer.context_degrees,
        )

    def row_name(self, row: int) -> str:
        """Layer type of a row, for tables."""
        return self.layer(row).name

    def boundary_bytes(self, row: int) -> float:
        """Bytes per sample of the input of a row that is not the first."""
        return self.layer(row).boundary_bytes

    # ---- time -------------------------------------------------------------------------------------------------------

    def contention(self, setting: Setting) -> float:
        """How much slower a device computes than alone, because processes share cores.

        In a pipeline of P stages and m microbatches a device computes for m / (m + P - 1) of the time, so
        ``N * m / (m + P - 1)`` devices compute at once on average. With equal stages the step then takes
        ``max(pipeline time at full speed, compute of all devices / slots)``.
        """
        busy = setting.num_microbatches / (setting.num_microbatches + setting.num_stages - 1)
        return max(1.0, setting.world_size * busy / self.cluster.slots)

    def _overlap(self, compute: float, communication: float, *, overlaps: bool = True) -> float:
        """Time of computation and communication side by side: both slow down while both run (spec of Galvatron)."""
        slowdown = self.cluster.overlap_slowdown
        if slowdown is None or not overlaps:
            return compute + communication
        short, long = sorted((compute, communication))
        return short * slowdown + max(0.0, long - short)

    def row_cost(self, row: int, stage: int, strategy: LayerStrategy, setting: Setting) -> RowCost:
        """Price of one row under one strategy."""
        layer = self._layer_of_plan(row, setting)
        c = self.constants
        contention = self.contention(setting)
        forward = self._forward_seconds(layer, strategy, setting)
        overhead = self.cluster.layer_overhead * contention
        backward = forward * layer.backward_ratio + (forward if strategy.recompute else 0.0)
        parts = self._parts(layer, strategy)
        traffic = self._traffic(parts, strategy)
        tensor = self.tensor_times(row, strategy, setting)
        sequence = self.sequence_times(row, strategy, setting)
        exchange = self.expert_times(row, strategy, setting)
        border = self._border_seconds(row, stage, strategy, setting)

        gather = traffic.gather
        forward_total = self._overlap(forward, gather, overlaps=c.overlap_gathers)
        backward_total = self._overlap(backward, gather, overlaps=c.overlap_gathers)
        # The reductions run next to the backward as well.
        gathered, reduced = (self._overlap(backward, seconds) for seconds in (gather, gather + traffic.reduce))
        reduce_exposed = reduced - gathered
        reduce_last = self._overlap(backward, gather + traffic.reduce + traffic.reduce_last) - reduced
        once_gather = self._overlap(forward, gather + traffic.gather_once, overlaps=c.overlap_gathers) - forward_total
        reduces: dict[str, float] = {}
        for part in parts:
            if self._reduces_every_microbatch(part):
                reduces["gradient_reduce"] = reduce_exposed
            else:
                reduces["gradient_reduce_per_step"] = reduce_last
        local = sum(part.total / part.shards for part in parts) * layer.trainable_fraction
        own = self._expert_share(layer, strategy)
        optimizer = (local + own.trained) * c.optimizer_seconds_per_byte
        copies = self._expert_sync_seconds(own, strategy)
        tied = self._tied_seconds(row, strategy, setting)
        return RowCost(
            seconds=forward_total
            + backward_total
            + overhead
            + sum(tensor)
            + sum(sequence)
            + sum(exchange)
            + sum(border)
            + reduce_exposed,
            sync=once_gather + optimizer + tied + copies + reduce_last,
            memory=self._memory(row, stage, strategy, setting),
            parts={
                "forward": forward,
                "backward": backward,
                "tensor_parallel": sum(tensor),
                "sequence_parallel": sum(sequence),
                "expert_exchange": sum(exchange),
                "parameter_gather": forward_total + backward_total - forward - backward,
                "stage_border": sum(border),
                "runtime": overhead,
                **reduces,
                "parameter_gather_per_step": once_gather,
                "optimizer_per_step": optimizer,
                "tied_gradients_per_step": tied,
                "expert_gradients_per_step": copies,
            },
            forward=forward_total + overhead / 2 + tensor[0] + sequence[0] + exchange[0] + border[0],
            first_forward=once_gather,
            optimizer=optimizer + tied + copies,
        )

    def _forward_seconds(self, layer: LayerProfile, strategy: LayerStrategy, setting: Setting) -> float:
        """Seconds that the forward of a row computes in one microbatch."""
        samples = setting.microbatch_size / strategy.dp
        return layer.forward_seconds(samples / strategy.sequence_degree, strategy.tp) * self.contention(setting)

    def gather_in_forward(self, row: int, strategy: LayerStrategy, setting: Setting) -> float:
        """Seconds that gathers around each use add to the forward of one microbatch."""
        layer = self._layer_of_plan(row, setting)
        forward = self._forward_seconds(layer, strategy, setting)
        gather = self._traffic(self._parts(layer, strategy), strategy).gather
        return self._overlap(forward, gather, overlaps=self.constants.overlap_gathers) - forward

    def _parts(self, layer: LayerProfile, strategy: LayerStrategy) -> tuple[_Part, ...]:
        """The parameters of a row by their type of data parallelism; one part, unless operators are sharded further.

        Raises:
            ValueError: If the profile does not know such an operator.
        """
        full, trained, shards = layer.parameters(strategy.tp), layer.trainable_fraction, strategy.shard_degree
        own = 1 if strategy.dp_type == "ddp" else shards
        if not strategy.sharded:
            return (_Part(strategy.dp_type, own, (full,), trained),)
        unknown = [name for name in strategy.sharded if name not in layer.operators]
        if unknown:
            known = ", ".join(layer.operators) or "none known; profile the model again"
            raise ValueError(
                f"strategy {strategy}: layer {layer.name!r} has no operator {unknown[0]!r}, expected among {known}."
            )
        # Which of them tensor parallelism splits is not known one by one: each is taken to be split as the layer is.
        scale = full / layer.parameter_bytes
        sizes = tuple(layer.operators[name] * scale for name in strategy.sharded)
        parts = (_Part("zero3", shards, sizes, trained),)
        rest = full - sum(sizes)
        return parts if rest < 1 else (_Part(strategy.dp_type, own, (rest,), trained), *parts)

    def _traffic(self, parts: Sequence[_Part], strategy: LayerStrategy) -> _Traffic:
        """Seconds of gathers and reductions, each with the message of its group."""
        # Tensor parallelism is innermost: the ranks that hold one shard of the weights are tp apart.
        stride = strategy.tp if strategy.tp_consecutive else 1
        ranks = strategy.shard_degree
        gathers = {"ddp": 0.0, "zero2": 0.0, "zero3": 0.0}
        every = last = 0.0
        for part in parts:
            kind: Literal["all_reduce", "reduce_scatter"] = "all_reduce" if part.dp_type == "ddp" else "reduce_scatter"
            for size in part.sizes:
                if part.dp_type != "ddp":
                    gathers[part.dp_type] += self.cluster.seconds(
                        "all_gather", ranks, size * self._gathered, stride=stride
                    )
                seconds = self.cluster.seconds(kind, ranks, size * part.trained * self._reduced, stride=stride)
                if self._reduces_every_microbatch(part):
                    every += seconds
                else:
                    last += seconds
        return _Traffic(gathers["zero3"], gathers["zero2"], every, last)

    def _tied_seconds(self, row: int, strategy: LayerStrategy, setting: Setting) -> float:
        """Once per step first and last stage add up the gradients of what embedding and head share."""
        if row <= self.num_layers or not self.profile.tied_bytes or setting.num_stages == 1:
            return 0.0
        message = self.profile.tied_bytes * self._reduced
        if strategy.dp_type != "ddp":
            message /= strategy.shard_degree
        apart = setting.devices_per_stage * (setting.num_stages - 1)
        return self.cluster.seconds("all_reduce", 2, message, stride=apart)

    def _reduces_every_microbatch(self, strategy: LayerStrategy | _Part) -> bool:
        return strategy.dp_type != "ddp" and self.constants.reduce_every_microbatch

    def tensor_times(self, row: int, strategy: LayerStrategy, setting: Setting) -> tuple[float, float]:
        """Seconds of tensor parallelism for one microbatch in forward and in backward: sums and gathers."""
        if strategy.tp == 1:
            return 0.0, 0.0
        c = self.constants
        samples = setting.microbatch_size / (strategy.dp * strategy.sequence_degree)
        if row == 0:
            # The embedding's input are indices; what it reduces is its output, the input of the first block.
            forward, backward, message = c.tp_embedding_reduces, 0, self.boundary_bytes(1) * samples
        elif row > self.num_layers:
            # The head reduces the gradient of its input.
            forward, backward, message = 0, c.tp_head_reduces, self.boundary_bytes(row) * samples
        else:
            forward, backward = c.tp_forward_reduces, c.tp_backward_reduces
            backward += c.tp_recompute_reduces if strategy.recompute else 0
            message = self.boundary_bytes(row) * samples
        stride = 1 if strategy.tp_consecutive else strategy.shard_degree
        if strategy.sequence_parallel:
            gather, scatter = (
                self.cluster.seconds(kind, strategy.tp, message, stride=stride)
                for kind in ("all_gather", "reduce_scatter")
            )
            # Whole again: behind the layer its output, before it the gradient of its input. What a product gathers is
            # not kept: backward gathers it once more, unless recomputation just did.
            again = 0 if strategy.recompute else c.tp_forward_reduces
            both = gather + scatter
            return forward * both + gather, backward * both + (again + 1) * gather
        seconds = self.cluster.seconds("all_reduce", strategy.tp, message, stride=stride)
        return forward * seconds, backward * seconds

    def sequence_times(self, row: int, strategy: LayerStrategy, setting: Setting) -> tuple[float, float]:
        """Seconds of Ulysses and context parallelism for one microbatch in forward and in backward.

        The layer takes its part of a whole input and gathers its output; backward gathers the gradient of the input.
        In between, Ulysses exchanges queries, keys, values and output, each of which has a rank's part of the
        boundary, and their gradients. Ring attention sends keys and values to the next rank ``cp - 1`` times; backward
        does so again, and their gradients go all the way round. Recomputation repeats what is in between.
        """
        parts = strategy.sequence_degree
        if parts == 1:
            return 0.0, 0.0
        sp, cp = strategy.sp, strategy.cp
        stride = strategy.tp if strategy.tp_consecutive else 1
        whole = self.boundary_bytes(row) * setting.microbatch_size / strategy.dp
        gather = self.cluster.seconds("all_gather", parts, whole, stride=stride)
        exchange = _ULYSSES_EXCHANGES * self.cluster.seconds("all_to_all", sp, whole / parts, stride=stride)
        # On a ring an all-gather is cp - 1 rounds as well, here of a rank's keys and values.
        pairs = 2 * whole / (parts * strategy.tp)
        ring = self.cluster.seconds("all_gather", cp, pairs * cp, stride=stride * sp)
        home = ring * cp / (cp - 1) if cp > 1 else 0.0
        again = exchange + ring if strategy.recompute else 0.0
        return gather + exchange + ring, gather + exchange + ring + home + again

    def expert_times(self, row: int, strategy: LayerStrategy, setting: Setting) -> tuple[float, float]:
        """Seconds of the all-to-alls to experts and back, for one microbatch in forward and in backward.

        Rows are taken to be spread evenly. Recomputation sends them once more.
        """
        experts = self.layer(row).experts
        if experts is None:
            return 0.0, 0.0
        samples = setting.microbatch_size / (strategy.dp * strategy.sequence_degree)
        ranks, stride = experts.ranks(strategy.shard_degree), strategy.tp if strategy.tp_consecutive else 1
        both_ways = 2 * self.cluster.seconds("all_to_all", ranks, experts.routed_bytes * samples, stride=stride)
        return both_ways, both_ways * (2 if strategy.recompute else 1)

    @staticmethod
    def _expert_share(layer: LayerProfile, strategy: LayerStrategy) -> _ExpertShare:
        """A rank's share of the experts of a row."""
        if layer.experts is None:
            return _ExpertShare(0.0, 0.0, 1)
        ranks = layer.experts.ranks(strategy.shard_degree)
        share = layer.experts.parameter_bytes / ranks
        return _ExpertShare(share, share * layer.experts.trainable_fraction, ranks)

    def _expert_sync_seconds(self, own: _ExpertShare, strategy: LayerStrategy) -> float:
        """Once per step the ranks with the same experts add up their gradients."""
        stride = own.ranks * (strategy.tp if strategy.tp_consecutive else 1)
        return self.cluster.seconds("all_reduce", strategy.shard_degree // own.ranks, own.trained, stride=stride)

    def _regroup_seconds(self, row: int, finer: int, coarser: int, setting: Setting) -> float:
        """One all-gather of the input of ``row`` from ``finer`` batch shards to ``coarser`` ones.

        Going back is a slice and free. Devices with one of the finer shards are neighbors.
        """
        message = self.boundary_bytes(row) * setting.microbatch_size / coarser
        stride = setting.devices_per_stage // finer
        return self.cluster.seconds("all_gather", finer // coarser, message, stride=stride)

    def relayout_seconds(self, row: int, before: LayerStrategy, after: LayerStrategy, setting: Setting) -> float:
        """Seconds per microbatch to bring the output of the row before into the layout of ``row``.

        To fewer batch shards: an all-gather in forward, a slice in backward. To more: the other way round.
        """
        if before.dp == after.dp:
            return 0.0
        finer, coarser = (before, after) if before.dp > after.dp else (after, before)
        return self._regroup_seconds(row, finer.dp, coarser.dp, setting)

    def relayout_times(
        self, row: int, before: LayerStrategy, after: LayerStrategy, setting: Setting
    ) -> tuple[float, float]:
        """Forward gathers on the way to fewer batch shards, backward on the way to more."""
        seconds = self.relayout_seconds(row, before, after, setting)
        return (seconds, 0.0) if before.dp > after.dp else (0.0, seconds)

    def _border_seconds(self, row: int, stage: int, strategy: LayerStrategy, setting: Setting) -> tuple[float, float]:
        """Receiving over the borders of a stage, per microbatch: activations in forward, gradients in backward.

        Both cross in the most sharded layout and are gathered on arrival.
        """
        rows = setting.rows(stage)
        found = []
        shards = self._border_shards(setting)
        devices = setting.devices_per_stage
        for border_row, sender in (
            (row if row == rows[0] and stage > 0 else None, stage - 1),
            (row + 1 if row == rows[-1] and stage < setting.num_stages - 1 else None, stage),
        ):
            if border_row is None:
                found.append(0.0)
                continue
            message = self.boundary_bytes(border_row) * setting.microbatch_size / shards
            # Every rank talks to the one at its position in the next stage.
            seconds = self.cluster.seconds("p2p", 2, message, stride=devices, first_rank=sender * devices)
            found.append(seconds + self._regroup_seconds(border_row, shards, min(strategy.dp, shards), setting))
        return found[0], found[1]

    @staticmethod
    def _border_shards(setting: Setting) -> int:
        """Batch shards of what crosses a stage border: as many as devices, or as divide the microbatch."""
        return gcd(setting.microbatch_size, setting.devices_per_stage)

    # ---- memory -----------------------------------------------------------------------------------------------------

    def stage_base(self, stage: int, setting: Setting, strategies: Sequence[LayerStrategy] | None = None) -> Bytes:
        """The runtime's own memory, and the activations that wait at the end of the stage."""
        rows = setting.rows(stage)
        # What a stage was sent is the input that its first row keeps; what it sends is kept by nobody else.
        borders = [rows[-1] + 1] if stage < setting.num_stages - 1 else []
        samples = setting.microbatch_size / self._border_shards(setting)
        waiting = sum(self.boundary_bytes(row) for row in borders) * samples
        return byte_vector(transient=self.constants.context_bytes, activations=waiting * setting.in_flight(stage))

    def _memory(self, row: int, stage: int, strategy: LayerStrategy, setting: Setting) -> RowMemory:
        layer = self._layer_of_plan(row, setting)
        in_flight = setting.in_flight(stage)
        single = setting.num_stages == 1
        key = (self.row_kind(row), strategy, setting.microbatch_size, setting.num_microbatches, in_flight, single)
        if key not in self._memory_cache:
            whole = not self.split_vocab and not 0 < row <= self.num_layers
            self._memory_cache[key] = self._row_memory(layer, strategy, setting, in_flight, whole)
        return self._memory_cache[key]

    def _row_memory(
        self, layer: LayerProfile, strategy: LayerStrategy, setting: Setting, in_flight: int, whole: bool = False
    ) -> RowMemory:
        """Bytes of one row in all phases.

        Args:
            layer: The row's profile.
            strategy: Its strategy.
            setting: Stages and microbatches.
            in_flight: Microbatches that are held at most.
            whole: Whether the row is gathered for as long as its stage runs: what is outside of the blocks of a model
                that runs its own forward.
        """
        c = self.constants
        samples = setting.microbatch_size / strategy.dp
        tp, parts = strategy.tp, strategy.sequence_degree
        microbatches = setting.num_microbatches
        uncut = layer.boundary_bytes * samples
        # Ulysses and context parallelism cut everything inside of the layer.
        samples /= parts
        inside = layer.activations(tp, sequence_parallel=strategy.sequence_parallel) * samples
        entry = layer.boundary_bytes * samples
        forward_extra = LayerProfile.at_degree(layer.forward_transient, tp) * samples
        backward_extra = LayerProfile.at_degree(layer.backward_transient, tp) * samples
        rerun_extra, gathered = forward_extra, 0.0
        if strategy.sequence_parallel:
            # Beyond its part a rank has, for a moment, the whole input of the layer and of a product, and what the
            # product's sum is scattered into; in backward only one whole input.
            part = entry / tp
            forward_extra += 2 * entry + part
            rerun_extra += part
            backward_extra += entry - part
            gathered = c.tp_forward_reduces * (entry - part)  # in recomputation until backward
            entry = part
        if parts > 1:
            # The whole input is there until the whole output is. Inside, an exchange has queries, keys and values
            # twice; at the end the output is gathered and then put in order. In backward there is the whole gradient
            # of input or output.
            forward_extra = uncut + max(forward_extra + 4 * entry, 2 * uncut + 2 * entry)
            backward_extra += uncut
        kept = min(entry, inside) if strategy.recompute else inside
        if strategy.recompute:
            # Forward drops what is inside at once; right before its own backward all of it is there again.
            backward_extra = inside - kept + gathered + max(backward_extra, rerun_extra)

        own = self._parameter_bytes(layer, strategy, setting, in_flight, kept, whole)
        gradient, accumulated, copy = own.trained, own.accumulated, own.copy
        states = {"parameters": own.parameters, "optimizer": gradient * self.profile.optimizer_state_bytes}
        full_gradients = layer.parameters(tp) * layer.trainable_fraction * self._reduced
        full_gradients += self._expert_share(layer, strategy).trained
        earlier = (gradient if self.pipeline else full_gradients) if c.accumulates else 0.0
        if microbatches == 1:
            resting = gradient if c.gradients_during_forward else 0.0
            held = byte_vector(**states, gradients=resting + earlier, activations=kept, gathered=copy)
            released = byte_vector(**states, gradients=gradient + earlier)
        else:
            # Gradients accumulate from the first backward on, when one microbatch is gone already.
            late = min(in_flight, microbatches - 1) * kept + accumulated
            if in_flight * kept > late:
                held = byte_vector(**states, gradients=earlier, activations=in_flight * kept, gathered=copy)
            else:
                here = accumulated + earlier
                held = byte_vector(**states, gradients=here, activations=late - accumulated, gathered=copy)
            waiting = (in_flight - 1) * kept
            released = byte_vector(**states, gradients=accumulated + earlier, activations=waiting, gathered=copy)
        backward_extra = max(backward_extra + own.new + max(own.lingering, 0.0), own.reduced)
        step = byte_vector(**states, gradients=gradient, transient=gradient * c.optimizer_transient)
        return RowMemory(
            held=held,
            released=released,
            forward=held + byte_vector(transient=forward_extra + own.forward),
            backward=held + byte_vector(transient=backward_extra + own.backward),
            step=step,
        )

    def _parameter_bytes(
        self, layer: LayerProfile, strategy: LayerStrategy, setting: Setting, in_flight: int, kept: float, whole: bool
    ) -> _ParameterBytes:
        """Bytes of parameters and gradients of one row, and of the buffers that they are gathered and reduced in.

        Args:
            layer: The row's profile.
            strategy: Its strategy.
            setting: Stages and microbatches.
            in_flight: Microbatches that are held at most.
            kept: Activations that are kept of one of them.
            whole: See :meth:`_row_memory`.
        """
        c, microbatches = self.constants, setting.num_microbatches
        parts = self._parts(layer, strategy)
        full = sum(part.total for part in parts)
        gradients = LayerProfile.at_degree(layer.backward_gradients, strategy.tp) * self._reduced
        parameters = trained = copy = accumulated = forward = backward = new = flat = rest = 0.0
        lingering = reduced = float("-inf")
        for part in parts:
            every = self._reduces_every_microbatch(part)
            parameters += part.total / part.shards
            local = part.total * part.trained / part.shards
            trained += local
            accumulated += local if every else part.total * part.trained * self._reduced
            # One gathered copy from forward to backward; zero3 has its own only while it runs.
            keeps = part.dp_type == "zero2" or (part.dp_type == "ddp" and c.ddp_keeps_copy)
            keeps |= whole and part.dp_type == "zero3"
            copy += part.total * self._gathered if keeps else 0.0
            if part.dp_type == "zero2":
                flat = part.total * self._gathered
                forward = c.zero2_forward_gather * part.total * self._gathered
            elif part.dp_type == "zero3":
                largest = part.largest * self._gathered
                # The gather before the first operator's own may have been that of the rest.
                forward = max(forward, c.zero3_forward_gather * largest + max(flat - largest, 0.0))
                backward = c.zero3_backward_gather * largest
                if strategy.recompute:
                    # What recomputation gathers inside of the row stays for backward.
                    backward += part.total * self._gathered - largest
            arriving = part.largest * part.trained * self._reduced
            if microbatches == 1 or every:
                # Full gradients are made from the first layer of its backward on; elsewhere they are there already.
                made = gradients * (part.total / full if full else 1.0)
                new += made if len(part.sizes) == 1 else min(made, arriving)
            # FSDP2 frees the flat buffer of a reduction when the next row reduces: it is still there while that row
            # runs its backward. The next row is taken to be of the same size. What reduces in the last microbatch only
            # has released the others by then.
            lingers = c.lingering_reduce * arriving
            lingering = max(lingering, lingers - (0.0 if every else (in_flight - 1) * kept))
            # Gradients are reduced when the row's backward is done, and so its activations are gone: of this
            # microbatch, or of all of them where only the last microbatch reduces. The accumulated gradient counts
            # already; a new one and the flat buffer of the reduction come on top.
            if part.dp_type == "zero3" and strategy.sharded:
                # Operators reduce in between: the first one before activations are gone, the last one when they are,
                # and all gradients of the rest are there.
                gone = min(0.0, kept - rest)
            else:
                gone = kept if every else min(in_flight, microbatches) * kept
                rest = arriving if microbatches == 1 or every else 0.0
            reduced = max(reduced, c.backward_reduce * arriving - gone)
        experts = self._expert_share(layer, strategy)
        parameters += experts.parameters
        trained += experts.trained
        accumulated += experts.trained
        new += experts.trained if microbatches == 1 else 0.0
        return _ParameterBytes(parameters, trained, copy, accumulated, forward, backward, new, lingering, reduced)
