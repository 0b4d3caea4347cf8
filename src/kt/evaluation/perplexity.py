"""Perplexity on held-out text: the harm that an edit does to the model in general.

Every document is read in windows of up to 1,024 tokens (or as many as the model has positions) that overlap by half:
each token is predicted once, from all before it in the document or from at least half a window. A document's first
token is predicted only behind a BOS. Perplexity is exp(sum of -log p / number of tokens), so long documents weigh
more; its interval resamples documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import BadFact, BadFile
from ..facts.corpus import Corpus
from ..model.model import TracedModel
from ..model.scoring import Question, Row, TeacherForced, teacher_force
from ..model.tokens import token_ids
from ..stats import Interval, bootstrap_of_means

WINDOW = 1024
"""Most tokens that the model reads at once."""
MOST_TOKENS = 300_000
"""Documents are taken until this many tokens are reached (WikiText-2's test set has 283,000 of GPT-2's)."""
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole parts, lie evenly, however many there are."""
CHECK_TOKENS, CHECK_WINDOW = 1_000, 256
"""Tokens that every edit is checked on, and the window that they are read in: few, since each edit reads them twice."""


@dataclass(frozen=True)
class Heldout:
    """Losses on held-out text, a document each.

    Args:
        source: the corpus' name.
        sha256: of its bytes.
        nll: sum of -ln p over a document's tokens.
        tokens: how many those are.
    """

    source: str
    sha256: str
    nll: tuple[float, ...]
    tokens: tuple[int, ...]

    def perplexity(self, seed: int = 0) -> Interval:
        """exp(mean loss a token); n is the number of documents."""
        return bootstrap_of_means(np.array([self.nll, self.tokens]).T, lambda m: np.exp(m[:, 0] / m[:, 1]), seed=seed)

    def difference(self, other: Heldout, seed: int = 0) -> Interval:
        """This perplexity less the other, documents resampled together.

        Raises:
            BadFact: the two are of different texts, or counted by different tokenizers.
        """
        if (self.sha256, self.tokens) != (other.sha256, other.tokens):
            raise BadFact(
                f"perplexities of different texts or tokenizers ({self.source}, {other.source}) do not compare; "
                "score both models on one held-out file"
            )
        table = np.array([self.nll, other.nll, self.tokens]).T
        return bootstrap_of_means(table, lambda m: np.exp(m[:, 0] / m[:, 2]) - np.exp(m[:, 1] / m[:, 2]), seed=seed)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Heldout:
        """The inverse of `as_dict`."""
        return cls(data["source"], data["sha256"], tuple(data["nll"]), tuple(data["tokens"]))


class Windows(NamedTuple):
    """A held-out corpus cut into windows; `owner` is the number of the document that each belongs to."""

    corpus: Corpus
    rows: tuple[Row, ...]
    owner: tuple[int, ...]

    def losses(self, scores: Mapping[Question, TeacherForced]) -> Heldout:
        """The documents' losses from those of their windows."""
        nll, tokens = np.zeros(max(self.owner) + 1), np.zeros(max(self.owner) + 1, dtype=int)
        for row, document in zip(self.rows, self.owner, strict=True):
            nll[document] -= scores[row.question].log_prob or 0.0
            tokens[document] += len(row.target)
        return Heldout(self.corpus.name, self.corpus.sha256, tuple(nll.tolist()), tuple(tokens.tolist()))


def heldout_corpus(source: str | Path | None, model: str) -> Corpus:
    """The named corpus; without a name the shipped held-out text of the model's kind.

    Raises:
        BadFile: the file is not there.
    """
    return Corpus.heldout(model) if source is None else Corpus.open(source, model)


def check_losses(model: TracedModel) -> Heldout | None:
    """Losses on the small text that every edit is checked on; None where the tokenizer reads nothing of it."""
    some = _windows(model, heldout_corpus(None, model.name), CHECK_TOKENS, CHECK_WINDOW)
    return some.losses(teacher_force(model, some.rows, allow_nan=True)) if some.rows else None


def check_rows(model: TracedModel, tokens: int) -> list[tuple[int, ...]]:
    """The first `tokens` tokens of that text, a document a row."""
    return [row.read for row in _windows(model, heldout_corpus(None, model.name), tokens, tokens).rows]


def opening_rows(model: TracedModel, tokens: int, each: int) -> list[tuple[int, ...]]:
    """About `tokens` tokens of the text that second moments are taken over, no document of which is in the held-out
    text: the first `each` of documents from all parts of it."""
    texts = list(Corpus.open("auto", model.name).texts())
    rows: list[tuple[int, ...]] = []
    for i in sorted(range(len(texts)), key=lambda i: i * GOLDEN % 1):
        if sum(map(len, rows)) >= tokens:
            break
        ids = token_ids(model.tokenizer, texts[i])[:each]
        rows += [tuple(ids)] * (len(ids) > 1)
    return rows


def windows(model: TracedModel, corpus: Corpus) -> Windows:
    """Cut the corpus' documents into rows for `teacher_force`, up to `MOST_TOKENS` tokens in all.

    Raises:
        BadFile: no document has a token to predict.
    """
    every = _windows(model, corpus, MOST_TOKENS, WINDOW)
    if not every.rows:
        raise BadFile(f"{corpus.name} has no text to predict; give one document a line, of two tokens or more")
    return every


def _windows(model: TracedModel, corpus: Corpus, most: int, window: int) -> Windows:
    """The windows of documents, of up to `most` tokens each, until `most` tokens are reached."""
    longest = model.most_positions or window
    rows: list[Row] = []
    owner: list[int] = []
    total = 0
    for text in corpus.texts():
        ids = token_ids(model.tokenizer, text)[: most + 1]
        if len(ids) < 2:
            continue
        document = owner[-1] + 1 if owner else 0
        for number, (read, target) in enumerate(_cut(ids, min(window, longest)), start=1):
            rows.append(Row((f"{corpus.name}, document {document + 1}, window {number}", ""), read, target))
            owner.append(document)
            total += len(target)
        if total >= most:
            break
    return Windows(corpus, tuple(rows), tuple(owner))


def _cut(ids: Sequence[int], window: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens read, tokens that their end predicts): every token but the first is predicted once."""
    start, step = 1, window
    while start < len(ids):
        stop = min(start + step, len(ids))
        yield tuple(ids[max(0, stop - 1 - window) : stop - 1]), tuple(ids[start:stop])
        start, step = stop, max(1, window // 2)


def ppl_protocol(heldout: Heldout) -> str:
    """The definition of perplexity, in a sentence."""
    return (
        f"perplexity of {heldout.source}: exp of the mean -ln p a token over {len(heldout.nll)} documents "
        f"({sum(heldout.tokens)} tokens), windows of up to {WINDOW} tokens that overlap by half; n and interval are "
        "over documents"
    )
