"""Figure files are whole, offline, and the same bytes every time."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from kt.errors import KtError, WorkFailed
from kt.figures import heatmap, write_figure
from kt.figures.save import drew, figure_html, figure_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MAKE = """
import numpy as np
from kt.figures import heatmap
FIGURE = heatmap(np.arange(6.0).reshape(2, 3) - 1, ["<b>", " b</script>"], title="m · 3 facts", low=np.zeros((2, 3)))
"""


@pytest.fixture
def figure():
    scope = {}
    exec(MAKE, scope)
    return scope["FIGURE"]


class Fetched(HTMLParser):
    """What a page would load, and how many scripts it has."""

    def __init__(self):
        super().__init__()
        self.urls, self.scripts = [], 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.urls += [value for name, value in attributes if name in ("src", "href", "data", "srcset", "action")]


def test_html_is_offline_and_forbids_itself_every_other_source(figure):
    page = figure_page(figure)
    seen = Fetched()
    seen.feed(page)
    assert seen.urls == [] and seen.scripts == 2
    assert "default-src 'none'" in page and "<title>m · 3 facts</title>" in page
    assert "plotly.js v" in page


def test_text_cannot_close_the_script_that_holds_it(figure):
    fragment = figure_html(figure, "here")
    assert fragment.count("</script>") == 1
    assert 'id="here"' in fragment


def test_the_same_figure_gives_the_same_bytes_in_every_process(figure, tmp_path):
    script = (
        f"{MAKE}\nimport sys\nfrom kt.figures import write_figure\n"
        "write_figure(FIGURE, html=sys.argv[1], json=sys.argv[2])"
    )
    for name in ("one", "two"):
        files = [tmp_path / f"{name}.html", tmp_path / f"{name}.json"]
        subprocess.run([sys.executable, "-c", script, *map(str, files)], check=True, timeout=60)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_json_reads_back_as_the_figure_with_plain_numbers(figure, tmp_path):
    [path] = write_figure(figure, json=tmp_path / "f.json")
    loaded = json.loads(path.read_text())
    assert loaded["data"][0]["z"] == [[-1, 0, 1], [2, 3, 4]]
    assert "bdata" not in path.read_text()


def test_html_and_json_need_neither_kaleido_nor_a_browser(tmp_path):
    script = (
        f"import sys; sys.modules['kaleido'] = None\n{MAKE}\nfrom kt.figures import write_figure\n"
        f"write_figure(FIGURE, html={str(tmp_path / 'f.html')!r}, json={str(tmp_path / 'f.json')!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.html", "f.json"]


def test_without_a_browser_the_error_names_the_remedy_and_nothing_is_written(figure, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(WorkFailed, match="apt install chromium") as caught:
        write_figure(figure, png=tmp_path / "f.png", svg=tmp_path / "f.svg")
    assert "\n" not in str(caught.value) and "PNG and SVG" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(figure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KtError, match="cannot write"):
        write_figure(figure, html=tmp_path / "file" / "f.html")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_png_and_svg_are_drawn_at_their_size(figure, tmp_path):
    png, svg = write_figure(figure, png=tmp_path / "f.png", svg=tmp_path / "f.svg", width=700, scale=1)
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert tuple(np.frombuffer(head[16:24], dtype=">u4")) == (700, figure.layout.height)
    drawn = "".join(ElementTree.fromstring(svg.read_bytes()).itertext())
    assert "m · 3 facts" in drawn and "<b>" in drawn and "</script>" in drawn
    assert not re.findall(r'(?:href|src)="https?:', svg.read_text())


def chunks(png):
    """The chunks of a PNG, each of which ends with its checksum."""
    at = 8
    while at < len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        assert zlib.crc32(png[at + 4 : end]) == int.from_bytes(png[end : end + 4], "big")
        yield png[at + 4 : end]
        at = end + 4


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_picture_is_known_as_drawn_by_kt(figure, tmp_path):
    files = write_figure(figure, png=tmp_path / "f.png", svg=tmp_path / "f.svg")
    assert all(map(drew, files)) and b"tEXtSoftware\0kt" in chunks(files[0].read_bytes())
    for file, word in zip(files, (b"Software\0kt", b"Generator: kt"), strict=True):
        file.write_bytes(file.read_bytes().replace(word, word[:-2] + b"me"))
    assert not any(map(drew, files))


def test_the_room_is_imported_as_functions():
    import kt.figures.heatmap  # noqa: F401
    from kt.figures import curves as lines

    assert callable(heatmap) and callable(lines)
