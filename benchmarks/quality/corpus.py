"""How much second moments still change with more text and with other text, and how much an edit depends on that.

    python benchmarks/quality/corpus.py MODEL --facts counterfact-edit.json [--other TEXT] [--layers 4-8]

C is taken over the first 25,000, 50,000 and 100,000 tokens of the English sample, and over another text where one is
given. Printed, as Markdown: ‖C - C_100k‖ / ‖C_100k‖ in Frobenius norm (smallest and largest over the layers), and
MEMIT's edit of the first facts with each C: the shares of tokens of the new answer that come first after the prompt
and after a paraphrase, of neighbours that keep their first token, and perplexity of the held-out English text. δ is
searched once, with no text before the prompt, which is twenty times faster and leaves the comparison as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from post_norms import search_once

import kt
from kt.editing import Statistics, key_statistics
from kt.model.sites import Kind, Site

TOKENS = (25_000, 50_000, 100_000)
METRICS = ("edit_success_tf_token", "paraphrase_tf_token", "neighbourhood_same_argmax", "perplexity_heldout")


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--facts", required=True)
    options.add_argument("--edits", type=int, default=10)
    options.add_argument("--other", type=Path, help="another text: one document a line")
    options.add_argument("--layers", default="4-8")
    options.add_argument("--cache", type=Path, help="where second moments are kept")
    given = options.parse_args(arguments)
    model = kt.load(given.model)
    first, last = map(int, given.layers.split("-"))
    layers = tuple(range(first, last + 1))
    sites = [Site(Kind.MLP, layer) for layer in layers]
    moments = {f"English, {n:,}": key_statistics(model, sites, "english", n, given.cache) for n in TOKENS}
    if given.other is not None:
        other = key_statistics(model, sites, given.other, TOKENS[-1], given.cache)
        moments[f"{given.other.name}, {other.n_tokens:,}"] = other
    facts = kt.load_facts(given.facts, limit=given.edits)
    asked = {"protocols": ("tf", "ppl")}
    before = kt.evaluate(model, facts, **asked)
    search_once()
    say(["C over (tokens)", "‖C - C_100k‖ / ‖C_100k‖", *METRICS])
    say(["---"] * (2 + len(METRICS)))
    say(["unedited", "", *figures(before)])
    whole = moments[f"English, {TOKENS[-1]:,}"]
    for name, taken in moments.items():
        away = [distance(taken, whole, model.weight_name(site)) for site in sites]
        edit = kt.edit(model, facts, method="memit", layers_mlp=layers, statistics=taken, context_templates=["{}"])
        with edit.applied(model):
            after = kt.evaluate(model, facts, before=before, **asked)
        say([name, f"{min(away):.3f} to {max(away):.3f}", *figures(after)])


def distance(ours: Statistics, theirs: Statistics, weight: str) -> float:
    """‖ours - theirs‖ / ‖theirs‖."""
    a, b = (moments.moment_of(weight.removesuffix(".weight")).matrix() for moments in (ours, theirs))
    return float((a - b).norm() / b.norm())


def figures(scores: kt.evaluation.Scores) -> list[str]:
    found = scores.metrics
    return [f"{found[name].mean:.3f}" if name in found else "-" for name in METRICS]


def say(cells: Sequence[str]) -> None:
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
