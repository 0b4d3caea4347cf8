"""Whether memory stays flat over 10,000 facts: peak of tracing, probing, scoring and taking statistics by their number.

    python benchmarks/speed/fact_memory.py  # 1,000 and 10,000 facts; docs/data/fact-memory.json
    python benchmarks/speed/fact_memory.py --small  # 100 and 400
    python benchmarks/speed/fact_memory.py --table  # the table again, from docs/data/fact-memory.json

A tiny random GPT-2, so that what grows is what is kept for a fact. `kept` is the size of the result's own file: what
the peak grows by beyond a few times that would be work that is not let go.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import string
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Cost, measured
from trace_speed import random_gpt2

import kt
from kt.facts.corpus import Corpus
from kt.model.sites import Kind, Site

OUT = Path(__file__).parents[2] / "docs" / "data" / "fact-memory.json"


def requests(count: int) -> list[kt.Fact]:
    """As many facts with subjects of their own, a paraphrase and a neighbour each."""
    subjects = itertools.islice(itertools.product(string.ascii_lowercase, repeat=4), count)
    return [
        kt.Fact("is {} at-", "".join(s), answer="q", foil="z", target="x", rephrasings=("on {}-",)) for s in subjects
    ]


def works(model: kt.TracedModel, folder: Path) -> dict[str, Callable[[int], Path]]:
    """What is done with so many facts, each giving the file of its result."""

    def trace(count: int) -> Path:
        found = kt.causal_trace(model, requests(count), kinds=("mlp", "attn"), samples=2, keep="all")
        return _saved(found, folder / f"trace-{count}.safetensors")

    def probe(count: int) -> Path:
        return _saved(kt.contrast_probe(model, requests(count)), folder / f"probe-{count}.safetensors")

    def evaluate(count: int) -> Path:
        return _saved(kt.evaluate(model, requests(count), generate=False), folder / f"scores-{count}.json")

    def statistics(count: int) -> Path:
        corpus = folder / f"corpus-{count}.txt"
        corpus.write_text("".join(f"{f.subject} and more text of a line of a corpus\n" for f in requests(count)))
        sites = [Site(Kind.MLP, 0)]
        found = kt.key_statistics(model, sites, Corpus.open(corpus), 10**9, folder / f"cache-{count}")
        return next(iter(found.files.values()))

    return {"causal_trace": trace, "contrast_probe": probe, "evaluate": evaluate, "key_statistics": statistics}


def _saved(result: Any, path: Path) -> Path:
    result.save(path)
    return path


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    few, many = (f"{count:,} facts" for count in found[0]["facts"])
    lines = [f"| | peak MiB, {few} | {many} | KiB a fact more | KiB a fact kept | CPU s, {many} |", "|" + " --- |" * 6]
    for row in found:
        low, high = row["peak_mib"]
        figures = (low, high, row["kib_a_fact"], row["kept_kib_a_fact"], row["cpu_s"][1])
        lines.append(f"| `{row['work']}` | {' | '.join(f'{figure:,.1f}' for figure in figures)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="100 and 400 facts; prints, writes nothing")
    parser.add_argument("--table", action="store_true", help="print the table of the last run")
    chosen = parser.parse_args()
    if chosen.table:
        sys.stdout.write(table(json.loads(OUT.read_text(encoding="utf-8"))) + "\n")
        return 0
    small = chosen.small
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    few, many = (100, 400) if small else (1000, 10_000)
    model, found = random_gpt2(2, 16, vocabulary=300), []
    with tempfile.TemporaryDirectory() as name:
        for work, do in works(model, Path(name)).items():
            do(50)  # what only a first call takes
            sizes: dict[int, tuple[Cost, int]] = {}
            for count in (few, many):
                gc.collect()
                path, cost = measured(lambda do=do, count=count: do(count))  # type: ignore[misc]
                sizes[count] = cost, path.stat().st_size
            (low, kept_low), (high, kept_high) = sizes[few], sizes[many]
            found.append(
                {
                    "work": work,
                    "facts": [few, many],
                    "peak_mib": [round(low.peak_mib, 1), round(high.peak_mib, 1)],
                    "kib_a_fact": round(1024 * (high.peak_mib - low.peak_mib) / (many - few), 2),
                    "kept_kib_a_fact": round((kept_high - kept_low) / 1024 / (many - few), 2),
                    "cpu_s": [round(low.cpu_s, 1), round(high.cpu_s, 1)],
                }
            )
    text = json.dumps(found, indent=2) + "\n"
    if not small:
        OUT.write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
