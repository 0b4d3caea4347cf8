"""Samples: the model's raw response to each prompt of each record, from which metrics can be recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..facts.fact import Fact, Prompt
from ..model.model import TracedModel
from ..model.scoring import Question, readable

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
        wild_text: the model's response to the prompt as a question, up to its natural stop.
        mello_text: the final answer to a multi-hop question that is asked in steps.
        verdict: a judge's verdict on that text.
        kl: KL(unedited || edited) of the next token's distribution, in nats.
        join: the text between prompt and answer, where the fact names one.
        any_of: of a record's samples with the same name here, the best value counts, once.
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
    mello_text: str | None = None
    verdict: bool | None = None
    kl: float | None = None
    join: str | None = None
    any_of: str = ""

    @property
    def key(self) -> Key:
        """Identifies the same question before and after an edit."""
        return self.role, self.prompt, self.answer

    @property
    def question(self) -> Question:
        """What the model is asked about the answer."""
        return self.about(self.answer)

    def about(self, answer: str | None) -> Question:
        """The question about another answer after the same prompt."""
        return (self.prompt, answer) if self.join is None else (self.prompt, answer, self.join)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all fields but those at their default."""
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return {name: value for name, value, default in values if default is MISSING or value != default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sample:
        """The inverse of `as_dict`, with JSON's lists as tuples."""
        parts: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        return cls(**parts)


def samples_of(facts: Sequence[Fact]) -> list[Sample]:
    """The samples of a list of facts, without responses."""
    return [sample for fact in facts for sample in _samples_of_fact(fact)]


def readable_facts(model: TracedModel, facts: Sequence[Fact], more: int = 0) -> list[Fact]:
    """The facts of which the model can read every prompt with its answer; see `model.scoring.readable`."""
    return readable(model, facts, lambda fact: [sample.question for sample in _samples_of_fact(fact)], more)


def _samples_of_fact(fact: Fact) -> Iterator[Sample]:
    """In the order of `ROLES`; a fact that has neither target nor foil is scored on its old answer alone."""
    if fact.target is not None or fact.foil is not None:
        fact = fact.as_request()

    def sample(role: str, prompt: str, answer: str | None, aliases: Sequence[str] = (), **more: Any) -> Sample:
        others = tuple(alias for alias in dict.fromkeys(aliases) if alias.strip() and alias != answer)
        return Sample(fact.id, role, prompt, answer, aliases=others, **{"join": fact.target_prefix, **more})

    if fact.target is not None:
        for role, prompt in (("edit", fact.prompt), *(("paraphrase", p) for p in fact.paraphrases)):
            yield sample(role, prompt, fact.target, fact.target_aliases, rival=fact.answer)
    if fact.answer is not None:
        yield sample("answer", fact.prompt, fact.answer, fact.answer_aliases)
    for near in fact.neighbours:
        rival = near.answer and fact.target
        yield sample("neighbourhood", near.prompt, near.answer, near.aliases, rival=rival, **_of_prompt(near))
    for hop in fact.hops:
        if hop.answer is not None:
            yield sample("portability", hop.prompt, hop.answer, hop.aliases, **_of_prompt(hop))
    for prompt in fact.generation or (fact.prompt,):
        yield sample("generation", prompt, None)


def _of_prompt(prompt: Prompt) -> dict[str, Any]:
    return {"kind": prompt.kind, "join": prompt.target_prefix, "any_of": prompt.any_of}
