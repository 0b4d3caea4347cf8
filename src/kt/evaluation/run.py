"""Score a model on edit requests: ask everything in few batches, keep the raw responses, compute the metrics.

>>> before = evaluate(model, requests)                    # the unedited model, frozen
>>> with edit.applied(model):
...     after = evaluate(model, requests, before=before)  # adds what locality needs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..errors import BadFact
from ..facts.fact import Fact
from ..facts.load import facts_from
from ..model import TracedModel
from ..progress import Progress
from .continuations import Wish, continuations, room
from .metrics import METRICS, record_values
from .samples import Key, Sample, samples_of
from .scores import Scores
from .teacher import Forced, Question, Row, teacher_force, tokens_of

LONGER_TOKENS = 10
"""Tokens of the "longer" greedy continuation; an answer with more tokens gets as many as it has."""
TEXT_TOKENS = 100
"""Tokens of a text whose fluency is measured, its prompt included, as in EasyEdit (here up to nine fewer)."""
TEXT_TOP_K = 5

GENERATION = (
    f"greedy; the longer continuation has {LONGER_TOKENS} tokens, or the answer's number if that is more; "
    f"texts for fluency have up to {TEXT_TOKENS} tokens, prompt included, or as many as the model has positions, "
    f"those after the prompt a multiple of ten, sampled from the top {TEXT_TOP_K} with seed {{seed}}, the same noise "
    "for the same prompt"
)


def evaluate(
    model: TracedModel,
    requests: Sequence[Fact | Mapping[str, Any]],
    before: Scores | None = None,
    generate: bool = True,
    batch_size: int | str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score the model as it stands now.

    Args:
        model: unedited, or with an edit written into it.
        requests: facts with a target (else the foil is the target); one with neither is scored on its answer.
        before: what this function returned for the unedited model; without it, locality metrics are absent.
        generate: also generate text; without it the `gen` metrics are absent, and it is much faster.
        batch_size: rows per forward, or "auto" for a budget of tokens.
        seed: of the sampled texts and of the bootstrap.
        progress: called with (done, total).

    Raises:
        BadFact: no requests, a request that asks for nothing new, or a `before` that does not fit.
    """
    _check_batch_size(batch_size)
    facts = facts_from(requests)
    if not facts:
        raise BadFact("no requests to evaluate; give at least one fact")
    asked = samples_of(facts)
    work = _plan(model, asked, generate)
    old = {} if before is None else _matching(before, asked, work)
    samples = _answered(asked, _run(model, work, batch_size, seed, progress))
    values = record_values(samples, old)
    return Scores(
        model=model.name,
        records=tuple(fact.id for fact in facts),
        samples=tuple(samples),
        values=values,
        protocol=_protocol(values, generate, seed, before),
        seed=seed,
        compared=before is not None,
    )


class Work(NamedTuple):
    """All that the model is asked, each question once, in an order that does not change between runs."""

    rows: dict[Question, Row]
    greedy: dict[Wish, None]
    sampled: dict[Wish, None]


class Responses(NamedTuple):
    forced: dict[Question, Forced]
    greedy: dict[Wish, str]
    sampled: dict[str, str]


def _plan(model: TracedModel, asked: Sequence[Sample], generate: bool) -> Work:
    questions = dict.fromkeys((s.prompt, s.answer) for s in asked if s.role != "generation")
    rows = {question: tokens_of(model, question) for question in questions}
    if not generate:
        return Work(rows, {}, {})
    wishes = (w for s in asked if s.role not in ("answer", "generation") for w in _wishes(rows[s.prompt, s.answer]))
    texts = dict.fromkeys(s.prompt for s in asked if s.role == "generation")
    free = ((prompt, room(model, prompt, TEXT_TOKENS)) for prompt in texts)
    return Work(rows, dict.fromkeys(wishes), dict.fromkeys(wish for wish in free if wish[1]))


def _wishes(row: Row) -> list[Wish]:
    """A continuation of the answer's own length, if there is an answer, and the longer one."""
    prompt, n = row.question[0], len(row.target)
    return [(prompt, n)] * bool(n) + [(prompt, max(n, LONGER_TOKENS))]


def _run(model: TracedModel, work: Work, batch_size: int | str, seed: int, progress: Progress | None) -> Responses:
    total, done = len(work.rows) + len(work.greedy) + len(work.sampled), 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    forced = teacher_force(model, list(work.rows.values()), batch_size, tick)
    greedy = continuations(model, work.greedy, batch_size, tick)
    sampling = {"do_sample": True, "top_k": TEXT_TOP_K, "seed": seed}
    sampled = continuations(model, work.sampled, batch_size, tick, **sampling)
    return Responses(forced, greedy, {prompt: text for (prompt, _), text in sampled.items()})


def _answered(asked: Sequence[Sample], found: Responses) -> list[Sample]:
    """The questions with their responses."""
    samples = []
    for s in asked:
        if s.role == "generation":
            samples.append(replace(s, text=found.sampled.get(s.prompt)))
            continue
        forced = found.forced[s.prompt, s.answer]
        n = len(forced.target)
        samples.append(
            replace(
                s,
                target_ids=forced.target,
                predicted_ids=forced.predicted,
                log_prob=forced.log_prob,
                exact_text=found.greedy.get((s.prompt, n)) if n and s.role != "answer" else None,
                text=found.greedy.get((s.prompt, max(n, LONGER_TOKENS))) if s.role != "answer" else None,
            )
        )
    return samples


def _matching(before: Scores, samples: Sequence[Sample], work: Work) -> dict[Key, Sample]:
    """The unedited model's samples, after making sure that they answer the same questions."""
    if before.compared:
        raise BadFact("`before` was itself compared with another run; give the scores of the unedited model")
    old = {sample.key: sample for sample in before.samples}
    asked = [s for s in samples if s.role == "neighbourhood"]
    missing = [s for s in asked if s.key not in old]
    if missing:
        raise BadFact(
            f"`before` lacks {len(missing)} of {len(asked)} neighbourhood prompts, the first "
            f"{missing[0].prompt!r}; evaluate the unedited model on the same facts"
        )
    if any(work.rows[s.prompt, s.answer].target != old[s.key].target_ids for s in asked):
        raise BadFact("`before` comes from a model with another tokenizer; evaluate the unedited model itself")
    return old


def _protocol(values: Mapping[str, object], generate: bool, seed: int, before: Scores | None) -> dict[str, str]:
    """One sentence for every metric that is there, and how all were measured."""
    settings = {
        "records": "a record's value is the mean over its prompts, a metric the mean over n records",
        "intervals": f"95%, percentile bootstrap over records, 2000 resamples, seed {seed}",
        "answers": "after one space (none behind a bracket or quote); tokens: the suffix of the joint tokenisation",
        "padding": "left, masked, positions from the first real token; no result depends on the batch size",
        "normalisation": "NFKC, lower case, no ASCII punctuation, no a/an/the, single spaces",
        "words": "runs of letters, digits, underscores; other visible characters by themselves (not nltk's)",
        "locality": f"compared with the unedited model {before.model}"
        if before is not None
        else "absent: no scores of the unedited model were given",
        "generation": GENERATION.format(seed=seed) if generate else "off",
    }
    return {name: METRICS[name].says for name in values} | settings


def _check_batch_size(batch_size: int | str) -> None:
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size > 0):
        raise BadFact(f"batch size {batch_size!r} is not understood; give a number from 1, or auto")
