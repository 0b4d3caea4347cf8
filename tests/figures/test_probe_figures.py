"""The probe's figures: ranks run upwards on a logarithmic axis, hovers keep the true numbers, stages stand apart."""

from __future__ import annotations

import numpy as np
import pytest

from kt.figures import Mark, Series, before_after_probe, curve_panels, probe_figure, sets_figure
from kt.figures.curves import lines_of
from kt.figures.layout import Across, axis_coordinates, y_axis
from kt.stats import Interval

NAN = float("nan")
LAYERS = [-1, 0, 1, 2, 3]


def answers(top=999.0, layers=LAYERS):
    falling = np.linspace(top, 0.0, len(layers))
    return [
        Series("original", layers, falling, falling * 0.9, falling * 1.1, 8, "original"),
        Series("target", layers, falling / 2, kind="target"),
    ]


def probed(stages=None):
    panels = {place: {"rank": answers(), "prob": answers(0.5)} for place in ("subject_last", "prediction")}
    return probe_figure(panels, title="t", stages=stages)


def axes(figure, letter="y"):
    return [figure.layout[f"{letter}axis{'' if i == 0 else i + 1}"] for i in range(len(panels_of(figure)))]


def panels_of(figure):
    return sorted({t.yaxis for t in figure.data}, key=lambda name: int(name[1:] or 1))


def lines(figure):
    return [t for t in figure.data if t.hoverinfo == "text"]


# Scales


def test_ranks_are_drawn_at_rank_plus_one_and_gaps_stay():
    assert axis_coordinates([0, 9, NAN, -1e-12], "rank") == [1, 10, None, 1]
    assert axis_coordinates([0.5, 0, -1, NAN], "log") == [0.5, None, None, None]
    assert axis_coordinates([0.5, -1, NAN], "linear") == [0.5, -1, None]


@pytest.mark.parametrize(("largest", "short"), [(8e-5, True), (3e-9, True), (2e-3, False), (0.5, False), (0.0, False)])
def test_small_probabilities_are_written_with_a_power_so_that_labels_stay_clear_of_the_title(largest, short):
    axis = y_axis([0, largest], "linear", 220)
    assert (axis.get("exponentformat") == "e") == short and ("tickformat" in axis) != short


@pytest.mark.parametrize("worst", [0, 5, 9, 10, 99, 3000, 256_000])
def test_the_rank_axis_runs_downwards_from_the_top_rank_and_names_true_ranks(worst):
    axis = y_axis([0, worst], "rank", 220)
    bottom, top = axis["range"]
    assert bottom > np.log10(1 + worst) and top < 0 and axis["type"] == "log"
    assert axis["tickvals"][0] == 1 and axis["ticktext"][0] == "0"
    assert [int(t.replace(",", "")) + 1 for t in axis["ticktext"]] == axis["tickvals"]
    apart = np.diff(np.log10(axis["tickvals"])) / (bottom - top) * 220
    assert (apart >= 13).all() and max(axis["tickvals"]) <= 10**bottom


@pytest.mark.parametrize("values", [[1e-9, 0.5], [0.2, 0.3], [1e-30, 1.0], [0.5], [], [0.0]])
def test_the_log_axis_holds_its_values_and_labels_some_of_them(values):
    axis = y_axis(values, "log", 290)
    low, high = axis["range"]
    assert all(10**low <= v <= 10**high for v in values if v > 0) and low < high
    assert 1 <= len(axis["tickvals"]) <= 14 and all(low <= np.log10(v) <= high for v in axis["tickvals"])


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"cubic.*linear, log, rank"):
        y_axis([1.0], "cubic", 200)


# Figure 2


def test_figure_2_has_positions_down_metrics_across_and_both_answers_once_in_the_legend():
    figure = probed()
    assert panels_of(figure) == ["y", "y2", "y3", "y4"]
    assert [a.type for a in axes(figure)] == ["log", None, "log", None]
    assert [a.title.text for a in axes(figure)] == ["rank (0 is the top)", "probability"] * 2
    assert axes(figure)[0].domain[0] > axes(figure)[2].domain[1]
    assert [t.name for t in figure.data if t.showlegend] == ["original", "target"]
    headings = [a.text for a in figure.layout.annotations]
    assert headings.count("<b>Last subject token</b>") == headings.count("<b>Prediction position</b>") == 2


def test_answers_differ_by_colour_and_by_dash():
    first, second = lines(probed())[:2]
    assert (first.line.dash, second.line.dash) == ("solid", "dash") and first.line.color != second.line.color


def test_hovers_tell_the_true_rank_and_call_the_embedding_so():
    line = lines(probed())[0]
    assert line.y[0] == 1000 and "mean <b>999.0000</b>" in line.hovertext[0]
    assert "<b>original</b>, embedding<br>" in line.hovertext[0] and ", layer 0<br>" in line.hovertext[1]
    assert "95% interval 899.1000 to 1098.9000<br>n = 8" in line.hovertext[0]


def test_the_embedding_has_a_tick_of_its_own():
    ticks = axes(probed(), "x")[0]
    assert list(ticks.ticktext) == ["emb.", "0", "1", "2", "3"] and ticks.tickvals[0] == -1


