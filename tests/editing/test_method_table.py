"""The registry: what is listed without torch, and the tables of docs/methods.md."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from editing_help import CONTEXTS, REQUESTS, statistics

import kt
from kt.editing.config import FORMAT_1, REGISTERED, Config, method
from kt.editing.config import setting as default
from kt.editing.method_names import Method
from kt.editing.methods import METHODS
from kt.editing.methods.memit import MEMIT

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|of the wanted change)")

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_docs_are_what_the_command_prints():
    command = [sys.executable, str(ROOT / "tools" / "method_table.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    methods, *settings = printed.strip().split("\n\n")
    assert methods in page and "\n\n".join(settings) in page


def test_the_names_that_type_checkers_know_are_those_of_the_registry_in_its_order():
    assert get_args(Method) == tuple(METHODS)
    for function in (kt.edit, kt.EditSession.__init__, kt.run_edits, kt.find_layers):
        annotation = function.__annotations__["method"]
        assert "Method" in annotation and "str" not in annotation


def test_every_file_of_the_folder_is_one_method():
    files = {path.stem for path in (ROOT / "src" / "kt" / "editing" / "methods").glob("*.py")} - {"__init__"}
    assert {name.replace("-", "_") for name in METHODS} == files
    assert set(METHODS) == set(REGISTERED)
    assert all(config.__module__.endswith(f".{name.replace('-', '_')}") for name, config in METHODS.items())


def test_every_file_has_its_test():
    """The fine-tuning methods share theirs."""
    shared = {"ft-l", "ft-wd", "lora"}
    tests = {path.stem.removeprefix("test_") for path in (Path(__file__).parent / "methods").glob("test_*.py")}
    assert {name.replace("-", "_") for name in METHODS if name not in shared} <= tests


def test_methods_settings_and_presets_are_read_without_torch():
    check = (
        "import sys\nfrom kt.editing.methods import METHODS, all_settings\nfrom kt.presets import presets\n"
        "assert METHODS and all_settings() and presets()\n"
        "print([name for name in ('torch', 'numpy', 'scipy', 'transformers', 'nnsight') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "[]", found.stderr


def test_a_method_made_outside_of_kt_edits_by_its_configuration(setting):
    @method("mine", "a method of one's own")
    @dataclass(frozen=True)
    class Mine(MEMIT):
        mom2_update_weight: float = default(0.02, source="a sweep")

    try:
        model, corpus, cache = setting
        moments = statistics(model, corpus, cache)
        shared = {"statistics": moments, "context_templates": CONTEXTS}
        edit = kt.edit(model, REQUESTS, Mine(layers_mlp=(1,)), **shared)
        other = kt.edit(model, REQUESTS, MEMIT(layers_mlp=(1,), mom2_update_weight=0.02), **shared)
        named = kt.edit(model, REQUESTS, "mine", layers=(1,), **shared)
        assert all(torch.equal(edit.delta(name), named.delta(name)) for name in named.names)
        assert edit.manifest["method"] == "mine" and Mine.own_defaults() == {"mom2_update_weight": 0.02}
        assert all(torch.equal(edit.delta(name), other.delta(name)) for name in other.names)
    finally:
        REGISTERED.pop("mine")


def test_a_method_without_a_plan_is_told_to_have_one(setting):
    @method("planless", "a method that has no plan yet")
    @dataclass(frozen=True)
    class Planless(Config):
        pass

    try:
        with pytest.raises(kt.KtError, match=r"Planless has no plan of its edit; .*docs/add-a-method.md"):
            kt.edit(setting[0], REQUESTS, "planless")
    finally:
        REGISTERED.pop("planless")


def test_every_file_lists_the_same_settings_and_those_of_other_methods_as_they_were_given():
    config = METHODS["memit"].of({"layers_mlp": [1], "layers_high": [3, 2], "lr": 0.1})
    listed = config.as_dict()
    assert list(listed) == list(FORMAT_1) and config == METHODS["memit"](layers_mlp=(1,))
    assert (listed["layers_high"], listed["lr"], listed["alpha"], listed["lora_alpha"]) == ((2, 3), 0.1, 0.0, 32.0)
    for name in FORMAT_1:
        assert any(name in each.settings() for each in METHODS.values()), "a setting that no method has"
