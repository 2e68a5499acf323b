"""The cost model of the released Galvatron 3 (PKU-DAIR/Hetu-Galvatron), for comparing plans with it.

It follows the formulas of that release, including those we consider wrong, so that its plans get its predictions:

* A recomputed layer is charged only for its input, not for what its own backward recomputes.
* A strategy with dp 1 and Ulysses ranks never pays for its gradient synchronization.
* Gradient synchronization of the layers hides behind the time of embedding and head; their own is free.
* The pipeline formula does not see a slow stage in the middle.

One thing differs by default: changing the layout between layers costs bytes over bandwidth. The release multiplies
bytes, ms per MB and 1e-7, about 105 times more; ``reshard_scale=1e-7`` does as well. Its search only counts that cost
when it chooses strategies, not in the time it reports; here it is in both.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import ceil

from lightning_hetu.planning.cost_model import Bytes, CostModel, Restriction, RowCost, RowMemory, Setting, byte_vector
from lightning_hetu.planning.enumeration import powers_of_two, strategies_with_sequence_parallelism
from lightning_hetu.planning.galvatron_files import MEGABYTE, GalvatronLayer, GalvatronProfile, VocabMemory
from lightning_hetu.planning.layer_strategy import DataParallelType, LayerStrategy

PHYSICAL_RESHARD_SCALE = 1e-3 / MEGABYTE
"""From bytes times ms per MB to seconds."""

_BACKWARD_RATIO = 2.0
_SHARDING_OVERHEAD = 0.003
"""The release's measured overhead of sharded states, as a share of the unsharded ones."""
_CONTEXT_MEGABYTES = 1024
_RESERVE_FROM_GIGABYTES = 20


