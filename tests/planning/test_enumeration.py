"""The strategy sets have the sizes of the papers and of the released Galvatron, and the members they should have."""

from __future__ import annotations

import pytest

from lightning_hetu.planning import decision_tree, decision_trees, layer_strategies
from lightning_hetu.planning.enumeration import leaf_strategy, strategies_with_sequence_parallelism


@pytest.mark.parametrize(
    ("num_devices", "mixed", "kept", "per_degree"),
    [
        (4, 13, 11, [7, 3, 1]),
        (8, 34, 22, [11, 7, 3, 1]),
        (16, 73, 37, [15, 11, 7, 3, 1]),
        (32, 136, 56, [19, 15, 11, 7, 3, 1]),
        (64, 229, 79, [23, 19, 15, 11, 7, 3, 1]),
    ],
)
def test_decision_trees_have_the_sizes_of_the_paper(
    num_devices: int, mixed: int, kept: int, per_degree: list[int]
) -> None:
    """Leaves per pipeline degree, in total, and without takeaway 3; recomputation doubles them."""
    trees = decision_trees(num_devices)
    assert [len(leaves) for leaves in trees.values()] == per_degree
    assert list(trees) == [1 << k for k in range(len(per_degree))]
    assert sum(per_degree) == kept
    assert sum(map(len, decision_trees(num_devices, mix_dp_and_sdp=True).values())) == mixed
    strategies = {
        (stages, leaf_strategy(leaf, recompute=flag))
        for stages, leaves in trees.items()
        for leaf in leaves
        for flag in (False, True)
    }
    assert len(strategies) == 2 * kept


def test_the_leaves_on_four_devices_are_those_of_the_paper() -> None:
    """Both orders of data and tensor parallelism count; the last one has neighboring ranks."""
    assert set(decision_tree(4)) == {
        (("dp", 4),),
        (("sdp", 4),),
        (("tp", 4),),
        (("dp", 2), ("tp", 2)),
        (("tp", 2), ("dp", 2)),
        (("sdp", 2), ("tp", 2)),
        (("tp", 2), ("sdp", 2)),
    }
    assert str(leaf_strategy((("sdp", 2), ("tp", 2)))) == "dp2-tp2-zero3"
    assert str(leaf_strategy((("tp", 2), ("dp", 2)))) == "dp2-tp2-ddp-strided"
    with pytest.raises(ValueError, match="either DP or SDP"):
        leaf_strategy((("dp", 2), ("sdp", 2)))


@pytest.mark.parametrize(("num_devices", "size"), [(4, 26), (8, 50), (16, 76), (32, 96)])
def test_the_set_with_sequence_parallelism_has_the_size_of_the_release(num_devices: int, size: int) -> None:
    """Galvatron 3 has 50 layer strategies on 8 devices, half of them without recomputation."""
    found = strategies_with_sequence_parallelism(num_devices)
    strategies = [(stages, strategy) for stages, group in found.items() for strategy in group]
    assert len(set(strategies)) == len(strategies) == size
    assert sum(not strategy.recompute for _, strategy in strategies) == size // 2
    assert all(strategy.num_devices * stages == num_devices for stages, strategy in strategies)


def test_without_sequence_parallelism_the_release_has_32_strategies_on_8_devices() -> None:
    """The same set with Ulysses off."""
    found = strategies_with_sequence_parallelism(8, sequence_parallel=False)
    assert sum(map(len, found.values())) == 32
    assert all(strategy.sp == 1 for group in found.values() for strategy in group)


def test_our_set_has_tensor_parallelism_inside_and_one_type_without_data_parallelism() -> None:
    """What the executor runs: three types where ranks share, one where there is nothing to share."""
    found = layer_strategies(4, tp_degrees=(1, 2, 4, 8), recompute=(False,))
    assert [str(strategy) for strategy in found] == [
        "dp4-ddp",
        "dp4-zero2",
        "dp4-zero3",
        "dp2-tp2-ddp",
        "dp2-tp2-zero2",
        "dp2-tp2-zero3",
        "tp4",
    ]
    assert len(layer_strategies(4, tp_degrees=(1, 2, 4))) == 14
    assert [str(s) for s in layer_strategies(2, tp_degrees=(1,), dp_types=("zero3",))] == [
        "dp2-zero3",
        "dp2-zero3-recompute",
    ]


@pytest.mark.parametrize("devices", [0, 3, True, 2.0])
def test_devices_must_be_a_power_of_two(devices: object) -> None:
    """Takeaway 2: only equal groups."""
    with pytest.raises(ValueError, match="expected a power of two"):
        decision_tree(devices)  # type: ignore[arg-type]
