"""Figures of sweeps: a log axis whose values stay true, names in place of numbers, a marked place with its interval."""

import numpy as np
import pytest

from kt.figures import Series
from kt.figures.sweep import Traced, sweep_figure


def line(x, mean, spread=0.05):
    mean = np.asarray(mean, dtype=float)
    return Series("success", x, mean, mean - spread, mean + spread, 10)


def test_a_log_axis_keeps_true_values_and_ticks_at_numbers():
    runs = {"memit": {"success": line([1, 10, 560], [1, 0.9, 0.5])}}
    figure = sweep_figure(runs, title="t", x_title="edits", scale="log")
    axis = figure.layout.xaxis
    assert axis.type == "log" and axis.range[0] < 0 and axis.range[1] > np.log10(560)
    assert set(axis.ticktext) == {"1", "10", "100", "560"}
    drawn = next(t for t in figure.data if t.name == "memit" and t.mode and "lines" in t.mode)
    assert list(drawn.x) == [1, 10, 560] and "560" in drawn.hovertext[-1]
    band = [t for t in figure.data if t.fill]
    assert band, "intervals are drawn as a band"


def test_the_traced_place_and_its_interval_stand_on_every_panel():
    by = {"success": line([0, 0.5, 1], [1, 1, 0.5]), "locality": line([0, 0.5, 1], [0.5, 0.6, 0.7])}
    figure = sweep_figure({"intattn": by}, title="t", traced=Traced(0.3, (0.2, 0.45)))
    assert sum("traced α = 0.30" in a.text for a in figure.layout.annotations) == 2
    boxes = [s for s in figure.layout.shapes if s.type == "rect"]
    assert [(s.x0, s.x1) for s in boxes] == [(0.2, 0.45)] * 2
    assert sum(s.type == "line" and s.x0 == s.x1 == 0.3 for s in figure.layout.shapes) == 2


def test_names_stand_where_numbers_would_and_are_escaped():
    runs = {"1-2": {"success": line([0], [1])}, "<b>3": {"success": line([1], [0.5])}}
    figure = sweep_figure(runs, title="t", names=["1-2", "<b>3"])
    assert list(figure.layout.xaxis.ticktext) == ["1-2", "&lt;b&gt;3"]
    assert {t.name for t in figure.data if t.error_y.array} == {"1-2", "&lt;b&gt;3"}


def test_other_units_widen_the_axis_and_shares_do_not():
    by = {"success": line([0, 1], [1, 1]), "fluency": line([0, 1], [5, 6])}
    figure = sweep_figure({"m": by}, title="t")
    assert figure.layout.yaxis.range[1] < 1.2 < 6 < figure.layout.yaxis2.range[1]


@pytest.mark.parametrize(
    ("runs", "scale", "words"),
    [({}, "linear", "nothing|no run"), ({"m": {"s": line([0, 1], [1, 1])}}, "log", "no place on a log scale")],
)
def test_what_cannot_be_drawn_is_refused(runs, scale, words):
    with pytest.raises(ValueError, match=words):
        sweep_figure(runs, title="t", scale=scale)
