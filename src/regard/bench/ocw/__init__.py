"""Only Connect walls: sixteen words that form four groups, made so that some of them seem to belong elsewhere."""

from ..._lazy import lazy_exports

_TABLE = {
    "Wall": ".walls",
    "WallScore": ".scores",
    "WallsReport": ".scores",
    "equal_kmeans": ".solve",
    "load_walls": ".walls",
    "made_walls": ".solve",
    "ocw_prompt": ".prompts",
    "ocw_score": ".scores",
    "parse_connections": ".prompts",
    "parse_wall": ".prompts",
    "randomize_walls": ".walls",
    "score_connections": ".scores",
    "score_groups": ".scores",
    "solve_by_embeddings": ".solve",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
