"""A journal gives back to the bit what a phase gave, and refuses what was asked otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kt.errors import BadFile, KtError
from kt.journal import Journal


def value() -> dict:
    return {
        "tensor": torch.tensor([1.5, -0.0, 3e-45]),
        "half": torch.tensor([1.0, 2.5], dtype=torch.bfloat16),
        "array": np.array([[1.0, np.nan]], dtype=np.float64),
        "number": 0.1 + 0.2,
        "infinite": math.inf,
        "nothing": None,
        "list": [1, True, "text", (2.0, {"deep": torch.tensor(7)})],
    }


def same(one, two) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(
            one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8)
        )
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and one.tobytes() == two.tobytes()
    return type(one) is type(two) and one == two


def test_a_phase_comes_back_to_the_bit_and_is_not_computed_again(tmp_path):
    first = Journal.begin(tmp_path / "run", {"seed": 0}, resume=False)
    assert same(first.take("phase", value), value())

    def never() -> dict:
        raise AssertionError("computed again")

    first.release()
    again = Journal.begin(tmp_path / "run", {"seed": 0}, resume=True)
    assert same(again.take("phase", never), value())
    assert again.done == 1


def test_a_journal_nowhere_computes_and_keeps_nothing(tmp_path):
    calls = []
    journal = Journal()
    for _ in range(2):
        journal.take("phase", calls.append, 1)
    assert calls == [1, 1] and journal.done == 0


def test_parts_and_odd_names_do_not_mix(tmp_path):
    journal = Journal.begin(tmp_path / "run", {}, resume=False)
    names = ["a/b", "a-b", "../../a-b", "x" * 300, "x" * 301, "ä"]
    for number, name in enumerate(names):
        assert journal.take(name, int, number) == number
        assert journal.within("part").take(name, int, number + 100) == number + 100
    assert [journal.take(name, int, -1) for name in names] == list(range(len(names)))
    assert journal.done == 2 * len(names)
    assert all(p.parent == tmp_path / "run" / "phases" for p in tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "resume", "words"),
    [
        ({"seed": 1}, True, "begun with seed 0, now it is 1"),
        ({"seed": 0}, False, "holds a run already.*--resume"),
    ],
)
def test_another_question_or_a_second_beginning_is_refused(tmp_path, settings, resume, words):
    Journal.begin(tmp_path / "run", {"seed": 0}, resume=False)
    with pytest.raises(KtError, match=words):
        Journal.begin(tmp_path / "run", settings, resume)


def test_nothing_to_go_on_with_is_refused(tmp_path):
    with pytest.raises(KtError, match="no run to go on with"):
        Journal.begin(tmp_path / "run", {}, resume=True)
    assert not (tmp_path / "run").exists()


def test_a_broken_phase_is_one_line_that_names_the_file(tmp_path):
    journal = Journal.begin(tmp_path / "run", {}, resume=False)
    journal.take("phase", value)
    (path,) = (tmp_path / "run" / "phases").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadFile, match=r"phase\.safetensors.*delete it"):
        journal.take("phase", value)


def test_a_result_that_no_file_can_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="object"):
        Journal.begin(tmp_path / "run", {}, resume=False).take("phase", object)


def test_two_processes_do_not_share_a_journal_and_a_dead_one_lets_go(tmp_path):
    first = Journal.begin(tmp_path / "run", {}, resume=False)
    with pytest.raises(KtError, match="another process"):
        Journal.begin(tmp_path / "run", {}, resume=True)
    first.release()
    Journal.begin(tmp_path / "run", {}, resume=True)


def test_what_a_killed_writer_left_is_taken_away(tmp_path):
    first = Journal.begin(tmp_path / "run", {}, resume=False)
    first.take("phase", value)
    first.release()
    left = tmp_path / "run" / "phases" / ".phase.safetensors.tmp-0a1b2c3d"
    left.write_bytes(b"half")
    Journal.begin(tmp_path / "run", {}, resume=True)
    assert not left.exists() and (tmp_path / "run" / "phases" / "phase.safetensors").exists()
