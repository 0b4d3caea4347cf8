"""Intervals over documents, without lm-eval; and what a missing lm-eval says."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest

from kt.capability.compare import difference, interval, values_of
from kt.capability.tasks import choose
from kt.errors import KtError

VALUES = {("t", i): v for i, v in enumerate([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])}


def weighted(pairs):
    return math.exp(-sum(a for a, _ in pairs) / sum(b for _, b in pairs))


PAIRS = {("t", i): (-float(i + 1), 3) for i in range(8)}


def test_samples_are_found_by_task_filter_and_metric():
    samples = {"t": [{"doc_id": 0, "filter": "a", "acc": 1.0}, {"doc_id": 0, "filter": "b", "acc": 0.0}], "u": []}
    assert values_of(samples, ["t", "u", "none"], "acc,b") == {("t", 0): 0.0}
    assert values_of(samples, ["t"], "f1,b") == {}


def test_a_mean_keeps_the_figure_and_gets_an_interval():
    found = interval(4 / 6, VALUES, None, seed=0)
    assert found.mean == 4 / 6 and found.n == 6 and found.low < found.mean < found.high


@pytest.mark.parametrize("values", [{}, VALUES])
def test_a_figure_that_the_documents_do_not_give_has_no_interval(values):
    assert interval(0.9, values, None, seed=0).ci95 is None
    assert difference((0.9, 4 / 6), VALUES, VALUES, None, seed=0).ci95 is None


def test_equal_runs_differ_by_nothing_under_any_aggregation():
    shown = weighted(list(PAIRS.values()))
    assert difference((shown, shown), PAIRS, dict(PAIRS), weighted, seed=0)[:3] == (0.0, 0.0, 0.0)
    assert difference((4 / 6, 4 / 6), VALUES, dict(VALUES), None, seed=0)[:3] == (0.0, 0.0, 0.0)


def test_pairing_narrows_the_interval():
    worse = {key: (value - 0.3, n) for key, (value, n) in PAIRS.items()}
    old, new = weighted(list(PAIRS.values())), weighted(list(worse.values()))
    paired = difference((old, new), PAIRS, worse, weighted, seed=0)
    alone = interval(old, PAIRS, weighted, seed=0)
    assert paired.low > 0 and paired.high - paired.low < (alone.high - alone.low) / 2


def test_runs_over_other_documents_are_not_compared():
    fewer = dict(list(VALUES.items())[:5])
    assert difference((4 / 6, 0.6), VALUES, fewer, None, seed=0).ci95 is None


def test_a_resample_without_a_value_gives_no_interval():
    values = {("t", 0): (0.0, 0), ("t", 1): (1.0, 1)}

    def ratio(pairs):
        total = sum(b for _, b in pairs)
        return sum(a for a, _ in pairs) / total if total else math.nan

    assert interval(1.0, values, ratio, seed=0).ci95 is None


def test_one_document_has_no_interval():
    assert interval(1.0, {("t", 0): 1.0}, None, seed=0).ci95 is None
    assert interval(2.0, {("t", 0): (-np.log(2.0), 1)}, weighted, seed=0).ci95 is None


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'lm_eval'")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(KtError, match=r"pip install 'kt-interp\[lm-eval\]'") as caught:
        choose("gsm8k")
    assert "\n" not in str(caught.value)
