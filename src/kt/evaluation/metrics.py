"""The metrics: a table from a name, which says the protocol, to a role and the score of one sample.

In names, `tf` is teacher forcing (the model reads the right answer while it is asked for it), `gen` what the
model writes by itself; `token` is the share of right tokens, `exact` all of them. A record's value is the
mean over its samples, a metric the mean over records. Equations are those of the IntAttn-Edit paper, section
5.1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from .samples import Key, Sample
from .text import contains, ngram_entropy, repetition, same_text, word_count

Score = Callable[[Sample, "Sample | None"], "float | None"]
"""(sample, the same sample on the unedited model or None) -> value, or None where it cannot be said."""


class MetricSpec(NamedTuple):
    role: str
    says: str
    score: Score


def tf_token(sample: Sample, old: Sample | None = None) -> float | None:
    return _agreement(sample.predicted_ids, sample.target_ids)


def tf_exact(sample: Sample, old: Sample | None = None) -> float | None:
    return float(sample.predicted_ids == sample.target_ids) if sample.target_ids else None


def tf_prob(sample: Sample, old: Sample | None = None) -> float | None:
    return None if sample.log_prob is None else math.exp(sample.log_prob)


def gen_exact(sample: Sample, old: Sample | None = None) -> float | None:
    if sample.exact_text is None or sample.answer is None:
        return None
    return float(same_text(sample.exact_text, sample.answer))


def gen_contains(sample: Sample, old: Sample | None = None) -> float | None:
    if sample.text is None or sample.answer is None:
        return None
    return float(contains(sample.text, sample.answer))


def same_argmax(sample: Sample, old: Sample | None) -> float | None:
    return None if old is None else float(sample.predicted_ids[:1] == old.predicted_ids[:1])


def same_tf_token(sample: Sample, old: Sample | None) -> float | None:
    if old is None or not sample.target_ids:
        return None
    return _agreement(sample.predicted_ids, old.predicted_ids)


def gen_same(sample: Sample, old: Sample | None) -> float | None:
    return None if old is None or sample.text is None or old.text is None else float(sample.text == old.text)


def fluency(sample: Sample, old: Sample | None = None) -> float | None:
    return None if sample.text is None else ngram_entropy(sample.prompt + sample.text)


def length(sample: Sample, old: Sample | None = None) -> float | None:
    return None if sample.text is None else word_count(sample.prompt + sample.text)


def repeated(sample: Sample, old: Sample | None = None) -> float | None:
    return None if sample.text is None else repetition(sample.prompt + sample.text)


def _agreement(first: tuple[int, ...], second: tuple[int, ...]) -> float | None:
    if not second:
        return None
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(second)


def _four_ways(name: str, role: str, answer: str, where: str) -> dict[str, MetricSpec]:
    """The four ways to ask whether an answer is given."""
    ways: dict[str, tuple[str, Score]] = {
        "tf_token": ("share of the tokens of {} that are the argmax, teacher-forced {}", tf_token),
        "tf_exact": ("whether every token of {} is the argmax, teacher-forced {}", tf_exact),
        "gen_exact": ("whether the greedy continuation of as many tokens is {}, normalised, {}", gen_exact),
        "gen_contains": ("whether the longer greedy continuation holds {} as whole words, {}", gen_contains),
    }
    filled = {way: MetricSpec(role, says.format(answer, where), score) for way, (says, score) in ways.items()}
    return {f"{name}_{way}": metric for way, metric in filled.items()}


_NEAR = "neighbourhood"

METRICS: dict[str, MetricSpec] = {
    **_four_ways("edit_success", "edit", "the target", "after the edit prompt (eq. 14)"),
    "target_prob_tf": MetricSpec("edit", "joint probability of the target after the edit prompt", tf_prob),
    "answer_prob_tf": MetricSpec("answer", "joint probability of the old answer after that prompt", tf_prob),
    **_four_ways("paraphrase", "paraphrase", "the target", "after a rephrased prompt"),
    "neighbourhood_same_argmax": MetricSpec(
        _NEAR, "locality (eq. 16): whether the next token's argmax is that of the unedited model", same_argmax
    ),
    "neighbourhood_same_tf_token": MetricSpec(
        _NEAR,
        "locality as EasyEdit has it: share of the answer's positions where the teacher-forced argmax is "
        "that of the unedited model",
        same_tf_token,
    ),
    "neighbourhood_gen_same": MetricSpec(
        _NEAR, "whether the longer greedy continuation is to the letter that of the unedited model", gen_same
    ),
    **_four_ways(_NEAR, _NEAR, "the neighbour's own answer", "after its prompt"),
    **_four_ways("portability", "portability", "the consequence", "after a prompt needing the edit (eq. 15)"),
    "fluency_ngram_entropy_gen": MetricSpec(
        "generation",
        "(H2 + 2 H3) / 3 of the entropies in bits of a text's bigrams and trigrams of words (eq. 17, its "
        "sign mended; papers print it times 100)",
        fluency,
    ),
    "text_words_gen": MetricSpec(
        "generation", "words of a text, which bound its entropy (a text may end early)", length
    ),
    "repetition_rate_gen": MetricSpec(
        "generation", "share of a text's trigrams of words that stand in it before", repeated
    ),
}


def record_values(samples: Iterable[Sample], before: Mapping[Key, Sample]) -> dict[str, dict[str, float]]:
    """Metric -> record -> value; records and metrics that nothing can be said of are absent."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in METRICS}
    for sample in samples:
        for name, metric in METRICS.items():
            value = metric.score(sample, before.get(sample.key)) if metric.role == sample.role else None
            if value is not None:
                found[name][sample.record].append(value)
    return {n: {r: sum(v) / len(v) for r, v in records.items()} for n, records in found.items() if records}
