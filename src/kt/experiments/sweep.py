"""`sweep`: solve and score every point, keep each when it is done, give the rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._util.data import plain
from .._util.notebook_bar import stage_or_bars
from .._util.progress import Stage
from .._util.text import words
from ..editing import Statistics
from ..editing.resolve import prompt_asked, read_requests, without_contradictions
from ..errors import KtError, warn_user
from ..evaluation import Scores, evaluate
from ..evaluation.metrics import PROTOCOLS
from ..evaluation.perplexity import Heldout, heldout_corpus
from ..facts.corpus import corpus_for, tokens_for
from ..facts.fact import Fact, facts_digest
from ..facts.load import FactsLike
from ..model.identity import of_a_run, turns_of
from ..runs.provenance import versions
from .grids import Point, check_points
from .sweep_result import Kept, Row, Sweep
from .sweep_solving import Solver, config_of

if TYPE_CHECKING:
    from ..model.model import TracedModel


def sweep(
    model: TracedModel,
    facts: FactsLike,
    points: Sequence[Point],
    *,
    kind: str = "points",
    folder: str | Path | None = None,
    resume: bool = False,
    generate: bool = True,
    protocols: Sequence[str] | None = None,
    heldout: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    statistics: Statistics | str | Path | None = None,
    corpus: str = "auto",
    max_tokens: int | None = None,
    batch_size: int | str = "auto",
    balance: Mapping[str, Any] | None = None,
    stage: Stage | None = None,
) -> Sweep:
    """One edit a point, in one batch, scored on the facts that it edits against the unedited model.

    Args:
        model: unedited; its weights are the same bytes afterwards.
        facts: the edit requests, of which a point may take the first so many.
        points: settings (see `grids`); a point may take only the first so many facts.
        kind: what is swept; names the figure's x axis.
        folder: keeps each point when it is done; `resume` goes on there.
        generate: whether scores also rest on generated text.
        protocols: the ways to ask, as in `kt.evaluate`; in place of `generate`.
        heldout: the text of the protocol ppl, as in `kt.evaluate`.
        seeds: each point is solved once a seed; a record's value is the mean over them, intervals are over records.
            A held-out document's loss is the mean over them as well.
        statistics, corpus, max_tokens: second moments, as in `kt.edit`.
        balance: a traced α, to be marked on the figure.
        stage: opens a stage by name and gives the callback for its progress.

    Returns:
        One row a point: metrics with n and 95% interval over records, values by record, seconds.

    Raises:
        KtError: no points, a point that asks for more facts than there are, what `kt.edit` raises, or a folder that
            holds a sweep with other settings.
    """
    stage = stage_or_bars(stage)
    requests = without_contradictions(read_requests(model, facts))
    check_points(points, len(requests), seeds)
    ways = _ways(protocols, generate)
    settings = identity_of(model, requests, seeds, statistics, corpus, max_tokens) | {
        "kind": kind,
        "points": list(points),
        "protocols": ways,
        "heldout": heldout_corpus(heldout, model.name).identity if "ppl" in ways else None,
    }
    if any(config_of(model, point.options).follows_keys for point in points):
        settings["ridges"] = "auto"  # so that points of a kt with fixed ones are not gone on with
    kept = Kept(folder, settings, resume, {"balance": balance})
    arguments: dict[str, Any] = {"protocols": ways, "heldout": heldout, "batch_size": batch_size, "seed": seeds[0]}
    solver = Solver(model, [point.options for point in points], statistics, corpus, max_tokens)
    with stage("unedited model") as tick:
        before = evaluate(model, requests, progress=tick, **arguments)
    rows = []
    for number, point in enumerate(points):
        row = kept.row(number, point)
        if row is None:
            with stage(f"point {number + 1} of {len(points)}: {point.series} {point.label}") as tick:
                row = _measure(solver, requests, point, before, seeds, arguments, tick)
            kept.add(number, point, row)
        rows.append(row)
    about = {
        "kind": kind,
        "model": model.name,
        "n_facts": len(requests),
        "seeds": list(seeds),
        # The meaning of each metric; locality needs an unedited model, so one fact is scored again.
        "protocol": evaluate(model, requests[:1], before=before, **arguments).protocol,
    }
    return Sweep(plain(about), tuple(rows), plain(before.as_dict()["metrics"]), balance)


def identity_of(
    model: TracedModel,
    facts: Sequence[Fact],
    seeds: Sequence[int],
    statistics: Statistics | str | Path | None,
    corpus: str,
    max_tokens: int | None,
) -> dict[str, Any]:
    """What the kept points of a model rest on; points of something else are not gone on with."""
    text = corpus_for(corpus, model.name)
    return {
        "model": model.fingerprint(),
        **of_a_run(model),
        **turns_of(model, (prompt for fact in facts for prompt in _prompts(fact))),
        "versions": versions(),
        "facts": facts_digest(facts),
        "seeds": list(seeds),
        "corpus": text,
        "max_tokens": tokens_for(text, max_tokens),
        "statistics": None if statistics is None else str(getattr(statistics, "files", statistics)),
    }


def _prompts(fact: Fact) -> list[str]:
    """All that a fact asks."""
    return [fact.prompt, *fact.paraphrases, *(each.prompt for each in (*fact.neighbours, *fact.hops)), *fact.generation]


def _ways(protocols: Sequence[str] | None, generate: bool) -> list[str]:
    """The protocols, each once and in one order, so that a sweep that goes on may name them in another. Unknown ones
    are left for `evaluate` to refuse."""
    if protocols is None:
        return ["tf", "gen"] if generate else ["tf"]
    return sorted(dict.fromkeys(words(protocols)), key=lambda name: (*PROTOCOLS, name).index(name))


def _measure(
    solver: Solver,
    facts: Sequence[Fact],
    point: Point,
    before: Scores,
    seeds: Sequence[int],
    arguments: Mapping[str, Any],
    tick: Any,
) -> Row:
    edited = list(facts[: point.edits])
    by_seed: list[Scores] = []
    seconds = {"solve": 0.0, "score": 0.0}
    for seed in seeds:
        start = time.perf_counter()
        edit = solver.edit(edited, point.options, seed, tick)
        if point.control and (control := edit.control()) is not None:
            edit = control
        solved = time.perf_counter()
        with edit.applied(solver.model):
            by_seed.append(evaluate(solver.model, edited, before=before, progress=tick, **arguments))
        seconds["solve"] += solved - start
        seconds["score"] += time.perf_counter() - solved
    scores = _mean_over_seeds(by_seed)
    return Row(
        label=point.label,
        series=point.series,
        x=point.x,
        edits=len(edited),
        settings=plain(dict(point.options)),
        metrics=plain(scores.as_dict()["metrics"]),
        values={name: dict(values) for name, values in scores.values.items()},
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def _mean_over_seeds(by_seed: Sequence[Scores]) -> Scores:
    """Each record's value as its mean over seeds: repetitions are averaged before records are resampled."""
    if len(by_seed) == 1:
        return by_seed[0]
    values: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(name for scores in by_seed for name in scores.values):
        records = dict.fromkeys(r for scores in by_seed for r in scores.values.get(name, {}))
        by_record = {r: [s.values[name][r] for s in by_seed if r in s.values.get(name, {})] for r in records}
        values[name] = {record: float(np.mean(numbers)) for record, numbers in by_record.items()}
    return replace(by_seed[0], values=values, heldout=_mean_heldout([scores.heldout for scores in by_seed]))


def _mean_heldout(by_seed: Sequence[Heldout | None]) -> Heldout | None:
    """Each document's loss as its mean over seeds."""
    texts = [text for text in by_seed if text is not None]
    if not texts:
        return None
    return replace(texts[0], nll=tuple(np.mean([text.nll for text in texts], axis=0).tolist()))


# Preparation: requests that can stand in one batch, and the traced α to mark on the curve.


def distinct(facts: Sequence[Fact]) -> list[Fact]:
    """The facts that can be edited together: those with a new target, and of two with one prompt the first.

    Data sets hold such pairs; a batch refuses them. A warning says how many were left out.
    """
    kept: dict[str, Fact] = {}
    nothing = twice = 0
    for fact in facts:
        try:
            request = fact.as_request()
        except KtError:
            nothing += 1
            continue
        prompt = prompt_asked(fact)
        twice += prompt in kept
        kept.setdefault(prompt, request)
    if nothing or twice:
        warn_user(
            f"{nothing + twice} of {len(facts)} records are left out: {nothing} without a new target, {twice} with the "
            "prompt of an earlier one"
        )
    if not kept:
        raise KtError(
            "no record can be edited: none has a target that is not its old answer; give facts with a target or a foil"
        )
    return list(kept.values())
