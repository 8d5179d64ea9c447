"""Bandits that choose how a query is rewritten before a language model answers it: features, arms, rewards, policies, regret.

QueryBandits: "QueryBandits for Hallucination Mitigation: Exploiting Semantic Features for No-Regret Rewriting" (2025, arXiv
2508.16697; later version 2602.20332, JPMorgan AI Research). No code of the authors was found. Weights of the reward and the arms are the
paper's; the names of the 17 features come from its companion (arXiv 2602.20300), from memory; regularisers, v and alpha are open
there and options here.
"""

from typing import TYPE_CHECKING

from ..._lazy import lazy_exports

if TYPE_CHECKING:  # a name that a file of this package has too: what it means to a type checker
    from .replay import replay as replay

_TABLE = {
    "BetaThompson": ".policies",
    "EpsilonGreedy": ".policies",
    "Exp3": ".policies",
    "FollowTheLeader": ".policies",
    "LinUCB": ".policies",
    "LinearThompson": ".policies",
    "Static": ".policies",
    "UCB": ".policies",
    "FEATURES": ".features",
    "query_features": ".features",
    "REWRITES": ".rewrites",
    "bleu1": ".rewrites",
    "fuzzy": ".rewrites",
    "qa_reward": ".rewrites",
    "rewrite_prompt": ".rewrites",
    "Played": ".replay",
    "play": ".replay",
    "replay": ".replay",
    "win_rate": ".replay",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
