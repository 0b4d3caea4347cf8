"""What a public function is given that is of another kind: one line that names it, before any work."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny_model

import kt
import kt.export
from kt._util.kinds import annotated_kinds, takes

FACT = kt.Fact("The capital of {} is", "France", "Paris", target="Rome")
OF_A_MODEL = {
    "causal_trace": lambda model: kt.causal_trace(model, [FACT]),
    "screen": lambda model: kt.screen(model, [FACT]),
    "knowledge_neurons": lambda model: kt.knowledge_neurons(model, [FACT]),
    "contrast_probe": lambda model: kt.contrast_probe(model, [FACT]),
    "key_statistics": lambda model: kt.key_statistics(model, [kt.Site("mlp", 0)]),
    "edit": lambda model: kt.edit(model, [FACT]),
    "EditSession": lambda model: kt.EditSession(model),
    "train_editor": lambda model: kt.train_editor(model, [FACT]),
    "residual_fact": lambda model: kt.residual_fact(model, edit(), [FACT]),
    "run_edits": lambda model: kt.run_edits(model, [FACT]),
    "find_layers": lambda model: kt.find_layers(model),
    "evaluate": lambda model: kt.evaluate(model, [FACT]),
    "abilities": lambda model: kt.abilities(model, "gsm8k"),
    "case_study": lambda model: kt.case_study(model, [FACT], {"a": edit()}),
    "Edit.apply_": lambda model: edit().apply_(model),
    "Edit.revert_": lambda model: edit().revert_(model),
    "Edit.state_of": lambda model: edit().state_of(model),
    "Edit.applied": lambda model: edit().applied(model),
    "EditStack.apply_": lambda model: kt.EditStack([edit()]).apply_(model),
    "to_hf": lambda model: kt.export.to_hf(model, edit(), "out"),
    "to_peft": lambda model: kt.export.to_peft(model, edit(), "out"),
    "EditStack.applied": lambda model: kt.EditStack([edit()]).applied(model),
}
OF_A_FILE = (kt.Trace, kt.Balance, kt.Probe, kt.Edit, kt.EditStack, kt.Editor, kt.Residual, kt.Scores, kt.Sweep)
OF_A_FILE += (kt.Abilities, kt.CaseStudy)


def edit():
    return kt.Edit({}, {"method": "by hand"})


def refused(call, words):
    with pytest.raises(kt.KtError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", OF_A_MODEL)
@pytest.mark.parametrize("given", ["demo", 3])
def test_what_is_no_model_is_refused_by_name(name, given):
    refused(lambda: OF_A_MODEL[name](given), f"model is {given!r}; give the model that kt.load returns")


@pytest.mark.parametrize("kind", OF_A_FILE, ids=lambda kind: kind.__name__)
def test_a_result_is_loaded_from_a_files_name_alone(kind):
    refused(lambda: kind.load(3), "file is 3; give a file's name")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"template": 3}, "template is 3; give a text"),
        ({"subject": 3}, "subject is 3; give a text"),
        ({"target": 3}, "target is 3; give a text, or None"),
        ({"answer": ["Paris"]}, r"answer is \['Paris'\]; give a text"),
        ({"neighbours": 3}, "neighbours of a Fact is 3; give a list of prompts"),
        ({"neighbours": ("x",)}, "neighbours of a Fact is .*; give a list of prompts"),
        ({"rephrasings": (3,)}, "rephrasings of a Fact is .*; give a list of texts"),
    ],
)
def test_a_fact_is_made_of_texts(values, words):
    refused(lambda: kt.Fact(**({"template": "The capital of {} is", "subject": "France"} | values)), words)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kt.Prompt(3), "prompt is 3; give a text"),
        (lambda: kt.Site(3, 1), "kind is 3; give attn"),
        (lambda: kt.Site("mlp", "x"), "layer is 'x'; give a whole number"),
        (lambda: kt.Chat(system=3), "system is 3; give a text"),
        (lambda: kt.Chat(thinking="on"), "thinking is 'on'; give True"),
        (lambda: kt.load(3), "model is 3; give demo"),
        (lambda: kt.load("demo", device=1.5), "device is 1.5; give auto, cpu"),
        (lambda: kt.load("demo", device_map=3), "device_map is 3; give a file's name"),
        (lambda: kt.EditStack(["x"]), "edits holds 'x'; give a list of edits"),
        (lambda: kt.EditStack(edit()), "edits is an object of type Edit; give a list of edits"),
        (lambda: kt.export.revert_folder(edit()), "folder is an object of type Edit; give a file's name"),
        (lambda: kt.export.revert_folder("out", 3), "edit is 3; give an edit"),
        (lambda: kt.export.revert_folder("out", base=3), "base is 3; give the model that kt.load returns, its name"),
        (lambda: kt.export.push(edit(), "me/edit"), "folder is an object of type Edit; give a file's name"),
        (lambda: kt.export.push("out", Path("me/edit")), "repo is an object of type PosixPath; give a text"),
        (lambda: kt.export.to_edit("edit.safetensors", "out"), "edit is 'edit.safetensors'; give an edit"),
        (
            lambda: kt.export.write_card("out", "edit.safetensors", "me/edit"),
            "edit is 'edit.safetensors'; give an edit",
        ),
        (lambda: kt.export.carries("out", "edit.safetensors"), "edit is 'edit.safetensors'; give an edit"),
    ],
)
def test_what_needs_no_model_says_what_to_give(call, words):
    refused(call, words)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: kt.edit(model, [FACT], preset=3), "preset is 3; give its name, or a TOML file"),
        (lambda model: kt.EditSession(model, preset=["x"]), r"preset is \['x'\]"),
        (lambda model: kt.edit(model, [FACT], preset=Path("none.toml")), "none.toml"),
        (lambda model: kt.causal_trace(model, [FACT], samples="x"), "samples is 'x'; give a whole number"),
        (lambda model: kt.causal_trace(model, [FACT], window=1.5), "window is 1.5; give a whole number"),
        (lambda model: kt.causal_trace(model, [FACT], kinds=3), "kinds is 3; give a list of names"),
        (lambda model: kt.key_statistics(model, 3), "sites is 3; give a list of Sites"),
        (lambda model: kt.train_editor(model, [FACT], modules=3), "modules is 3; give a text"),
        (lambda model: kt.residual_fact(model, 3, [FACT]), "edit is 3; give an edit or a stack"),
        (lambda model: kt.run_edits(model, [FACT], "sequential", "x"), "step_size is 'x'; give a whole number"),
        (lambda model: kt.find_layers(model, n_trace="x"), "n_trace is 'x'; give a whole number"),
        (lambda model: kt.evaluate(model, [FACT], before=3), "before is 3; give Scores"),
        (lambda model: kt.export.to_hf(edit(), model, "out"), "model is an object of type Edit; give the model that"),
        (
            lambda model: kt.export.to_hf(model.module, edit(), "out"),
            "model is an object of type Llama",
        ),
        (lambda model: kt.export.to_hf(model, "edit.safetensors", "out"), "edit is 'edit.safetensors'; give an edit"),
        (lambda model: kt.export.to_peft(model, "out", edit()), "edit is 'out'; give an edit"),
        (
            lambda model: kt.export.to_peft(model, edit(), "out", dtype="float32"),
            "dtype is 'float32'; give a torch.dtype",
        ),
        (lambda model: kt.case_study(model, [FACT], 3), "edits is 3; give edits by"),
        (lambda model: kt.case_study(model, [FACT], {"a": 3}), "a is 3; give an edit or a stack"),
    ],
)
def test_other_arguments_of_another_kind_are_refused_by_name(call, words):
    refused(lambda: call(tiny_model("llama")), words)


def test_a_device_is_a_name_a_number_or_torchs_own():

    assert [kt.load("demo", device=device).device.type for device in ("cpu", torch.device("cpu"))] == ["cpu", "cpu"]
    refused(lambda: kt.load("demo", device=["cpu"]), "device is \\['cpu'\\]; give auto, cpu")


def test_every_public_function_of_export_checks_what_it_is_given():
    functions = [each for name in kt.export.__all__ if inspect.isfunction(each := getattr(kt.export, name))]
    assert len(functions) == 7 and all(hasattr(each, "__wrapped__") for each in functions)


FUNCTIONS = [name for name in kt.__all__ if inspect.isfunction(getattr(kt, name))]
BY_FUNCTION = [(name, argument) for name in FUNCTIONS for argument in annotated_kinds(getattr(kt, name))]


OF_FACTS = {"facts", "fact", "requests", "source", "pool", "edited", "exclude"}
BY_THEIR_OWN_RULES = {"tokenizer", "method", "edit", "batch_size", "judge"}
HANDED_ON = {"options", "settings", "session", "solving"}


def test_what_no_annotation_checks_is_facts_what_has_rules_of_its_own_and_what_is_handed_on():
    taken = {name: set(inspect.signature(getattr(kt, name)).parameters) for name in FUNCTIONS}
    unchecked = {each for name in FUNCTIONS for each in taken[name] - set(annotated_kinds(getattr(kt, name)))}
    assert unchecked <= OF_FACTS | BY_THEIR_OWN_RULES | HANDED_ON


@pytest.mark.parametrize(
    "call",
    [
        lambda model, odd: kt.load(tiny_model("llama").module, tokenizer=odd),
        lambda model, odd: kt.edit(model, [FACT], method=odd),
        lambda model, odd: kt.residual_fact(model, odd, [FACT]),
        lambda model, odd: kt.abilities(model, "gsm8k", edit=odd),
        lambda model, odd: kt.evaluate(model, [FACT], batch_size=odd),
        lambda model, odd: kt.evaluate(model, odd),
        lambda model, odd: kt.evaluate(model, [FACT], edited=odd),
        lambda model, odd: kt.load_facts(odd),
    ],
)
def test_those_refuse_an_object_of_no_kind_too(call):
    with pytest.raises(kt.KtError, match="object"):
        call(tiny_model("llama"), object())


@pytest.mark.parametrize(("name", "argument"), BY_FUNCTION)
def test_an_object_of_no_kind_is_refused_for_every_argument_by_its_name(name, argument):
    """Before anything else is looked at: the other arguments may be missing."""
    function = getattr(kt, name)
    refused(lambda: function(**{argument: object()}), f"{argument} is an object of type object; give ")


@takes()
def asked(
    layers: "Sequence[int] | None" = None,
    flag: "bool" = False,
    share: "float" = 0.5,
    file: "str | Path" = "x",
    anything: "Nowhere | int" = 0,  # noqa: F821
):
    return layers, flag, share, file, anything


@pytest.mark.parametrize(
    "given",
    [
        {"layers": range(3)},
        {"layers": np.arange(3)},
        {"layers": (np.int64(1),)},
        {"layers": []},
        {"flag": np.True_},
        {"share": 1},
        {"share": np.float32(0.5)},
        {"file": Path("x")},
        {"anything": object()},  # an annotation that names what nobody knows is not checked
    ],
)
def test_numbers_and_lists_of_numpy_are_taken(given):
    assert asked(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": "1,2"}, "layers is '1,2'; give a list of whole numbers, or None"),
        ({"layers": [1, "2"]}, "layers holds '2'; give a list of whole numbers, or None"),
        ({"layers": [True]}, "layers holds True"),
        ({"flag": "yes"}, "flag is 'yes'; give True or False"),
        ({"share": True}, "share is True; give a number"),
        ({"share": "0.5"}, "share is '0.5'; give a number"),
        ({"file": 3}, "file is 3; give a file's name"),
    ],
)
def test_an_annotation_says_what_is_taken(given, words):
    refused(lambda: asked(**given), words)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: kt.find_layers(model, max_token=5), "find_layers takes no max_token; did you mean max_tokens"),
        (lambda model: kt.screen(model, [FACT], sample=2), "screen takes no sample; did you mean samples"),
        (lambda model: kt.abilities(model, "gsm8k", apply_template=True), "abilities takes no apply_template"),
        (lambda model: kt.run_recipe("none", lambda name: model), "no recipe 'none'; there are"),
    ],
)
def test_options_that_are_handed_on_are_known_before_any_work(call, words):
    with pytest.raises(kt.KtError, match=words):
        call(tiny_model("llama"))


def test_a_bootstrap_needs_a_draw_and_a_seed():
    facts = [FACT, kt.Fact("The capital of {} is", "Italy", "Rome")]
    trace = kt.causal_trace(tiny_model("llama"), facts, samples=1, keep="all")
    for given in ({"n_boot": 0}, {"n_boot": -1}):
        refused(lambda given=given: trace.by_role("mlp", **given), "give at least one draw, and a seed of at least 0")
    refused(lambda: trace.by_role("mlp", seed=-1), "seed -1 is below 0; give a whole number from 0")
