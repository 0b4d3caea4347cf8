"""The lens' input for each fact: the first tokens of two answers, and where the subject ends.

The original answer is the fact's answer, or else the model's own next token; the target is the fact's target, or else
its foil. A fact with neither is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..facts.fact import Fact
from ..model.batches import BatchSize
from ..model.model import TracedModel
from ..model.scoring import Row, batch_logits, row_batches
from ..model.tokens import target_ids, template_span, token_ids
from ..tracing.prompts import LeftOut

ANSWERS = ("original", "target")

NO_TARGET = "it has neither a target nor a foil"


@dataclass(frozen=True, slots=True)
class ProbedFact:
    """A fact and the two tokens whose probability is read.

    Args:
        index: the fact's index in the caller's list.
        original_source: `given` or `model`.
        target_source: `target` or `foil`.
    """

    index: int
    id: str
    relation: str
    prompt: str
    subject: str
    original: str
    original_id: int
    original_source: str
    target: str
    target_id: int
    target_source: str

    @property
    def same_first_token(self) -> bool:
        """Whether the two answers begin with the same token, so that nothing tells them apart here."""
        return self.original_id == self.target_id

    @property
    def identity(self) -> tuple[str, str, int, int]:
        """Equal for two facts that are the same measurement."""
        return self.prompt, self.subject, self.original_id, self.target_id


class Question(NamedTuple):
    """A fact made ready for the lens. `answer_ids` and `target_ids` are all tokens of its two answers."""

    fact: ProbedFact
    ids: tuple[int, ...]
    subject_last: int
    answer_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


def described(model: TracedModel, final_norm: bool) -> dict[str, Any]:
    """The part of a reading's metadata about the model and the final norm."""
    return {
        "model": model.name,
        "revision": model.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "n_layers": model.n_layers,
        "vocab": model.vocab_size,
        "final_norm": final_norm,
        "direct": model.layout.direct,
    }


def ask(
    model: TracedModel, facts: Sequence[tuple[int, Fact]], batch_size: BatchSize
) -> tuple[list[Question], list[LeftOut]]:
    """Questions of numbered facts, in the order given."""
    questions, left_out = [], []
    for index, fact in facts:
        target = fact.target if fact.target is not None else fact.foil
        problem = NO_TARGET if target is None else model.why_unreadable(token_ids(model.reader, fact.prompt))
        if problem is not None or target is None:
            left_out.append(LeftOut(index, fact.id, problem or NO_TARGET))
        else:
            questions.append(_question(model.reader, index, fact, target))
    unanswered = {q.ids: Row((q.fact.prompt, None), q.ids, ()) for q in questions if q.fact.original_source == "model"}
    best: dict[tuple[int, ...], int] = {}
    for batch in row_batches(list(unanswered.values()), batch_size, model.vocab_size):
        best |= zip((row.read for row in batch), batch_logits(model, batch)[:, -1].argmax(-1).tolist(), strict=True)
    for i, question in enumerate(questions):
        if question.fact.original_source == "model":
            questions[i] = _answered_by_model(model.reader, question, best[question.ids])
    return questions, left_out


def _question(tokenizer: Any, index: int, fact: Fact, target: str) -> Question:
    prompt = fact.prompt
    wanted = target_ids(tokenizer, prompt, target, fact.target_prefix)
    answer_ids = () if fact.answer is None else target_ids(tokenizer, prompt, fact.answer, fact.target_prefix)
    probed = ProbedFact(
        index=index,
        id=fact.id,
        relation=fact.relation,
        prompt=prompt,
        subject=fact.subject,
        original=(fact.answer or "").strip(),
        original_id=answer_ids[0] if answer_ids else -1,
        original_source="given" if answer_ids else "model",
        target=target.strip(),
        target_id=wanted[0],
        target_source="target" if fact.target is not None else "foil",
    )
    last = template_span(tokenizer, fact.template, fact.subject).last
    return Question(probed, tuple(token_ids(tokenizer, prompt)), last, answer_ids, wanted)


def _answered_by_model(tokenizer: Any, question: Question, token: int) -> Question:
    fact = replace(question.fact, original=tokenizer.decode([token]).strip(), original_id=token)
    return question._replace(fact=fact, answer_ids=(token,))
