"""Hatching marks exactly the cells that are not told apart from zero, and says what it means."""

from __future__ import annotations

import numpy as np
import pytest

from kt.figures import Panel, heads_figure, heatmap, heatmap_panel, theme
from kt.figures.heatmap import hatch, hatch_note

NAN = float("nan")
VALUES = np.array([[0.5, 0.1, -0.1, 0.0], [0.2, NAN, 0.3, 0.4]])
Q = np.array([[0.01, 0.2, 0.05, 1.0], [0.049, NAN, NAN, 0.04]])
ROWS = ["a", "b"]


def hatching(figure):
    return [t for t in figure.data if t.name == "not told apart from zero"]


def words(figure):
    return " ".join(a.text for a in figure.layout.annotations)


def covered(lines, shape):
    """The cells that the middles of the segments lie in."""
    x, y = (np.array([np.nan if v is None else v for v in values]) for values in (lines.x, lines.y))
    x, y = np.append(x, np.nan).reshape(-1, 3), np.append(y, np.nan).reshape(-1, 3)
    found = np.zeros(shape, bool)
    for share in np.linspace(0.001, 0.999, 200):
        columns = np.rint(x[:, 0] + share * (x[:, 1] - x[:, 0])).astype(int)
        rows = np.rint(y[:, 0] + share * (y[:, 1] - y[:, 0])).astype(int)
        found[rows, columns] = True
    return found


@pytest.mark.parametrize("size", [(30.0, 28.0), (120.0, 28.0), (9.0, 16.0)])
def test_lines_cover_every_marked_cell_and_no_other(size):
    cells = np.random.default_rng(0).random((6, 12)) < 0.4
    np.testing.assert_array_equal(covered(hatch(cells, *size), cells.shape), cells)
    assert hatch(np.zeros((2, 2), bool), *size).x == []


def test_lines_run_at_45_degrees_without_a_break_between_neighbours():
    width, height = 20.0, 28.0
    lines = hatch(np.ones((1, 10), bool), width, height)
    across, down = (np.diff([v for v in values if v is not None])[::2] for values in (lines.x, lines.y))
    np.testing.assert_allclose(across * width, -down * height)
    assert lines.x.count(None) == len(across) - 1 < 10 * (width + height) / 8


def test_cells_with_q_at_or_above_alpha_are_hatched_in_one_quiet_trace():
    panel = Panel(VALUES, ROWS, n=9, q=Q)
    np.testing.assert_array_equal(panel.hatched, [[0, 1, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(Panel(VALUES, ROWS, n=9, q=Q, alpha=0.3).hatched.sum(), 1)
    (trace,) = hatching(heatmap(VALUES, ROWS, title="t", n=9, q=Q))
    assert trace.mode == "lines" and trace.hoverinfo == "skip" and trace.showlegend is False
    assert min(v for v in trace.x if v is not None) == pytest.approx(0.5)


def test_the_note_says_what_hatching_means_and_makes_room_for_itself():
    plain, hatched = heatmap(VALUES, ROWS, title="t"), heatmap(VALUES, ROWS, title="t", n=9, q=Q, over="noise draws")
    said = "hatched: not told apart from zero (sign-flip test over noise draws, false discovery rate 5%)"
    assert said in words(hatched) and "hatched" not in words(plain)
    assert hatched.layout.margin.b - plain.layout.margin.b == 20
    assert not hatching(plain)


def test_nothing_is_hatched_or_said_where_every_cell_stands_out():
    figure = heatmap(np.abs(VALUES), ROWS, title="t", n=9, q=np.where(np.isnan(Q), NAN, 0.01))
    assert not hatching(figure) and "zero" not in words(figure)


def test_too_few_records_to_tell_any_cell_from_zero_hatch_none_and_the_note_says_so():
    figure = heatmap(VALUES, ROWS, title="t", n=5, q=np.full(VALUES.shape, 0.07))
    assert not hatching(figure) and "no cell can be told apart from zero with so few facts" in words(figure)
    assert len(hatching(heatmap(VALUES, ROWS, title="t", n=np.array([5, 6]), q=np.full(VALUES.shape, 0.07)))) == 1
    untested = heatmap(VALUES, ROWS, title="t", n=1, q=np.full(VALUES.shape, NAN))
    assert not hatching(untested) and "told apart" not in words(untested)


def test_the_hover_tells_p_and_q():
    figure = heatmap(VALUES, ROWS, title="t", n=9, p=Q / 2, q=Q)
    assert figure.data[0].hovertext[0][1].endswith("n = 9<br>p = 0.100, q = 0.200")
    assert figure.data[0].hovertext[1][2].endswith("n = 9")


def test_five_kinds_stand_in_two_rows_on_the_same_rows_of_cells():
    kinds = ("mlp", "attn", "hidden", "hidden-no-mlp", "hidden-no-attn")
    figure = heatmap_panel([{"values": VALUES, "rows": ROWS, "kind": kind, "n": 9, "q": Q} for kind in kinds])
    axes = [figure.layout[f"yaxis{s}"] for s in ("", 2, 3, 4, 5)]
    assert [a.domain == axes[0].domain for a in axes] == [True, True, True, False, False]
    assert axes[3].domain[1] < axes[0].domain[0] and axes[3].showticklabels and not axes[4].showticklabels
    for kind, text in (("hidden-no-mlp", "MLP severed"), ("hidden-no-attn", "attention severed")):
        assert f"<b>Hidden state, {text}</b>" in words(figure) and theme.look(kind).label.endswith(text)
    assert len(hatching(figure)) == 5


# Heads


def test_heads_go_down_and_layers_across():
    values = np.arange(6.0).reshape(3, 2)
    q = np.array([[0.5, 0.01], [0.01, 0.01], [0.01, 0.01]])
    figure = heads_figure(values, values - 1, values + 1, q, title="t", n=9, heads=[4, 7], layers=[0, 2, 3])
    np.testing.assert_array_equal(np.array(figure.data[0].z, dtype=float), values.T)
    assert list(figure.layout.yaxis.ticktext) == ["head 4", "head 7"]
    assert figure.data[0].hovertext[1][2] == (
        "<b>head 7</b><br>Attention, layer 3<br>effect: <b>5.0000</b><br>95% interval 4.0000 to 6.0000<br>n = 9<br>"
        "q = 0.010"
    )
    assert "effect: <b>4.0000</b><br>95% interval 3.0000 to 5.0000<br>" in figure.data[0].hovertext[0][2]
    assert "q = 0.500" in figure.data[0].hovertext[0][0] and "q = 0.010" in figure.data[0].hovertext[0][1]
    assert covered(hatch(np.array([[True, False, False], [False] * 3]), 20, 28), (2, 3))[0, 0]
    (lines,) = hatching(figure)
    assert max(v for v in lines.x if v is not None) <= 0.5 and max(v for v in lines.y if v is not None) <= 0.5


def test_the_look_of_a_head_is_attention_with_its_number():
    assert (
        theme.look("attn.h3").label == "Attention, head 3" and theme.look("attn.h3").scale == theme.look("attn").scale
    )
    assert theme.look("attn.h3").line != theme.look("attn.h4").line
    assert theme.head_of("attn.h12") == 12 and theme.head_of("attn") is None and theme.head_of("attn.hx") is None


@pytest.mark.parametrize(("n", "few"), [(7, True), (20, False), (None, False)])
def test_the_note_says_when_few_facts_leave_no_lone_cell_a_chance(n, few):
    panel = Panel(np.ones((4, 8)), list("abcd"), q=np.full((4, 8), 0.5), n=n)
    assert ("so few facts give no p below 0.016" in hatch_note([panel])) == few
