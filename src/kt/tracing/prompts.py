"""Prepare facts for tracing: the answer token r, the foil token r' of eq. 8, the subject's span and the token roles.

r is the first token of the fact's answer, or the model's most likely next token if the fact has no answer. r' is the
first that exists of (`foil_source` names it): the fact's foil (`given`); its edit target (`target`); the answer of
another fact of the same relation with the highest logit (`relation`); the model's best other token (`model`). The whole
answer and the whole foil are all their tokens behind the prompt; where the model chose, that is the one token.

At token `at` of the answer, the tokens before it count as the prompt's. A foil that begins with them goes on with its
own; else r' is the model's best other token there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..facts.fact import Fact
from ..model.model import TracedModel
from ..model.scoring import warn_of_joins
from ..model.tokens import Span, other_first_id, target_ids, template_span, token_ids
from .patches import unpadded_batch

SAME_TOKEN = "answer and foil begin with the same token"
SAME_TOKENS = "answer and foil are the same tokens"
ENDED = "the answer has no token {}"
UNKNOWN = "the model's first token is not the answer's"


@dataclass(frozen=True)
class TracePrompt:
    """A fact made ready for tracing. `index` is its position in the caller's list.

    `answer_ids` and `foil_ids` are all tokens of the two behind `ids`, `answer_id` and `foil_id` the first ones. The
    last `at` of `ids` are the answer's.
    """

    index: int
    fact: Fact
    ids: tuple[int, ...]
    span: Span
    answer: str
    answer_id: int
    answer_source: str
    foil: str
    foil_id: int
    foil_source: str
    known: bool
    answer_ids: tuple[int, ...]
    foil_ids: tuple[int, ...]
    at: int = 0


class LeftOut(NamedTuple):
    """A fact that was not traced, and why. `fact` is its position in the caller's list."""

    fact: int
    id: str
    reason: str


def numbered_on(results: Sequence[Any]) -> tuple[list[Any], list[LeftOut], int]:
    """The facts of several results and those left out, numbered on from list to list; and how many the lists hold."""
    facts: list[Any] = []
    left_out: list[LeftOut] = []
    start = 0
    for result in results:
        facts += [replace(fact, index=fact.index + start) for fact in result.facts]
        left_out += [one._replace(fact=one.fact + start) for one in result.left_out]
        start += int(result.metadata["n_given"])
    return facts, left_out, start


def why(left_out: Sequence[LeftOut]) -> str:
    """Reasons with counts, for messages and manifests."""
    counts = Counter(fact.reason for fact in left_out)
    return "; ".join(f"{n} left out: {reason}" for reason, n in sorted(counts.items())) or "none left out"


class Choice(NamedTuple):
    """An answer or foil: its text, token ids, and source."""

    text: str
    ids: tuple[int, ...]
    source: str

    @property
    def token(self) -> int:
        """The first token."""
        return self.ids[0]

    def behind(self, start: tuple[int, ...]) -> Choice | None:
        """What is left behind these first tokens; None if it has others, or no more."""
        left = self.ids[len(start) :]
        return self._replace(ids=left) if left and self.ids[: len(start)] == start else None


def prepare(
    model: TracedModel,
    facts: Sequence[Fact],
    max_rows: int,
    scored: Literal["first", "whole", "both"] = "first",
    at: int = 0,
) -> tuple[list[TracePrompt], list[LeftOut]]:
    """Choose answer and foil of every fact; one forward of the model per `max_rows` prompts of equal length.

    Args:
        scored: what will be scored, the first token of answer and foil, all of them, or both.
        at: tokens of the answer that are read with the prompt.

    Returns:
        The prompts, in the order of the facts, and the facts left out because their answer is too short, because
        nothing that is scored tells answer from foil (they share their first token, or all), or because the model
        cannot read them (`TracedModel.why_unreadable`).
    """
    encoded = [tuple(token_ids(model.reader, fact.prompt)) for fact in facts]
    spans = [template_span(model.reader, fact.template, fact.subject) for fact in facts]
    answers = [_choice(model.reader, fact, fact.answer, "given") for fact in facts]
    starts = [() if answer is None else answer.ids[:at] for answer in answers]
    relations: dict[str, dict[int, Choice]] = defaultdict(dict)
    for fact, answer in zip(facts, answers, strict=True):
        if fact.relation and answer is not None:
            relations[fact.relation].setdefault(answer.token, answer)
    cases: list[TracePrompt] = []
    doubts: dict[tuple[str, str], tuple[float, float]] = {}
    if at:
        answers = [None if a is None else a.behind(start) for a, start in zip(answers, starts, strict=True)]
        encoded = [ids + start for ids, start in zip(encoded, starts, strict=True)]
    unread = {i: reason for i, ids in enumerate(encoded) if (reason := model.why_unreadable(ids))}
    unread |= {i: ENDED.format(at) for i, answer in enumerate(answers) if at and answer is None}
    left_out = [LeftOut(i, facts[i].id, reason) for i, reason in unread.items()]
    readable = [i for i in range(len(facts)) if i not in unread]
    for places in equal_lengths([encoded[i] for i in readable], max_rows):
        rows = [readable[place] for place in places]
        logits = model.logits(unpadded_batch(torch.tensor([encoded[i] for i in rows])))[:, -1]
        for i, row in zip(rows, logits, strict=True):
            fact, best, given = facts[i], int(row.argmax()), answers[i]
            if given is not None and fact.target_prefix is None and not at:
                other = other_first_id(model.reader, fact.prompt, given.text, given.token)
                if other is not None:
                    log_probs = row.log_softmax(-1)
                    doubts[fact.prompt, given.text] = float(log_probs[given.token]), float(log_probs[other])
            answer = answers[i] or Choice(model.tokenizer.decode([best]).strip(), (best,), "model")
            foil = _foil(model.reader, fact, answer, relations.get(fact.relation, {}), row, starts[i])
            if reason := _unscorable(model, encoded[i], answer, foil, scored):
                left_out.append(LeftOut(i, fact.id, reason))
                continue
            chosen = (answer.text, answer.token, answer.source, foil.text, foil.token, foil.source)
            known = best == answer.token
            cases.append(TracePrompt(i, fact, encoded[i], spans[i], *chosen, known, answer.ids, foil.ids, at))
    warn_of_joins(doubts)
    return sorted(cases, key=lambda c: c.index), sorted(left_out)


