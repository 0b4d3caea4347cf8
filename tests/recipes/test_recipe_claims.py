"""Claims of papers about their figures: each check holds of curves that show it, and fails of curves that do not."""

import numpy as np
import pytest
import torch

import kt
from kt.experiments.case_study import CaseStudy, Question, Reply
from kt.recipes.case import check as check_case
from kt.recipes.claims import NOTHING, Claim, Finding, Verdict, layers_of, peak_layer, peak_words
from kt.recipes.probe_checks import check as check_probe
from kt.recipes.trace_checks import _ROLES
from kt.recipes.trace_checks import check as check_trace
from kt.stats import Interval

CLAIM = Claim("says", "1", "peak", {})


@pytest.fixture(scope="module")
def demo():
    torch.set_num_threads(1)
    return kt.load("demo")


def verdict(finding, smoke=False):
    return Verdict("m", CLAIM, finding, smoke)


def test_a_claim_holds_inside_its_range_alone_and_is_sure_with_its_whole_interval():
    inside, across = Interval(0.2, 0.1, 0.3, 9), Interval(0.2, -0.1, 0.3, 9)
    assert [verdict(Finding("r", each, 0.0)).holds for each in (inside, across)] == [True, True]
    assert [verdict(Finding("r", each, 0.0)).sure for each in (inside, across)] == [True, False]
    outside = verdict(Finding("r", across, high=0.1))
    assert outside.holds is False and outside.sure is False and "no (interval reaches across)" in outside.line()
    assert verdict(Finding("r", inside, 0.4)).sure is True and verdict(Finding("r", inside, 0.4)).holds is False
    assert verdict(Finding("r", Interval(0.0, 0.0, 0.0, 9), 0.0)).holds is False, "no change is no rise"
    assert verdict(Finding("r", inside, 0.0), smoke=True).holds is None
    assert verdict(Finding("r", NOTHING, reason="none")).holds is None
    failed = verdict(Finding("r", across, reason="none", fails=True))
    assert failed.holds is False and failed.sure is None and failed.line()[-1] == "no"


def test_layers_are_counted_from_one_or_from_either():
    assert layers_of({"layers": [1, 5]}, 28)[:2] == (0, 5)
    assert layers_of({"layers": [1, 5], "either_count": True}, 28)[:2] == (0, 6)
    assert [layers_of({"part": part}, 28)[:2] for part in ("low", "middle", "high")] == [(0, 9), (9, 19), (19, 28)]


def test_the_peak_layer_has_an_interval_over_facts():
    rng = np.random.default_rng(0)
    clear = np.zeros((20, 6)) + np.eye(6)[4] + 0.01 * rng.normal(size=(20, 6))
    assert peak_layer(clear) == Interval(4.0, 4.0, 4.0, 20)
    assert peak_words(peak_layer(clear)) == "layer 4 [4, 4] (from 1: 5)"
    found = peak_layer(rng.normal(size=(20, 6)))
    assert found.low < found.high, "noise has no one peak"


class Traced:
    """A trace of 16 facts whose mean effect by layer at the last subject token is given; at other tokens it is 0.1."""

    n_layers = 12

    def __init__(self, **curves):
        self.curves = curves

    def checked(self, kind, metric):
        return kind


@pytest.fixture
def effects(monkeypatch):
    def given(trace, kind, metric):
        jitter = 0.01 * np.random.default_rng(1).normal(size=(16, len(_ROLES), trace.n_layers))
        found = 0.1 + jitter
        found[:, _ROLES.index("subject_last")] = trace.curves[kind] + jitter[:, 0]
        return found

    monkeypatch.setattr("kt.tracing.means.role_effects", given)


def bump(layer, width=1.5):
    return np.exp(-(((np.arange(12) - layer) / width) ** 2))


FLAT = np.zeros(12)


@pytest.mark.parametrize(
    ("name", "about", "true", "false"),
    [
        ("peak", {"kind": "attn", "layers": [1, 5]}, {"attn": bump(3)}, {"attn": bump(6)}),
        ("peak", {"kind": "attn", "part": "middle"}, {"attn": bump(6)}, {"attn": bump(2)}),
        ("falls", {"kind": "attn", "after": 5}, {"attn": bump(2)}, {"attn": bump(8, 6)}),
        ("above", {"kind": "mlp", "than": "attn"}, {"mlp": bump(6), "attn": FLAT}, {"mlp": FLAT, "attn": bump(6)}),
        ("role", {"kind": "mlp", "roles": ["subject_last"]}, {"mlp": bump(6)}, {"mlp": FLAT}),
    ],
)
def test_a_claim_about_a_trace_holds_of_one_that_shows_it_and_fails_of_another(effects, name, about, true, false):
    right, wrong = (verdict(check_trace(Traced(**curves), name, about)) for curves in (true, false))
    assert right.holds is True and right.sure is True
    assert wrong.holds is False and wrong.sure is True


