"""What objects print: a line that a person can read, whatever they hold."""

import re
import warnings
from html import unescape

import numpy as np
import pytest
import torch

import kt


@pytest.fixture(scope="module")
def made():
    torch.set_num_threads(1)
    model, facts = kt.load("demo"), kt.load_facts("demo")[:3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = kt.causal_trace(model, facts, kinds=("mlp",), samples=2)
        edit = kt.edit(model, facts, "memit", layers=(2,), v_num_grad_steps=2, max_tokens=2_000)
    return model, facts, trace, edit


def test_objects_print_one_short_line(made):
    model, facts, trace, edit = made
    stages = kt.contrast_probe(model, facts).stages
    shown = [model, trace, trace.facts[0], edit, *edit.updates.values(), edit.report[0], edit.verdict, *facts]
    shown += [facts[0].neighbours[0], stages() if callable(stages) else stages]
    for each in shown:
        assert "\n" not in repr(each)
        assert len(repr(each)) < 500, repr(each)


def test_a_fact_shows_what_is_asked_and_answered_and_what_stands_beside_it(made):
    fact = kt.Fact("The capital of {} is", "France", "Paris", target="Rome", rephrasings=["{}'s capital is"])
    assert (
        repr(fact) == "Fact('The capital of France is', subject 'France', answer 'Paris', target 'Rome', 1 paraphrase)"
    )
    assert repr(kt.Prompt("The capital of Italy is", "Rome")) == "Prompt('The capital of Italy is', answer='Rome')"
    assert len(repr(made[1][:3] * 4)) < 3_000  # twelve facts: 14,000 with every field


def cells(html):
    return re.findall(r"<t[dh][^>]*>([^<]*)<", html)


def test_a_notebook_shows_facts_as_a_table_and_so_what_is_taken_of_them(made):
    facts = kt.load_facts("demo", limit=60)
    assert isinstance(facts, list) and facts == list(facts) and isinstance(facts[0], kt.Fact)
    shown = cells(facts[:3]._repr_html_())
    heads = ["prompt", "subject", "answer", "foil", "paraphrases", "neighbours"]
    assert shown[:6] == heads and len(shown) == 4 * 6
    assert shown[6:12] == cells(facts[0]._repr_html_())[6:] == [
        "The government of Afghanistan meets in", "Afghanistan", "Kabul", "Ouagadougou", "2", "5"
    ]  # fmt: skip
    assert "60 facts, the first 50" in facts._repr_html_() and facts._repr_html_().count("<tr>") == 51
    evil = kt.Fact("<b>{}</b>", "<i>x</i>", "y")._repr_html_()
    assert "<b>" not in evil and "&lt;i&gt;x" in evil


def test_a_notebook_shows_a_traced_fact_as_a_row_with_its_strongest_cell(made):
    fact = made[2].facts[0]
    heads, row = np.array(cells(fact._repr_html_())).reshape(2, -1).tolist()
    shown = dict(zip(heads, row, strict=True))
    effect = fact.effect("mlp", "prob")
    layer, token = np.argwhere(effect == effect.max())[0]
    assert shown["answer"] == fact.answer and shown["p(answer), clean"] == f"{fact.p_clean:.3f}"
    assert shown["largest effect on p, mlp"].startswith(f"{effect.max():.3f} at layer {layer}, ")
    assert fact.tokens[token].strip() in shown["largest effect on p, mlp"]


def test_a_notebook_shows_a_verdict_with_its_warnings(made):
    verdict = made[3].verdict
    shown = unescape(verdict._repr_html_())
    assert len(verdict.warnings) == 2 and shown.startswith(f"<p>{verdict.text}</p>")
    assert all(f"<p>warning: {line}</p>" in shown for line in verdict.warnings)


def test_dir_shows_the_public_names_and_loaded_rooms_alone():
    names = [name for name in dir(kt) if not name.startswith("_")]
    assert set(kt.__all__) <= {*names, "__version__"}
    assert not {"TYPE_CHECKING", "annotations", "attach"} & set(names)
