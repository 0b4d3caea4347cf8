"""Hostile texts in facts and names: a real Chromium opens the pages that commands write, and only shows them."""

from __future__ import annotations

import re

import pytest
from browser import CHROMIUM, opened
from hostile import HARMLESS, MODEL, SCRIPT, run_everything

ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What a terminal or a browser would act on; line breaks and tabs stand."""
BRIEF = ("heatmap", "edit", "residual", "case")


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    return run_everything(tmp_path_factory.mktemp("brief"), only=BRIEF)


def check_terminal(hostile):
    """Every command did its work, and nothing that it said can act."""
    for ran in hostile.ran:
        assert ran.code == 0, (ran.arguments[0], ran.err[-400:])
        assert not ACTS.findall(ran.out), ran.arguments
        assert not ACTS.findall(ran.err), ran.arguments


def check_pages(hostile, folder, at_least):
    """No page has a script, an address, a handler or a title that a text brought in, and the texts can be read."""
    found = opened(hostile.pages, folder)
    assert len(found) >= at_least and hostile.folder / "report.html" in hostile.pages
    for path, page in zip(hostile.pages, found, strict=True):
        name = str(path.relative_to(hostile.folder))
        assert page["ready"] and (page["hovered"] or path.name == "explore.html"), name
        assert page["title"].startswith("kt "), name
        assert page["handlers"] == [], name
        assert [url for tag, _, url in page["urls"] if not url.startswith("#" if tag == "a" else "data:")] == [], name
        assert not [entry for entry in page["fetched"] if not entry.startswith("data:")], name
        assert page["scripts"] <= page["charts"] + 1, name
        assert not ACTS.findall(page["text"] + page["drawn"]), name
    named = {path.name: page for path, page in zip(hostile.pages, found, strict=True)}
    for report in (named["report.html"], named["explore.html"]):
        assert HARMLESS in report["text"] and SCRIPT in report["text"], "without the texts nothing was tested"
        assert not re.search(r"(?<![\d.])49(?![\d.])", report["text"]), "something worked out 7*7"
    assert any(MODEL in page["drawn"] for page in found), "a figure read mark-up in the model's name"


def test_no_text_acts_in_the_terminal(brief):
    check_terminal(brief)
    assert any("\\u001b" in ran.out for ran in brief.ran), "no command showed the text with the escapes"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_no_text_acts_in_a_browser(brief, tmp_path):
    check_pages(brief, tmp_path, at_least=3)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_look_would_see_what_a_page_does(tmp_path):
    """On a page that is open to attack, everything that the test above asks about is found."""
    page = tmp_path / "open.html"
    page.write_text(
        f'<title>kt x</title><p>{SCRIPT}</p><svg onload="1"></svg><a href="javascript:1">a</a>'
        '<img src="https://evil.invalid/x.png"><p>\x1b[31m 49</p>',
        encoding="utf-8",
    )
    [found] = opened([page], tmp_path)
    assert found["title"] == "pwned" and found["handlers"] == [["svg", "onload", "1"]]
    assert {url for _, _, url in found["urls"]} == {"javascript:1", "https://evil.invalid/x.png"}
    assert found["scripts"] == 1 > found["charts"]
    assert ACTS.findall(found["text"])


@pytest.mark.slow
def test_no_text_of_any_command_acts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    (folder / "runs").mkdir()
    hostile = run_everything(folder / "runs")
    check_terminal(hostile)
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    check_pages(hostile, folder, at_least=8)
