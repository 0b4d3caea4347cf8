"""The formats of fact records: a table of readers, chosen by a record's keys.

To add a data set, add a module to `readers/` and a row to `FORMATS`. Readers take a `Record`, which names its location
in every error, and return its facts (one, except for LRE relations and MQuAKE's chains).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, partial
from typing import Any, NamedTuple

from .._util.kinds import shown
from ..errors import BadFact, KtError
from .fact import BadPrompt, Fact, joined_by
from .readers.cknowedit import is_cknowedit, read_cknowedit
from .readers.conflictedit import is_conflict, read_conflict
from .readers.counterfact import read_counterfact, read_tracing
from .readers.easyedit import EASYEDIT_KEYS, is_knowedit, read_easyedit
from .readers.hallueditbench import read_hallueditbench
from .readers.known import read_known
from .readers.lre import read_lre
from .readers.mquake import read_mquake
from .readers.own import NAMES, read_own, read_rome
from .readers.pararel import read_pararel
from .readers.popqa import read_popqa
from .readers.qaedit import read_qaedit
from .readers.ripple import is_edit_sentence, read_ripple
from .readers.unke import is_akew, read_akew, read_unke
from .readers.wikibigedit import read_wikibigedit
from .readers.wikibio import read_wikibio
from .readers.zsre import by_language, read_bizsre, read_zsre
from .record import Choices, Junk, Record, kind, names

_KEY = re.compile(r"[A-Za-z]\w+")
_PROMPTS = frozenset(
    name for ours in ("paraphrases", "neighbourhood", "generation", "target", "foil") for name in NAMES[ours]
) | {"locality", "portability", "locality_prompt", "portability_prompt"}
"""Keys of prompts and targets in any format."""


class Format(NamedTuple):
    """A row of `FORMATS`.

    Args:
        keys: the format's keys, for error messages.
        shows: whether a record's keys are of this format.
        published: bad records are junk (left out and counted), since users cannot mend a published data set.
        family: formats of one family may be mixed in one file.
    """

    about: str
    keys: str
    shows: Callable[[Record], bool]
    read: Callable[[Record, Choices], list[Fact]]
    published: bool = True
    family: str = ""


DEFAULT_CHOICES = Choices()


def read_records(
    value: Any,
    where: str,
    format: str | None = None,
    choices: Choices = DEFAULT_CHOICES,
    notes: list[str] | None = None,
    guessed: bool = False,
) -> list[Fact]:
    """The facts of one JSON value.

    Args:
        where: the value's location, for error messages.
        format: a name of `FORMATS`; without it the record's keys decide.
        notes: gets what was left out of the record or taken another way than it says.
        guessed: whether `format` was found by the record's keys; errors then name it.

    Raises:
        Junk: a record of a published data set that cannot be edited.
        BadFact, SubjectNotFound: the value is not a record of the format.
    """
    record = as_record(value, where)
    name = format or sniff(record)
    row = named(name)
    data = _Noted(record.data)
    if row.published:
        record = replace(record, data=data, lenient=True)
    if choices.known_to is not None and row.read is not read_known:
        raise record.bad("only known_1000 records say which model knows them; leave the model out (--known-to)")
    if choices.zsre_target != DEFAULT_CHOICES.zsre_target and not name.startswith(("zsre", "bizsre")):
        raise record.bad("only zsRE's records have two targets to choose from; leave the choice out (--zsre-target)")
    try:
        facts = [joined_by(fact, record.prefix()) for fact in row.read(record, choices)]
        facts = [_checked(joined_by(fact, choices.join), record, row) for fact in facts]
    except Junk:
        raise
    except BadPrompt as error:
        raise record.junk(error.reason) if row.published else record.bad(str(error)) from None
    except KtError as error:
        message = str(error) if str(error).startswith(where) else f"{where}: {error}"
        told = guessed or not format
        raise type(error)(f"{message} (read as {name}; --format names another)" if told else message) from None
    if notes is not None:
        notes += record.notes
        if row.published and data.unread:
            passed = (_not_read(str(key), name) for key in record.data if key in data.unread)
            notes += [line for line in passed if line]
    return facts


def read_record(value: Any, where: str, format: str | None = None) -> Fact:
    """The single fact of one JSON value; raises as `read_records` does, and BadFact for several facts."""
    facts = read_records(value, where, format)
    if len(facts) != 1:
        raise BadFact(f"{where}: the record holds {len(facts)} facts where one is needed; give it as a file of facts")
    return facts[0]


def as_record(value: Any, where: str) -> Record:
    """The value as a record; BadFact unless it is a JSON object, or the sentence of a RippleEdits edit."""
    if isinstance(value, str) and is_edit_sentence(value):
        value = {"edit": {"prompt": value}}
    if not isinstance(value, Mapping):
        remedy = "; a JSON list needs the ending .json" if isinstance(value, list) else "; see docs/data.md"
        raise BadFact(f"{where}: a record must be an object with a prompt and a subject, not {kind(value)}{remedy}")
    if stray := [key for key in value if not isinstance(key, str)]:
        raise BadFact(f"{where}: the key {shown(stray[0])} is no text; name every key of a record by a text")
    return Record(value, where)


def named(format: str) -> Format:
    """The row of a format's name."""
    if format not in FORMATS:
        raise BadFact(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    return FORMATS[format]


def sniff(record: Record) -> str:
    """The name of the first format that fits the record's keys."""
    for name, row in FORMATS.items():
        if row.shows(record):
            return name
    keys = {str(key).lower() for key in record.data}
    others = {name: _KEY.findall(row.keys) for name, row in FORMATS.items()}
    shared = {name: len(keys & {key.lower() for key in theirs}) for name, theirs in others.items()}
    nearest = max(shared, key=lambda name: (shared[name], -len(others[name])))
    near = f"the nearest is {nearest} ({FORMATS[nearest].keys})" if shared[nearest] else "ours has prompt and subject"
    near += "".join(f", did you mean {close!r} by {key!r}?" for key, close in _misspelt(record, others[nearest]))
    raise record.bad(f"the keys {names(record.data)} fit no known format; {near}; kt ls datasets lists all")


def fits(record: Record, format: str) -> bool:
    """Whether the record's keys show it to be of this format, or of its family."""
    try:
        name = sniff(record)
    except BadFact:
        return False
    return (FORMATS[name].family or name) == (FORMATS[format].family or format)


def _misspelt(record: Record, known: Iterable[str]) -> list[tuple[str, str]]:
    """The record's keys that are like one of these which the record lacks, and that one."""
    free = {key.lower(): key for key in known if not record.has(key)}
    found = [(str(key), get_close_matches(str(key).lower(), free, 1, 0.85)) for key in record.data if key not in known]
    return [(key, free[close[0]]) for key, close in found if close]


class _Noted(dict[str, Any]):
    """A record's data that notes which keys are read."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.unread = {key for key, value in data.items() if value not in (None, "", [], {})}

    def get(self, key: str, default: Any = None) -> Any:
        self.unread.discard(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.unread.discard(key)
        return super().__getitem__(key)

    def items(self) -> Any:
        self.unread.clear()
        return super().items()


@cache
def _not_read(key: str, format: str) -> str | None:
    """What to say of a key that a published format's reader passes over: only where another reader takes it, or it is
    like one of the format's. (Published records have many keys about themselves.)"""
    theirs = [k for k in _KEY.findall(FORMATS[format].keys) if len(k) > 4]
    name = str(key).lower()
    close = [name] if name in _PROMPTS else get_close_matches(name, [k.lower() for k in theirs], 1, 0.85)
    if key in theirs or (key not in _PROMPTS and not close):
        return None
    known = any(key in _KEY.findall(row.keys) for row in FORMATS.values())
    return f"{key[:40]!r} is not read" + (
        f" (did you mean {close[0]!r}?)" if close and close[0] != key and not known else ""
    )


class Schema:
    """Allow one format family per file: the first records decide, and a later record of another family is refused.

    A file that mixes two data sets is usually a mistake. Records that lack optional keys of the first, or have null
    under them, count as the first format.

    Args:
        begins: the first records. Those that lack keys of one another fill in what the very first lacks.
    """

    N_FIRST = 10
    """How many records decide."""

    def __init__(self, begins: Iterable[Any] = ()) -> None:
        self.first: tuple[str, str] | None = None
        self.keys: frozenset[str] = frozenset()
        self.begins = tuple(value for value in begins if isinstance(value, Mapping))

    def format_of(self, record: Record) -> str:
        """The record's format; BadFact if it is of another family than the file's first record."""
        if self.first is None:
            whole = replace(record, data=self._filled(record.data))
            self.first, self.keys = (sniff(whole), record.where), frozenset(whole.data)
        fewer = self.keys.issuperset(record.data)
        try:
            name = sniff(record)
        except BadFact:
            if not fewer:
                raise
            name = ""
        first, where = self.first
        family, first_family = (FORMATS[n].family or n if n else "" for n in (name, first))
        if family == first_family:
            return name
        if fewer or (name == "kt" and first_family == "easyedit" and record.has("prompt", "subject", "target_new")):
            return first
        raise record.bad(f"it looks like {name}, but {where} like {first}; split the file, or name one with --format")

    def _filled(self, first: Mapping[str, Any]) -> dict[str, Any]:
        """The first record, with what it lacks from others that have all of its keys, or only some of them."""
        filled = dict(first)
        for other in self.begins:
            if filled.keys() <= other.keys() or other.keys() <= filled.keys():
                filled |= {k: v for k, v in other.items() if filled.get(k) is None and v is not None and v == v}
        return filled


def _checked(fact: Fact, record: Record, format: Format) -> Fact:
    """Refuse an answer that equals target or foil: the edit, or eq. 8, would be empty."""
    for name, other in (("target", fact.target), ("foil", fact.foil)):
        if other is not None and other == fact.answer:
            if format.published:
                raise record.junk(f"the {name} is the same as the old answer")
            raise record.bad(f"the {name} {other!r} is the same as the old answer; give a different one")
    return fact


def _has_rewrite(record: Record, listed: bool) -> bool:
    return record.has("requested_rewrite") and isinstance(record.data["requested_rewrite"], list) == listed


FORMATS: dict[str, Format] = {
    "counterfact": Format(
        "CounterFact and Multi-CounterFact, as ROME and MEMIT publish them",
        "requested_rewrite, paraphrase_prompts, neighborhood_prompts",
        lambda r: _has_rewrite(r, False) and not is_akew(r),
        read_counterfact,
    ),
    "mquake": Format(
        "MQuAKE-CF: chains of edits with multi-hop questions",
        "requested_rewrite (a list), questions, new_answer, new_single_hops",
        lambda r: _has_rewrite(r, True) and not is_akew(r),
        read_mquake,
    ),
    "akew": Format(
        "AKEW: CounterFact, MQuAKE and WikiUpdate with paragraphs as targets",
        "requested_rewrite {question, subject, fact_new_uns, unsfact_triplets_GPT}",
        is_akew,
        read_akew,
    ),
    "conflictedit": Format(
        "ConflictEdit and RoundEdit: edits as Wikidata triples",
        "edits (or edit) {relation, subject, object, new_object}, true_objects",
        is_conflict,
        read_conflict,
    ),
    "counterfact-tracing": Format(
        "CounterFact-tracing, the flat form for causal tracing",
        "prompt, subject, target_true, target_false",
        lambda r: r.has("target_false"),
        read_tracing,
    ),
    "zsre": Format(
        "zsRE in MEND's form, with or without EasyEdit's portability questions",
        "src, subject, answers, alt, rephrase, loc, loc_ans",
        lambda r: r.has("src"),
        read_zsre,
    ),
    "bizsre": Format(
        "Bi-ZsRE, MzsRE: zsRE in several languages, edited in English and asked in all",
        "en {src, subject, alt, answers, rephrase, loc, portability}, zh {...}",
        lambda r: len(by_language(r)) > 1 and "en" in by_language(r),
        read_bizsre,
    ),
    "bizsre-zh": Format(
        "the same, edited in Chinese",
        "en {src, subject, ...}, zh {...}",
        lambda r: False,
        partial(read_bizsre, source="zh"),
        family="bizsre",
    ),
    "ripple": Format(
        "RippleEdits: popular, random, recent",
        "edit {prompt, original_fact}, Relation_Specificity, Logical_Generalization, ...",
        lambda r: r.has("edit") and not is_conflict(r),
        read_ripple,
    ),
    "lre": Format(
        "LRE relations, one file for each",
        "name, prompt_templates, samples {subject, object}",
        lambda r: r.has("samples"),
        read_lre,
    ),
    "known": Format(
        "known_1000, with or without a flag for each model",
        "known_id, prompt, subject, attribute",
        lambda r: r.has("attribute"),
        read_known,
    ),
    "unke": Format(
        "UnKE: questions whose answers are paragraphs",
        "question, answer, para_question, sub_question, sub_answer",
        lambda r: r.has("question", "answer", "para_question"),
        read_unke,
    ),
    "hallueditbench": Format(
        "HalluEditBench: questions that a model answers wrongly",
        "subject, relation, object, question, paraphrased_question, locality_question, question_2hop",
        lambda r: r.has("question", "subject", "object"),
        read_hallueditbench,
    ),
    "wikibigedit": Format(
        "WikiBigEdit: changes of Wikidata over time",
        "subject, update, ans, rephrase, personas, loc, loc_ans, mhop, mhop_ans",
        lambda r: r.has("update", "ans"),
        read_wikibigedit,
    ),
    "popqa": Format(
        "PopQA: questions about entities of different popularity",
        "subj, prop, obj, question, possible_answers",
        lambda r: r.has("subj", "obj", "question"),
        read_popqa,
    ),
    "pararel": Format(
        "ParaRel's wordings with the facts of T-REx: a folder with both",
        "sub_label, obj_label, predicate_id; pattern",
        lambda r: r.has("sub_label", "obj_label"),
        read_pararel,
    ),
    "cknowedit": Format(
        "CKnowEdit: Chinese facts, words and reasoning",
        "prompt, target_old, target_new, rephrase, portability [{prompt, answer}], locality [{prompt, answer}]",
        is_cknowedit,
        read_cknowedit,
    ),
    "qaedit": Format(
        "QAEdit: questions of NQ, TriviaQA and SimpleQA",
        "prompt, subject, target, rephrase, locality [{loc, loc_ans}]",
        lambda r: r.has("rephrase", "target"),
        read_qaedit,
    ),
    "wikibio": Format(
        "KnowEdit's WikiBio: biographies that go on with an invented sentence",
        "text, concept, labels, locality {Relation_Specificity}",
        lambda r: r.has("text", "concept", "labels"),
        read_wikibio,
    ),
    "knowedit": Format(
        "KnowEdit: ZsRE, wiki_counterfact, wiki_recent",
        "prompt, subject, target_new, portability {Reasoning, ...}, locality {Relation_Specificity, ...}",
        lambda r: is_knowedit(r) and not r.has("concept"),
        read_easyedit,
        family="easyedit",
    ),
    "easyedit": Format(
        "EasyEdit's requests, such as its flat CounterFact",
        "prompt, subject, target_new, ground_truth, rephrase_prompt, locality, portability",
        lambda r: any(r.has(key) for key in EASYEDIT_KEYS) and not is_cknowedit(r),
        read_easyedit,
        family="easyedit",
    ),
    "rome": Format(
        "a plain edit request of ROME and MEMIT",
        "prompt, subject, target_new, target_true",
        lambda r: False,
        read_rome,
        published=False,
        family="kt",
    ),
    "kt": Format(
        "our own records; also as columns of a CSV file",
        "prompt, subject, answer, foil, target, paraphrases, neighbourhood, portability, generation",
        lambda r: r.has("prompt"),
        read_own,
        published=False,
    ),
}
"""In the order in which `sniff` tries them. A plain ROME request has no distinctive key; the `kt` reader takes it."""
