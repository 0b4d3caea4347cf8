"""The metrics: a table from a name, which contains the protocol, to a role and the score of one sample.

In names, `tf` is teacher forcing (the model reads the right answer while its tokens are scored), `prob` compares the
probabilities of two answers, `gen` is greedy text cut to the answer's length, `wild` text up to the model's own stop,
`mello` the final answer to a multi-hop question that is asked in steps (mello.py); `token` is the share of right
tokens, `exact` all of them. A record's value is the mean over its samples, a metric the mean over records.
`portability_tf_exact[Reasoning]` is the same over the prompts that the data set files under "Reasoning", and
`..._by_key` averages a record's keys with equal weight.

Equations are those of IntAttn-Edit (arXiv 2510.27400, section 5.1) and JEEP (arXiv 2412.17872, appendix C).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from ..stats import Interval, bootstrap_of_means
from . import measures
from .measures import Score
from .samples import Key, Sample

PROTOCOLS = ("tf", "gen", "prob", "wild", "mello", "ppl")
"""The choices of `evaluate(protocols=...)` and `kt eval --protocol`."""


class MetricSpec(NamedTuple):
    """The role of the samples, the meaning of the score, its function, and its protocol."""

    role: str
    says: str
    score: Score
    protocol: str


_WAYS: dict[str, tuple[str, Score, str]] = {
    "tf_token": ("share of the tokens of {} that are the argmax, teacher-forced {}", measures.tf_token, "tf"),
    "tf_exact": ("whether every token of {} is the argmax, teacher-forced {}", measures.tf_exact, "tf"),
    "gen_exact": (
        "whether the greedy continuation of as many tokens is {} or an alias of it, normalised, {}",
        measures.gen_exact,
        "gen",
    ),
    "gen_contains": (
        "whether the longer greedy continuation holds {} or an alias of it as whole words, {}",
        measures.gen_contains,
        "gen",
    ),
    "wild_exact": (
        "whether all that the model says up to its natural stop is {} or an alias, normalised, {}",
        measures.wild_exact,
        "wild",
    ),
    "wild_contains": (
        "whether what the model says up to its natural stop holds {} or an alias as whole words, {}",
        measures.wild_contains,
        "wild",
    ),
    "wild_judge": ("whether a judge finds that what the model says is {}, {}", measures.wild_judge, "wild"),
}


def _ways(name: str, role: str, answer: str, where: str, token: str = "") -> dict[str, MetricSpec]:
    """The metrics of whether an answer is given; `token` is added to the meaning of tf_token."""
    return {
        f"{name}_{way}": MetricSpec(
            role, says.format(answer, where) + (token if way == "tf_token" else ""), score, protocol
        )
        for way, (says, score, protocol) in _WAYS.items()
    }


_NEAR = "neighbourhood"
_MEAN_LOG = "by mean log probability a token, so that a longer answer is not less likely for its length alone"
_SUCCESS = f"whether the new answer is more probable than the old one, {_MEAN_LOG}, after "
_BY_KEY = "; a record's value is the mean over its keys of the mean over each key's prompts, as EasyEdit averages"

METRICS: dict[str, MetricSpec] = {
    **_ways(
        "edit_success",
        "edit",
        "the target",
        "after the edit prompt (IntAttn-Edit, eq. 14)",
        "; JEEP's efficacy, eq. 13",
    ),
    "target_prob_tf": MetricSpec(
        "edit", "joint probability of the target after the edit prompt", measures.tf_prob, "tf"
    ),
    "answer_prob_tf": MetricSpec(
        "answer", "joint probability of the old answer after that prompt", measures.tf_prob, "tf"
    ),
    "efficacy_prob_success": MetricSpec(
        "edit", f"{_SUCCESS}the edit prompt (ES; JEEP, eq. 16)", measures.prob_success, "prob"
    ),
    **_ways("paraphrase", "paraphrase", "the target", "after a rephrased prompt", "; JEEP's generalization, eq. 14"),
    "generalization_prob_success": MetricSpec(
        "paraphrase", f"{_SUCCESS}a rephrased prompt (GS; JEEP, eq. 17)", measures.prob_success, "prob"
    ),
    "neighbourhood_same_argmax": MetricSpec(
        _NEAR,
        "locality (IntAttn-Edit, eq. 16): whether the next token's argmax is that of the unedited model",
        measures.same_argmax,
        "tf",
    ),
    "neighbourhood_same_tf_token": MetricSpec(
        _NEAR,
        "locality as EasyEdit has it: share of the answer's positions where the teacher-forced argmax is "
        "that of the unedited model",
        measures.same_tf_token,
        "tf",
    ),
    "neighbourhood_gen_same": MetricSpec(
        _NEAR,
        "whether the longer greedy continuation is to the letter that of the unedited model",
        measures.gen_same,
        "gen",
    ),
    "neighbourhood_kl": MetricSpec(
        _NEAR, "KL(unedited || edited) of the next token's distribution, in nats; 0 is untouched", measures.kl, "kl"
    ),
    **_ways(_NEAR, _NEAR, "the neighbour's own answer", "after its prompt", "; JEEP's locality, eq. 15"),
    "specificity_prob_success": MetricSpec(
        _NEAR,
        f"whether the neighbour's own answer is more probable than the edit's new one, {_MEAN_LOG}, after the "
        "neighbour's prompt (LS; JEEP, eq. 18)",
        measures.prob_success,
        "prob",
    ),
    **_ways("portability", "portability", "the consequence", "after a prompt needing the edit (IntAttn-Edit, eq. 15)"),
    "portability_mello_contains": MetricSpec(
        "portability",
        "whether the final answer to a multi-hop question, in subquestions held against the memory (MeLLo), holds the "
        "consequence or an alias as whole words",
        measures.mello_contains,
        "mello",
    ),
    "fluency_ngram_entropy_gen": MetricSpec(
        "generation",
        "(H2 + 2 H3) / 3 of the entropies in bits of a text's bigrams and trigrams of words (IntAttn-Edit, eq. 17, its "
        "sign mended; papers print it times 100)",
        measures.fluency,
        "gen",
    ),
    "text_words_gen": MetricSpec(
        "generation", "words of a text, which bound its entropy (a text may end early)", measures.length, "gen"
    ),
    "repetition_rate_gen": MetricSpec(
        "generation", "share of a text's trigrams of words that stand in it before", measures.repeated, "gen"
    ),
}

PERPLEXITY = "perplexity_heldout"
"""The protocol ppl's one metric, whose interval is over documents; `METRICS` are those over records."""

