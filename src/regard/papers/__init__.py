"""The catalog: one row a paper, and what can honestly be said about it.

`load_catalog()` gives the rows, `find_paper("004")` one of them, `search_papers(seam="mask")` some. Rows name code by dotted
path and import none of it.
"""

from .._lazy import lazy_exports

_TABLE = {
    "Paper": ".catalog",
    "load_catalog": ".catalog",
    "find_paper": ".catalog",
    "search_papers": ".catalog",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