def _unscorable(model: TracedModel, ids: tuple[int, ...], answer: Choice, foil: Choice, scored: str) -> str | None:
    """Why answer and foil cannot be scored against each other; None if they can."""
    if scored != "whole" and foil.token == answer.token:
        return SAME_TOKEN
    if foil.ids == answer.ids:
        return SAME_TOKENS
    longest = max(answer.ids, foil.ids, key=len)
    return None if scored == "first" else model.why_unreadable(ids + longest[:-1])


def equal_lengths(rows: Sequence[Sequence[Any]], size: int) -> Iterator[list[int]]:
    """Yield indices of rows with equal length, at most `size` at a time, so that no row needs padding."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_length[len(row)].append(i)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _choice(tokenizer: Any, fact: Fact, text: str | None, source: str) -> Choice | None:
    if text is None:
        return None
    return Choice(text.strip(), target_ids(tokenizer, fact.prompt, text, fact.target_prefix), source)


def _foil(
    tokenizer: Any,
    fact: Fact,
    answer: Choice,
    relation: dict[int, Choice],
    logits: Float[Tensor, " vocab"],
    start: tuple[int, ...],
) -> Choice:
    foil = _choice(tokenizer, fact, fact.foil, "given") or _choice(tokenizer, fact, fact.target, "target")
    if foil is not None and (left := foil.behind(start)) is not None:
        return left
    # Ties go to the lower token id, so that the result does not depend on the facts' order.
    wrong = sorted((-float(logits[token]), token) for token in relation if token != answer.token and not start)
    if wrong:
        return relation[wrong[0][1]]._replace(source="relation")
    others = logits.clone()
    others[answer.token] = -torch.inf
    second = int(others.argmax())
    return Choice(tokenizer.decode([second]).strip(), (second,), "model")


# Token roles: ROME's names for positions that are comparable across prompts. Every token has the first that applies of
#
# - `subject_last`   the subject's last token (also of a one-token subject);
# - `subject_first`  the first token of a subject of two or more;
# - `subject_middle` the tokens between these two;
# - `last`           the prompt's last token, where the prediction is made;
# - `after_first`    the first token after the subject;
# - `after_middle`   the tokens between `after_first` and `last`;
# - `before`         the tokens left of the subject. Patching them changes nothing, since they see no corruption, so no
#                    mean over roles includes them.
#
# ROME counts a one-token subject as first and as last, and a single token after the subject as first subsequent and as
# last; kt counts no token twice.

ROLES = ("subject_first", "subject_middle", "subject_last", "after_first", "after_middle", "last")
BEFORE = "before"
TITLES = {
    "subject_first": "First subject token",
    "subject_middle": "Middle subject tokens",
    "subject_last": "Last subject token",
    "after_first": "First subsequent token",
    "after_middle": "Further tokens",
    "last": "Last token",
}


def token_roles(span: Span, length: int) -> tuple[str, ...]:
    """The role of every token of a prompt of `length` tokens whose subject is at `span`."""
    return tuple(_role(i, span, length) for i in range(length))


def _role(token: int, span: Span, length: int) -> str:
    if token < span.start:
        return BEFORE
    if token == span.last:
        return "subject_last"
    if token < span.last:
        return "subject_first" if token == span.start else "subject_middle"
    if token == length - 1:
        return "last"
    return "after_first" if token == span.stop else "after_middle"
