"""What a command writes over: its own earlier result or figure, and nothing else that somebody may need."""

import json
import shutil
from pathlib import Path

import plotly.graph_objects as go
import pytest

from kt.figures import write_figure

pytestmark = pytest.mark.filterwarnings("ignore")
NEVER = ("-m", "never-looked-at")


@pytest.fixture
def work(kt, facts_file):
    """The current folder with files of a user's, and a small run with its JSON and its page."""
    shutil.copy(facts_file, "facts.jsonl")
    Path("kt.toml").write_text("seed = 1\n")
    Path("stack.json").write_text(json.dumps({"schema_version": 1, "kind": "edit-stack", "edits": []}))
    Path("data.json").write_text('{"mine": 1}')
    Path("notes.txt").write_text("mine")
    Path("page.html").write_text("<!doctype html><title>mine</title>")
    Path("drawing.svg").write_text("<html></html>")
    Path("empty.json").touch()
    Path("link.json").symlink_to("facts.jsonl")
    Path("kept").mkdir()
    Path("kept/manifest.json").write_text(
        json.dumps({"schema_version": 1, "command_line": ["kt"], "files": ["results.json"]})
    )
    Path("kept/results.json").write_text('{"schema_version": 1}')


READ = {
    "facts": ("heatmap", *NEVER, "-f", "facts.jsonl", "--json", "facts.jsonl"),
    "facts through a link": ("heatmap", *NEVER, "-f", "facts.jsonl", "--json", "link.json"),
    "facts by another name of the file": ("probe", *NEVER, "-f", "facts.jsonl", "--html", "../work/facts.jsonl"),
    "facts, by force": ("heatmap", *NEVER, "-f", "facts.jsonl", "--json", "facts.jsonl", "--overwrite"),
    "requests": ("apply-edit", *NEVER, "--edits", "facts.jsonl", "--json", "facts.jsonl"),
    "a config": ("ls", "methods", "--config", "kt.toml", "--json", "kt.toml"),
    "an edit": ("eval", *NEVER, "--edit", "stack.json", "--json", "stack.json"),
    "one of several edits": ("case", *NEVER, "--edits", "a=x.json,b=stack.json", "--json", "stack.json"),
    "a history": ("apply-edit", *NEVER, "--history", "x.json, stack.json", "--json", "stack.json"),
    "a file of an edit's settings": ("apply-edit", *NEVER, "--set", "editor=notes.txt", "--json", "notes.txt"),
    "a preset": ("presets", "show", "kt.toml", "--json", "kt.toml"),
    "what is shown": ("edits", "show", "stack.json", "--json", "stack.json"),
    "a run's file, by a page": ("report", "kept", "-o", "kept/results.json", "--overwrite"),
}


@pytest.mark.parametrize("words", READ.values(), ids=READ)
def test_no_output_replaces_what_the_command_reads(work, refused, words):
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert "name another file" in refused(*words)
    assert all(path.read_bytes() == held for path, held in before.items())


TWICE = {
    "page and JSON": ("--html", "new/x", "--json", "new/../new/x"),
    "page and figure": ("--html", "x.svg", "--svg", "x.svg"),
    "JSON and the run's folder": ("--json", "run", "-o", "run"),
    "JSON and a file of the run": ("--json", "run/results.json", "-o", "run"),
}


@pytest.mark.parametrize("words", TWICE.values(), ids=TWICE)
def test_no_two_outputs_are_one_file(work, refused, words):
    assert "writes " in refused("heatmap", *NEVER, *words)


OTHER_KINDS = {
    "JSON of somebody else": ("--json", "data.json"),
    "text, by JSON": ("--json", "notes.txt"),
    "a stack": ("--json", "stack.json"),
    "text, by a page": ("--html", "notes.txt"),
    "a page of somebody else": ("--html", "page.html"),
    "text, by a PNG": ("--png", "notes.txt"),
    "a page, by an SVG": ("--svg", "drawing.svg"),
}


