"""Word sets whose probability is followed through the layers (JEEP, appendix A and Figure 5).

A JSON object names them. `{"name": ["word", ...]}` holds for every fact; `{"name": {"key": ["word", ...]}}` is looked
up by fact: a key is a fact's id, its subject or its relation, and a fact has the union of the lists that match.
Appendix A's names keep their meaning:

related      words that occur with the fact; the answer's own words and tokens are taken out
factual      answers and subjects of the same kind; likewise
stopwords    the shipped list (stopwords.txt) where none is given
non-factual  where it is not given but `related` is: related without factual and stopwords, word by word
rest         never given: the vocabulary without all other sets and the answer's tokens

A word stands for all tokens that write it in the middle of a sentence (punctuation: with and without a space before),
special tokens excluded. Sets do not share words, but words of two sets may share a token, as the appendix notes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from .._util.data import read_json
from ..errors import BadFile, SubjectNotFound
from ..facts.fact import Fact
from ..model.tokens import char_span, token_ids

# Word sets in the logits of a lens: their ids as tensors, and the mean probability of each set.

Padded = tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]
"""Lists of ids as rows, and which of their entries are real."""


def set_tokens(masks: SetTokens, facts: Sequence[int]) -> tuple[list[Padded], Padded | None]:
    """The word sets of some rows, and the tokens that the last one excludes."""
    sets = [_padded([masks.ids[i][s] for i in facts]) for s in range(len(masks.ids[0]))]
    return sets, None if masks.outside is None else _padded([masks.outside[i] for i in facts])


def of_sets(logits: Float[Tensor, "row vocab"], total: Float[Tensor, " row"], named: Any) -> Float[Tensor, "row set"]:
    """Mean probability of each set's tokens (`named`: of `set_tokens`). Overwrites the logits."""
    prob = logits.sub_(total[:, None]).exp_()
    sets, outside = named
    means = []
    for some in sets:
        index, real = (part.to(prob.device) for part in some)
        means.append((prob.gather(1, index) * real).sum(1) / real.sum(1))
    if outside is not None:
        index, real = (part.to(prob.device) for part in outside)
        nothing = ~real.any(1, keepdim=True)  # a row without ids has a stand-in, which must keep its probability
        prob.scatter_(1, index, prob.gather(1, index) * nothing)
        means.append(prob.sum(1) / (prob.shape[1] - real.sum(1)))
    return torch.stack(means, 1).cpu()


def _padded(lists: Sequence[Int[ndarray, " token"]]) -> Padded:
    """Rows of one width: padding repeats the row's ids."""
    width = max((len(some) for some in lists), default=0) or 1
    index = np.stack([np.resize(some if len(some) else [0], width) for some in lists]).astype(np.int64)
    real = np.arange(width) < np.array([len(some) for some in lists])[:, None]
    return torch.as_tensor(index), torch.as_tensor(real)


class SetTokens(NamedTuple):
    """Word sets as token ids. With `outside`, one more set is read: every token that `outside` does not name."""

    ids: Sequence[Sequence[Int[ndarray, " token"]]]
    """By fact and set, each id once; empty where the fact has no such set."""
    outside: Sequence[Int[ndarray, " token"]] | None = None
    """By fact."""

    @property
    def n_sets(self) -> int:
        return len(self.ids[0]) + (self.outside is not None)


RELATED, FACTUAL, STOPWORDS, NON_FACTUAL, REST = "related", "factual", "stopwords", "non-factual", "rest"

DEMO = Path(__file__).parent.parent / "demo" / "word_sets.json"
SHIPPED_STOPWORDS = Path(__file__).parent / "stopwords.txt"

_WITHOUT_ANSWER = (RELATED, FACTUAL, NON_FACTUAL)
_BEFORE = "so"  # any word: a token that opens a text is not the one that follows another word

Words = tuple[str, ...]


