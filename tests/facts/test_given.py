"""Facts as functions of kt are given them: one or many, as `Fact`s, dicts, or a source by name."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from families import tiny_model

import kt
from kt.errors import BadFact, KtError, SubjectNotFound
from kt.facts import Prompt, facts_from, load_facts, read_facts

RECORD = {
    "prompt": "The mother tongue of {}", "subject": "Danielle Darrieux", "target_new": "Italy", "target_true": "French"
}  # fmt: skip
FACT = kt.Fact("The mother tongue of {}", "Danielle Darrieux", "French", target="Italy", id="0")


@pytest.fixture
def forms(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps(RECORD))
    return [FACT, [FACT], (FACT,), RECORD, [RECORD], iter([RECORD]), file, str(file), read_facts(file)]


def test_every_form_gives_the_same_facts(forms):
    forms[5] = list(forms[5])
    assert all(facts_from(form) == load_facts(form) == [FACT] for form in forms)
    assert load_facts([FACT, FACT], limit=1) == [FACT] and load_facts(RECORD, join="\n")[0].target_prefix == "\n"


def test_tracing_probing_and_judging_take_every_form(forms):
    model = tiny_model("gpt2")
    for form in forms:
        assert kt.contrast_probe(model, form).facts[0].target == "Italy"
    for form in (RECORD, forms[7]):
        trace = kt.causal_trace(model, form, kinds="mlp", samples=1, keep="all", metrics="logit-diff,prob")
        assert trace.facts[0].id == "0" and trace.metrics == ("prob", "logit_diff")
        assert kt.evaluate(model, form, protocols="tf").records == ("0",)
    assert (trace.curve("mlp", "logit-diff").mean == trace.curve("mlp", "logit_diff").mean).all()
    assert kt.case_study(model, RECORD, {}, 1).record == "0"
    with pytest.raises(BadFact, match="a case is of one fact, and 2"):
        kt.case_study(model, [RECORD, {**RECORD, "subject": "Marie Curie"}], {})
    with pytest.raises(BadFact, match="metric 'logit' is unknown"):
        trace.curve("mlp", "logit")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "given as null"),
        (3, "given as a number"),
        (b"facts", "given as bytes"),
        ("The capital of France is", "a prompt by hand has its subject beside it"),
        (["The capital of France is"], "record 1: a record must be an object"),
    ],
)
def test_what_is_no_fact_says_so(given, says):
    for read in (facts_from, load_facts):
        with pytest.raises(KtError, match=says):
            read(given)


def test_a_fact_takes_the_names_of_a_record():
    near = Prompt("The mother tongue of Marie Curie", "Polish", any_of="a")
    fact = kt.Fact(
        prompt="The mother tongue of Danielle Darrieux", subject="Danielle Darrieux", paraphrases=["{} speaks"],
        target_new={"str": "Italy"}, target_true="French", neighbourhood=[near],
        portability=[{"prompt": "A", "answer": "b"}],
    )  # fmt: skip
    assert (fact.template, fact.target, fact.answer) == (RECORD["prompt"], "Italy", "French")
    assert (fact.rephrasings, fact.neighbours, fact.hops) == (("{} speaks",), (near,), (Prompt("A", "b"),))
    same = kt.Fact("{} is", "Bo", None, None, "x", rephrasings=("{} was",))
    assert kt.Fact("{} is", "Bo", target_new="x", rephrasings=["{} was"]) == same
    assert copy.deepcopy(fact) == fact == dataclasses.replace(fact)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt": "{} is", "subject": "Bo", "targt": "x"}, "unknown key 'targt'; did you mean 'target'"),
        ({"prompt": "{} is"}, "'subject' is missing"),
        ({"template": "{} is", "subject": "Bo", "answer": "x", "target_true": "y"}, "'answer' and 'target_true'"),
        ({"template": "{} is", "prompt": "{} was", "subject": "Bo"}, "'prompt' is given twice"),
        ({"template": "{} is", "subject": "Bo", "rephrasings": "{} was"}, "rephrasings of a Fact is the text"),
    ],
)
def test_a_wrong_field_of_a_fact_is_one_line(given, says):
    with pytest.raises(BadFact, match=says):
        kt.Fact(**given)
    with pytest.raises(SubjectNotFound):
        kt.Fact(prompt="no place", subject="Bo")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lr": 1}, "lr: intattn does not use it .*ft.*intattn has layers_mlp, v_lr"),
        ({"v_lrr": 1}, "v_lrr: unknown hyper-parameter; did you mean v_lr"),
        ({"sed": 1}, "did you mean seed"),
        ({"method": "memit", "layers_attn": [0]}, "layers_attn: memit does not use it"),
        ({"layers": "4-8"}, r"layers_mlp '4-8' is no tuple of whole numbers from 0, as \[4, 5\]"),
        ({"layers": 4}, "layers_mlp 4 is no tuple of whole numbers"),
        ({"context_templates": "{}"}, "give a list of texts"),
        ({"layers": [1], "layers_attn": [1], "alpha": 0.3, "alpha_facts": RECORD}, "alpha_facts are traced for alpha"),
    ],
)
def test_options_of_an_edit_that_have_no_place_are_one_line(given, says):
    with pytest.raises(KtError, match=says):
        kt.edit(tiny_model("gpt2"), RECORD, **given)


def test_options_of_an_evaluation_that_have_no_place_are_one_line():
    for given in ({"max_new_tokens": 3}, {"heldout": "demo"}, {"protocols": "tf,gne"}):
        with pytest.raises(BadFact, match=r"add wild|add ppl|'gne' is unknown"):
            kt.evaluate(tiny_model("gpt2"), RECORD, **given)
    with pytest.raises(KtError, match="layers is '1'; give a list of whole numbers"):
        kt.contrast_probe(tiny_model("gpt2"), RECORD, layers="1")


def test_copies_of_a_fact_are_counted_once_and_said():
    model, spaced = tiny_model("gpt2"), dataclasses.replace(FACT, answer=" French ", id="spaced")
    other = dataclasses.replace(FACT, target="Rome", foil="Rome", id="other")
    given = [FACT, FACT, spaced, FACT, other]
    counts = {
        1: lambda: kt.causal_trace(model, given, keep="all", samples=1).n_facts,
        2: lambda: len(kt.evaluate(model, given, generate=False).records),
    }
    for what, count in counts.items():
        with pytest.warns(UserWarning, match=r"[34] of 5 facts are copies of others"):
            assert count() == what  # to a trace another target is no other fact
    hop = dataclasses.replace(FACT, hops=(Prompt("Its language is", "Italian"),))
    with pytest.warns(UserWarning, match="1 of 3 facts are copies of others"):  # the third asks something else
        assert len(kt.evaluate(model, [hop, dataclasses.replace(hop, id="b"), FACT], generate=False).records) == 2
    with pytest.warns(UserWarning, match="1 of 2 facts are copies of others"):  # and a trace asks the same
        assert kt.causal_trace(model, [hop, FACT], keep="all", samples=1).n_facts == 1
    scores = kt.evaluate(model, [FACT, other], generate=False)
    assert scores.of_edited(given, [other]).edited == (scores.records[1],)
