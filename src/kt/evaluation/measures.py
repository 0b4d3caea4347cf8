"""The score of one sample under each protocol: a number, or None where the score is undefined.

Every function takes a sample and the same sample on the unedited model, or None. metrics.py names the metrics and the
role that each is computed for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .samples import Sample
from .text import contains, ngram_entropy, repetition, same_text, word_count

Score = Callable[[Sample, "Sample | None"], "float | None"]
"""(sample, the same sample on the unedited model or None) -> value, or None where it is undefined."""


# Teacher forcing ------------------------------------------------------------------------------------------------------
def tf_token(sample: Sample, old: Sample | None = None) -> float | None:
    """Share of the answer's tokens that are the argmax at their position (JEEP, eq. 13-15)."""
    return _agreement(sample.predicted_ids, sample.target_ids)


def tf_exact(sample: Sample, old: Sample | None = None) -> float | None:
    """Whether all tokens of the answer are (IntAttn-Edit, eq. 14)."""
    return float(sample.predicted_ids == sample.target_ids) if sample.target_ids else None


def tf_prob(sample: Sample, old: Sample | None = None) -> float | None:
    """The answer's joint probability."""
    return None if sample.log_prob is None else math.exp(sample.log_prob)


def same_argmax(sample: Sample, old: Sample | None) -> float | None:
    """Whether the next token is the unedited model's (IntAttn-Edit, eq. 16)."""
    if old is None or not sample.predicted_ids or not old.predicted_ids:
        return None
    return float(sample.predicted_ids[:1] == old.predicted_ids[:1])


def same_tf_token(sample: Sample, old: Sample | None) -> float | None:
    """Share of the answer's positions where the argmax is the unedited model's."""
    if old is None or not sample.target_ids or not old.predicted_ids:
        return None
    return _agreement(sample.predicted_ids, old.predicted_ids)


def kl(sample: Sample, old: Sample | None = None) -> float | None:
    """KL(unedited || edited) of the next token, in nats."""
    return sample.kl


# Comparison of two answers --------------------------------------------------------------------------------------------
def prob_success(sample: Sample, old: Sample | None = None) -> float | None:
    """Whether the answer's mean log probability a token exceeds its rival's (JEEP, eq. 16-18)."""
    if sample.log_prob is None or sample.rival_log_prob is None or sample.target_ids == sample.rival_ids:
        return None
    return float(sample.log_prob / len(sample.target_ids) > sample.rival_log_prob / len(sample.rival_ids))


# Text that the model writes -------------------------------------------------------------------------------------------
def gen_exact(sample: Sample, old: Sample | None = None) -> float | None:
    """Whether the continuation of an answer's own length is that answer, for the answer or any alias."""
    if sample.exact_text is None or sample.answer is None:
        return None
    spelled = zip((sample.exact_text, *sample.alias_texts), (sample.answer, *sample.aliases), strict=False)
    return float(any(same_text(text, answer) for text, answer in spelled))


def gen_contains(sample: Sample, old: Sample | None = None) -> float | None:
    """Whether the longer continuation holds the answer or any alias as whole words."""
    return _holds(sample.text, sample)


def gen_same(sample: Sample, old: Sample | None) -> float | None:
    """Whether the longer continuation equals the unedited model's exactly."""
    return None if old is None or sample.text is None or old.text is None else float(sample.text == old.text)


def wild_exact(sample: Sample, old: Sample | None = None) -> float | None:
    """Whether the model's whole response is the answer or an alias."""
    if sample.wild_text is None or sample.answer is None:
        return None
    return float(any(same_text(sample.wild_text, answer) for answer in (sample.answer, *sample.aliases)))


def wild_contains(sample: Sample, old: Sample | None = None) -> float | None:
    """Whether the model's response holds the answer or an alias as whole words."""
    return _holds(sample.wild_text, sample)


def mello_contains(sample: Sample, old: Sample | None = None) -> float | None:
    """Whether the final answer after all steps holds the answer or an alias as whole words."""
    return _holds(sample.mello_text, sample)


def wild_judge(sample: Sample, old: Sample | None = None) -> float | None:
    """The judge's verdict."""
    return None if sample.verdict is None else float(sample.verdict)


# The text by itself ---------------------------------------------------------------------------------------------------
def fluency(sample: Sample, old: Sample | None = None) -> float | None:
    """(H2 + 2 H3) / 3 in bits."""
    return None if sample.text is None else ngram_entropy(sample.prompt + sample.text)


def length(sample: Sample, old: Sample | None = None) -> float | None:
    """Words of the text."""
    return None if sample.text is None else word_count(sample.prompt + sample.text)


def repeated(sample: Sample, old: Sample | None = None) -> float | None:
    """Share of the text's trigrams that stood in it before."""
    return None if sample.text is None else repetition(sample.prompt + sample.text)


def _holds(text: str | None, sample: Sample) -> float | None:
    if text is None or sample.answer is None:
        return None
    return float(any(contains(text, answer) for answer in (sample.answer, *sample.aliases)))


def _agreement(first: tuple[int, ...], second: tuple[int, ...]) -> float | None:
    if not first or not second:
        return None
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(second)
