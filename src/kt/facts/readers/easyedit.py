"""EasyEdit's requests, flat and nested, and KnowEdit, which nests lists of prompts under its own names."""

from __future__ import annotations

from collections.abc import Mapping

from ..fact import Fact, Prompt
from ..record import Choices, Record, templates

KNOWEDIT_NAMES = frozenset(
    {"Reasoning", "Subject_Aliasing", "Logical_Generalization", "Relation_Specificity", "Forgetfulness"}
)
REPHRASED = ("rephrase_prompt", "rephrase", "ood_rephrase", "paraphrase_prompts", "paraphrases")
"""Names of paraphrases; `ood_rephrase` is WISE's, of a prompt in another style."""
EASYEDIT_KEYS = ("ground_truth", "rephrase_prompt", "ood_rephrase", "locality", "locality_prompt", "portability_prompt")


def is_knowedit(record: Record) -> bool:
    """Whether portability or locality contains one of KnowEdit's names (all of them are optional)."""
    groups = (record.data.get(key) for key in ("portability", "locality"))
    return any(isinstance(g, Mapping) and not KNOWEDIT_NAMES.isdisjoint(g) for g in groups)


def read_easyedit(record: Record, choices: Choices) -> list[Fact]:
    """Locality and portability are {name: {prompt, ground_truth}}, {name: [{...}, ...]}, or flat keys.

    A ground truth is a text, a list of aliases, or a list of answers that are lists of aliases: the first is the
    answer, all others count as right too. Portability prompts without an answer are dropped, since none can be scored.
    """
    subject = record.filled("subject")
    target, *target_aliases = record.filled_answers("target_new")
    answer, answer_aliases = record.answer_and_aliases("ground_truth")
    fact = Fact(
        record.template(record.prompt("prompt"), subject),
        subject,
        answer=answer,
        target=target,
        id=record.id("case_id", "id"),
        relation=record.text(record.first("relation", "relation_id"), blank_is_none=True) or "",
        rephrasings=templates(tuple(text for key in REPHRASED for text in record.texts(key)), subject),
        neighbours=(
            *_flat(record, "locality", "neighborhood"),
            *groups(record, "locality"),
            *(Prompt(text, answer, kind="neighborhood") for text in record.texts("neighborhood_prompts")),
        ),
        hops=record.answered((*_flat(record, "portability", ""), *groups(record, "portability"))),
        generation=record.texts("generation_prompts"),
        answer_aliases=answer_aliases,
        target_aliases=tuple(target_aliases),
    )
    return [fact]


def one_hop(record: Record) -> tuple[Prompt, ...]:
    """{"New Question", "New Answer"}: the one-hop question that EasyEdit adds to zsRE and CounterFact."""
    if not record.has("portability"):
        return ()
    entry = record.child("portability", record.data["portability"])
    return entry.prompts("New Question", "New Answer", "One_Hop")


def _flat(record: Record, key: str, kind: str) -> tuple[Prompt, ...]:
    """`locality_prompt` and `locality_ground_truth`, `portability_prompt` and `portability_ground_truth`."""
    return record.prompts(f"{key}_prompt", f"{key}_ground_truth", kind)


def groups(record: Record, key: str) -> tuple[Prompt, ...]:
    """The prompts under `locality` or `portability`, by the names in it, or as a list of pairs."""
    value = record.data.get(key)
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        return tuple(_group(record, key))
    group = record.child(key, value)
    if group.has("New Question"):
        return one_hop(record)
    return tuple(p for name in group.data for p in _group(group, name))


def _group(groups: Record, name: str) -> list[Prompt]:
    """The prompts under one name: an entry or a list of entries, each with a text or parallel lists of texts."""
    value = groups.data[name]
    entries = groups.entries(str(name)[:40], value if isinstance(value, list) else [value])
    return [p for entry in entries for p in entry.prompts("prompt", entry.first("ground_truth", "answer"), str(name))]
