"""What many layers, requests or edits have in common is one warning."""

import warnings
from dataclasses import replace

import pytest
from editing_help import REQUESTS, fast, statistics
from families import tiny_model

import kt

pytestmark = pytest.mark.filterwarnings("ignore::kt.editing.verdict.FailedCheck")


@pytest.fixture
def told():
    """Texts of the warnings that a call gives and that have these words."""

    def called(words, call):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            call()
        return [text for each in found if words in (text := str(each.message))]

    return called


def solved(setting, method, requests=REQUESTS, **changes):
    return kt.edit(
        setting[0], requests, method, statistics=statistics(*setting), check=False, **fast(method, **changes)
    )


def test_evoedit_says_of_a_request_that_earlier_edits_hold_it_and_not_of_each_layer(told):
    model, facts = kt.load("demo", dtype="bfloat16"), kt.load_facts("demo", limit=2)
    again = replace(facts[0], target=facts[1].target)
    options = dict(v_num_grad_steps=3, max_tokens=2_000, check=False)
    with kt.EditSession(model, "evoedit", **options) as session:
        session.edit(facts[:1])
        [line] = told("already holds", lambda: session.edit([again, facts[1]]))
        assert len(session.steps[-1].updates) > 1
    assert f"already holds the key of {again.prompt!r} at " in line and "left as it is; alphaedit would" in line


@pytest.mark.parametrize("method", ["memit", "rome", "emmet"])
def test_a_second_moment_that_is_all_but_singular_is_said_once_a_solve(setting, told, method):
    model, corpus, cache = setting
    few = kt.editing.key_statistics(
        model, [kt.Site("mlp", layer) for layer in (0, 1)], corpus, max_tokens=20, cache_dir=cache
    )
    options = fast(method, v_num_grad_steps=1)
    call = lambda: kt.edit(model, REQUESTS, method, statistics=few, check=False, **options)  # noqa: E731
    [line] = told("all but singular", call)
    assert "take it over more tokens" in line


@pytest.mark.parametrize("method", ["memit", "rome"])
def test_nas_says_once_which_requests_it_leaves(setting, told, method, monkeypatch):
    monkeypatch.setattr("kt.editing.closed_form.norm_guards.anchor_of", lambda norms: float(norms.min()) / 3)
    edits = []
    options = {"norm_guard": "nas", "norm_facts": REQUESTS, "v_num_grad_steps": 2}
    lines = told("NAS", lambda: edits.append(solved(setting, method, **options)))
    assert [line[:24] for line in lines] == ["NAS's anchor is a mean o", "NAS leaves 2 of 2 reques"]
    assert edits[0].manifest["skipped"] == [request["subject"] for request in REQUESTS]


def test_targets_that_stay_improbable_at_every_layer_are_one_line(setting, told):
    [line] = told("below probability 0.5", lambda: solved(setting, "memit", v_num_grad_steps=1, spread="blue"))
    assert "2 of 2 targets" in line and "(and some at 1 other site)" in line


def test_requests_that_contradict_each_other_about_several_subjects_are_one_line(setting, told):
    facts = [
        kt.Fact(prompt, request["subject"], target=target, relation="r")
        for request in REQUESTS
        for prompt, target in (("The mother tongue of {}", "Italy"), ("The city of the {}", "Warsaw"))
    ]
    [line] = told(
        "undo each other", lambda: kt.edit(setting[0], facts, "ft", num_steps=1, layers_mlp=(0,), check=False)
    )
    assert "2 requests give 'Danielle Darrieux' different targets of one relation ('Italy', 'Warsaw')" in line
    assert "and so do those about 1 more subject;" in line


def test_edits_without_keys_in_a_history_are_one_line(setting, told):
    model = setting[0]
    keyless = [kt.edit(model, [r], "ft", num_steps=1, layers_mlp=(0,), check=False) for r in REQUESTS]
    [line] = told("keeps no keys", lambda: kt.EditSession(model, "memit", history=keyless))
    assert "a ft edit (and 1 more) keeps no keys" in line


def test_moments_that_do_not_say_how_often_experts_were_asked_are_one_line(corpus, tmp_path, told):
    model = tiny_model("mixtral")
    moments = statistics(model, corpus, tmp_path)
    bare = kt.editing.Statistics(moments.files, moments.n_tokens)
    call = lambda: kt.edit(model, REQUESTS, "memit", statistics=bare, check=False, **fast("memit"))  # noqa: E731
    assert len(told("how many tokens each expert was sent", call)) == 1
