"""Joining: how regard reaches into other people's models, and how it gets hold of one.

`transformers.py` (attach, detach), `session.py` (what is attached, and what has to be put back), `sites.py` (which modules are
attention), `generation.py` (caches and logits processors under `generate`), `masks.py`, `hub.py` (load).
"""

from .._lazy import lazy_exports

_TABLE = {
    "Session": ".session",
    "attach": ".transformers",
    "detach": ".transformers",
    "session_of": ".transformers",
    "chat_spans": ".spans",
    "find_text": ".spans",
    "text_spans": ".spans",
    "SpannedPrompt": ".spans",
    "load": ".hub",
    "AgentDiffusion": ".agent_diffusion",
    "AGENT_SD_SCHEDULE": ".agent_diffusion",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
