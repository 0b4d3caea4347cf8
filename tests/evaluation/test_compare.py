"""Paired differences of two runs on the same records, and the figure of before and after."""

from dataclasses import replace

import numpy as np
import pytest

from kt.errors import BadFact
from kt.evaluation import Sample, Scores
from kt.evaluation.perplexity import Heldout
from kt.stats import paired_bootstrap_difference

RECORDS = tuple(f"r{i}" for i in range(40))
SAMPLES = tuple(Sample(r, "edit", f"prompt of {r}", "x") for r in RECORDS)
PARTS = ("efficacy_prob_success", "generalization_prob_success", "specificity_prob_success")


def scores(seed=0, shift=0.0, **more):
    rng = np.random.default_rng(seed)
    values = {name: dict(zip(RECORDS, (rng.random(40) * 0.5 + shift).tolist(), strict=True)) for name in PARTS}
    values["portability_tf_exact"] = {r: values[PARTS[0]][r] for r in RECORDS[:5]}
    return Scores("m", RECORDS, SAMPLES, values, {}, **more)


def test_differences_are_paired_by_record():
    first, second = scores(shift=0.1), scores()
    found = first.compare(second)
    for name in PARTS:
        # The records' own spread cancels: every one of them gained exactly 0.1.
        assert found[name].mean == pytest.approx(0.1) and found[name].ci95 == pytest.approx((0.1, 0.1)), name
        alone = first.metrics[name]
        assert alone.high - alone.low > 0.05
    assert found["portability_tf_exact"].n == 5


def test_they_are_those_of_the_paired_bootstrap():
    first, second = scores(1), scores(2)
    columns = [[s.values[PARTS[0]][r] for r in RECORDS] for s in (first, second)]
    assert first.compare(second, seed=3)[PARTS[0]] == pytest.approx(paired_bootstrap_difference(*columns, seed=3))
    assert first.compare(second)[PARTS[0]] == pytest.approx(paired_bootstrap_difference(*columns, seed=0))
    back = second.compare(first)[PARTS[0]]
    assert back.mean == pytest.approx(-first.compare(second)[PARTS[0]].mean)


def test_the_order_of_the_records_does_not_matter():
    first, second = scores(1), scores(2)
    turned = replace(second, records=RECORDS[::-1], samples=SAMPLES[::-1])
    assert first.compare(turned) == first.compare(second)


def test_the_score_is_compared_as_a_whole():
    first, second = scores(1, 0.2), scores(2)
    found = first.compare(second)["score_prob_harmonic"]
    both = [s.metrics["score_prob_harmonic"].mean for s in (first, second)]
    assert found.mean == pytest.approx(both[0] - both[1]) and found.low < found.mean < found.high
    assert first.compare(first)["score_prob_harmonic"].ci95 == (0.0, 0.0)


def test_records_and_metrics_that_only_one_has_are_left_out():
    first, second = scores(1), scores(2)
    values = {PARTS[0]: {r: v for r, v in second.values[PARTS[0]].items() if r in RECORDS[10:]}}
    found = first.compare(replace(second, values={**values, "portability_tf_exact": {RECORDS[30]: 1.0}}))
    assert set(found) == {PARTS[0]} and found[PARTS[0]].n == 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"records": RECORDS[:-1]}, "1 of 40 are only in the first, 0 of 39 only in the second"),
        ({"samples": (*SAMPLES[:-1], replace(SAMPLES[-1], prompt="other"))}, "different questions .*'r39'"),
        ({"heldout": Heldout("t", "1", (1.0,), (1,))}, "different texts"),
    ],
)
def test_other_records_questions_or_texts_are_refused(change, says):
    with pytest.raises(BadFact, match=says):
        scores(heldout=Heldout("t", "0", (1.0,), (1,))).compare(replace(scores(), **change))


def test_the_figure_shows_shares_before_and_after():
    before, after = scores(1), scores(2, 0.2)
    values = {**after.values, "text_words_gen": {"r0": 40.0}}
    figure = replace(after, values=values).figure(replace(before, values={**before.values, "text_words_gen": {}}))
    assert figure.layout.yaxis.ticktext == ("efficacy_prob_success", "generalization_prob_success",
                                            "specificity_prob_success", "portability_tf_exact",
                                            "score_prob_harmonic")  # fmt: skip
    dots = {trace.name: trace.x for trace in figure.data if trace.mode == "markers"}
    assert dots["after the edit"][0] == pytest.approx(after.metrics[PARTS[0]].mean)
    assert dots["before the edit"][0] == pytest.approx(before.metrics[PARTS[0]].mean)
    with pytest.raises(BadFact, match="no score is in both"):
        after.figure(replace(before, values={}))