def test_bands_stand_on_the_same_axis_as_their_lines():
    band = next(t for t in probed().data if t.fill == "toself")
    assert list(band.y)[:2] == pytest.approx([999 * 0.9 + 1, 749.25 * 0.9 + 1])
    assert list(band.y)[-1] == pytest.approx(999 * 1.1 + 1)


def test_stages_are_shaded_in_the_row_they_belong_to_and_proposed_layers_barred():
    marks = {
        "subject_last": [Mark("enrichment", 0, 1, kind="enrichment")],
        "prediction": [Mark("promotion", 2, 3, kind="promotion"), Mark("layers_high", 2, 2, strip=True)],
    }
    figure = probed(marks)
    shaded = [(s.xref, s.x0, s.x1, s.y0) for s in figure.layout.shapes if s.type == "rect"]
    assert shaded[:2] == [("x", -0.5, 1.5, 0), ("x2", -0.5, 1.5, 0)]
    assert shaded[2:] == [(x, 1.5, end, y0) for x in ("x3", "x4") for end, y0 in ((3.5, 0), (2.5, 0.965))]
    colours = {s.fillcolor for s in figure.layout.shapes if s.type == "rect"}
    assert len(colours) == 3
    assert [a.text for a in figure.layout.annotations].count("enrichment") == 2


def test_labels_of_marks_that_would_touch_stand_on_lines_of_their_own():
    wide, narrow = Across(0, 30, 900), Across(0, 30, 300)
    near = [Mark("extraction", 10, 14), Mark("promotion", 15, 16)]
    assert lines_of(near, wide) == 1 and lines_of(near, narrow) == 2 and lines_of([], wide) == 0
    single, double = (
        curve_panels(
            {"": answers(layers=range(31))}, title="t", x_title="layer", y_titles=["y"], marks=marks, columns=2
        )
        for marks in (near[:1], [*near, Mark("extraction too", 11, 15)])
    )
    assert double.layout.margin.t > single.layout.margin.t


def test_a_label_stays_inside_the_panel():
    figure = curve_panels(
        {"": answers()},
        title="t",
        x_title="layer",
        y_titles=["y"],
        marks=[Mark("x" * 40, -1, -1), Mark("y" * 40, 3, 3)],
    )
    assert [a.xanchor for a in figure.layout.annotations] == ["left", "right"]


def test_many_layers_leave_out_markers_that_would_hide_the_dashes():
    few, many = (
        lines(probe_figure({"prediction": {"rank": s, "prob": s}}, title="t"))[0].mode
        for s in (answers(layers=range(6)), answers(layers=range(32)))
    )
    assert (few, many) == ("lines+markers", "lines")


@pytest.mark.parametrize("panels", [{}, {"a": {}}, {"a": {"rank": []}, "b": {"prob": []}}])
def test_panels_that_do_not_form_a_grid_are_refused(panels):
    with pytest.raises(ValueError, match="same metrics"):
        probe_figure(panels, title="t")


# Before and after


def test_before_and_after_share_the_rank_axis_of_a_row_and_rows_keep_their_own():
    before = {"resid": answers(10), "mlp": answers(5000)}
    after = {"resid": answers(2000), "mlp": answers(7)}
    figure = before_after_probe(before, after, title="t", marks={"mlp": [Mark("edited", 1, 2)]})
    ranges = [a.range for a in axes(figure)]
    assert ranges[0] == ranges[1] and ranges[2] == ranges[3] and ranges[0] != ranges[2]
    headings = [a.text for a in figure.layout.annotations if a.text.startswith("<b>")]
    assert headings[:2] == ["<b>Residual stream, before the edit</b>", "<b>Residual stream, after the edit</b>"]
    assert {s.xref for s in figure.layout.shapes if s.type == "rect"} == {"x3", "x4"}


def test_probabilities_before_and_after_share_a_linear_axis():
    figure = before_after_probe({"resid": answers(0.1)}, {"resid": answers(0.9)}, title="t", metric="prob")
    left, right = axes(figure)
    assert left.range == right.range and left.range[0] == 0 and left.range[1] > 0.9 * 1.1


def test_the_residual_score_stands_in_the_subtitle_with_its_interval():
    figure = before_after_probe(
        {"a": answers()}, {"a": answers()}, title="t", subtitle="more", score=Interval(0.41, 0.3, 0.5, 20)
    )
    assert "residual score 0.410, 95% interval 0.300 to 0.500, n = 20 · more" in figure.layout.title.text


def test_rows_must_be_the_same_before_and_after():
    with pytest.raises(ValueError, match="same before and after"):
        before_after_probe({"a": answers()}, {"b": answers()}, title="t")


# Word sets


def test_word_sets_stand_on_a_log_axis_and_an_end_at_zero_reaches_its_edge():
    mean = np.array([1e-4, 0.0, 1e-2])
    figure = sets_figure([Series("rest", [0, 1, 2], mean, [0, 0, 1e-3], mean * 2, 5)], title="t")
    axis, line = figure.layout.yaxis, lines(figure)[0]
    assert axis.type == "log" and line.y == (1e-4, None, 1e-2) and "mean <b>0.0000</b>" in line.hovertext[1]
    band = next(t for t in figure.data if t.fill == "toself")
    assert min(v for v in band.y if v is not None) == pytest.approx(10 ** axis.range[0])