class Probed:
    """A probe of 8 facts whose curves at the prediction position are given."""

    positions, kinds, answers = ("subject_last", "prediction"), ("resid",), ("original", "target")

    def __init__(self, prob=(0, 0, 0, 0), rank=(0, 0, 0, 0), sets=None):
        self.n_layers, self.layers, self.counted = 4, (0, 1, 2, 3), np.ones(8, dtype=bool)
        self.set_names = tuple(sets or ())
        self.reading = type("Reading", (), {})()
        for metric, curve in (("prob", prob), ("rank", rank)):
            whole = np.zeros((8, 2, 1, 4, 2))
            whole[:, 1, 0, :, 0] = curve
            setattr(self.reading, metric, whole)
            setattr(self.reading, f"start_{metric}", np.full((8, 2, 2), 50.0))
        columns = [np.tile(np.asarray(curve, float), (8, 1)) for curve in (sets or {}).values()]
        self.reading.sets = np.stack(columns, -1)[:, None, None].repeat(2, 1) if columns else None


PEAK = {"prob": [0, 1, 2, 1]}


def of(*curve, **others):
    """The sets of a probe: `a` and others."""
    return {"sets": {"a": curve, **others}}


@pytest.mark.parametrize(
    ("name", "about", "true", "false"),
    [
        ("declines", {"answer": "original"}, {"prob": [0, 0.5, 0.9, 0.7]}, {"prob": [0, 0.5, 0.7, 0.9]}),
        ("steps-back", {"answer": "original", "layer": -2}, {"rank": [9, 2, 5, 0]}, {"rank": [9, 5, 2, 0]}),
        ("mirrors", {"set": "a"}, {**PEAK, **of(0, 2, 4, 2)}, {**PEAK, **of(4, 2, 0, 2)}),
        ("rises", {"set": "a"}, {**PEAK, **of(0, 0, 1, 2)}, {**PEAK, **of(0, 0, 2, 1)}),
        ("dips", {"set": "a"}, of(3, 2, 1, 2), of(3, 2, 1, 0.5)),
        ("rises-more", {"set": "a", "than": "b"}, of(3, 1, 1, 4, b=[3, 1, 1, 2]), of(3, 1, 1, 2, b=[3, 1, 1, 4])),
    ],
)
def test_a_claim_about_a_probe_holds_of_one_that_shows_it_and_fails_of_another(name, about, true, false):
    right, wrong = (verdict(check_probe(Probed(**curves), name, about)).holds for curves in (true, false))
    assert (right, wrong) == (True, False)


@pytest.mark.filterwarnings("ignore")
def test_the_stages_of_the_demo_model_are_high_up_and_not_low(demo):
    facts = [fact for fact in kt.load_facts("demo")[::20] if fact.foil or fact.target]
    probe = kt.contrast_probe(demo, facts)
    promotion = {"stage": "promotion"}
    found = [verdict(check_probe(probe, "stage", promotion | {"part": part})).holds for part in ("low", "high")]
    assert found == [False, True]
    assert verdict(check_probe(probe, "worsens", promotion | {"answer": "target"})).holds is True
    assert verdict(check_probe(probe, "worsens", promotion | {"answer": "original"})).holds is False
    assert verdict(check_probe(probe, "lags", promotion)).holds is True
    assert verdict(check_probe(probe, "lags", {"stage": "extraction"})).holds is False, "there both rise"
    without = verdict(check_probe(probe, "mirrors", {"set": "factual"}))
    assert without.holds is None and "--sets" in without.line()[4]


def test_a_claim_about_a_case_fails_where_another_method_is_right_too():
    asked = tuple(Question(role, role, ("x",)) for role in ("edited", "equivalent", "unrelated"))

    def study(**right):
        replies = {name: tuple(Reply("x", r) for r in by) for name, by in {"unedited": (False,) * 3, **right}.items()}
        return CaseStudy("m", "r", asked, replies)

    only = Claim("s", "1", "only-right", {"row": "B", "roles": ["equivalent", "unrelated"]})
    every = Claim("s", "1", "all-right", {"roles": ["edited"]})
    paper = study(A=(True, True, False), B=(True, True, True))
    assert verdict(check_case(paper, only)).holds is True and verdict(check_case(paper, every)).holds is True
    assert verdict(check_case(study(A=(True, True, True), B=(True, True, True)), only)).holds is False
    assert verdict(check_case(study(A=(False, True, False), B=(True, True, True)), every)).holds is False
