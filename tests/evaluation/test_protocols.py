"""The comparison of two answers, aliases, keys and the harmonic Score, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_evaluation import Successor

from kt.errors import BadFact
from kt.evaluation import METRICS, Sample, Scores, evaluate
from kt.evaluation.measures import gen_contains, gen_exact, prob_success, wild_exact
from kt.evaluation.metrics import base_of, composites, harmonic, in_order, record_values, says
from kt.evaluation.samples import samples_of
from kt.facts import Fact, Prompt
from kt.stats import bootstrap_mean, bootstrap_of_means

FACTS = [
    Fact(
        "{} 2", "1", id="a", answer="4 4", target="3", rephrasings=("{} 5", "{} 2"), neighbours=(Prompt("5", "6"),),
    ),
    Fact(
        "{} 2", "9", id="b", answer="3", target="5 6", rephrasings=("{} 4",),
        neighbours=(Prompt("7", "9"), Prompt("4", "2"), Prompt("1", None)),
    ),
]  # fmt: skip


def means(scores):
    return {name: metric.mean for name, metric in scores.metrics.items()}


def test_the_comparison_of_two_answers_by_hand():
    """After n the model gives n + 1 the logit 2, all else 0; so `right` is one more than `wrong` by 2 a token."""
    found = evaluate(Successor(), FACTS, protocols=("prob",))
    # a: 3 after "1 2" is right against 4 4; after "1 5" both begin wrong and end wrong: 3 against 4 4, a tie.
    # b: 5 6 (wrong, right) against 3 (right) after "9 2": mean log p is less; after "9 4" 5 6 is right, 3 is wrong.
    assert found.values["efficacy_prob_success"] == {"a": 1.0, "b": 0.0}
    assert found.values["generalization_prob_success"] == {"a": 0.5, "b": 1.0}
    # a: 6 after 5 against 3. b: 9 after 7 (wrong) against 5 6 (wrong, right); 2 after 4 (wrong) against 5 6 (right).
    assert found.values["specificity_prob_success"] == {"a": 1.0, "b": 0.0}
    assert means(found)["score_prob_harmonic"] == pytest.approx(3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.5))
    assert set(found.metrics) == {*found.values, "score_prob_harmonic"} and len(found.values) == 3


def test_whom_an_answer_is_compared_with():
    asked = samples_of([replace(FACTS[0], neighbours=(Prompt("5", "6"), Prompt("1", None)))])
    assert [(s.role, s.answer, s.rival) for s in asked if s.role != "generation"] == [
        ("edit", "3", "4 4"), ("paraphrase", "3", "4 4"), ("paraphrase", "3", "4 4"), ("answer", "4 4", None),
        ("neighbourhood", "6", "3"), ("neighbourhood", None, None),
    ]  # fmt: skip


def test_length_counts_for_nothing_in_the_comparison():
    long = Sample("r", "edit", "p", "a", target_ids=(1, 2, 3), log_prob=-3.0, rival_ids=(4,), rival_log_prob=-1.5)
    assert prob_success(long) == 1.0
    assert prob_success(replace(long, log_prob=-4.6)) == 0.0
    assert prob_success(replace(long, log_prob=-4.5)) == 0.0  # a tie is no success
    assert prob_success(replace(long, rival_ids=(1, 2, 3))) is None  # the same answer
    assert prob_success(replace(long, rival_log_prob=None)) is None


def test_a_neighbour_without_an_answer_and_a_fact_without_an_old_one_have_no_comparison():
    fact = replace(FACTS[1], answer=None, neighbours=(Prompt("1", None),))
    assert evaluate(Successor(), [fact], protocols=("prob",)).metrics == {}


def test_the_default_protocols_ask_for_no_comparison():
    found = evaluate(Successor(), FACTS, generate=False)
    assert not any("prob_success" in name or "harmonic" in name for name in found.metrics)
    assert all(s.rival_log_prob is None for s in found.samples)


def test_per_token_scores_are_the_harmonic_mean_of_the_three():
    found = means(evaluate(Successor(), FACTS, protocols=("tf",)))
    parts = [found[f"{name}_tf_token"] for name in ("edit_success", "paraphrase", "neighbourhood")]
    assert found["score_tf_token"] == pytest.approx(3 / sum(1 / p for p in parts))


def test_the_interval_of_the_score_resamples_whole_records():
    rng = np.random.default_rng(1)
    records = [str(i) for i in range(60)]
    names = ("efficacy_prob_success", "generalization_prob_success", "specificity_prob_success")
    table = np.stack([rng.random(60), rng.random(60), rng.random(60)], 1)
    table[:, 2] = 1 - table[:, 0]  # records that gain in one lose in the other: the Score hardly moves
    values = {n: dict(zip(records, table[:, i], strict=True)) for i, n in enumerate(names)}
    found = composites(values, records)["score_prob_harmonic"]
    picks = np.random.default_rng(7).integers(60, size=(4000, 60))
    plain = 3 / (1 / table[picks].mean(1)).sum(1)
    assert found.n == 60 and found.mean == pytest.approx(3 / (1 / table.mean(0)).sum())
    assert np.allclose(found.ci95, np.quantile(plain, [0.025, 0.975]), atol=4e-3)
    alone = np.column_stack([rng.permutation(column) for column in table.T])  # records taken apart
    apart = composites({n: dict(zip(records, alone[:, i], strict=True)) for i, n in enumerate(names)}, records)
    assert apart["score_prob_harmonic"].high - apart["score_prob_harmonic"].low > 1.2 * (found.high - found.low)


def test_a_score_with_a_zero_is_zero_and_one_with_a_missing_part_is_absent():
    assert harmonic(np.array([[0.5, 0.0, 1.0], [0.5, 0.5, 0.5]])).tolist() == [0.0, 0.5]
    parts = ("efficacy_prob_success", "generalization_prob_success")
    assert composites({name: {"r": 1.0} for name in parts}, ["r"]) == {}


def test_a_function_of_means_by_hand():
    one = np.array([1.0, 2.0, 4.0, 9.0])[:, None]
    same = bootstrap_of_means(one, lambda m: m[:, 0])
    assert same.mean == 4.0 and same.ci95 == pytest.approx(bootstrap_mean(one[:, 0]).ci95, abs=0.3)
    lone = bootstrap_of_means(np.array([[1.0, np.nan], [3.0, 5.0]]), lambda m: m[:, 0] + m[:, 1])
    assert lone.mean == 7.0 and lone.n == 1 and lone.ci95 is None
    assert math.isnan(bootstrap_of_means(np.array([[1.0, np.nan]]), lambda m: m[:, 0]).mean)


def sample(role="portability", kind="", **more):
    return Sample("r", role, more.pop("prompt", "p"), "Rome", kind=kind, **more)


def test_keys_have_figures_of_their_own():
    hops = [
        sample(kind=kind, target_ids=(1, 2), predicted_ids=(1, 2 if right else 0), prompt=str(i))
        for i, (kind, right) in enumerate([("Reasoning", True), ("Reasoning", False), ("Alias", False)])
    ]
    values = record_values([*hops, replace(hops[2], record="other")], {}, ("tf",))
    assert values["portability_tf_exact"] == {"r": pytest.approx(1 / 3), "other": 0.0}
    assert values["portability_tf_exact[Reasoning]"] == {"r": 0.5}
    assert values["portability_tf_exact[Alias]"] == {"r": 0.0, "other": 0.0}
    assert values["portability_tf_token_by_key"]["r"] == pytest.approx((0.75 + 0.5) / 2)  # EasyEdit: keys count alike
    assert values["portability_tf_token"]["r"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert list(values) == in_order(sorted(values))


def test_prompts_of_one_kind_only_by_name_not_by_role():
    assert "[" not in "".join(
        record_values([sample("edit", "Reasoning", target_ids=(1,), predicted_ids=(1,))], {}, ("tf",))
    )


def test_every_name_has_its_sentence():
    assert base_of("portability_tf_exact[a[b]]") == ("portability_tf_exact", "a[b]")
    assert base_of("portability_tf_token_by_key") == ("portability_tf_token", "by_key")
    assert "filed under 'x'" in says("portability_tf_exact[x]")
    assert "EasyEdit averages" in says("portability_tf_token_by_key")
    assert all(says(name) for name in METRICS) and says("none") == ""


def test_keys_reach_the_scores_and_survive_a_file(tmp_path):
    hops = (Prompt("1 2", "3", kind="<b>"), Prompt("1 2", "4", kind=""))
    found = evaluate(Successor(), [replace(FACTS[0], hops=hops)], generate=False)
    assert found.values["portability_tf_exact[<b>]"] == {"a": 1.0}
    assert found.protocol["portability_tf_exact[<b>]"] and "<b>" not in found._repr_html_()
    again = Scores.load(found.save(tmp_path / "scores.json"))
    assert again == found and list(again.metrics) == list(found.metrics)


def test_aliases_count_where_text_is_compared():
    said = sample("edit", exact_text="The Big", text="The Big Apple, of course", wild_text="NYC.",
                  aliases=("Big Apple", "NYC"), alias_texts=("The Big Apple", "The Big"))  # fmt: skip
    assert gen_exact(said) == gen_contains(said) == wild_exact(said) == 1.0
    bare = replace(said, aliases=(), alias_texts=())
    assert gen_exact(bare) == gen_contains(bare) == wild_exact(bare) == 0.0
    crossed = replace(said, exact_text="no", alias_texts=("NYC", "Big Apple"))  # each at the other's length
    assert gen_exact(crossed) == 0.0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"protocols": ("tf", "guess")}, "'guess' is unknown; choose among tf, gen, prob, wild, mello, ppl"),
        ({"protocols": ()}, "no protocol"),
        ({"protocols": ("tf",), "judge": list}, "add wild"),
        ({"protocols": ("tf",), "max_new_tokens": 9}, "add wild"),
        ({"protocols": ("wild",), "max_new_tokens": 0}, "at least 1"),
    ],
)
def test_wrong_protocols(wrong, says):
    with pytest.raises(BadFact, match=says):
        evaluate(Successor(), FACTS, **wrong)
