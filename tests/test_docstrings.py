"""The public names say what they take and give, and their examples run."""

import doctest
import inspect
import re

import pytest

import kt

PUBLIC = {name: getattr(kt, name) for name in kt.__all__}


def methods(public_class):
    """(name, function) of the public methods and properties that a class itself defines."""
    for name in vars(public_class):
        raw = inspect.getattr_static(public_class, name)
        function = getattr(raw, "__func__", raw.fget if isinstance(raw, property) else raw)
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


def unnamed(function):
    """The arguments that a function's docstring does not name."""
    text = inspect.getdoc(function)
    assert text, function
    own = set(inspect.signature(function).parameters) - {"self", "cls", "progress", "stage"}
    return {argument for argument in own if not re.search(rf"\b{argument}\b", text)}


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if not inspect.isclass(thing)])
def test_a_public_function_names_its_arguments_and_what_it_returns(name):
    assert unnamed(PUBLIC[name]) == set()
    assert {"Args:", "Returns:"} <= set(inspect.getdoc(PUBLIC[name]).split())


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_the_methods_of_a_public_class_name_their_arguments(name):
    missing = {method: unnamed(function) - {"model"} for method, function in methods(PUBLIC[name])}
    assert {method: arguments for method, arguments in missing.items() if arguments} == {}


@pytest.fixture(scope="module")
def names():
    """What the reference says that its examples stand on (tools/site/hooks.py)."""
    model, facts = kt.load("demo"), kt.load_facts("demo", limit=4)
    edit = kt.edit(model, facts[:2], method="memit", max_tokens=2_000, v_num_grad_steps=5)
    return {"kt": kt, "model": model, "facts": facts, "edit": edit}


FINDER = doctest.DocTestFinder(recurse=False)
EXAMPLES = [example for name, thing in PUBLIC.items() for example in FINDER.find(thing, name) if example.examples]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_gives_what_it_says(example, names):
    example.globs = dict(names)
    said = []
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)


def test_the_examples_are_found():
    assert len(EXAMPLES) >= 15
