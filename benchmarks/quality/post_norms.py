"""Edits of a model with norms behind its projections: what comes through, and what it does to the rest of the model.

    python benchmarks/quality/post_norms.py MODEL --facts counterfact-edit.json --corpus TEXT --heldout TEXT

Takes CounterFact records (EasyEdit's flat form) whose old answer the model gives, and edits 1 and 5 of them together
with MEMIT and IntAttn-Edit for several λ. Prints a Markdown table. δ does not depend on λ and is searched once.
`--plain` asks every projection for the stream's change itself, as if its output were added as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import kt
from kt.editing import key_statistics
from kt.editing.closed_form import plan, post_norm
from kt.model.sites import Kind, Site

COLUMNS = (
    "method", "edits", "λ", "P(new) before", "P(new)", "rank 0", "came through", "missing", "largest ‖ΔW‖/‖W‖",
    "neighbours kept", "perplexity",
)  # fmt: skip


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def known(model: kt.TracedModel, path: Path, count: int) -> list[dict[str, Any]]:
    """The first records whose old answer begins with the model's likeliest token."""
    found = []
    for record in json.loads(path.read_text()):
        token = model.tokenizer.decode([int(model.logits(model.encode([record["prompt"]]))[0, -1].argmax())]).strip()
        template = record["prompt"].replace(record["subject"], "{}", 1)
        if token and record["ground_truth"].startswith(token) and "{}" in template:
            record["request"] = dict(
                prompt=template,
                subject=record["subject"],
                target_new=record["target_new"],
                target_true=record["ground_truth"],
            )
            found.append(record)
        if len(found) == count:
            break
    return found


def likeliest(model: kt.TracedModel, prompts: list[str]) -> list[int]:
    return [int(model.logits(model.encode([prompt]))[0, -1].argmax()) for prompt in prompts]


def perplexity(model: kt.TracedModel, texts: list[str]) -> float:
    nll, tokens = 0.0, 0
    for text in texts:
        batch = model.encode([text])
        log_p = model.logits(batch, keep=batch.ids.shape[1])[0, :-1].log_softmax(-1)
        nll -= float(log_p.gather(1, batch.ids[0, 1:, None]).sum())
        tokens += len(log_p)
    return math.exp(nll / tokens)


def search_once() -> None:
    """Keep searches by facts and aims."""
    kept: dict[tuple[Any, ...], Any] = {}
    search = plan.find_targets

    def kept_search(model: Any, facts: Any, aims: Any, *rest: Any, **named: Any) -> Any:
        key = (*(fact.id for fact in facts), *aims)
        if key not in kept:
            kept[key] = search(model, facts, aims, *rest, **named)
        return kept[key]

    plan.find_targets = kept_search


def measure(model: kt.TracedModel, options: argparse.Namespace) -> None:
    records = known(model, options.facts, max(options.edits))
    sites = [Site(Kind.MLP, layer) for layer in options.layers] + [Site(Kind.ATTN, i) for i in options.layers_attn]
    statistics = key_statistics(model, sites, options.corpus, max_tokens=options.tokens, cache_dir=options.cache)
    texts = [line for line in options.heldout.read_text().splitlines() if line.strip()][: options.documents]
    neighbours = [record["locality_prompt"] for record in records]
    before, said = perplexity(model, texts), likeliest(model, neighbours)
    say(f"perplexity {before:.2f} unedited; facts: {[r['prompt'] for r in records]}")
    search_once()
    for count in options.edits:
        for method in options.methods:
            for weight in options.weights:
                joint = dict(layers_attn=tuple(options.layers_attn), alpha=options.alpha) if method == "intattn" else {}
                edit = kt.edit(
                    model,
                    [record["request"] for record in records[:count]],
                    method=method,
                    layers_mlp=tuple(options.layers),
                    mom2_update_weight=weight,
                    statistics=statistics,
                    context_templates=options.contexts,
                    **joint,
                )
                with edit.applied(model):
                    after = perplexity(model, texts)
                    kept = sum(a == b for a, b in zip(said, likeliest(model, neighbours), strict=True))
                through = edit.manifest["value_change"][f"hidden.{options.layers[-1]}"]
                sizes = [edit.updates[n].norm() / edit.manifest["weight_norms"][n] for n in edit.names]
                old, new = ([r.target_prob[i] for r in edit.report] for i in (0, 1))
                row = [
                    method, str(count), f"{weight:g}", f"{sum(old) / count:.3f}", f"{sum(new) / count:.3f}",
                    f"{sum(r.target_rank[1] == 0 for r in edit.report)} of {count}",
                    f"{through['came_through']['mean']:.2f}", f"{through['left']['mean']:.2f}", f"{max(sizes):.2f}",
                    f"{kept} of {len(neighbours)}", f"{after:.2f}",
                ]  # fmt: skip
                say("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("facts", "corpus", "heldout"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    parser.add_argument("--layers-attn", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--edits", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--methods", nargs="+", default=["memit", "intattn"])
    parser.add_argument("--weights", type=float, nargs="+", default=[50, 500, 1500])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--documents", type=int, default=8, help="held-out documents, one a line")
    parser.add_argument("--contexts", nargs="+", default=None, help="templates with {}; default: the model's own")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.plain:
        plan.change_of_output = lambda model, site, now, wanted: post_norm.OutputChange(wanted, wanted)
    say("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    measure(kt.load(options.model), options)


if __name__ == "__main__":
    main()
