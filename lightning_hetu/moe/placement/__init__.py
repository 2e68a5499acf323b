"""FlexMoE: which rank holds which experts, decided from the traffic that gates make (arXiv 2304.03946).

Gates send more tokens to some experts than to others, and which ones changes while training goes on. A
:class:`Placement` says which experts are in the slots of each rank; an expert may be on several, which then share its
tokens. :func:`plan` finds changes that even out the ranks and pay for themselves::

    placement = Placement.contiguous(num_experts=16, ranks=4, slots=6)
    found = plan(counts, placement, cost_model=PlacementCostModel.for_experts(2048, 768, "4xH100-80GB"))
    if found.pays:
        placement = found.after
    tokens = apportion(counts, found.fractions, placement)

Everything here is arithmetic in Python and numpy on what all ranks know, without a process group. The same arguments
give the same answer, with ties going to the lowest rank and expert. Counts are whole numbers, and dividing them up uses
only operations whose last bit is the same on every processor; where ranks run on different kinds of processors, let one
of them plan all the same.

Reading order: ``operations`` and ``placement`` (what is decided), ``split`` and ``apportion`` (who computes which
tokens), ``cost`` (what that takes), ``planner`` (the policies), ``flexmoe`` with ``greedy``, ``moves``, ``even_search``
and ``flow_search``, ``eplb``, ``shadow`` and ``transition`` (how they decide), ``traces`` and ``replay`` (what they
would do with recorded traffic), ``picture``.
"""

from lightning_hetu.moe.placement.apportion import apportion, quotas
from lightning_hetu.moe.placement.cost import PlacementCostModel, StepSeconds
from lightning_hetu.moe.placement.operations import Expand, Migrate, Operation, Shrink
from lightning_hetu.moe.placement.placement import FREE, Placement
from lightning_hetu.moe.placement.planner import PlacementPlan, Policy, plan
from lightning_hetu.moe.placement.replay import Replay, compare, comparison_table, replay
from lightning_hetu.moe.placement.split import Split, SplitName, balance_ratio, even_split, optimal_split
from lightning_hetu.moe.placement.traces import drifting_trace, load_trace, save_trace

__all__ = [
    "FREE",
    "Expand",
    "Migrate",
    "Operation",
    "Placement",
    "PlacementCostModel",
    "PlacementPlan",
    "Policy",
    "Replay",
    "Shrink",
    "Split",
    "SplitName",
    "StepSeconds",
    "apportion",
    "balance_ratio",
    "compare",
    "comparison_table",
    "drifting_trace",
    "even_split",
    "load_trace",
    "optimal_split",
    "plan",
    "quotas",
    "replay",
    "save_trace",
]
