"""Indexes of keys: which keys have the largest inner products with a query, found without reading them all.

Each index holds the keys of a batch and its kv heads, is searched by query heads (a group shares its kv head's index), grows by
`insert`, and says how many keys a search has read. `ExactIP` reads all; `IVF` (faiss) reads cells; `QueryGraph` walks a graph that was
made from queries.
"""

from ..._lazy import lazy_exports

_TABLE = {
    "ExactIP": ".exact",
    "Found": ".base",
    "IVF": ".ivf",
    "KeyIndex": ".base",
    "QueryGraph": ".query_graph",
    "found_mass": ".quality",
    "make_index": ".quality",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
