"""More than one machine: attention as tasks that any device can do, planned, run and simulated (core attention disaggregation).

DistCA, "Efficient Long-context Language Model Training by Core Attention Disaggregation" (2025, arXiv 2510.18121). Code read for
numbers: hao-ai-lab/distca @ 039f2e4 (Apache-2.0 by its README), `distca/planner/`.
"""

from .._lazy import lazy_exports

_TABLE = {
    "AttentionTask": ".tasks",
    "Piece": ".tasks",
    "place_documents": ".placement",
    "place_whole": ".placement",
    "balance": ".planner",
    "plan_tasks": ".planner",
    "water_filling": ".baselines",
    "pack_by_workload": ".baselines",
    "Plan": ".plan",
    "run_plan": ".execute",
    "run_plans": ".distributed",
    "AttentionServers": ".servers",
    "ServersLost": ".servers",
    "simulate": ".simulate",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