@pytest.mark.parametrize("words", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_an_output_replaces_files_of_its_own_kind_alone(work, refused, words):
    assert "is there already and is no " in refused("heatmap", *NEVER, *words)
    assert "never-looked-at" in refused("heatmap", *NEVER, *words[:1], "new") or words[0] in ("--png", "--svg")


def test_a_file_of_a_run_is_no_place_for_another_result(work, refused):
    assert "a file of the run" in refused("ls", "methods", "--json", "kept/results.json")


def test_a_command_runs_again_over_its_own_result_and_page(kt, work, model_folder, facts_file):
    asked = ("probe", "-m", model_folder, "-f", facts_file, "--limit", 1)
    for _ in range(2):
        ran = kt(*asked, "--json", "empty.json", "--html", "new.html", "-o", "run", "--overwrite")
        assert ran.code == 0, ran.err
        ran = kt(*asked, "--json", "again.json", "--html", "again.html")
        assert ran.code == 0, ran.err
        assert kt("ls", "presets", "--json", "list.json").code == 0
        assert kt("report", "run", "-o", "report.html", "--overwrite").code == 0
        assert kt("probe", *asked[1:], "--html", "report.html").code == 0
    assert json.loads(Path("empty.json").read_text()) == json.loads(Path("again.json").read_text())
    write_figure(go.Figure(), html="figure.html")
    assert kt(*asked, "--html", "figure.html", "--json", "/dev/null").code == 0


def test_by_overwrite_a_file_of_another_kind_is_replaced(kt, work, model_folder, facts_file):
    asked = ("probe", "-m", model_folder, "-f", facts_file, "--limit", 1)
    ran = kt(*asked, "--json", "data.json", "--html", "notes.txt", "--overwrite")
    assert ran.code == 0 and json.loads(Path("data.json").read_text())["schema_version"] == 1, ran.err
    assert Path("notes.txt").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("flag", "begins"),
    [("--png", b"\x89PNG\r\n\x1a\n..."), ("--svg", b'<?xml version="1.0"?>\n<svg>'), ("--svg", b"<svg ")],
)
def test_pictures_replace_pictures(work, refused, flag, begins):
    Path("picture").write_bytes(begins)
    other = "--svg" if flag == "--png" else "--png"
    assert "is there already" not in refused("heatmap", *NEVER, flag, "picture")  # but the model is nowhere
    assert "is there already" in refused("heatmap", *NEVER, other, "picture")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRAWN = ("--limit", 1, "--keep", "all", "--kind", "mlp", "--samples", 1, "--metric", "prob", "--png", "map.png")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_further_picture_leaves_what_kt_did_not_draw(kt, work, model_folder, facts_file):
    def draws(*more):
        ran = kt("heatmap", "-m", model_folder, "-f", facts_file, *DRAWN, *more)
        assert ran.code == 0, ran.err
        return ran.err, {path.name: path.read_bytes() for path in Path().glob("map*")}

    said, first = draws()
    assert sorted(first) == ["map-curves.png", "map.png"] and "does not write over" not in said
    mine = first["map.png"].replace(b"Software\0kt", b"Software\0me")
    Path("map-curves.png").write_bytes(mine)
    Path("map-curves-2.png").write_bytes(first["map.png"])  # one that kt drew
    said, second = draws()
    assert "map-curves.png is a file that kt does not write over; this figure is map-curves-2.png" in said
    assert sorted(second) == ["map-curves-2.png", "map-curves.png", "map.png"]
    assert second["map-curves.png"] == mine and second["map-curves-2.png"] != first["map.png"]
    said, third = draws("--overwrite")
    assert sorted(third) == sorted(second) and third["map-curves.png"] != mine


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_further_picture_does_not_take_the_place_of_another_output(kt, work, model_folder, facts_file):
    ran = kt("heatmap", "-m", model_folder, "-f", facts_file, *DRAWN, "--json", "map-curves.png")
    assert ran.code == 0 and json.loads(Path("map-curves.png").read_text())["kinds"], ran.err
    assert Path("map-curves-2.png").is_file()
