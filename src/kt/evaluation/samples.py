"""Samples: what the model did on each prompt of each record, kept raw so that metrics can be recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..facts.fact import Fact

Key = tuple[str, str, "str | None"]
"""Role, prompt, answer."""

ROLES = ("edit", "answer", "paraphrase", "neighbourhood", "portability", "generation")


@dataclass(frozen=True)
class Sample:
    """One prompt in one role, and the model's response to it.

    Args:
        record: id of the fact it belongs to.
        role: one of `ROLES`: the edit prompt with the new target or with the old answer, a paraphrase with the
            target, a neighbour or a consequence with its own answer, a prompt for free text.
        prompt: the full prompt.
        answer: the text scored after it; None where a neighbour has none, and for free text.
        target_ids: the answer's tokens.
        predicted_ids: the argmax where each of them is due (of the next token where there is no answer).
        log_prob: joint natural-log probability of the answer; None without one.
        exact_text: greedy continuation of exactly as many tokens as the answer has.
        text: a longer continuation (greedy, or sampled in the role "generation").
    """

    record: str
    role: str
    prompt: str
    answer: str | None
    target_ids: tuple[int, ...] = ()
    predicted_ids: tuple[int, ...] = ()
    log_prob: float | None = None
    exact_text: str | None = None
    text: str | None = None

    @property
    def key(self) -> Key:
        """What identifies the same question before and after an edit."""
        return self.role, self.prompt, self.answer


def samples_of(facts: Sequence[Fact]) -> list[Sample]:
    """The questions that a list of facts asks, still without responses."""
    return [sample for fact in facts for sample in _of_one(request_of(fact))]


def request_of(fact: Fact) -> Fact:
    """The fact as an edit request; one that has neither target nor foil is scored on its old answer alone."""
    return fact if fact.target is None and fact.foil is None else fact.as_request()


def _of_one(fact: Fact) -> list[Sample]:
    asked: list[tuple[str, str, str | None]] = []
    if fact.target is not None:
        asked.append(("edit", fact.prompt, fact.target))
        asked += [("paraphrase", prompt, fact.target) for prompt in fact.paraphrases]
    if fact.answer is not None:
        asked.append(("answer", fact.prompt, fact.answer))
    asked += [("neighbourhood", p.prompt, p.answer) for p in fact.neighbours]
    asked += [("portability", p.prompt, p.answer) for p in fact.hops if p.answer is not None]
    asked += [("generation", prompt, None) for prompt in fact.generation or (fact.prompt,)]
    return [Sample(fact.id, role, prompt.rstrip(), answer) for role, prompt, answer in asked]
