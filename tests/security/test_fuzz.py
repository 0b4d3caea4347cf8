"""Every loader on broken files: what is not loaded is refused in one line (more: benchmarks/reliability/fuzz.py)."""

from __future__ import annotations

import json

import mutations
import pytest
from fuzzing import Loader, count, outcome
from loaders import NAMES, all_loaders
from whole_files import make_runs

from kt.errors import BadFile

EXAMPLES = 40


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    runs = make_runs(tmp_path_factory.mktemp("runs"))
    return {loader.name: loader for loader in all_loaders(runs)}


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_file_is_refused_in_one_line(every, tmp_path, name):
    assert count(every[name], EXAMPLES, tmp_path / "fuzzed").failures == ()


def test_no_loader_is_left_out(every):
    assert set(every) == set(NAMES)


def test_whole_files_are_loaded(every, tmp_path):
    """Else every example would be refused for a reason of its own, and nothing would be tested."""
    for loader in every.values():
        for name, content in loader.seeds.items():
            assert outcome(loader, name, content, tmp_path / "whole") == "loaded", (loader.name, name)


def reader(load):
    return Loader("own", {"a.json": b'{"a": [1, 2]}'}, mutations.json_files, load)


def test_the_property_sees_what_a_loader_lets_through(tmp_path):
    found = count(reader(lambda path: json.loads(path.read_text())["a"][1]), 60, tmp_path / "x")
    assert found.failed and any("KeyError" in failure for failure in found.failures)
    assert found.loaded + found.refused + found.failed == 60


def test_the_property_sees_errors_of_several_lines_and_floods_of_warnings(tmp_path):
    def says(path):
        raise BadFile("one\ntwo")

    def floods(path):
        import warnings

        for _ in range(30):
            warnings.warn("again", stacklevel=1)

    assert "no single line" in count(reader(says), 5, tmp_path / "x").failures[0]
    assert "30 warnings" in count(reader(floods), 5, tmp_path / "x").failures[0]