class GalvatronCostModel(CostModel):
    """Prices rows as Galvatron 3 does.

    Args:
        profile: The official files, read.
        reshard_scale: Factor from bytes times ms per MB to seconds between layers of different layout.
        reserve_fraction: Share of a budget above 20 GB that is left to the allocator's cache.
        default_dp_type: Type of plain data parallelism.
        async_grad_reduce: Whether gradients are reduced in the last microbatch only.
        max_degree: Largest tensor, sequence and pipeline degree.
        sequence_parallel_search: Whether Ulysses strategies are searched.
    """

    name = "galvatron3"
    split_vocab = False
    exact_pipeline = False
    uneven_stages = False
    additive_sync = False

    def __init__(
        self,
        profile: GalvatronProfile,
        *,
        reshard_scale: float = PHYSICAL_RESHARD_SCALE,
        reserve_fraction: float = 0.2,
        default_dp_type: DataParallelType = "zero2",
        async_grad_reduce: bool = True,
        max_degree: int = 8,
        sequence_parallel_search: bool = True,
    ) -> None:
        self.profile = profile
        self.num_layers = profile.num_layers
        self.num_devices = profile.num_devices
        self.reshard_scale = reshard_scale
        self.reserve_fraction = reserve_fraction
        self.async_grad_reduce = async_grad_reduce
        self._types = [index for index, layer in enumerate(profile.layers) for _ in range(layer.count)]
        self._strategies = strategies_with_sequence_parallelism(
            profile.num_devices,
            max_degree=max_degree,
            sequence_parallel=sequence_parallel_search and bool(profile.all_to_all_latency),
            default_dp_type=default_dp_type,
        )

    # ---- search space -----------------------------------------------------------------------------------------------

    def strategies(self, row: int, setting: Setting) -> list[LayerStrategy]:
        """The released set; embedding and head without recomputation."""
        found = self._strategies.get(setting.num_stages, [])
        if 0 < row <= self.num_layers:
            return [s for s in found if not s.recompute or self._layer(row).checkpoint is not None]
        return [s for s in found if not s.recompute]

    def restrictions(self, setting: Setting) -> list[Restriction]:
        """No tensor parallelism without a gather buffer, or any up to a degree with a buffer of that degree."""
        if not self.profile.sequence_parallel:
            return super().restrictions(setting)
        found = [Restriction(lambda s: s.tp == 1, byte_vector())]
        for degree in powers_of_two(setting.devices_per_stage)[1:]:
            if setting.microbatch_size * degree % setting.devices_per_stage:
                continue
            buffer = self._gather_buffer(degree, setting)
            found.append(Restriction(lambda s, most=degree: s.tp * s.sp <= most, buffer))  # type: ignore[misc]
        return found

    def row_kind(self, row: int) -> Hashable:
        """Embedding, head, or the layer type."""
        return {0: "embedding", self.num_layers + 1: "head"}.get(row) or self._types[row - 1] + 1

    def row_name(self, row: int) -> str:
        """Layer type of a row, for tables."""
        return str(self.row_kind(row)) if row in (0, self.num_layers + 1) else f"layertype_{self._types[row - 1]}"

    def _layer(self, row: int) -> GalvatronLayer:
        return self.profile.layers[self._types[row - 1]]

    # ---- prices -----------------------------------------------------------------------------------------------------

    def row_cost(self, row: int, stage: int, strategy: LayerStrategy, setting: Setting) -> RowCost:
        """Price of one row under one strategy. Without a pipeline, the embedding's row stands for the head as well."""
        if 0 < row <= self.num_layers:
            return self._layer_cost(self._layer(row), stage, strategy, setting)
        if setting.num_stages == 1:
            if row == 0:
                return self._vocab_cost(self.profile.vocab_single, 1.0, 1, strategy, setting)
            return RowCost(0.0, 0.0, _constant_memory(0.0, 0.0, mixed=True))
        memory = self.profile.vocab_first if row == 0 else self.profile.vocab_last
        return self._vocab_cost(memory, 0.5, setting.in_flight(stage), strategy, setting)

    def _layer_cost(self, layer: GalvatronLayer, stage: int, s: LayerStrategy, setting: Setting) -> RowCost:
        degree = s.tp * s.sp
        samples = setting.microbatch_size // s.dp
        forward = _line(layer.forward, samples / degree)
        backward = forward * (_BACKWARD_RATIO + s.recompute)
        shards = s.shard_degree
        per_megabyte = self.profile.all_reduce[shards, s.tp == 1]
        gradient = 2 * (shards - 1) / shards * layer.parameter_megabytes / s.tp
        gradient *= 0.5 if self.profile.mixed_precision else 1.0
        communicates = s.dp > 1
        with_sync = self._side_by_side(backward, gradient * per_megabyte) if communicates else backward
        tensor = self._degree_time(layer, s, samples)
        gather = 0.5 * gradient * per_megabyte if s.dp_type == "zero3" else 0.0
        border = 0.0
        if setting.num_stages > 1:
            # The release adds this once for all layers of a type.
            message = setting.num_stages * 2 * self._message(layer, samples)
            border = message * self.profile.p2p[setting.num_stages] / layer.count
        states = 4 * layer.parameter_megabytes / s.tp * self._states_left(s, setting)
        return RowCost(
            seconds=(forward + backward + tensor + gather + border) / 1e3,
            sync=(with_sync - backward) / 1e3,
            memory=_constant_memory(
                states,
                self._activation(layer, s) * samples * setting.in_flight(stage),
                mixed=self.profile.mixed_precision,
            ),
            parts={
                "forward": forward / 1e3,
                "backward": backward / 1e3,
                "tensor_parallel": tensor / 1e3,
                "parameter_gather": gather / 1e3,
                "stage_border": border / 1e3,
                "gradient_reduce_per_step": (with_sync - backward) / 1e3,
            },
        )

    def _vocab_cost(
        self, memory: VocabMemory, share: float, in_flight: int, s: LayerStrategy, setting: Setting
    ) -> RowCost:
        """Embedding and head, or ``share`` of their time and the memory of one of them."""
        degree = s.tp * s.sp
        samples = setting.microbatch_size // s.dp
        forward = _line(self.profile.vocab_forward, samples / degree) * share
        shards = s.shard_degree
        states = _at_degree(memory.model_states, s.tp)
        gradient = states / 4 * (0.5 if self.profile.mixed_precision else 1.0)
        gather = gradient * self.profile.all_reduce[shards, s.tp == 1] * (shards - 1) / shards * 0.5
        gather = gather if s.dp_type == "zero3" else 0.0
        tensor = 0.0
        if s.tp > 1:
            layer = self.profile.layers[0]
            tensor = self._gather_time(s.tp, self._message(layer, samples)) * (2 if share == 1.0 else 1)
        total = self._hidden(gather, forward) + self._hidden(gather, forward * _BACKWARD_RATIO) + tensor
        activation = _at_degree(memory.activations, degree) * samples * in_flight
        return RowCost(
            seconds=total / 1e3,
            # The release compares the synchronized time of the layers alone with a stage time that includes these rows.
            sync=-total / 1e3,
            memory=_constant_memory(
                states * self._states_left(s, setting), activation, mixed=self.profile.mixed_precision
            ),
            parts={"forward_and_backward": (total - tensor) / 1e3, "tensor_parallel": tensor / 1e3},
        )

    def _side_by_side(self, compute: float, communication: float) -> float:
        """Both slow down while both run; then the longer one goes on alone."""
        short, long = sorted((compute, communication))
        return short * self.profile.overlap + long - short

    def _hidden(self, communication: float, compute: float) -> float:
        """Embedding and head: computation slows down behind communication, communication does not slow down."""
        slowed = compute * self.profile.overlap
        return communication + max(0.0, slowed - communication) / self.profile.overlap

    def _message(self, layer: GalvatronLayer, samples: float) -> float:
        """MB of the activations of ``samples``."""
        width = 2 if self.profile.mixed_precision else 4
        return samples * layer.sequence_length * layer.hidden_size * width / MEGABYTE

    def _gather_time(self, degree: int, megabytes: float) -> float:
        """An all-gather or a reduce-scatter: half of an all-reduce of the same size."""
        return self.profile.all_reduce_latency[degree].milliseconds(megabytes) / 2

    def _degree_time(self, layer: GalvatronLayer, s: LayerStrategy, samples: float) -> float:
        """Communication inside a tensor- or sequence-parallel layer; half as often again with recomputation."""
        message, again = self._message(layer, samples), 1.5 if s.recompute else 1.0
        if s.sp > 1:
            return 4 * again * self.profile.all_to_all_latency[s.sp].milliseconds(message)
        if s.tp == 1:
            return 0.0
        if self.profile.sequence_parallel:
            return 6 * again * self._gather_time(s.tp, message)
        return 4 * again * self.profile.all_reduce_latency[s.tp].milliseconds(message)

    def relayout_seconds(self, row: int, before: LayerStrategy, after: LayerStrategy, setting: Setting) -> float:
        """Between blocks of different degree, over a group of the larger one; free next to embedding and head."""
        degree = max(before.tp * before.sp, after.tp * after.sp)
        block = 1 < row <= self.num_layers
        if not block or before.tp * before.sp == after.tp * after.sp or not self.profile.sequence_parallel:
            return 0.0
        samples = setting.microbatch_size / (setting.devices_per_stage / degree)
        message = (degree - 1) / degree * self._message(self._layer(row), samples) * MEGABYTE
        return message * self.profile.all_reduce[degree, True] * self.reshard_scale

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _states_left(self, s: LayerStrategy, setting: Setting) -> float:
        """Share of the model states that remains on a rank."""
        if s.dp_type == "ddp":
            return 1.0
        share = 1 / s.shard_degree + _SHARDING_OVERHEAD
        mixed = self.profile.mixed_precision
        sharded = 1.0 if s.dp_type == "zero3" else 7 / 8 if mixed else 3 / 4
        if setting.num_microbatches > 1:
            if self.async_grad_reduce:
                # Full gradients wait for the last microbatch.
                sharded -= 1 / 8 if mixed else 1 / 4
            elif mixed:
                return (sharded * share + 1 - sharded) * 5 / 4
            elif s.dp_type == "zero3":
                return share * 5 / 4
        return sharded * share + 1 - sharded

    def _activation(self, layer: GalvatronLayer, s: LayerStrategy) -> float:
        """MB per sample."""
        degree = s.tp * s.sp
        if not s.recompute:
            return _at_degree(layer.activations, degree)
        if layer.checkpoint is None:
            raise ValueError(f"strategy {s}: the profile has no 'checkpoint' activation, recompute is not possible.")
        splits = s.sp > 1 or (s.tp > 1 and self.profile.sequence_parallel)
        return layer.checkpoint / (degree if splits else 1)

    def _gather_buffer(self, degree: int, setting: Setting) -> Bytes:
        """The buffer that Megatron sequence parallelism gathers into, in whole MB."""
        if not self.profile.sequence_parallel:
            return byte_vector()
        samples = setting.microbatch_size / (setting.devices_per_stage / degree)
        longest = max(self.profile.layers, key=lambda layer: layer.sequence_length)
        return byte_vector(gathered=int(self._message(longest, samples)) * MEGABYTE)

    def stage_base(self, stage: int, setting: Setting, strategies: Sequence[LayerStrategy] | None = None) -> Bytes:
        """The context of the runtime, and the gather buffer that the strategies of the plan need."""
        base = byte_vector(transient=_CONTEXT_MEGABYTES * MEGABYTE)
        if strategies is not None and any(s.tp > 1 for s in strategies):
            base = base + self._gather_buffer(max(s.tp * s.sp for s in strategies), setting)
        return base

    def reserve(self, memory_budget: int) -> int:
        """A fifth of a budget of more than 20 GB, in whole MB."""
        megabytes = memory_budget // MEGABYTE
        if megabytes // 1024 <= _RESERVE_FROM_GIGABYTES:
            return 0
        return int(megabytes * self.reserve_fraction) * MEGABYTE

    def budget_for(self, peak: int) -> int:
        """Smallest budget whose planned part holds ``peak`` bytes."""
        if not self.reserve(peak):
            return peak
        megabytes = int(ceil(peak / MEGABYTE) / (1 - self.reserve_fraction)) - 2
        while megabytes * MEGABYTE - self.reserve(megabytes * MEGABYTE) < peak:
            megabytes += 1
        return megabytes * MEGABYTE

    # ---- time of a step ---------------------------------------------------------------------------------------------

    def iteration_time(self, seconds: Sequence[float], sync: Sequence[float], setting: Setting) -> float:
        """The release's pipeline formula, and the synchronization that sticks out behind it."""
        tails = [seconds[i] + sync[i] - sum(seconds[: i + 1]) for i in range(len(seconds))]
        return self._pipeline(seconds, setting.num_microbatches) + max(0.0, *tails)

    def time_bound(self, seconds: Sequence[float], sync: Sequence[float], setting: Setting) -> float:
        """A longer stage may hide more synchronization, so that only counts with a single stage."""
        if len(seconds) == 1:
            return self.iteration_time(seconds, sync, setting)
        return self._pipeline(seconds, setting.num_microbatches)

    @staticmethod
    def _pipeline(seconds: Sequence[float], microbatches: int) -> float:
        first, rest = seconds[0], sum(seconds[1:])
        rounds = min(len(seconds) - 1, microbatches - 1) * first
        from_last = sum(seconds) + seconds[-1] * (microbatches - 1)
        from_first = max(rounds / 3, rest / 3) + max(rounds * 2 / 3, rest * 2 / 3)
        return max(from_last, from_first + first * max(0, microbatches + 1 - len(seconds)))


def _line(line: tuple[float, float], samples: float) -> float:
    return line[0] * samples + line[1]


def _at_degree(table: Mapping[int, float], degree: int) -> float:
    """Value of a table by degree; beyond the largest known one it halves."""
    if degree in table:
        return table[degree]
    smaller = max((known for known in table if known < degree), default=min(table))
    return table[smaller] * smaller / degree


def _constant_memory(states: float, activation: float, *, mixed: bool) -> RowMemory:
    """MB that are there in every phase; the sum is rounded up to whole MB as in the release.

    The release counts model states as one; they are shown here as parameters, gradients and optimizer in the ratio of
    their bytes: 2, 2, 12 in mixed precision, otherwise 4, 4, 8.
    """
    weight, moments = (2 / 16, 12 / 16) if mixed else (4 / 16, 8 / 16)
    parts = [int(states * share * MEGABYTE) for share in (weight, weight, moments)] + [int(activation * MEGABYTE)]
    total = ceil(states + activation) * MEGABYTE
    size = byte_vector(
        parameters=parts[0],
        gradients=parts[1],
        optimizer=parts[2],
        activations=parts[3],
        transient=total - sum(parts),
    )
    return RowMemory(size, size, size, size, size)
