"""Samples: what the model did on each prompt of each record, kept raw so that metrics can be recomputed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..facts.fact import Fact, Prompt

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
        kind: the data set's own key for such prompts ("Reasoning", "Forgetfulness").
        aliases: other texts that count as the answer where text is compared.
        alias_texts: for each of them the greedy continuation of as many tokens as it has.
        rival: the answer that this one's probability is compared with: the old one after the edit prompt and its
            paraphrases, the new one after a neighbour.
        rival_ids: its tokens.
        rival_log_prob: its joint natural-log probability.
        wild_text: what the model says to the prompt as a question, up to its natural stop.
        verdict: a judge's verdict on that text.
        kl: KL(unedited || edited) of the next token's distribution, in nats.
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
    kind: str = ""
    aliases: tuple[str, ...] = ()
    alias_texts: tuple[str, ...] = ()
    rival: str | None = None
    rival_ids: tuple[int, ...] = ()
    rival_log_prob: float | None = None
    wild_text: str | None = None
    verdict: bool | None = None
    kl: float | None = None

    @property
    def key(self) -> Key:
        """What identifies the same question before and after an edit."""
        return self.role, self.prompt, self.answer

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what was asked and measured; parts at their default are left out."""
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return {name: value for name, value, default in values if default is MISSING or value != default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sample:
        """What `as_dict` gave, JSON's lists as tuples."""
        parts: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        return cls(**parts)


def samples_of(facts: Sequence[Fact]) -> list[Sample]:
    """The questions that a list of facts asks, still without responses."""
    return [sample for fact in facts for sample in _of_one(request_of(fact))]


def request_of(fact: Fact) -> Fact:
    """The fact as an edit request; one that has neither target nor foil is scored on its old answer alone."""
    return fact if fact.target is None and fact.foil is None else fact.as_request()


def _of_one(fact: Fact) -> list[Sample]:
    asked: list[Sample] = []

    def ask(role: str, prompt: str, answer: str | None, **more: Any) -> None:
        asked.append(Sample(fact.id, role, prompt.rstrip(), answer, **more))

    if fact.target is not None:
        for role, prompt in (("edit", fact.prompt), *(("paraphrase", p) for p in fact.paraphrases)):
            ask(role, prompt, fact.target, aliases=_others(fact.target_aliases, fact.target), rival=fact.answer)
    if fact.answer is not None:
        ask("answer", fact.prompt, fact.answer, aliases=_others(fact.answer_aliases, fact.answer))
    for near in fact.neighbours:
        ask("neighbourhood", near.prompt, near.answer, **_about(near), rival=near.answer and fact.target)
    for hop in fact.hops:
        if hop.answer is not None:
            ask("portability", hop.prompt, hop.answer, **_about(hop))
    for prompt in fact.generation or (fact.prompt,):
        ask("generation", prompt, None)
    return asked


def _about(prompt: Prompt) -> dict[str, Any]:
    return {"kind": prompt.kind, "aliases": _others(prompt.aliases, prompt.answer)}


def _others(aliases: Sequence[str], answer: str | None) -> tuple[str, ...]:
    """The aliases that are text and not the answer again."""
    return tuple(a for a in dict.fromkeys(aliases) if a.strip() and a != answer)