_KEYED = ("portability", _NEAR)
"""Roles whose prompts a data set may file under keys."""
_ByRecord = dict[str, dict[str, list[float]]]
"""Record -> key -> the scores of its samples, or of its tests that the best of several samples decides."""
_BY_KEY_OF = ("portability_tf_token", "neighbourhood_same_tf_token")


def record_values(
    samples: Iterable[Sample], before: Mapping[Key, Sample], protocols: Collection[str]
) -> dict[str, dict[str, float]]:
    """Metric -> record -> value; records and metrics without a defined value are absent.

    Metrics stand in the order of their table, each followed by its keys and by their mean.
    """
    by_role: dict[str, list[str]] = defaultdict(list)
    scores: dict[str, _ByRecord] = {}
    for name, metric in METRICS.items():
        if metric.protocol in protocols:
            by_role[metric.role].append(name)
            scores[name] = defaultdict(lambda: defaultdict(list))
    place: dict[tuple[str, str, str, str], int] = {}  # of the value of a test that any of its samples passes
    for sample in samples:
        old = before.get(sample.key)
        for name in by_role[sample.role]:
            if (value := METRICS[name].score(sample, old)) is None:
                continue
            values = scores[name][sample.record][sample.kind]
            at = len(values)
            if sample.any_of and METRICS[name].protocol != "kl":
                at = place.setdefault((name, sample.record, sample.kind, sample.any_of), at)
            values[at : at + 1] = [max([value, *values[at : at + 1]])]
    return {n: values for name in scores for n, values in _of_metric(name, scores[name]).items() if values}


