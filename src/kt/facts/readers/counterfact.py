"""CounterFact and Multi-CounterFact (ROME, MEMIT), and CounterFact-tracing, its flat form for causal tracing."""

from __future__ import annotations

from ..fact import Fact, Prompt
from ..record import Choices, Record, templates


def read_counterfact(record: Record, choices: Choices) -> list[Fact]:
    """A ROME request with paraphrases, neighbours and generation prompts.

    By the data set's construction neighbours have the same true answer as the edited fact. `attribute_prompts` (other
    subjects that already have the new answer) are dropped, since no metric of the papers uses them.
    """
    request = record.child("requested_rewrite", record.data.get("requested_rewrite"))
    subject = request.filled("subject")
    target, *target_aliases = request.filled_answers("target_new")
    answer, answer_aliases = request.answer_and_aliases("target_true")
    fact = Fact(
        request.template(request.prompt("prompt"), subject, filled=False),
        subject,
        answer=answer,
        target=target,
        id=record.id("case_id"),
        relation=request.text("relation_id") or "",
        rephrasings=templates(record.texts("paraphrase_prompts"), subject),
        neighbours=tuple(Prompt(text, answer, kind="neighborhood") for text in record.texts("neighborhood_prompts")),
        generation=record.texts("generation_prompts"),
        answer_aliases=answer_aliases,
        target_aliases=tuple(target_aliases),
    )
    return [fact]


def read_tracing(record: Record, choices: Choices) -> list[Fact]:
    """CounterFact-tracing: the false target is the foil of tracing.

    Its subjects and targets have a leading space, which facts do not have (tokenisation adds it).
    """
    subject = record.filled("subject")
    fact = Fact(
        record.template(record.prompt("prompt"), subject),
        subject,
        answer=record.filled("target_true"),
        foil=record.filled("target_false"),
        id=record.id("case_id", "id"),
        relation=record.text(record.first("relation_id", "relation"), blank_is_none=True) or "",
    )
    return [fact]
