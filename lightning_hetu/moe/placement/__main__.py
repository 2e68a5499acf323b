r"""Prints what the policies would do with a routing trace on a described cluster.

python -m lightning_hetu.moe.placement --trace trace.npz --cluster 4xH100-80GB --slots 6
python -m lightning_hetu.moe.placement --drift 0.15 --picture flexmoe.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_hetu.moe.placement.cost import PlacementCostModel
from lightning_hetu.moe.placement.picture import save_heat_map
from lightning_hetu.moe.placement.placement import Placement
from lightning_hetu.moe.placement.replay import compare, comparison_table
from lightning_hetu.moe.placement.traces import drifting_trace, load_trace
from lightning_hetu.planning.presets import cluster_preset


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(prog="python -m lightning_hetu.moe.placement", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    out.add_argument("--trace", type=Path, help="recorded counts, [steps, ranks, experts] in an .npz file")
    out.add_argument("--drift", type=float, default=0.05, help="without a trace: drift of a made-up one")
    out.add_argument("--experts", type=int, default=16, help="without a trace: its experts")
    out.add_argument("--ranks", type=int, default=4, help="without a trace: its ranks")
    out.add_argument("--tokens", type=int, default=131072, help="without a trace: tokens of a rank, times choices")
    out.add_argument("--seed", type=int, default=0, help="without a trace: seed of its draws")
    out.add_argument("--cluster", help="such as 2x8xH100-80GB; by default as many of those as there are ranks")
    out.add_argument("--slots", type=int, help="slots of a rank; by default half as many again as experts need")
    out.add_argument("--dim", type=int, default=2048, help="width of a token")
    out.add_argument("--hidden", type=int, default=768, help="width of an expert")
    out.add_argument("--horizon", type=float, default=20.0, help="steps for which a change must pay")
    out.add_argument("--interval", type=int, default=5, help="steps between decisions")
    out.add_argument("--eplb-interval", type=int, default=50, help="the same for eplb")
    out.add_argument("--window", type=int, default=10, help="steps whose mean decides")
    out.add_argument("--threshold", type=float, default=1.0, help="balance ratio above which the policy is asked")
    out.add_argument("--max-ops", type=int, help="most operations of one decision")
    out.add_argument("--refresh", choices=("step", "check"), default="step", help="when the optimal split is solved")
    out.add_argument("--skip", type=int, default=0, help="steps at the beginning that do not count for means")
    out.add_argument("--picture", type=Path, help="draw flexmoe with the optimal split, as .svg or .png")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        print(_report(options))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _report(options: argparse.Namespace) -> str:
    if options.trace is not None:
        trace = load_trace(options.trace)
    else:
        trace = drifting_trace(
            ranks=options.ranks, experts=options.experts, drift=options.drift, tokens=options.tokens, seed=options.seed
        )
    steps, ranks, experts = trace.shape
    cluster = cluster_preset(options.cluster or f"{ranks}xH100-80GB")
    if cluster.num_devices != ranks:
        raise ValueError(f"cluster={options.cluster!r} has {cluster.num_devices} devices: expected the {ranks} ranks.")
    model = PlacementCostModel.for_experts(options.dim, options.hidden, cluster, horizon=options.horizon)
    slots = options.slots if options.slots is not None else -(-experts * 3 // (2 * ranks))
    found = compare(
        trace,
        Placement.contiguous(experts, ranks, slots),
        model,
        interval=options.interval,
        eplb_interval=options.eplb_interval,
        window=options.window,
        threshold=options.threshold,
        max_ops=options.max_ops,
        refresh=options.refresh,
    )
    if options.picture is not None:
        save_heat_map(trace, found["flexmoe", "flow"], options.picture)
    title = f"{steps} steps, {experts} experts on {ranks} ranks of {slots} slots, {cluster.device}"
    return f"{title}\n\n{comparison_table(found, options.skip)}"


if __name__ == "__main__":
    sys.exit(main())
