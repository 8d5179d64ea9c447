"""The command `regard lens influence`: a corpus ranked by what a model loses on it without its retrieval heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .._console import console


def register(app: typer.Typer) -> None:
    """Add the command to `regard lens`."""
    app.command("influence")(influence)


def influence(
    corpus: Annotated[list[Path], typer.Argument(help="Files (.jsonl, .txt, either with .gz) or folders of such.")],
    out: Annotated[Path, typer.Option(help="Folder for heads.safetensors, part-I-of-N.jsonl and ranked.jsonl.")] = Path(
        "influence"
    ),
    model: Annotated[str, typer.Option(help="A hub name, a local folder, or smollm2-135m.")] = "smollm2-135m",
    heads: Annotated[str, typer.Option(help="Scores of the heads (.safetensors, .json); empty = find them.")] = "",
    top: Annotated[float, typer.Option(help="Share of the heads that are masked.")] = 0.05,
    probes: Annotated[int, typer.Option(help="Key-value prompts to find the heads with.")] = 20,
    probe_tokens: Annotated[int, typer.Option(help="Length of these prompts.")] = 1024,
    max_tokens: Annotated[int, typer.Option(help="A document is read up to here.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Documents in one forward.")] = 8,
    share: Annotated[float, typer.Option(help="Share of each domain to keep.")] = 0.2,
    field: Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")] = "text",
    domain_field: Annotated[str, typer.Option(help="Field that holds the domain.")] = "domain",
    txt: Annotated[str, typer.Option(help="A .txt file is one document (file) or one a line (line).")] = "file",
    literal: Annotated[bool, typer.Option(help="Masked weights are 1/L, as printed in the paper.")] = False,
    processes: Annotated[int, typer.Option(help="Processes on this machine, each with a model of its own.")] = 1,
    shard: Annotated[
        str, typer.Option(help="I/N: only every N-th document from the I-th on, for several machines.")
    ] = "0/1",
    fresh: Annotated[bool, typer.Option(help="Score again what an earlier run has scored.")] = False,
) -> None:
    """Rank documents by AttentionInfluence; a run that was stopped goes on where it was."""
    from .._checks import require, require_int
    from .._files import require_writable, write_whole
    from .corpus_files import CorpusReport, rank_corpus

    require_int("processes", processes, 1)
    index, count = _shard(shard)
    require(0 < share <= 1, "share", share, "a number in (0, 1]")
    ranked = require_writable(out / "ranked.jsonl")
    screen = console(stderr=True)
    with screen.status("finding the retrieval heads"):
        chosen = _heads(model, heads, out, top, probes, probe_tokens, fresh)
    options = {
        "resume": not fresh,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "literal": literal,
        "field": field,
    }
    options |= {"domain_field": domain_field, "txt": txt}
    total = count * processes
    numbers = [index + count * i for i in range(processes)]
    jobs = [
        (model, [str(path) for path in corpus], chosen, str(out / f"part-{i}-of-{total}.jsonl"), (i, total), options)
        for i in numbers
    ]
    with screen.status("scoring the corpus"):
        if processes == 1:
            reports = [_score(jobs[0])]
        else:
            from concurrent.futures import ProcessPoolExecutor
            from multiprocessing import get_context

            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                reports = list(pool.map(_score, jobs))
    whole: CorpusReport = reports[0]  # every process passes over the same unreadable lines: one tells of them
    whole.scored, whole.resumed = sum(r.scored for r in reports), sum(r.resumed for r in reports)
    whole.elsewhere = 0 if count == 1 else whole.elsewhere
    console().print(str(whole), soft_wrap=True)
    parts = [out / f"part-{i}-of-{total}.jsonl" for i in range(total)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        console().print(f"not ranked yet: {', '.join(missing)} of other shards are not in {out}", soft_wrap=True)
        return
    rows = rank_corpus(parts, share)
    write_whole(ranked, "".join(json.dumps(row) + "\n" for row in rows))
    table = Table(title=f"{len(chosen)} heads masked; what is kept of each domain")
    for column in ("domain", "documents", "kept", "score of the best", "of the worst"):
        table.add_column(column)
    for domain in dict.fromkeys(row["domain"] for row in rows):
        own = [row for row in rows if row["domain"] == domain]
        figures = (len(own), sum(row["keep"] for row in own), f"{own[0]['score']:.3f}", f"{own[-1]['score']:.3f}")
        table.add_row(domain, *map(str, figures))
    console().print(table)
    console().print(f"wrote {ranked}", soft_wrap=True)


def _shard(text: str) -> tuple[int, int]:
    from .._checks import bad_value

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise bad_value("shard", text, "I/N with 0 <= I < N")
    return int(index), int(count)


def _heads(
    model: str, given: str, out: Path, top: float, probes: int, length: int, fresh: bool
) -> list[tuple[int, int]]:
    """The heads to mask: from a file, from an earlier run's, or found now."""
    from .. import load
    from .corpus_influence import influence_heads
    from .head_scores import HeadScores
    from .key_values import KeyValueProbes

    kept = Path(given) if given else out / "heads.safetensors"
    if given or (kept.exists() and not fresh):
        return HeadScores.load(kept).top(top)
    loaded, tokenizer = load(model)
    heads, scores = influence_heads(loaded, tokenizer, KeyValueProbes(count=probes, max_tokens=length), top=top)
    scores.save(kept)
    return heads


def _score(job: tuple[Any, ...]) -> Any:
    """One process's part."""
    from .. import load
    from .corpus_files import score_files

    model, corpus, heads, out, shard, options = job
    loaded, tokenizer = load(model)
    return score_files(loaded, tokenizer, corpus, heads, out, shard=shard, **options)
