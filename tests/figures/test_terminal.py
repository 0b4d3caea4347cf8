"""The terminal rendering fits, and says with characters what it cannot say with colour."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from kt.figures import terminal_heatmap


def shown(picture, width=80, **more):
    out = io.StringIO()
    console = Console(file=out, width=width, **{"color_system": None, "force_terminal": False, **more})
    console.print(picture)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("layers", [1, 8, 32, 48, 96])
def test_it_fits_the_terminal(width, layers):
    values = np.random.default_rng(0).normal(size=(3, layers))
    text = shown(terminal_heatmap(values, ["The", " capital of something long 日本語日本語", " x"], "t" * 200), width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    assert len(text.splitlines()) == 6


def test_up_to_32_layers_keep_a_column_each_in_80_columns():
    text = shown(terminal_heatmap(np.ones((2, 32)), ["a rather long first token", " b"]))
    assert "layers per cell" not in text


def test_binned_layers_keep_their_largest_value_and_say_so():
    values = np.zeros((1, 200))
    values[0, 151] = 1.0
    text = shown(terminal_heatmap(values, ["a"]))
    assert "max of 3 layers per cell" in text
    assert text.splitlines()[0].count("@") == 1


def test_without_colour_shades_grow_with_the_value_and_minus_means_below_zero():
    text = shown(terminal_heatmap(np.array([[0.0, 0.5, 1.0, -0.5, np.nan]]), ["a"]))
    assert text.splitlines()[0] == "a     ++++@@@@----    "[: 2 + 20]
    assert "min -0.5" in text and "below 0 --" in text


def test_no_color_is_honoured(monkeypatch):
    picture = terminal_heatmap(np.eye(3), ["a", "b", "c"])
    coloured = shown(picture, color_system="truecolor", force_terminal=True)
    assert "\x1b[48;2;0;68;27m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[48" not in shown(picture, color_system="truecolor", force_terminal=True)


def test_tokens_are_no_markup_and_the_subject_is_starred():
    text = shown(terminal_heatmap(np.eye(2), ["[red]x[/red]", " [/b]"], "[b]t", subject_rows=[1]))
    assert "[red]x[/red]" in text and "·[/b]*" in text and "[b]t" in text


def test_layer_numbers_stand_under_their_columns():
    lines = shown(terminal_heatmap(np.eye(3), ["a", "b", "c"], layers=[7, 8, 9])).splitlines()
    assert lines[0].index("@") == lines[3].index("7")
    assert lines[2].index("@") == lines[3].index("9")


def test_cells_not_told_apart_from_zero_have_strokes_with_and_without_colour():
    values, q = np.array([[1.0, 0.5, 0.0]]), np.array([[0.01, 0.2, np.nan]])
    picture = terminal_heatmap(values, ["a"], q=q, n=9)
    assert shown(picture).splitlines()[0].startswith("a @@@@/+/+    ")
    assert shown(picture).splitlines()[-1].strip() == "/ not told apart from 0"
    coloured = shown(picture, color_system="truecolor", force_terminal=True)
    assert coloured.count("////") == 1 and "\x1b[48;2;0;68;27m    " in coloured
    for plain in (terminal_heatmap(values, ["a"]), terminal_heatmap(values, ["a"], q=q, n=4)):
        assert "/" not in shown(plain)


def test_binned_layers_have_strokes_where_their_largest_value_has():
    values, q = np.zeros((1, 200)), np.full((1, 200), 0.5)
    values[0, 151], q[0, 151] = 1.0, 0.001
    line = shown(terminal_heatmap(values, ["a"], q=q)).splitlines()[0]
    assert line.count("@") == 1 and line.count("/") == 66
