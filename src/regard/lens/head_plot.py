"""Pictures of `HeadScores`: one heat map a table, layers downwards, heads (or experts) across."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .._checks import bad_type, require

if TYPE_CHECKING:
    from .head_scores import HeadScores

__all__ = ["plot_scores"]


def plot_scores(tables: Mapping[str, HeadScores], path: str | Path, *, title: str = "", columns: int = 3) -> Path:
    """Draw tables side by side, each on its own colour scale, and write them to `path` (PNG, PDF, SVG, by its ending).

    Args:
        tables: name -> table. A cell without a score (NaN) is left grey. title: above all of them. columns: pictures in a row.

    Raises:
        ValueError: nothing to draw, or an ending that matplotlib does not know. ImportError: matplotlib is not installed.
    """
    require(bool(tables), "tables", "none", "at least one table of scores")
    for name, table in tables.items():
        if not hasattr(table, "scores"):
            raise bad_type(f"tables[{name!r}]", table, "HeadScores")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing scores needs matplotlib: pip install 'regard[lens]'") from error
    path = Path(path)
    columns = min(max(1, columns), len(tables))
    rows = -(-len(tables) // columns)
    layers, units = (max(table.scores.shape[axis] for table in tables.values()) for axis in (0, 1))
    width, height = 1.4 + min(12.0, max(1.6, 0.22 * units)), 0.9 + min(12.0, max(1.2, 0.16 * layers))
    figure = Figure(figsize=(columns * width, rows * height + (0.4 if title else 0.0)), layout="constrained")
    FigureCanvasAgg(figure)  # a figure of its own: no window, and pyplot's state stays as it was
    known = figure.canvas.get_supported_filetypes()
    require(path.suffix[1:].lower() in known, "path", str(path), f"a name that ends in one of {sorted(known)}")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, table) in zip(axes, tables.items()):
        values = table.scores.detach().float().cpu().numpy()
        axis.set_facecolor("0.85")
        image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
        axis.set_title(name)
        axis.set_xlabel(table.unit)
        axis.set_ylabel("layer")
        figure.colorbar(image, ax=axis)
    for axis in axes[len(tables) :]:
        axis.set_axis_off()
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
