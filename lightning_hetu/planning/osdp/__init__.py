"""OSDP: which operators to shard, so that a step is fast and fits in memory (arXiv 2209.13258 and 2305.09940).

Sharding everything needs the least memory and the most communication. :func:`solve` keeps as many operators gathered or
replicated as a memory limit allows, choosing those for which it pays most::

    plan = solve(operators, "20GiB", modes=("dp", "z2", "zdp"), world_size=8, comm=Ring(1e-10, latency=1e-5))
    print(plan.explain())

Reading order: ``operator`` and ``links`` (what is known), ``costs`` (what a choice costs),
``problem`` (all choices of a model), ``solver`` with ``relaxation``, ``core`` and ``frontier``
(the best one), ``plan`` (the result), ``overlap`` (an estimate for it). With a profile of a model's
step, ``timeline`` plays plans on ``fsdp2``, ``fitted`` and ``staircase`` search by the memory that
this shows, and ``picture`` draws it.
"""

from lightning_hetu.planning.osdp.costs import CollectiveCount, MemoryConstants, OperatorCosts
from lightning_hetu.planning.osdp.links import CallOverhead, HostLink, Ring
from lightning_hetu.planning.osdp.operator import Operator
from lightning_hetu.planning.osdp.plan import OperatorPlan, OSDPPlan
from lightning_hetu.planning.osdp.problem import OSDPInfeasibleError
from lightning_hetu.planning.osdp.search import solve, solve_batch
from lightning_hetu.planning.osdp.timeline import StepProfile

__all__ = [
    "CollectiveCount",
    "CallOverhead",
    "HostLink",
    "MemoryConstants",
    "OSDPInfeasibleError",
    "OSDPPlan",
    "Operator",
    "OperatorCosts",
    "OperatorPlan",
    "Ring",
    "StepProfile",
    "solve",
    "solve_batch",
]