def _of_metric(name: str, scores: _ByRecord) -> dict[str, dict[str, float]]:
    """One metric over all prompts of a record, by key, and as the mean over keys."""
    values = {name: {r: _mean([v for some in by_key.values() for v in some]) for r, by_key in scores.items()}}
    keys = sorted({key for by_key in scores.values() for key in by_key if key})
    if METRICS[name].role not in _KEYED or not keys:
        return values
    for key in keys:
        values[f"{name}[{key}]"] = {r: _mean(by_key[key]) for r, by_key in scores.items() if key in by_key}
    if name in _BY_KEY_OF:
        values[f"{name}_by_key"] = {r: _mean([_mean(v) for v in by_key.values()]) for r, by_key in scores.items()}
    return values


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def base_of(name: str) -> tuple[str, str]:
    """A metric's name in the table, and the key in brackets or `by_key`; "" where there is none."""
    if name not in METRICS and name.endswith("]"):
        base, _, kind = name.partition("[")
        return base, kind[:-1]
    if name not in METRICS and name.endswith("_by_key"):
        return name.removesuffix("_by_key"), "by_key"
    return name, ""


def protocols_of(names: Iterable[str]) -> tuple[str, ...]:
    """The protocols that measure these metrics, in the order of `PROTOCOLS`. A name that is in no table adds none, nor
    does KL, which is asked for apart from them."""
    ways = {PERPLEXITY: "ppl"} | {name: spec.protocol for name, spec in METRICS.items()}
    parts = {part for name in names for part in (COMPOSITES[name].parts if name in COMPOSITES else (base_of(name)[0],))}
    asked = {ways[part] for part in parts if part in ways}
    return tuple(way for way in PROTOCOLS if way in asked)


def says(name: str) -> str:
    """The meaning of a metric, in a sentence; "" for a name that is in no table."""
    base, kind = base_of(name)
    if base not in METRICS:
        return ""
    if name.endswith("]"):
        return f"{METRICS[base].says}; only the prompts filed under {kind!r}"
    return METRICS[base].says + (_BY_KEY if kind else "")


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order of the table: JSON files have their keys sorted."""
    position = {name: i for i, name in enumerate(METRICS)}

    def rank(name: str) -> tuple[int, bool, str]:
        base, kind = base_of(name)
        # A key in brackets goes before the mean over keys.
        return position.get(base, len(position)), bool(kind) and not name.endswith("]"), name

    return sorted(names, key=rank)


# The Score of ROME, MEMIT and JEEP is 3 / (1/ES + 1/GS + 1/LS) of three means, not a mean over records: its interval
# resamples records with all their values, takes the means and then the function.


class Composite(NamedTuple):
    """The metrics whose means enter, and the meaning of the result."""

    parts: tuple[str, ...]
    says: str


_N = "records resampled together; n is the smallest of the three"
COMPOSITES: dict[str, Composite] = {
    "score_tf_token": Composite(
        ("edit_success_tf_token", "paraphrase_tf_token", "neighbourhood_tf_token"),
        f"harmonic mean of the three (JEEP, eq. 13-15), {_N}",
    ),
    "score_prob_harmonic": Composite(
        ("efficacy_prob_success", "generalization_prob_success", "specificity_prob_success"),
        f"harmonic mean of the three (JEEP's Score of ES, GS, LS, eq. 16-18), {_N}",
    ),
}


def harmonic(means: Float[ndarray, "draw column"]) -> Float[ndarray, " draw"]:
    """The harmonic mean of each row; 0 where a mean is."""
    with np.errstate(divide="ignore"):
        return means.shape[1] / (1 / means).sum(1)


def composites(values: Mapping[str, Mapping[str, float]], records: Sequence[str], seed: int = 0) -> dict[str, Interval]:
    """The composites all of whose parts are in `values`."""
    return {
        name: bootstrap_of_means(columns(values, parts, records), harmonic, seed=seed)
        for name, (parts, _) in COMPOSITES.items()
        if all(part in values for part in parts)
    }


def columns(
    values: Mapping[str, Mapping[str, float]], names: Sequence[str], records: Sequence[str]
) -> Float[ndarray, "n column"]:
    """Metrics side by side, a row a record; NaN where a record lacks one."""
    return np.array([[values[name].get(record, np.nan) for name in names] for record in records], dtype=np.float64)
