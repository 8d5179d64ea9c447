"""A comparison as a table on the screen, a picture, and a page."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from rich.table import Table

from .compare import COLUMNS, PARTS, Comparison

_HEADINGS = {
    "prompt_ppl": "ppl\nprompt",
    "decode_ppl": "ppl\ndecode",
    "needle": "needle\nlog-prob",
    "chat": "chat\nlog-prob",
    "recall": "recall\nlog-prob",
    "tracking": "tracking\nlog-prob",
    "aggregation": "aggreg.\nlog-prob",
    "hits": "answers\nright",
    "kl": "KL to\ndense",
    "prefill_seconds": "prefill\ns",
    "decode_tokens_per_second": "decode\ntok/s",
    "kv_bytes": "KV\nMB",
}
_LOG_PROBS = ("needle", "chat", "recall", "tracking", "aggregation")
_WITHOUT_RATIO = (
    *_LOG_PROBS,
    "hits",
    "kl",
)  # log-probabilities and a divergence from dense itself: a ratio would say nothing


def figures(result: Comparison) -> list[str]:
    """The figures that were measured, in the order of the table."""
    return [f for f in COLUMNS if any(result.mean(label, f) is not None for label in result.labels)]


def cell(result: Comparison, label: str, figure: str) -> tuple[str, str]:
    """A figure's value and, below it, its ratio to dense with the spread over the repeats."""
    mean = result.mean(label, figure)
    if mean is None:
        return "", ""
    value = mean / 2**20 if figure == "kv_bytes" else mean
    text = (
        f"{value:.2e}"
        if figure == "kl" and 0 < value < 0.001
        else f"{value:.3g}"
        if figure not in _LOG_PROBS
        else f"{value:.2f}"
    )
    if label == "dense" or figure in _WITHOUT_RATIO:
        values = result.values(label, figure)
        spread = (max(values) - min(values)) / 2 if len(values) > 1 else 0.0
        spread = spread / 2**20 if figure == "kv_bytes" else spread
        return text, f"±{spread:.2g}" if spread else ""
    ratio = result.ratio(label, figure)
    if ratio is None:
        return text, ""
    return text, f"{ratio[0]:.2f}×" + (f" ±{ratio[1]:.2f}" if ratio[1] >= 0.005 else "")


def table(result: Comparison) -> Table:
    """The table that `regard compare` prints: value, and below it the ratio to dense."""
    settings = result.settings
    shown = Table(
        title=f"{settings['model']}: {settings['context']} tokens of context, {settings['decode']} decoded, "
        f"{settings['repeats']} repeats, budget {settings['budget']}",
        caption="below each value: ratio to dense in the same run, ± half the range over repeats",
        title_style="bold",
        pad_edge=False,
    )
    shown.add_column("method")
    for figure in figures(result):
        shown.add_column(_HEADINGS[figure], justify="right")
    for label in result.labels:
        if label in result.skipped or not any(result.values(label, f) for f in COLUMNS):
            continue
        cells = []
        for figure in figures(result):
            value, ratio = cell(result, label, figure)
            cells.append(f"{value}\n[dim]{ratio}[/dim]" if ratio else value)
        shown.add_row(label, *cells, style="bold" if label == "dense" else "", end_section=label == "dense")
    return shown


