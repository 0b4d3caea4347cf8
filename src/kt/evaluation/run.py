"""Score a model on edit requests: ask everything in few batches, keep the raw responses, compute the metrics.

    before = evaluate(model, requests)                     # the unedited model, frozen
    with edit.applied(model):
        after = evaluate(model, requests, before=before)   # adds what locality needs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import BadFact
from ..facts.fact import Fact
from ..facts.load import facts_from
from ..model import TracedModel
from .continuations import continuations, room
from .metrics import METRICS, record_values
from .samples import Sample, samples_of
from .scores import Scores
from .teacher import teacher_force

LONGER_TOKENS = 10
"""Tokens of the "longer" greedy continuation; an answer with more tokens gets as many as it has."""
TEXT_TOKENS = 100
"""Tokens of a text whose fluency is measured, its prompt included, as in EasyEdit."""
TEXT_TOP_K = 5

Progress = Callable[[int, int], None]
"""Hears (done, total) model rows."""


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
        requests: facts with a target (else the foil is the target); one with neither is scored on its old answer.
        before: what this function returned for the unedited model. Without it the locality metrics are absent.
        generate: also generate text; without it the `gen` metrics are absent and it takes a fraction of the time.
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
    counter = _Counter(progress)
    samples = _forced(model, asked, batch_size, counter, generate)
    if generate:
        samples = _free_texts(model, _greedy(model, samples, batch_size, counter), batch_size, seed, counter)
    old = {} if before is None else _matching(before, samples)
    return Scores(
        model=model.name,
        records=tuple(fact.id for fact in facts),
        samples=tuple(samples),
        values=(values := record_values(samples, old)),
        protocol=_protocol(values, generate, seed, before),
        seed=seed,
        compared=before is not None,
    )


class _Counter:
    """Adds up what is done of a total that grows as the stages find their work."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.done, self.total = progress, 0, 0

    def expect(self, rows: int) -> None:
        self.total += rows

    def __call__(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.done, self.total)


def _forced(
    model: TracedModel, asked: list[Sample], batch_size: int | str, counter: _Counter, generate: bool
) -> list[Sample]:
    """Teacher forcing for all roles but free text."""
    questions = {(s.prompt, s.answer) for s in asked if s.role != "generation"}
    counter.expect(len(questions))
    if generate:  # a first guess of what generation will add, so that the total does not jump at the half
        counter.expect(len({s.prompt for s in asked}))
    ordered = sorted(questions, key=lambda q: (q[0], q[1] or ""))
    found = teacher_force(model, ordered, batch_size, counter)
    return [
        s
        if s.role == "generation"
        else replace(
            s,
            target_ids=(forced := found[s.prompt, s.answer]).target,
            predicted_ids=forced.predicted,
            log_prob=forced.log_prob,
        )
        for s in asked
    ]
