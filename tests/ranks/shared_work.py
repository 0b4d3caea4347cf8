"""A program with everything that is shared out; as a script it is one of several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import kt
from kt import ranks
from kt.editing import key_statistics
from kt.journal import Journal
from kt.sites import Kind, Site

TEXTS = [
    f"The {what} of the {whose} is in {where}."
    for what in ("old king", "new king", "old book", "new book")
    for whose in ("sea", "sun")
    for where in ("Rome", "Paris", "Oslo")
]


def work(folder: Path, shared: Path) -> dict:
    """What comes out, as files in `folder` and as numbers; journal and cache are all processes' own together."""
    folder.mkdir()
    model = kt.load("demo", device="cpu")
    facts = kt.load_facts("demo", limit=4)
    journal = Journal.begin(shared / "journal", {}, resume=False)
    traced = {"kinds": ("mlp", "attn"), "samples": 1, "max_rows": 16, "seed": 3}
    kt.causal_trace(model, facts, **traced, journal=journal.within("trace")).save(folder / "trace.safetensors")
    kt.causal_trace(model, facts, **traced, method="atp").save(folder / "estimate.safetensors")
    kt.contrast_probe(model, facts, batch_size=2).save(folder / "probe.safetensors")
    corpus = shared / "corpus.txt"
    ranks.by_main("corpus", lambda: corpus.write_text("\n".join(TEXTS)))
    sites = [Site(Kind.MLP, 1), Site(Kind.MLP, 2)]
    statistics = key_statistics(model, sites, str(corpus), max_tokens=200, cache_dir=shared / "cache")
    requests = [fact.as_request() for fact in facts]
    chosen = {"layers": [1, 2], "v_num_grad_steps": 3, "context_templates": ["{}"]}
    edit = kt.edit(model, requests, method="memit", statistics=statistics, journal=journal.within("edit"), **chosen)
    edit.save(folder / "edit.safetensors")
    with edit.applied(model):
        kt.evaluate(model, requests[:1], batch_size=4).save(folder / "scores.json")
    return {"tokens": statistics.n_tokens, "phases": journal.done}


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.join()
    shared = Path(sys.argv[1])
    sys.stdout.write(json.dumps(work(shared / f"of-{ranks.started_as()}", shared)))
    sys.stdout.flush()
    ranks.leave()
