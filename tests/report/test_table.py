"""A table is written once and drawn as text, Markdown, LaTeX, HTML and a data frame; results share one interface."""

from __future__ import annotations

import re
from importlib import import_module
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from kt._util.text import count
from kt.report import Column, Result, Shown, Table
from kt.report.table import before_after, cell_text
from kt.report.terminal import rich_table
from kt.runs.report import RESULTS
from kt.stats import Interval

EVIL = "[red]a|b[/red]<i>$x_1$ & 50%</i>\x1b[31m"
TABLE = Table(
    ["text", "n", "mean", Column("prob", before_after, lambda pair: "bold" if pair is None else "")],
    [[EVIL, 3, Interval(0.4119, 0.39, 0.43, 9), (0.012, 0.981)], ["x", None, Interval(0.5, np.nan, np.nan, 1), None]],
    "a title",
    "a caption",
)


def drawn(table, width=200):
    file = StringIO()
    Console(file=file, width=width).print(rich_table(table))
    return file.getvalue()


def test_a_terminal_shows_intervals_in_brackets_and_reads_no_mark_up():
    text = drawn(TABLE)
    assert "0.412 [0.390, 0.430]" in text and "0.012 → 0.981" in text and "a title" in text and "a caption" in text
    assert "[red]a|b[/red]<i>" in text and "\x1b[31m" not in text and "\\u001b[31m" in text


def test_markdown_escapes_bars_and_tags():
    head, rule, first, second = TABLE.markdown().split("\n")
    assert head == "| text | n | mean | prob |" and rule == "| --- | --- | --- | --- |"
    assert first.startswith("| [red]a\\|b[/red]&lt;i&gt;$x_1$ &amp; 50%") and first.endswith("| 0.012 → 0.981 |")
    assert second == "| x | – | 0.500 | – |"


def test_latex_escapes_what_latex_reads_and_sets_numbers_right():
    text = TABLE.latex()
    assert text.startswith("\\begin{tabular}{lrrl}\n\\toprule\n") and text.endswith("\\bottomrule\n\\end{tabular}")
    assert r"\$x\_1\$ \& 50\%" in text and "\\textbackslash{}u001b" in text
    assert text.count(r" \\") == 3


def test_a_data_frame_holds_the_raw_values():
    frame = TABLE.to_dataframe()
    assert list(frame.columns) == ["text", "n", "mean", "prob"]
    assert frame["prob"][0] == (0.012, 0.981) and frame["text"][0] == EVIL


def test_a_notebook_escapes_every_text():
    page = TABLE._repr_html_()
    assert "<i>" not in page and "&lt;i&gt;" in page and "\x1b" not in page
    plain = re.sub(r' style="[^"]+"', "", page)
    assert plain.startswith("<table><caption>a title; a caption</caption><tr><th>text</th>")


def test_cells_in_a_notebook_stand_apart_and_numbers_to_the_right():
    """marimo gives tables no style of its own: 0.724 and 0.164 stood as 0.7240.164."""
    cells = re.findall(r'<(?:td|th) style="([^"]+)">([^<]*)<', Table(["name", "n"], [["a", 0.724]])._repr_html_())
    assert [(text, style.rpartition(" ")[2]) for style, text in cells] == [
        ("name", "left"), ("n", "right"), ("a", "left"), ("0.724", "right")
    ]  # fmt: skip
    assert all("padding: 2px 10px" in style for style, _ in cells)


@pytest.mark.parametrize("place", [*RESULTS.values(), "kt.recipes:RecipeRun", "kt.editing.diff:EditDiff",
                                   "kt.editing.stack:EditStack", "kt.tracing:Screen", "kt.export:Exported",
                                   "kt.experiments.sequence:EditRun", "kt.editing:Statistics"])  # fmt: skip
def test_every_result_has_the_interface(place):
    module, _, name = place.partition(":")
    result = getattr(import_module(module), name)
    assert issubclass(result, Shown)
    fields = getattr(result, "__dataclass_fields__", {})
    wanted = {"kind", "metadata", "tables", "figures", "as_dict"}
    assert {each for each in wanted if not hasattr(result, each) and each not in fields} == set()
    assert wanted <= set(dir(Result))


def test_a_count_of_one_is_singular():
    assert [count(n, "fact") for n in (0, 1, 2)] == ["0 facts", "1 fact", "2 facts"]


def test_the_terminal_shows_an_interval_of_tiny_numbers_around_its_mean():
    assert cell_text(Interval(1.4e-5, 1.2e-6, 2.6e-5, 2)) == "1.4e-05 [1.2e-06, 2.6e-05]"
    assert cell_text(Interval(0.412, 0.0001, 0.43, 9)) == "0.412 [0.000, 0.430]"
    assert cell_text(Interval(0.412, -0.0001, 0.43, 9)) == "0.412 [0.000, 0.430]"
