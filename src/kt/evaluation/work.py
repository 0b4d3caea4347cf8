"""All that a model is asked for a list of samples: each question once, in few batches, and the responses put back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..corpus import Corpus
from ..model import TracedModel
from ..progress import Progress
from ..prompts import target_ids
from .continuations import Wish, continuations, room
from .distributions import Distributions, divergences, near_prompts
from .perplexity import Heldout, Text, windows
from .samples import Sample
from .shared import force
from .teacher import Forced, Question, Row, teacher_force, tokens_of
from .wild import has_chat, up_to_stop, wish_for

LONGER_TOKENS = 10
"""Tokens of the "longer" greedy continuation; an answer with more tokens gets as many as it has."""
TEXT_TOKENS = 100
"""Tokens of a text whose fluency is measured, its prompt included, as in EasyEdit (here up to nine fewer)."""
TEXT_TOP_K = 5

_ANSWERED = ("edit", "paraphrase", "neighbourhood", "portability")
"""Roles whose answers the model may also give as text."""


class Wanted(NamedTuple):
    """What is asked: the protocols, and what some of them need."""

    protocols: Collection[str]
    wild_tokens: int
    corpus: Corpus | None = None
    reference: Distributions | None = None


class Work(NamedTuple):
    """All that the model is asked, each question once, in an order that does not change between runs.

    `rows` holds the tokens of every question, `forced` those of them that a forward is to answer, `rivals` those that
    another answer is compared with; `wild` has the wish for each prompt that is asked freely, `near` the prompts for
    KL.
    """

    rows: dict[Question, Row]
    rivals: frozenset[Question]
    forced: tuple[Row, ...]
    greedy: dict[Wish, None]
    sampled: dict[Wish, None]
    wild: dict[str, Wish]
    near: tuple[str, ...]
    text: Text | None

    @property
    def total(self) -> int:
        """Units of progress."""
        asked = (self.forced, self.written, self.sampled, self.near)
        return sum(map(len, asked)) + (len(self.text.rows) if self.text else 0)

    @property
    def written(self) -> dict[Wish, None]:
        """All greedy text: free answers are longer continuations, often of prompts that are continued anyway."""
        return dict.fromkeys([*self.greedy, *self.wild.values()])


class Responses(NamedTuple):
    """What came back, by question, wish or prompt."""

    forced: dict[Question, Forced]
    greedy: dict[Wish, str]
    sampled: dict[str, str]
    wild: dict[str, str]
    kl: dict[str, float]
    heldout: Heldout | None


def plan_work(model: TracedModel, asked: Sequence[Sample], wanted: Wanted) -> Work:
    """Every question that the samples ask under the wanted protocols."""
    protocols = wanted.protocols
    questions = dict.fromkeys((s.prompt, s.answer) for s in asked if s.role != "generation")
    rivals = dict.fromkeys((s.prompt, s.rival) for s in asked if s.rival is not None and "prob" in protocols)
    rows = {question: tokens_of(model, question) for question in questions | rivals}
    forced = tuple(rows.values()) if {"tf", "prob"} & set(protocols) else ()
    greedy: dict[Wish, None] = {}
    sampled: dict[Wish, None] = {}
    if "gen" in protocols:
        answered = (s for s in asked if s.role in _ANSWERED)
        greedy = dict.fromkeys(wish for s in answered for wish in _wishes(model, s, rows[s.prompt, s.answer]))
        texts = dict.fromkeys(s.prompt for s in asked if s.role == "generation")
        free = ((prompt, room(model, prompt, TEXT_TOKENS)) for prompt in texts)
        sampled = dict.fromkeys(wish for wish in free if wish[1])
    wild: dict[str, Wish] = {}
    if "wild" in protocols:
        prompts = dict.fromkeys(s.prompt for s in asked if s.role in _ANSWERED and s.answer is not None)
        wishes = {prompt: wish_for(model, prompt, wanted.wild_tokens) for prompt in prompts}
        wild = {prompt: wish for prompt, wish in wishes.items() if wish[1]}
    near = tuple(near_prompts(asked)) if wanted.reference is not None else ()
    text = windows(model, wanted.corpus) if wanted.corpus is not None else None
    return Work(rows, frozenset(rivals), forced, greedy, sampled, wild, near, text)


def _wishes(model: TracedModel, sample: Sample, row: Row) -> list[Wish]:
    """A continuation of the answer's own length, if there is an answer, one of each alias', and the longer one."""
    prompt, n = sample.prompt, len(row.target)
    own = [(prompt, len(target_ids(model.tokenizer, prompt, alias))) for alias in sample.aliases]
    return [(prompt, n)] * bool(n) + own + [(prompt, max(n, LONGER_TOKENS))]


def ask_model(
    model: TracedModel, work: Work, wanted: Wanted, batch_size: int | str, seed: int, progress: Progress | None
) -> Responses:
    """Ask the model everything."""
    done = 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, work.total)

    forced = force(model, work.forced, batch_size, tick)
    written = continuations(model, work.written, batch_size, tick)
    sampling = {"do_sample": True, "top_k": TEXT_TOP_K, "seed": seed}
    sampled = continuations(model, work.sampled, batch_size, tick, **sampling)
    chat = has_chat(model.tokenizer)
    kl: dict[str, float] = {}
    if wanted.reference is not None:
        kl = divergences(model, wanted.reference, work.near, batch_size, tick)
    heldout = None
    if work.text is not None:
        heldout = work.text.losses(teacher_force(model, work.text.rows, batch_size, tick))
    return Responses(
        forced,
        {wish: written[wish] for wish in work.greedy},
        {prompt: text for (prompt, _), text in sampled.items()},
        {prompt: up_to_stop(written[wish], chat) for prompt, wish in work.wild.items()},
        kl,
        heldout,
    )


def with_responses(model: TracedModel, asked: Sequence[Sample], work: Work, found: Responses) -> list[Sample]:
    """The questions with their responses."""
    samples = []
    for s in asked:
        if s.role == "generation":
            samples.append(replace(s, text=found.sampled.get(s.prompt)))
            continue
        question = (s.prompt, s.answer)
        known = _forced(s, work, found)
        if s.role in _ANSWERED:
            n = len(work.rows[question].target)
            known |= {
                "exact_text": found.greedy.get((s.prompt, n)) if n else None,
                "text": found.greedy.get((s.prompt, max(n, LONGER_TOKENS))),
                "alias_texts": _alias_texts(model, s, found),
                "wild_text": None if s.answer is None else found.wild.get(s.prompt),
            }
        if s.role == "neighbourhood":
            known["kl"] = found.kl.get(s.prompt)
        samples.append(replace(s, target_ids=work.rows[question].target, **known))
    return samples


def _forced(sample: Sample, work: Work, found: Responses) -> dict[str, Any]:
    """What teacher forcing says of the answer and of its rival, as far as it was asked."""
    known: dict[str, Any] = {}
    if (forced := found.forced.get((sample.prompt, sample.answer))) is not None:
        known |= {"predicted_ids": forced.predicted, "log_prob": forced.log_prob}
    rival = (sample.prompt, sample.rival)
    if rival in work.rivals:
        known |= {"rival_ids": work.rows[rival].target, "rival_log_prob": found.forced[rival].log_prob}
    return known


def _alias_texts(model: TracedModel, sample: Sample, found: Responses) -> tuple[str, ...]:
    if not found.greedy:
        return ()
    lengths = (len(target_ids(model.tokenizer, sample.prompt, alias)) for alias in sample.aliases)
    return tuple(found.greedy[sample.prompt, n] for n in lengths)
