"""What objects print: a line that a person can read, whatever they hold."""

import warnings

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


def test_dir_shows_the_public_names_and_loaded_rooms_alone():
    names = [name for name in dir(kt) if not name.startswith("_")]
    assert set(kt.__all__) <= {*names, "__version__"}
    assert not {"TYPE_CHECKING", "annotations", "attach"} & set(names)
