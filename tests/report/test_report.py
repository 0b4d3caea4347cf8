"""A report is one offline file whose text is only ever read."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from kt.errors import KtError
from kt.figures import heatmap
from kt.figures.save import POLICY
from kt.report import Card, Figure, Section, Table, Text, build, render
from kt.stats import Interval

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><script>document.title='pwned'</script>{{7*7}}<img src=x onerror=\"document.title='pwned'\">"


def sample(text="a prompt"):
    figure = heatmap(np.eye(2), [text, " b"], title=text)
    table = Table([text, "p", "n"], [[text, 0.5, 12345], ["x", None, 2]], caption=text)
    return [
        Section(text, [Text([text, "two"]), Figure(figure, text, text)]),
        Section("two", [table, Figure(figure)]),
        Section("three", [Text("only")]),
    ]


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)


def test_plotly_is_embedded_once_and_figures_have_ids_of_their_own():
    html = render("t", sample())
    page = Page(html)
    assert html.count("plotly.js v") == 1
    assert page.tags.count("script") == 4  # the library, what runs it when a figure shows, and the two figures
    assert [v for k, v in page.attributes if k == "id" and "figure" in v] == ["kt-figure-1", "kt-figure-2"]
    assert "Figure 1. a prompt" in html


def test_without_figures_there_is_no_script():
    html = render("t", [Section("s", [Text("x")])])
    assert "<script" not in html and len(html) < 10_000


def test_nothing_is_fetched():
    html = render("t", sample(EVIL), {"command": EVIL}, summary=[Card(EVIL, EVIL, EVIL)], lead=EVIL)
    page = Page(html)
    assert all(v.startswith("#") for k, v in page.attributes if k in ("href", "src", "action", "data"))
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert ("content", POLICY) in page.attributes and POLICY.startswith("default-src 'none'")
    assert "@import" not in html.split("<script>")[0]


def test_text_from_models_is_escaped_everywhere():
    html = render(EVIL, sample(EVIL), {EVIL: EVIL}, summary=[Card(EVIL, EVIL, EVIL)], lead=EVIL)
    plain = render("x", sample("x"), {"x": "x"}, summary=[Card("x", "x", "x")], lead="x")
    assert Page(html).tags == Page(plain).tags
    assert "{{7*7}}" in html and "49<" not in html


def test_tables_set_numbers_flush_right_and_leave_nothing_as_a_dash():
    html = render("t", sample())
    assert '<td class="number">0.500</td><td class="number">12,345</td>' in html
    assert '<td>x</td><td class="number">–</td>' in html
    assert "<caption>a prompt</caption>" in html


def test_a_row_that_does_not_fit_its_headers_is_refused():
    with pytest.raises(ValueError, match="3 cells"):
        Table(["a", "b"], [[1, 2, 3]])


def test_cards_show_a_mean_with_its_interval_and_n():
    html = render("t", [], summary=[Card("α", Interval(0.31, 0.27, 0.36, 120), "eq. 12"), Card("facts", 120)])
    assert '<dd class="value">0.310</dd><dd class="below">0.270 to 0.360, n = 120 · eq. 12</dd>' in html
    assert '<dd class="value">120</dd></div>' in html


def test_numpy_numbers_and_intervals_are_numbers():
    table = Table(["a", "b"], [[np.float32(0.25), Interval(0.5, 0.4, 0.6, 9)], [np.int64(3), None]])
    assert table.numeric == [True, True]
    assert table.cells == [["0.250", "0.500 (0.400 to 0.600, n = 9)"], ["3", "–"]]
    unmeasured = Interval(np.nan, np.nan, np.nan, 9)
    assert Table(["a"], [[unmeasured]]).cells == [["–"]]  # as in a terminal


def test_the_footer_holds_the_metadata():
    html = render("t", [], {"seed": 0, "layers": [4, 5], "command": "kt demo"})
    for name, value in (("seed", "0"), ("layers", "4, 5"), ("command", "kt demo")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in html


def test_the_same_blocks_give_the_same_bytes(tmp_path):
    one = build("t", sample(), tmp_path / "deep" / "one.html", {"seed": 1})
    two = build("t", sample(), tmp_path / "two.html", {"seed": 1})
    assert one.read_bytes() == two.read_bytes()


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KtError, match="cannot write"):
        build("t", [], tmp_path / "file" / "r.html")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_in_a_browser_prompts_are_read_and_figures_are_drawn(tmp_path):
    out = build("kt", sample(EVIL), tmp_path / "r.html", summary=[Card(EVIL, 1)])
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=4000",
        f"--user-data-dir={tmp_path}/p",
    ]
    seen = subprocess.run([BROWSER, *flags, "--dump-dom", out.as_uri()], capture_output=True, text=True, timeout=90)
    assert "<title>kt</title>" in seen.stdout
    assert seen.stdout.count('class="main-svg"') >= 2
    assert "{{7*7}}" in seen.stdout