class Asked(NamedTuple):
    """A fact, its original answer, and all of that answer's tokens."""

    fact: Fact
    original: str
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class WordSets:
    """Checked word sets: for every fact, or by key. `source` names them in messages."""

    given: Mapping[str, Words | Mapping[str, Words]]
    source: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """In the order of the appendix, then those of other names, then the rest."""
        known = {*self.given, STOPWORDS} | ({NON_FACTUAL} if RELATED in self.given else set())
        first = [name for name in (RELATED, FACTUAL, NON_FACTUAL, STOPWORDS) if name in known]
        return (*first, *(name for name in self.given if name not in first), REST)

    @cached_property
    def stopwords(self) -> Words:
        return tuple(SHIPPED_STOPWORDS.read_text(encoding="utf-8").split())

    def words(self, name: str, fact: Fact, original: str) -> Words:
        """A set's words for one fact, each once."""
        listed = self._listed(name, fact)
        if name not in _WITHOUT_ANSWER:
            return listed
        answer = {original.casefold(), *original.casefold().split()}
        out = {word.casefold() for word in self._taken_out(name, fact)} | answer
        return tuple(word for word in listed if word.casefold() not in out)

    def _listed(self, name: str, fact: Fact) -> Words:
        if name not in self.given:
            return self.stopwords if name == STOPWORDS else self._listed(RELATED, fact)
        listed = self.given[name]
        if not isinstance(listed, Mapping):
            return listed
        keys = dict.fromkeys((fact.id, fact.subject, fact.relation))
        return tuple(dict.fromkeys(word for key in keys for word in listed.get(key, ())))

    def _taken_out(self, name: str, fact: Fact) -> Words:
        if name != NON_FACTUAL or name in self.given:
            return ()
        factual = self._listed(FACTUAL, fact) if FACTUAL in self.given else ()
        return (*factual, *self._listed(STOPWORDS, fact))

    def require_some(self, facts: Iterable[Fact]) -> None:
        """Refuse a set that has no words for any of the facts, before any work.

        Raises:
            BadFile: there is such a set.
        """
        keys = {key for fact in facts for key in (fact.id, fact.subject, fact.relation)}
        for name, listed in self.given.items():
            if isinstance(listed, Mapping) and keys.isdisjoint(listed):
                self._refuse(name, "has no words for any fact; its keys must be fact ids, subjects or relations")

    def require_read(self, values: Float[ndarray, "fact position kind layer set"]) -> None:
        """Refuse a set that had no token for any fact.

        Raises:
            BadFile: there is such a set.
        """
        for name, column in zip(self.names, np.moveaxis(values, -1, 0), strict=True):
            if name in self.given and np.isnan(column).all():
                self._refuse(name, "has no token for any fact; give words that the tokenizer knows")

    def _refuse(self, name: str, what: str) -> None:
        raise BadFile(f"word sets of {self.source}: set {name!r} {what}")


@dataclass(frozen=True)
class SetReader:
    """Word sets as one tokenizer writes them; every word is tokenised once."""

    words: WordSets
    tokenizer: Any
    known: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def tokens(self, rows: Sequence[Asked]) -> SetTokens:
        """The sets of some facts; the last one is every token in none of them."""
        names = [name for name in self.words.names if name != REST]
        ids = [[self._set(name, row) for name in names] for row in rows]
        named = [[*some, np.array(row.answer_ids, dtype=np.int64)] for some, row in zip(ids, rows, strict=True)]
        return SetTokens(ids, [np.unique(np.concatenate(some)) for some in named])

    def _set(self, name: str, row: Asked) -> Int[ndarray, " token"]:
        words = self.words.words(name, row.fact, row.original)
        ids = {token for word in words for token in self._ids(word)}
        if name in _WITHOUT_ANSWER:
            ids -= set(row.answer_ids)
        return np.array(sorted(ids), dtype=np.int64)

    def _ids(self, word: str) -> tuple[int, ...]:
        if word not in self.known:
            self.known[word] = word_ids(self.tokenizer, word)
        return self.known[word]


def word_ids(tokenizer: Any, word: str) -> tuple[int, ...]:
    """The tokens that write a word after another one, each once and without special tokens."""
    gaps = (" ",) if any(c.isalnum() for c in word) else (" ", "")
    special = set(tokenizer.all_special_ids)
    ids = dict.fromkeys(token for gap in gaps for token in _after_a_word(tokenizer, gap, word))
    return tuple(token for token in ids if token not in special)


def _after_a_word(tokenizer: Any, gap: str, word: str) -> list[int]:
    joint = _BEFORE + gap + word
    before, both = token_ids(tokenizer, _BEFORE), token_ids(tokenizer, joint)
    if both[: len(before)] == before:
        return both[len(before) :]
    try:
        return both[char_span(tokenizer, joint, len(_BEFORE), len(joint)).start :]
    except SubjectNotFound:  # the tokenizer drops the word
        return []


def open_sets(source: str | os.PathLike[str] | Mapping[str, Any] | WordSets) -> WordSets:
    """Word sets from `demo`, a JSON file, or what such a file holds.

    Raises:
        BadFile: no JSON object, a set that is empty, or a shape that is neither of the two (see the module).
    """
    if isinstance(source, WordSets):
        return source
    if isinstance(source, Mapping):
        return _checked(source, "sets=")
    path = DEMO if source == "demo" else Path(source)
    return _checked(read_json(path), str(source))


def _checked(value: Mapping[str, Any], source: str) -> WordSets:
    given = {name: listed for name, listed in value.items() if name != "schema_version"}
    if not given:
        raise BadFile(f"word sets of {source}: there are none; name at least one set with its words")
    if REST in given:
        raise BadFile(f"word sets of {source}: {REST!r} is what the others leave over; give it another name")
    return WordSets({name: _listed(listed, source, f"set {name!r}") for name, listed in given.items()}, source)


def _listed(value: Any, source: str, what: str, inner: bool = False) -> Any:
    if isinstance(value, Mapping) and value and not inner:
        return {key: _listed(words, source, f"{what}, key {key!r}", inner=True) for key, words in value.items()}
    words = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
    if not words and not isinstance(value, Mapping):
        shown = json.dumps(value, default=str)[:60]
        raise BadFile(f"word sets of {source}: {what} is {shown}; give a list of words, or such lists by key")
    if inner and isinstance(value, Mapping):
        raise BadFile(f"word sets of {source}: {what} holds keys again; give a list of words there")
    if not value or not all(word.strip() for word in value):
        raise BadFile(f"word sets of {source}: {what} is empty or holds an empty word; give at least one word each")
    return tuple(dict.fromkeys(word.strip() for word in value))
