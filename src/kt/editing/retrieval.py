"""Which facts a text is about: by its words (BM25), or by the model's own states (embeddings)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import KtError
from ..evaluation.perplexity import check_rows
from ..evaluation.text import normalised
from ..facts.fact import in_a_word, unspaced
from ..model.sites import Kind, Site
from ..model.tokens import pad_id, token_ids
from ..runs import parallel
from .closed_form.keys import TOKENS_PER_FORWARD, Rows

if TYPE_CHECKING:
    from ..model.model import TracedModel

RETRIEVERS = ("bm25", "embeddings")
UNRELATED = 256
"""Tokens of unrelated text, whose mean is the origin of embeddings."""


class Retriever(Protocol):
    """Documents in an order of their nearness."""

    def nearest(self, query: str) -> list[int]:
        """Those that are near at all, the nearest first; of equal ones the later."""

    def found(self, queries: Sequence[str]) -> list[bool]:
        """Of a query a document, in their order: whether that document is near to it."""


class BM25:
    """Okapi BM25 over a text's `terms` (k1 1.2, b 0.75; Robertson and Zaragoza 2009), idf as
    ln(1 + (N - n + 0.5) / (n + 0.5))."""

    def __init__(self, documents: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(terms(document)) for document in documents]
        mean = sum(c.total() for c in counts) / len(counts)
        among = Counter(word for c in counts for word in c)
        idf = {word: math.log1p((len(counts) - n + 0.5) / (n + 0.5)) for word, n in among.items()}
        self.weights = [
            {w: idf[w] * n * (k1 + 1) / (n + k1 * (1 - b + b * c.total() / mean)) for w, n in c.items()} for c in counts
        ]

    def nearest(self, query: str) -> list[int]:
        """The documents that share a word with the query, the nearest first; of equal ones the later."""
        words = terms(query)
        scores = [sum(weights.get(word, 0.0) for word in words) for weights in self.weights]
        return sorted((i for i, score in enumerate(scores) if score > 0), key=lambda i: (-scores[i], -i))

    def found(self, queries: Sequence[str]) -> list[bool]:
        """Of a query a document, in their order: whether they share a word."""
        return [any(w in weights for w in terms(q)) for q, weights in zip(queries, self.weights, strict=True)]


def terms(text: str) -> list[str]:
    """The words of a text in SQuAD's normal form; of scripts where words stand together (`unspaced`), every two
    neighbouring characters, or one that stands alone.

    >>> terms("The capital of France is"), terms("フランスの首都は")
    (['capital', 'of', 'france', 'is'], ['フラ', 'ラン', 'ンス', 'スの', 'の首', '首都', '都は'])
    """
    return [term for word in normalised(text).split() for term in _parts(word)]


def _parts(word: str) -> list[str]:
    """The word, or its terms where some of its characters are of such a script."""
    if not any(map(unspaced, word)):
        return [word]
    found = []
    for (joined, _), characters in groupby(word, lambda c: (unspaced(c), in_a_word(c))):
        run = "".join(c for c in characters if in_a_word(c))
        pairs = [run[i : i + 2] for i in range(len(run) - 1)] if joined else []
        found += pairs or ([run] if run else [])
    return found


class Embeddings:
    """The cosine of mean states: a text's is the mean over its tokens, without the first, of the residual stream behind
    the middle block, less `centre` (one for all documents, or one each). Documents of a cosine below `nearness` (one
    too, or one each) are not near."""

    def __init__(
        self,
        model: TracedModel,
        vectors: Float[Tensor, "document d_model"],
        centre: Float[Tensor, "one_or_document d_model"],
        nearness: float | Sequence[float],
    ) -> None:
        self.model, self.centre = model, centre.float()
        self.nearness = [nearness] * len(vectors) if isinstance(nearness, int | float) else list(nearness)
        self.directions = torch.nn.functional.normalize(vectors.float() - self.centre, dim=-1)

    @classmethod
    def of(cls, model: TracedModel, documents: Sequence[str], nearness: float) -> Embeddings:
        return cls(model, embedded(model, documents), origin(model), nearness)

    def nearest(self, query: str) -> list[int]:
        """The documents that are near to the query, the nearest first; of equal ones the later."""
        scores = self._cosines([query])
        near = (i for i, (s, least) in enumerate(zip(scores, self.nearness, strict=True)) if s >= least)
        return sorted(near, key=lambda i: (-scores[i], -i))

    def found(self, queries: Sequence[str]) -> list[bool]:
        """Of a query a document, in their order: whether its cosine reaches `nearness`."""
        return [s >= least for s, least in zip(self._cosines(queries), self.nearness, strict=True)]

    def _cosines(self, queries: Sequence[str]) -> list[float]:
        """Of each document with the query, or with its own one."""
        own = torch.nn.functional.normalize(embedded(self.model, queries) - self.centre, dim=-1)
        cosines: list[float] = (self.directions * own).sum(-1).tolist()
        return cosines


class Mixed:
    """Documents of which some are found by words, and some (`by_states`) by embeddings: each is near by its own way.
    BM25's scores and cosines do not compare, so all that are near stand in one order by words, and behind them those
    that share no word, by their cosine."""

    def __init__(self, words: BM25, states: Embeddings, by_states: Sequence[int]) -> None:
        self.words, self.states, self.by_states = words, states, by_states

    def nearest(self, query: str) -> list[int]:
        """The documents that are near to the query, the nearest first; of equal ones the later."""
        near = [self.by_states[i] for i in self.states.nearest(query)]
        away, worded = set(self.by_states) - set(near), self.words.nearest(query)
        return [i for i in worded if i not in away] + [i for i in near if i not in set(worded)]

    def found(self, queries: Sequence[str]) -> list[bool]:
        """Of a query a document, in their order: whether that document is near to it."""
        return [i in self.nearest(query) for i, query in enumerate(queries)]


def embedded(model: TracedModel, texts: Sequence[str]) -> Float[Tensor, "text d_model"]:
    """The texts' mean states, float32 on the CPU; zeros for a text without tokens."""
    ids = [tuple(token_ids(model.tokenizer, text)) for text in texts]
    rows = Rows(tuple(each or (pad_id(model.tokenizer),) for each in ids), (0,) * len(ids))
    site, found = Site(Kind.RESID, (model.n_layers - 1) // 2), torch.zeros(len(ids), model.d_model)
    with parallel.alone():
        for numbers, batch, _ in rows.batches(pad_id(model.tokenizer), TOKENS_PER_FORWARD):
            states = model.read(batch.to(model.device), [site], "value")[site].float().cpu()
            # A row's first token has a state like no other, alike in all texts.
            kept = batch.mask.bool() & ((batch.positions > 0) | (batch.lengths[:, None] == 1))
            means = (states * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
            for number, mean in zip(numbers, means, strict=True):
                found[number] = mean if ids[number] else 0.0
    return found


def origin(model: TracedModel) -> Float[Tensor, "1 d_model"]:
    """The mean state of unrelated text.

    Raises:
        KtError: the tokenizer reads nothing of it.
    """
    rows = check_rows(model, UNRELATED)
    if not rows:
        raise KtError(f"the tokenizer of {model.name} reads nothing of the unrelated text; give retriever=bm25")
    return embedded(model, [model.tokenizer.decode(row) for row in rows]).mean(0, keepdim=True)
