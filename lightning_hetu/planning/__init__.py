"""Planning: which parallelism every layer of a model should use, in pure Python and numpy.

The planner follows Galvatron (arXiv 2211.13878) and Galvatron-BMW (arXiv 2307.02031). A :class:`ModelProfile` says what
one layer of each type costs, a :class:`ClusterSpec` what a collective costs; :func:`search` finds the
:class:`HybridPlan` of highest predicted throughput that fits a memory budget::

    plan = search(profile, cluster, memory_budget="20GiB", global_batch_size=64)
    print(plan.explain())
    plan.save("plan.json")

Reading order: ``layer_strategy`` and ``plan`` (what is decided), ``profile`` and ``cluster`` (what is known),
``enumeration`` (what may be chosen), ``cost_model`` with ``hetu_cost`` (what it costs), ``dynamic_programming`` and
``stage_search`` (the best choice inside the stages), ``partition`` and ``partition_search`` (where the stages begin),
``search`` (the loop around them), ``explain``. ``presets`` and ``topology`` describe clusters that nobody measured,
``simulate`` plays a step of a plan, ``pipeline`` is the formula for it.
``galvatron_files``, ``galvatron_plans`` and ``galvatron_cost`` read the files of the released Galvatron 3 and follow
its formulas.
"""

from lightning_hetu.planning.cluster import ClusterSpec, CollectiveCost
from lightning_hetu.planning.cost_model import CATEGORIES, CostModel
from lightning_hetu.planning.dynamic_programming import solve
from lightning_hetu.planning.enumeration import decision_tree, decision_trees, layer_strategies
from lightning_hetu.planning.errors import NoFeasiblePlanError
from lightning_hetu.planning.explain import diff, explain
from lightning_hetu.planning.galvatron_cost import GalvatronCostModel
from lightning_hetu.planning.galvatron_files import GalvatronProfile, load_galvatron_profiles
from lightning_hetu.planning.galvatron_plans import read_galvatron_plan, write_galvatron_plan
from lightning_hetu.planning.hetu_cost import HetuConstants, HetuCostModel
from lightning_hetu.planning.layer_strategy import LayerStrategy
from lightning_hetu.planning.partition import balance_degree, balanced_cut
from lightning_hetu.planning.picture import save_picture
from lightning_hetu.planning.plan import HybridPlan, PlanPrediction, RejectedPlan, even_stages
from lightning_hetu.planning.presets import DevicePreset, cluster_preset, device_preset
from lightning_hetu.planning.profile import LayerProfile, ModelProfile
from lightning_hetu.planning.search import evaluate, memory_breakdown, search, time_breakdown
from lightning_hetu.planning.search_space import Pins
from lightning_hetu.planning.simulate import simulate, simulate_pipeline
from lightning_hetu.planning.timeline import Simulation
from lightning_hetu.planning.topology import Link, Topology
from lightning_hetu.planning.units import format_bytes, parse_bytes

__all__ = [
    "CATEGORIES",
    "ClusterSpec",
    "CollectiveCost",
    "CostModel",
    "DevicePreset",
    "GalvatronCostModel",
    "GalvatronProfile",
    "HetuConstants",
    "HetuCostModel",
    "HybridPlan",
    "LayerProfile",
    "LayerStrategy",
    "Link",
    "ModelProfile",
    "NoFeasiblePlanError",
    "Pins",
    "PlanPrediction",
    "RejectedPlan",
    "Simulation",
    "Topology",
    "balance_degree",
    "balanced_cut",
    "cluster_preset",
    "decision_tree",
    "decision_trees",
    "device_preset",
    "diff",
    "evaluate",
    "even_stages",
    "explain",
    "format_bytes",
    "layer_strategies",
    "load_galvatron_profiles",
    "memory_breakdown",
    "parse_bytes",
    "read_galvatron_plan",
    "save_picture",
    "search",
    "simulate",
    "simulate_pipeline",
    "solve",
    "time_breakdown",
    "write_galvatron_plan",
]
