"""What several processes share gives what one gives: to the byte where they share out parts, sums to rounding."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from ranks_help import together
from safetensors.torch import load_file
from shared_work import work

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same work by one process, and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    program = f"import runpy, sys; sys.path.insert(0, {str(HERE)!r}); sys.argv = ['', {str(two)!r}]"
    found = together(f"{program}; runpy.run_module('shared_work', run_name='__main__')", timeout=150)
    assert [code for code, _, _ in found] == [0, 0], [err[-2000:] for _, _, err in found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = work(one / "of-0", one)
    assert [json.loads(out.splitlines()[-1]) for _, out, _ in found] == [said, said]
    return one, two


@pytest.mark.parametrize("name", ["trace.safetensors", "estimate.safetensors", "probe.safetensors", "scores.json"])
def test_parts_by_two_processes_are_those_by_one_to_the_byte_and_both_have_all(name, folders):
    one, two = folders
    whole = (one / "of-0" / name).read_bytes()
    assert len(whole) > 1000
    assert [(two / f"of-{rank}" / name).read_bytes() == whole for rank in (0, 1)] == [True, True]


def test_phases_are_kept_once_and_by_the_same_names(folders):
    one, two = ({p.name for p in (folder / "journal" / "phases").glob("*.safetensors")} for folder in folders)
    assert one == two
    assert sum(name.startswith("trace-group") for name in one) > 2


def test_second_moments_by_two_processes_are_those_by_one_to_rounding(folders):
    one, two = (sorted((folder / "cache").glob("cov-*.safetensors")) for folder in folders)
    assert [file.name for file in one] == [file.name for file in two]
    assert len(one) == 2
    for mine, theirs in zip(one, two, strict=True):
        ((name, moment),) = load_file(mine).items()
        torch.testing.assert_close(load_file(theirs)[name], moment, rtol=1e-5, atol=1e-7)


def test_an_edit_by_two_processes_is_that_by_one_to_rounding_and_both_have_it(folders):
    one, two = folders
    first, second = (load_file(two / f"of-{rank}" / "edit.safetensors") for rank in (0, 1))
    whole = load_file(one / "of-0" / "edit.safetensors")
    assert whole.keys() == first.keys() == second.keys()
    for name, value in whole.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(first[name], second[name])
