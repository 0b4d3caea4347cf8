"""Bars of progress in a notebook: where there is one, and only there."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

import kt
from kt._util import notebook_bar
from kt._util.notebook_bar import stage_or_bars, with_bar


@pytest.fixture
def drawn(monkeypatch):
    """What a notebook's kernel is told to show; the clock is fast."""
    shown = []

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))

    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(notebook_bar, "AFTER", 0.0)
    monkeypatch.setattr(notebook_bar, "EVERY", 0.0)
    return shown


@with_bar("outer work")
def outer(progress=None):
    for done in range(3):
        inner()
        if progress is not None:
            progress(done + 1, 3)
    return "result"


@with_bar("inner work")
def inner(progress=None):
    if progress is not None:
        progress(1, 1)


def test_work_shows_one_bar_with_what_is_left_and_ends_with_its_time(drawn):
    assert outer() == "result"
    assert [line.partition(",")[0] for line in drawn[:3]] == [f"outer work: {n} of 3" for n in (1, 2, 3)]
    assert "left" in drawn[0] and drawn[3].startswith("outer work: 3 of 3 in ") and len(drawn) == 4
    inner()
    assert drawn[4].startswith("inner work: 1 of 1")


def test_a_callback_of_ones_own_is_called_and_no_bar_is_shown(drawn):
    told = []
    outer(progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)] and drawn == []


def test_in_marimo_the_bar_is_the_output_of_the_cell_that_runs(drawn, monkeypatch):
    marimo, shown = ModuleType("marimo"), []
    marimo.running_in_notebook, marimo.Html = lambda: True, str
    marimo.output = SimpleNamespace(replace=shown.append)
    monkeypatch.setitem(sys.modules, "marimo", marimo)
    outer()
    assert shown[0].startswith("<progress") and "outer work: 3 of 3 in" in shown[-1] and drawn == []


@pytest.mark.parametrize("where", ["script", "terminal", "off"])
def test_there_is_no_bar_elsewhere(drawn, monkeypatch, where):
    if where == "script":
        monkeypatch.delitem(sys.modules, "IPython")
    elif where == "terminal":
        sys.modules["IPython"].get_ipython = lambda: SimpleNamespace()
    else:
        monkeypatch.setenv("KT_NO_PROGRESS", "1")
    outer()
    with stage_or_bars(None)("a stage") as tick:
        assert tick is None
    assert drawn == []


def test_a_trace_has_a_bar_with_its_facts(drawn):
    model, fact = kt.load("demo"), {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
    kt.causal_trace(model, fact, samples=2, tokens="subject_last")
    kt.contrast_probe(model, fact)
    assert drawn[0].startswith("tracing: 1 of 1") and any(line.startswith("probing: 1 of 1 in") for line in drawn)
