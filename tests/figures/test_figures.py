"""Figures show the numbers they are given, and never interpret the text they are given."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from kt._util.text import visible
from kt.figures import (
    Change,
    Mark,
    Series,
    balance_figure,
    before_after,
    before_after_probe,
    curves,
    heads_figure,
    heatmap,
    heatmap_panel,
    layer_curves,
    probe_figure,
    readable_token,
    sets_figure,
    theme,
)
from kt.figures.heatmap import colour_ticks
from kt.figures.summary import weight_sizes
from kt.figures.text import escape, number, unescape, wrap
from kt.stats import Interval

TOKENS = ["The", " capital", " of", " of", " France"]
EVIL = "<b>x</b> <a href='javascript:alert(1)'>y</a> $z$ %{meta} &amp; \u202e"
VALUES = np.array([[0.0, 0.1, -0.2], [0.3, 0.4, 0.5], [0.0, 0.0, 0.0], [0.0, np.nan, 0.01], [0.9, 0.8, 0.7]])
NAN = float("nan")


def grid(figure, place=0):
    return np.array(figure.data[place].z, dtype=float)


def line(name="MLP", kind="mlp", layers=4, **more):
    mean = np.linspace(0.3, -0.1, layers)
    return Series(name, range(layers), mean, mean - 0.05, mean + 0.05, 7, kind, **more)


def every_figure(text):
    series = Series(text, [0, 1, 2], [0.1, 0.2, 0.3], [0, 0.1, 0.2], [0.2, 0.3, 0.4], 5)
    panel = {"values": VALUES, "rows": [text] * 5, "title": text, "colour_title": text, "row_word": text}
    some = Interval(0.5, 0.4, 0.6, 9)
    return [
        heatmap(VALUES, [text] * 5, title=text, subtitle=text, colour_title=text, low=VALUES, high=VALUES),
        heatmap_panel([{**panel, "kind": kind} for kind in ("mlp", "attn", text)], title=text, subtitle=text),
        curves(
            [series], title=text, subtitle=text, x_title=text, y_title=text, marks=[Mark(text, 1), Mark(text, 0, 2)]
        ),
        layer_curves({text: {text: series}}, title=text, subtitle=text),
        balance_figure({"mlp": series}, some, title=text, subtitle=text, y_title=text, layers={"mlp": (1, 2)}),
        before_after([Change(text, some, some)], title=text, subtitle=text, x_title=text),
        probe_figure({text: {text: [series]}}, title=text, subtitle=text, stages={text: [Mark(text, 0, 1)]}),
        before_after_probe({text: [series]}, {text: [series]}, title=text, subtitle=text, score=some, y_title=text),
        sets_figure([series], title=text, subtitle=text, y_title=text, marks=[Mark(text, 0, 1, strip=True)]),
        heads_figure(VALUES, q=VALUES, p=VALUES, n=9, title=text, subtitle=text, colour_title=text, over=text),
    ]


# Heatmaps


def test_each_value_stands_in_its_cell_and_the_figure_keeps_values_below_zero():
    figure = heatmap(VALUES, TOKENS, title="t")
    np.testing.assert_array_equal(grid(figure), VALUES)
    assert figure.data[0].z[3][1] is None


def test_zero_is_fixed_at_the_bottom_of_the_scale_and_the_top_is_the_largest_value():
    trace = heatmap(VALUES, TOKENS, title="t").data[0]
    assert (trace.zmin, trace.zmax) == (0, 0.9)
    assert heatmap(VALUES, TOKENS, title="t", zmax=2.0).data[0].zmax == 2.0


def test_values_below_zero_are_drawn_on_their_own_scale_of_the_same_magnitudes():
    figure = heatmap(VALUES, TOKENS, title="t")
    below = grid(figure, 1)
    assert below[0, 2] == -0.2 and np.isfinite(below).sum() == 1
    assert (figure.data[1].zmin, figure.data[1].zmax) == (-0.9, 0)
    assert "below zero, down to −0.200" in figure.data[0].colorbar.title.text
    assert len(heatmap(np.abs(VALUES), TOKENS, title="t").data) == 1


@pytest.mark.parametrize(
    "values", [np.zeros((2, 3)), -np.ones((2, 3)), np.full((2, 3), np.nan), np.full((2, 3), 1e-12)]
)
def test_grids_without_a_positive_value_still_have_a_scale(values):
    trace = heatmap(values, ["a", "b"], title="t").data[0]
    assert trace.zmin == 0 and trace.zmax > 0


def test_panels_share_one_zero_fixed_scale_unless_told():
    panels = [{"kind": "mlp", "values": VALUES, "rows": TOKENS}, {"kind": "attn", "values": VALUES / 3, "rows": TOKENS}]
    shared = [t for t in heatmap_panel(panels, title="t").data if t.showscale is not False]
    own = [t for t in heatmap_panel(panels, title="t", shared_scale=False).data if t.showscale is not False]
    assert [t.zmax for t in shared] == [0.9, 0.9] and [t.zmin for t in shared] == [0, 0]
    assert [t.zmax for t in own] == pytest.approx([0.9, 0.3])
    assert [t.xaxis for t in shared] == ["x", "x2"]


def test_a_repeated_token_keeps_a_row_of_its_own_and_rows_run_downwards():
    axis = heatmap(VALUES, TOKENS, title="t").layout.yaxis
    assert list(axis.ticktext) == ["The", "·capital", "·of", "·of", "·France"]
    assert list(axis.tickvals) == [0, 1, 2, 3, 4]
    assert tuple(axis.range) == (4.5, -0.5)


def test_subject_rows_are_bold_starred_and_barred_in_every_panel():
    panel = {"values": VALUES, "rows": TOKENS, "subject_rows": (1, 2, 4)}
    figure = heatmap_panel([{**panel, "kind": "mlp"}, {**panel, "kind": "attn"}])
    assert figure.layout.yaxis.ticktext[1] == "<b>·capital*</b>"
    assert figure.layout.yaxis.ticktext[0] == "The"
    bars = [(s.yref, s.y0, s.y1) for s in figure.layout.shapes]
    assert bars == [("y", 0.5, 2.5), ("y", 3.5, 4.5), ("y2", 0.5, 2.5), ("y2", 3.5, 4.5)]


def test_the_hover_tells_value_interval_n_layer_and_token():
    n = np.arange(5)
    figure = heatmap(
        VALUES, TOKENS, title="t", low=VALUES - 0.1, high=VALUES + 0.1, n=n, subject_rows=[4], layers=[4, 5, 6]
    )
    assert figure.data[0].hovertext[4][1] == (
        "<b>·France</b>  (token 4, subject)<br>MLP, layer 5<br>effect: <b>0.8000</b><br>"
        "95% interval 0.7000 to 0.9000<br>n = 4"
    )
    assert "<b>−0.2000</b>" in figure.data[0].hovertext[0][2]
    assert figure.data[0].hovertext[3][1].endswith("no value")


def test_an_interval_that_is_not_there_is_called_so():
    hover = heatmap(VALUES, TOKENS, title="t", low=VALUES * NAN, high=VALUES * NAN, n=1).data[0].hovertext
    assert "no interval<br>n = 1" in hover[0][0]


def test_layers_name_the_ticks():
    axis = heatmap(VALUES, TOKENS, title="t", layers=[10, 12, 14]).layout.xaxis
    assert list(axis.ticktext) == ["10", "12", "14"]


def test_many_layers_get_as_many_ticks_as_fit():
    panels = [{"kind": k, "values": np.ones((2, 80)), "rows": ["a", "b"]} for k in ("mlp", "attn", "hidden")]
    assert list(heatmap_panel(panels).layout.xaxis.ticktext) == ["0", "10", "20", "30", "40", "50", "60", "70"]


@pytest.mark.parametrize("rows", [TOKENS[:4], [*TOKENS, "x"]])
def test_rows_that_do_not_match_the_values_are_refused_with_both_shapes(rows):
    with pytest.raises(ValueError, match=rf"\(5, 3\).*{len(rows)} rows"):
        heatmap(VALUES, rows, title="t")


@pytest.mark.parametrize("top", [1e-9, 0.03, 0.1, 0.498, 0.508, 0.874, 1.0, 2.0, 7.3, 99.0, 12345.0])
def test_colour_ticks_start_at_zero_end_at_the_top_and_stand_apart(top):
    values = colour_ticks(top)["tickvals"]
    assert values[0] == 0 and values[-1] == top and 2 <= len(values) <= 6
    assert min(np.diff(values)) >= 0.2 * top


# Curves, balance, before and after


def test_figure_2_has_a_panel_per_metric_a_line_per_kind_and_one_legend_entry_each():
    kinds = {
        "mlp": {"prob": line(), "logit_diff": line()},
        "attn": {"prob": line("Attention", "attn"), "logit_diff": line("Attention", "attn")},
    }
    figure = layer_curves(kinds, title="t")
    lines = [t for t in figure.data if t.mode == "lines+markers"]
    assert [(t.name, t.xaxis) for t in lines] == [("MLP", "x"), ("Attention", "x"), ("MLP", "x2"), ("Attention", "x2")]
    assert [t.showlegend for t in lines] == [True, True, False, False]
    assert figure.layout.yaxis.title.text == "probability restored"
    assert figure.layout.yaxis2.title.text == "logit difference restored (eq. 8)"


def test_the_band_runs_along_low_and_back_along_high():
    band = next(t for t in curves([line(layers=3)], title="t").data if t.fill == "toself")
    assert list(band.x) == [0, 1, 2, 2, 1, 0]
    assert list(band.y) == pytest.approx([0.25, 0.05, -0.15, -0.05, 0.15, 0.35])


def test_a_band_never_spans_a_gap():
    series = Series("s", range(5), [1, 1, NAN, 1, 1], [0, 0, NAN, 0, 0], [2, 2, NAN, 2, 2])
    figure = curves([series], title="t")
    bands = [list(t.x) for t in figure.data if t.fill == "toself"]
    assert bands == [[0, 1, 1, 0], [3, 4, 4, 3]]
    assert figure.data[-1].y[2] is None


def test_a_series_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="low"):
        Series("s", range(3), [1, 2, 3], [1, 2], [1, 2, 3])


def test_the_bars_of_updates_are_the_relative_norms_in_the_weights_order():
    figure = weight_sizes(["a.weight", "b<b>.weight"], [0.25, None], title="t")
    [bars] = figure.data
    assert list(bars.x) == [0.25, None] and list(bars.text) == ["0.250", "not known"]
    assert list(figure.layout.yaxis.ticktext) == ["a.weight", "b&lt;b&gt;.weight"]


def test_the_balance_figure_shows_alpha_its_interval_and_the_proposed_layers():
    alpha = Interval(-0.12, -0.37, 0.06, 20)
    figure = balance_figure(
        {"mlp": line(), "attn": line("Attention", "attn")}, alpha, title="t", layers={"mlp": (1, 2), "attn": (0,)}
    )
    assert [t.name for t in figure.data[:2]] == ["MLP (proposed: layers 1 to 2)", "Attention (proposed: layer 0)"]
    assert figure.data[2].x[0] == -0.12
    assert figure.layout.xaxis2.range[0] < -0.37 and figure.layout.xaxis2.range[1] > 1
    assert any("α = −0.120, 95% interval −0.370 to 0.060, n = 20" in a.text for a in figure.layout.annotations)


def test_before_and_after_survive_scores_without_interval_or_value():
    changes = [Change("a", Interval(NAN, NAN, NAN, 0), Interval(0.5, NAN, NAN, 1))]
    figure = before_after(changes, title="t")
    assert figure.data[1].x == (None,) and figure.data[2].x == (0.5,)
    assert "n/a → <b>0.500</b>" in figure.layout.annotations[0].text
    json.loads(figure.to_json())


# Text


def drawn_text(figure):
    """Every string of a figure that plotly would read as pseudo-HTML."""
    found = []

    def walk(value, key=""):
        if isinstance(value, dict):
            for name, item in value.items():
                walk(item, name)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item, key)
        elif isinstance(value, str) and key in ("text", "ticktext", "hovertext", "name", "legendgroup"):
            found.append(value)

    walk(json.loads(figure.to_json()))
    return found


OURS = re.compile(r"</?b>|<br>|</?span[^>]*>")


@pytest.mark.parametrize("place", range(10))
def test_text_from_models_is_inert_in_every_title_tick_hover_and_legend(place):
    texts = drawn_text(every_figure(EVIL)[place])
    assert any("&lt;b&gt;x&lt;/b&gt;" in text for text in texts)
    for text in texts:
        rest = OURS.sub("", text.replace("<b>x", "LEAK"))
        assert "LEAK" not in rest and "<" not in rest and ">" not in rest, text
        assert "$" not in rest and "%{" not in rest and "\u202e" not in rest, text


def test_escape_is_undone_by_what_plotly_draws():
    assert unescape(escape("a<b>&amp;\"'$x$ %{y}")) == "a<b>&amp;\"'$x$ %{y}"
    assert "&quot;" not in escape('"')


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" France", "·France"),
        ("France", "France"),
        ("\u2581France", "·France"),
        ("  ", "··"),
        ("", "∅"),
        ("\n", "↵"),
        (",\n ", ",↵·"),
        ("last subject token", "last subject token"),
        ("\x00", "\\u0000"),
        ("\ud800", "\\ud800"),
        ("x" * 40, "x" * 27 + "…"),
        ("日本", "日本"),
    ],
)
def test_tokens_are_readable(token, shown):
    assert readable_token(token) == shown
    readable_token(token).encode()


def test_numbers_too_small_for_their_decimals_are_not_shown_as_zero():
    assert [number(v) for v in (0.0, 1.25, -0.5, 1.2e-5, NAN)] == ["0.000", "1.250", "−0.500", "1.2e−05", "n/a"]


def test_long_titles_wrap_and_make_room():
    short, long = heatmap(VALUES, TOKENS, title="t"), heatmap(VALUES, TOKENS, title="word " * 60)
    assert long.layout.title.text.count("<br>") == 2
    assert long.layout.margin.t - short.layout.margin.t == 44
    assert wrap("", 10) == [] and visible("a\tb") == "a⇥b"


# Theme


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("kind", theme.KINDS)
def test_scales_darken_step_by_step_so_that_order_survives_without_hue(kind):
    lights = [luminance(c) for c in (*theme.KINDS[kind].scale,)]
    assert all(np.diff(lights) < 0)


@pytest.mark.parametrize("colour", [theme.INK, theme.MUTED, *(k.line for k in theme.KINDS.values()), *theme.SERIES])
def test_text_and_lines_stand_out_from_the_paper(colour):
    contrast = (luminance(theme.PAPER) + 0.05) / (luminance(colour) + 0.05)
    assert contrast >= 4.5