def markdown(result: Comparison) -> str:
    """The same table for a page of text."""
    settings = result.settings
    names = [_HEADINGS[figure].replace("\n", " ") for figure in figures(result)]
    lines = [
        f"{settings['model']}: {settings['context']} tokens of context, {settings['decode']} decoded, {settings['repeats']} repeats, "
        f"budget {settings['budget']}; in brackets the ratio to dense in the same run "
        f"({', '.join(f'{name} {value}' for name, value in result.machine.items())}).",
        "",
        f"| method | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for label in result.labels:
        if label in result.skipped or not any(result.values(label, figure) for figure in COLUMNS):
            continue
        cells = []
        for figure in figures(result):
            value, ratio = cell(result, label, figure)
            cells.append(f"{value} ({ratio.split(' ')[0]})" if "×" in ratio else value)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for label, why in (*result.skipped.items(), *result.notes.items()):
        lines += ["", f"{label}: {why}"]
    return "\n".join(lines) + "\n"


def front(points: list[tuple[float, float]]) -> list[int]:
    """Numbers of the points that no other beats in both coordinates (less is better in both), by rising first coordinate."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept


_QUALITY = (
    ("kl", "KL divergence from dense (nats)"),
    ("decode_ppl", "perplexity of the continuation"),
    ("needle", "needle: −log-probability (nats)"),
    ("chat", "chat: −log-probability (nats)"),
    ("recall", "recall: −log-probability (nats)"),
    ("tracking", "tracking: −log-probability (nats)"),
    ("aggregation", "aggregation: −log-probability (nats)"),
)
_COSTS = (
    ("kv_bytes", "KV cache, ratio to dense"),
    ("prefill_seconds", "prefill time, ratio to dense"),
    ("decode", "time per decoded token, ratio to dense"),
)


def _cost(result: Comparison, label: str, cost: str) -> float | None:
    if label == "dense":
        return 1.0
    ratio = result.ratio(label, "decode_tokens_per_second" if cost == "decode" else cost)
    if ratio is None:
        return None
    return 1.0 / ratio[0] if cost == "decode" else ratio[0]


def _quality(result: Comparison, label: str, quality: str) -> float | None:
    mean = result.mean(label, quality)
    return -mean if mean is not None and quality in _LOG_PROBS else mean


def picture(result: Comparison) -> Any:
    """Quality against cost, one panel a pair, with the Pareto front: a matplotlib `Figure`."""
    from matplotlib.figure import Figure

    qualities = [(q, name) for q, name in _QUALITY if result.values("dense", q)]
    figure = Figure(figsize=(4.6 * len(_COSTS), 3.9 * max(1, len(qualities))), layout="constrained")
    axes = figure.subplots(max(1, len(qualities)), len(_COSTS), squeeze=False)
    shown = [label for label in result.labels if label not in result.skipped]
    families: dict[str, list[str]] = {}
    for label in shown:
        families.setdefault(label.split(" @ ")[0], []).append(label)
    styles = {name: (f"C{i % 10}", "osD^vPX"[i // 10 % 7]) for i, name in enumerate(families)}
    for row, (quality, quality_name) in enumerate(qualities):
        for column, (cost, cost_name) in enumerate(_COSTS):
            axis = axes[row][column]
            found = [(label, _cost(result, label, cost), _quality(result, label, quality)) for label in shown]
            known = [(label, x, y) for label, x, y in found if x is not None and y is not None]
            points = [(x, y) for _, x, y in known]
            best = front(points)
            axis.plot(
                [points[i][0] for i in best],
                [points[i][1] for i in best],
                color="0.6",
                linewidth=1,
                zorder=1,
                drawstyle="steps-post",
            )
            stars = {known[i][0] for i in best}
            place = {label: (x, y) for label, x, y in known}
            for name, labels in families.items():
                own = [place[label] for label in labels if label in place]
                colour, marker = styles[name]
                if len(own) > 1:  # one method at several budgets
                    axis.plot(*zip(*own), color=colour, linewidth=0.8, alpha=0.6, zorder=1)
                axis.scatter(
                    [x for x, _ in own],
                    [y for _, y in own],
                    color=colour,
                    s=[70 if label in stars else 36 for label in labels if label in place],
                    marker="*" if name == "dense" else marker,
                    zorder=2,
                    label=name,
                )
            axis.axvline(1.0, color="0.85", linewidth=1, zorder=0)
            axis.set(xlabel=cost_name if row == len(qualities) - 1 else "", ylabel=quality_name if column == 0 else "")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    settings = result.settings
    figure.suptitle(
        f"{settings['model']}, {settings['context']} tokens: lower left is better; the line is the Pareto front",
        fontsize=11,
    )
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(len(names), 4 if len(names) < 12 else 7) or 1,
        fontsize=8,
        frameon=False,
    )
    return figure


def png(result: Comparison) -> bytes:
    """The picture as PNG bytes."""
    buffer = io.BytesIO()
    picture(result).savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#1c1e21;background:#fff}
h1{font-size:1.4rem}table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .7rem;text-align:right;border-bottom:1px solid #e3e5e8}th:first-child,td:first-child{text-align:left}
th{font-weight:600;vertical-align:bottom}td small{display:block;color:#6b7280}tr.dense{font-weight:600;background:#f6f7f9}
img{max-width:100%}code{background:#f1f3f5;padding:.1rem .3rem;border-radius:3px}dt{font-weight:600}dd{margin:0 0 .4rem}
"""


def page(result: Comparison, command: str = "") -> str:
    """One self-contained HTML page: table, picture, needle by depth, what was measured and on what."""
    shown = [label for label in result.labels if label not in result.skipped and result.values(label, "kv_bytes")]
    head = "".join(f"<th>{html.escape(_HEADINGS[f]).replace(chr(10), '<br>')}</th>" for f in figures(result))
    rows = []
    for label in shown:
        cells = "".join(
            f"<td>{html.escape(v)}<small>{html.escape(r)}</small></td>"
            for v, r in (cell(result, label, f) for f in figures(result))
        )
        described = html.escape(result.descriptions.get(label, ""))
        rows.append(
            f'<tr class="{"dense" if label == "dense" else ""}"><td title="{described}">{html.escape(label)}</td>{cells}</tr>'
        )
    parts = [f"<table><thead><tr><th>method</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"]
    parts.append("<p>Below each value: its ratio to dense in the same run, ± half the range over the repeats.</p>")
    parts.append(
        f'<p><img alt="quality against cost" src="data:image/png;base64,{base64.b64encode(png(result)).decode()}"></p>'
    )
    parts.append(_depths(result, shown))
    parts.append(_positions(result, shown))
    if result.skipped:
        items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in result.skipped.items())
        parts.append(f"<h2>Could not serve this model</h2><dl>{items}</dl>")
    meanings = "".join(
        f"<dt>{html.escape(_HEADINGS[f]).replace(chr(10), ' ')}</dt><dd>{html.escape(COLUMNS[f][0])}</dd>"
        for f in figures(result)
    )
    used = "".join(
        f"<dt>{html.escape(k)}</dt><dd><code>{html.escape(result.descriptions.get(k, ''))}</code></dd>" for k in shown
    )
    facts = ", ".join(f"{k} {v}" for k, v in result.machine.items())
    settings = ", ".join(f"{k} {v}" for k, v in result.settings.items())
    parts.append(f"<h2>What was measured</h2><dl>{meanings}</dl><h2>Methods as attached</h2><dl>{used}</dl>")
    parts.append(f"<p>{html.escape(settings)}<br>{html.escape(facts)}</p>")
    if command:
        parts.append(f"<p>Made by <code>{html.escape(command)}</code></p>")
    if not result.finished:
        parts.insert(0, "<p><strong>Unfinished: this run was stopped; go on with <code>--resume</code>.</strong></p>")
    title = html.escape(f"regard compare: {result.settings['model']}")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<h1>{title}</h1>{"".join(parts)}</html>'


def _depths(result: Comparison, shown: list[str]) -> str:
    depths = result.settings["depths"]
    columns = {f"{depth:.0%}": f"needle@{depth:g}" for depth in depths}
    return _by(result, shown, "Needle log-probability by depth", columns)


def _positions(result: Comparison, shown: list[str]) -> str:
    columns = {f"quarter {part}": f"ppl@{part}/{PARTS}" for part in range(1, PARTS + 1)}
    return _by(result, shown, "Perplexity by position in the prompt", columns)


def _by(result: Comparison, shown: list[str], title: str, columns: dict[str, str]) -> str:
    if not any(result.values(label, figure) for label in shown for figure in columns.values()):
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = ""
    for label in shown:
        means = [result.mean(label, figure) for figure in columns.values()]
        cells = "".join("<td>" + ("" if mean is None else f"{mean:.2f}") + "</td>" for mean in means)
        rows += f"<tr><td>{html.escape(label)}</td>{cells}</tr>"
    return f"<h2>{title}</h2><table><thead><tr><th>method</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
