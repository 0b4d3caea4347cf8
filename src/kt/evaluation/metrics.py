"""The metrics: a table from a name, which says the protocol, to the role it reads and the score of one sample.

In names, `tf` is teacher forcing (the model reads the right answer while it is asked for it), `gen` what the model
writes by itself; `token` is the share of right tokens, `exact` all of them. A record's value is the mean over its
samples, a metric the mean over records. Equations are those of the IntAttn-Edit paper, section 5.1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from .samples import Sample
from .text import contains, ngram_entropy, repetition, same_text

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


def repeated(sample: Sample, old: Sample | None = None) -> float | None:
    return None if sample.text is None else repetition(sample.prompt + sample.text)


def _agreement(first: tuple[int, ...], second: tuple[int, ...]) -> float | None:
    if not second:
        return None
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(second)


def _answered(name: str, role: str, what: str, answer: str) -> dict[str, MetricSpec]:
    """The four ways to ask whether an answer is given."""
    return {
        f"{name}_tf_token": MetricSpec(
            role, f"share of the {answer}'s tokens that are the argmax under teacher forcing {what}", tf_token
        ),
        f"{name}_tf_exact": MetricSpec(
            role, f"whether every token of the {answer} is the argmax under teacher forcing {what}", tf_exact
        ),
        f"{name}_gen_exact": MetricSpec(
            role,
            f"whether the greedy continuation {what}, cut to as many tokens as the {answer} has, is the {answer} "
            "after normalisation",
            gen_exact,
        ),
        f"{name}_gen_contains": MetricSpec(
            role, f"whether the longer greedy continuation {what} holds the {answer} as whole words", gen_contains
        ),
    }


METRICS: dict[str, MetricSpec] = {
    **_answered("edit_success", "edit", "after the edit prompt (eq. 14; tf_token is EasyEdit's rewrite_acc)", "target"),
    "target_prob_tf": MetricSpec("edit", "joint probability of the target's tokens after the edit prompt", tf_prob),
    "answer_prob_tf": MetricSpec("answer", "joint probability of the old answer's tokens after the edit prompt", tf_prob),
    **_answered("paraphrase", "paraphrase", "after a rephrased prompt", "target"),
    "neighbourhood_same_argmax": MetricSpec(
        "neighbourhood", "locality (eq. 16): whether the next token's argmax is that of the unedited model", same_argmax
    ),
    "neighbourhood_same_tf_token": MetricSpec(
        "neighbourhood",
        "locality as EasyEdit has it: share of the neighbour's answer positions whose argmax under teacher forcing is "
        "that of the unedited model",
        same_tf_token,
    ),
    "neighbourhood_gen_same": MetricSpec(
        "neighbourhood", "whether the longer greedy continuation is letter by letter that of the unedited model", gen_same
    ),
    **_answered("neighbourhood", "neighbourhood", "after a neighbour's prompt", "neighbour's own answer"),
    **_answered("portability", "portability", "after a prompt that needs the edit (eq. 15)", "consequence"),
    "fluency_ngram_entropy_gen": MetricSpec(
        "generation", "(H2 + 2 H3) / 3, entropies in bits of the text's bigrams and trigrams of words (eq. 17 with its "
        "sign mended; the papers print it times 100)", fluency,
    ),
    "repetition_rate_gen": MetricSpec(
        "generation", "share of the text's trigrams of words that stand in it before", repeated
    ),
}  # fmt: skip


def record_values(
    samples: Iterable[Sample], before: Mapping[tuple[str, str, str | None], Sample]
) -> dict[str, dict[str, float]]:
    """Metric -> record -> value; records and metrics that nothing can be said of are absent."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in METRICS}
    for sample in samples:
        for name, metric in METRICS.items():
            value = metric.score(sample, before.get(sample.key)) if metric.role == sample.role else None
            if value is not None:
                found[name][sample.record].append(value)
    return {n: {r: sum(v) / len(v) for r, v in records.items()} for n, records in found.items() if records}
