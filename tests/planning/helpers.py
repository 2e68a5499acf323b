"""Small random models and clusters, and a search that tries every plan."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from lightning_hetu.planning import (
    ClusterSpec,
    HybridPlan,
    LayerProfile,
    LayerStrategy,
    ModelProfile,
    layer_strategies,
)
from lightning_hetu.planning.partition import all_cuts

MIB = 2**20


def random_layer(rng: random.Random, name: str, tp_degrees: tuple[int, ...] = (1, 2, 4)) -> LayerProfile:
    """A layer type with sizes of a few MiB, so that states, activations and buffers are all of one order."""
    parameters = rng.randint(1, 12) * MIB
    activation = rng.uniform(0.5, 6) * MIB
    return LayerProfile(
        name,
        parameter_bytes=parameters,
        tp_parameter_bytes=int(parameters * rng.uniform(0.5, 1)),
        forward_time=((1, rng.uniform(1, 4) * 1e-3), (4, rng.uniform(5, 12) * 1e-3)),
        backward_ratio=rng.uniform(1.5, 2.5),
        activation_bytes={1: activation, 2: activation * rng.uniform(0.5, 0.8)},
        boundary_bytes=rng.uniform(0.05, 0.4) * MIB,
        forward_transient={1: rng.uniform(0, 1) * MIB},
        backward_transient={1: rng.uniform(0, 2) * MIB},
        tp_degrees=tp_degrees,
        trainable_fraction=rng.choice((1.0, 1.0, 0.5)),
    )


def random_model(rng: random.Random, num_layers: int, **kwargs: object) -> ModelProfile:
    """A model of one or two layer types."""
    types = rng.randint(1, 2)
    return ModelProfile(
        layer_types=tuple(random_layer(rng, f"type{i}", rng.choice(((1, 2), (1, 2, 4), (1,)))) for i in range(types)),
        layers=tuple(rng.randrange(types) for _ in range(num_layers)),
        embedding=random_layer(rng, "embedding", rng.choice(((1,), (1, 2, 4)))),
        head=random_layer(rng, "head", rng.choice(((1,), (1, 2, 4)))),
        precision=rng.choice(("32-true", "bf16-mixed")),
        **kwargs,  # type: ignore[arg-type]
    )


def random_cluster(rng: random.Random, num_devices: int) -> ClusterSpec:
    """Ring collectives over a link of random speed; processes share cores in half of the cases."""
    return ClusterSpec.from_bandwidth(
        num_devices,
        gigabytes_per_second=rng.choice((0.5, 4, 20)),
        latency=rng.choice((1e-6, 1e-4)),
        overlap_slowdown=rng.choice((None, 1.2)),
        compute_slots=rng.choice((None, 2.0)),
    )


def every_plan(profile: ModelProfile, num_devices: int, batch: int) -> Iterator[HybridPlan]:
    """All plans of a batch size that the search may choose from, without any cleverness."""
    for stages in (1, 2, 4, 8):
        if stages > num_devices or stages > profile.num_layers or (stages > 1 and not profile.pipeline):
            continue
        for microbatches in range(1, batch + 1) if profile.microbatches else (1,):
            if batch % microbatches or (stages > 1 and microbatches < stages):
                continue
            size = batch // microbatches

            def options(layer: LayerProfile, recompute: tuple[bool, ...]) -> list[LayerStrategy]:
                found = layer_strategies(num_devices // stages, tp_degrees=layer.tp_degrees, recompute=recompute)  # noqa: B023
                return [strategy for strategy in found if size % strategy.dp == 0]  # noqa: B023

            rows = [options(profile.embedding, (False,))]
            rows += [options(profile.block(i), (False, True)) for i in range(profile.num_layers)]
            rows.append(options(profile.head, (False,)))
            cuts = list(all_cuts(profile.num_layers, stages))
            for cut, choice in itertools.product(cuts, itertools.product(*rows)):
                if not profile.split_vocab and choice[0] != choice[-1]:
                    continue
                yield HybridPlan(
                    world_size=num_devices,
                    global_batch_size=batch,
                    num_microbatches=microbatches,
                    stages=cut,
                    layers=choice[1:-1],
                    embedding=choice[0],
                    head=choice[-1],
                )
