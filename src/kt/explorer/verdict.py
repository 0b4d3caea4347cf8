"""The head of a page: the verdict in words, and the four numbers that matter most of what the runs hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .._util.text import count
from ..editing import Edit
from ..evaluation.scores import Comparison, Scores
from ..experiments import Sweep
from ..probing import Probe
from ..report import Card
from ..residual import Residual
from ..tracing import Balance, Trace
from ..tracing.prompts import TITLES
from ..tracing.trace import without_heads

HEADLINES = 4
SUCCESS = {
    "edit_success_tf_exact": "teacher-forced",
    "edit_success_gen_exact": "greedy text",
    "efficacy_prob_success": "new answer above the old one",
    "edit_success_wild_contains": "free answers",
}
TONES = ("good", "mixed", "bad")
ORDER = (Comparison, Edit, Residual, Scores, Sweep, Balance, Trace, Probe)
AFTER_EDITS = ORDER.index(Scores)
"""Results from here on add sentences only where nothing was edited."""


class Verdict(NamedTuple):
    """`title` and `words` in sentences; `tone` is one of `TONES`; `warnings` say what failed and what to do."""

    title: str
    words: str
    tone: str
    warnings: tuple[str, ...]
    cards: tuple[Card, ...]


def verdict(results: Sequence[Any]) -> Verdict:
    """What the results say, the edit first."""
    sentences: list[str] = []
    warnings: list[str] = []
    cards: list[Card] = []
    tones: list[str] = []
    edited = any(isinstance(result, Edit) for result in results)
    for result in sorted(results, key=_order):
        said, found = _of(result)
        if not (isinstance(result, Comparison) and edited) and not (sentences and _order(result) >= AFTER_EDITS):
            sentences += said
        cards += [card for card in found if _about(card) not in map(_about, cards)]
        if isinstance(result, Edit) and result.verdict is not None:
            warnings += result.verdict.warnings
            share = result.verdict.changed / max(1, result.verdict.requests)
            tones.append("bad" if share < 0.5 else "mixed" if result.verdict.warnings or share < 1 else "good")
    tone = max(tones, key=TONES.index) if tones else ""
    title = _title(results) if results else "no results"
    return Verdict(title, " ".join(sentences), tone, tuple(warnings), tuple(cards[:HEADLINES]))


def _title(results: Sequence[Any]) -> str:
    """What the page is about, the edit first."""
    for result in results:
        if isinstance(result, Edit):
            return f"{count(len(result.report), 'fact')} edited by {result.manifest.get('method')}"
    for result in results:
        if isinstance(result, Scores | Comparison):
            return f"{(result.after if isinstance(result, Comparison) else result).about_records} scored"
    for kind, what in ((Trace, "traced"), (Probe, "probed"), (Residual, "probed before and after an edit")):
        if found := [result for result in results if isinstance(result, kind)]:
            return f"{count(sum(len(result.facts) for result in found), 'fact')} {what}"
    return str(min(results, key=_order).heading)


NAMES = {"mlp": "MLP", "attn": "attention"}
SAME = {"facts changed": "edit success", "neighbours kept": "locality"}
"""Cards of an edit that say less than those of its scores."""


def _about(card: Card) -> str:
    return SAME.get(card.name, card.name)


def _order(result: Any) -> int:
    return next((i for i, kind in enumerate(ORDER) if isinstance(result, kind)), len(ORDER))


def _of(result: Any) -> tuple[list[str], list[Card]]:
    if isinstance(result, Edit):
        return _edit(result)
    if isinstance(result, Scores | Comparison):
        return _scores(result)
    if isinstance(result, Residual):
        if not math.isfinite(result.score.mean):
            return [], []
        lead = f"{result.score.mean:.0%} of the old answers' lead over other answers is left."
        return [lead], [Card("residual score", result.score, "0 is none, 1 all")]
    if isinstance(result, Balance) and math.isfinite(result.alpha):
        return [f"Attention does {result.alpha:.0%} of the recall (α {result.alpha:.3f})."], list(result.headline())
    if isinstance(result, Trace):
        return _trace(result)
    if isinstance(result, Probe):
        return [], [Card("facts probed", result.n_facts)]
    return [], list(result.headline())


def _edit(edit: Edit) -> tuple[list[str], list[Card]]:
    found = edit.verdict
    if found is None:
        return [f"{count(len(edit.report), 'fact')} edited."], [Card("facts edited", len(edit.report))]
    method = str(edit.manifest.get("method"))
    words = f"{found.changed} of {count(found.requests, 'fact')} changed by {method}"
    cards = [Card("facts changed", f"{found.changed} of {found.requests}", "the new answer is first")]
    if found.neighbours is not None:
        kept, n = found.neighbours
        words += f"; {kept / n:.0%} of {count(n, 'neighbour')} kept their next token"
        cards.append(Card("neighbours kept", f"{kept / n:.0%}", f"{kept} of {n}"))
    if found.perplexity is not None and all(map(math.isfinite, found.perplexity)):
        before, after = found.perplexity
        moved = after / before - 1
        change = f"rose {moved:.1%}" if moved >= 0.0005 else f"fell {-moved:.1%}" if moved <= -0.0005 else "stayed"
        words += f"; perplexity of unrelated text {change}"
        cards.append(Card("perplexity", f"{before:.3g} → {after:.3g}", "of unrelated text"))
    warned = f" {count(len(found.warnings), 'warning')} below." if found.warnings else ""
    return [words + "." + warned], cards


def _scores(scores: Scores | Comparison) -> tuple[list[str], list[Card]]:
    after = scores.after if isinstance(scores, Comparison) else scores
    cards = []
    name = next((name for name in SUCCESS if name in after.metrics), None)
    if name is not None:
        before = scores.before.metrics.get(name) if isinstance(scores, Comparison) else None
        was = "" if before is None else f"; {before.mean:.3f} before"
        cards.append(Card("edit success", after.metrics[name], SUCCESS[name] + was))
    for metric, title in (("neighbourhood_same_argmax", "locality"), ("perplexity_heldout", "perplexity")):
        if metric in after.metrics:
            cards.append(Card(title, after.metrics[metric]))
    if name is None:
        return [f"{after.about_records} scored."], cards
    near = after.metrics.get("neighbourhood_same_argmax")
    kept = "" if near is None else f"; {near.mean:.0%} of the neighbours keep their next token"
    return [f"{after.about_records} scored: {after.metrics[name].mean:.0%} give the new answer{kept}."], cards


def _trace(trace: Trace) -> tuple[list[str], list[Card]]:
    """Which module at which layer brings most back, at which token."""
    metric, parts, cards = trace.metrics[-1], [], []
    for kind in [kind for kind in without_heads(trace) if kind in NAMES]:
        means = trace.by_role(kind, metric, n_boot=1)
        if np.isnan(means.mean).all():
            continue
        row, layer = np.unravel_index(int(np.nanargmax(means.mean)), means.mean.shape)
        mean = float(means.mean[row, layer])
        at = f"at the {TITLES[means.roles[row]].lower()}"
        parts.append(f"{NAMES[kind]} in layer {layer} {at} ({mean:.2f})")
        cards.append(Card(f"strongest {NAMES[kind]}", f"layer {layer}", f"{mean:.3f} {at}"))
    lost = trace.metadata["direction"] == "noise"
    what = "Most of the answer is lost without" if lost else "Most of the answer comes back with"
    words = [f"{count(trace.n_facts, 'fact')} traced. {what} {' and '.join(parts)}."] if parts else []
    return words, [*cards, Card("facts traced", trace.n_facts)]
