"""Requests of one batch whose keys are equal or nearly so: named before the solve, refused by exact constraints."""

import warnings

import pytest
from editing_help import solve

import kt
from kt.errors import KtError

SUBJECT = "Danielle Darrieux"
ONE_SUBJECT = [
    {"prompt": "{} was born in", "subject": SUBJECT, "target_new": "Warsaw"},
    {"prompt": "{} lived in", "subject": SUBJECT, "target_new": "Paris"},
    {"prompt": "{} speaks", "subject": SUBJECT, "target_new": "Italian"},
]
RIDGED = ("memit", "alphaedit", "pmet", "jeep", "intattn")


def named(caught):
    return [str(each.message) for each in caught if "all but one key" in str(each.message)]


@pytest.mark.parametrize("ridge", [0, 1e-4])
def test_an_exact_constraint_on_one_key_is_refused_before_targets_are_searched_for(setting, ridge, monkeypatch):
    searched = []
    monkeypatch.setattr("kt.editing.closed_form.plan.find_targets", lambda *_, **__: searched.append(1))
    with pytest.raises(KtError) as refused:
        solve(*setting, "emmet", ONE_SUBJECT, emmet_lambda=ridge)
    line = str(refused.value)
    assert "'Danielle Darrieux was born in' -> 'Warsaw' and 'Danielle Darrieux lived in' -> 'Paris'" in line
    assert "2 more such pairs" in line and "fact_token=last" in line and "mlp.0" in line
    assert searched == []


@pytest.mark.parametrize("method", RIDGED)
def test_a_ridge_names_them_once_and_the_update_stays_small(setting, method):
    lone = solve(*setting, method, ONE_SUBJECT[:1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edit = solve(*setting, method, ONE_SUBJECT)
    (line,) = named(caught)
    assert "a mean of their two" in line
    for name, delta in edit.deltas().items():
        assert delta["norm"] < 5 * lone.deltas()[name]["norm"]


def test_emmet_with_its_own_ridge_does_the_same(setting):
    lone = solve(*setting, "emmet", ONE_SUBJECT[:1], mom2_update_weight=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edit = solve(*setting, "emmet", ONE_SUBJECT, emmet_lambda="auto", mom2_update_weight=1.0)
    assert len(named(caught)) == 1
    for name, delta in edit.deltas().items():
        assert delta["norm"] < 5 * lone.deltas()[name]["norm"]


def test_rome_says_that_the_later_takes_the_place_of_the_earlier(setting):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(*setting, "rome", ONE_SUBJECT[:2])
    (line,) = named(caught)
    assert "the later" in line


@pytest.mark.parametrize("method", [*RIDGED, "emmet"])
def test_facts_of_different_subjects_are_solved_without_a_word(setting, method):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert solve(*setting, method).names
    assert named(caught) == []


def test_at_the_prompts_last_token_their_keys_are_apart_and_all_of_them_are_changed():
    prompts = ("{} is a country whose capital is", "{} pays with the", "The main language of {} is")
    requests = [
        {"prompt": prompt, "subject": "Qatar", "target_new": target}
        for prompt, target in zip(prompts, ("Oslo", "krone", "Danish"), strict=True)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edit = kt.edit(kt.load("demo"), requests, "emmet", fact_token="last", max_tokens=5_000)
    assert named(caught) == [] and edit.verdict.changed == 3


def test_blocks_of_facts_are_compared_with_all_others(setting, monkeypatch):
    monkeypatch.setattr("kt.editing.closed_form.near_keys.ROWS", 2)
    apart = [{"prompt": f"{{}} {verb}", "subject": name, "target_new": "Rome"} for verb, name in (
        ("was born in", "Marie Curie"), ("lived in", "Space Needle"), ("speaks", "Italy"))]  # fmt: skip
    requests = [ONE_SUBJECT[0], *apart, ONE_SUBJECT[1]]
    with pytest.raises(KtError, match=r"'Danielle Darrieux was born in' .* and 'Danielle Darrieux lived in'"):
        kt.edit(setting[0], requests, "emmet", layers_mlp=(0,), emmet_lambda=0, context_templates=["{}"],
                statistics=None, corpus=str(setting[1].path), max_tokens=500)  # fmt: skip
