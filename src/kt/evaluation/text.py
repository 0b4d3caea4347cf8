"""Measures of text alone: normalised comparison, n-gram entropy, repetition.

The originals split words with nltk, whose data must be downloaded. Here a word is a run of letters, digits
and underscores, and every other visible character is a word of its own ("don't" gives don, ', t); the figures
differ from nltk's in the second decimal on ordinary prose.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Words as the module describes them, case kept."""
    return _WORD.findall(text)


def normalised(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces.

    A text that would lose everything ("The", "!?") keeps it, or all such texts would be equal.
    """
    lower = unicodedata.normalize("NFKC", text).lower()
    bare = " ".join(_ARTICLE.sub(" ", lower.translate(_PUNCTUATION)).split())
    return bare or " ".join(lower.split())


def same_text(text: str, answer: str) -> bool:
    return normalised(text) == normalised(answer)


def contains(text: str, answer: str) -> bool:
    """Whether the answer occurs in the text, as whole words."""
    return f" {normalised(answer)} " in f" {normalised(text)} "


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def entropy(tokens: Sequence[str], n: int) -> float:
    """Entropy of the distribution of n-grams in bits; 0 for a text shorter than n."""
    counts = Counter(ngrams(tokens, n)).values()
    total = sum(counts)
    # log2(total / c), not -log2(c / total): a single n-gram then gives 0.0 and not -0.0.
    return sum(c / total * math.log2(total / c) for c in counts)


def ngram_entropy(text: str) -> float:
    """Mean of 2/3 the bigram and 4/3 the trigram entropy, (H2 + 2 H3) / 3 in bits.

    Eq. 17 of the IntAttn-Edit paper gives the second sum a plus sign; every implementation has both entropies
    positive and takes the mean of the two weighted terms, and so does this one.
    """
    tokens = words(text)
    return (2 / 3 * entropy(tokens, 2) + 4 / 3 * entropy(tokens, 3)) / 2


def word_count(text: str) -> float:
    """Entropy is bounded by the logarithm of this, so that a text that ends early looks less fluent."""
    return float(len(words(text)))


def repetition(text: str, n: int = 3) -> float | None:
    """Share of the text's n-grams of words that occurred in it before; None for a text shorter than n."""
    found = ngrams(words(text), n)
    return 1 - len(set(found)) / len(found) if found else None
