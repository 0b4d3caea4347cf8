"""`results.json` says what its figures are about; samples are files that other tools read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kt.artifacts import NotWritable
from kt.errors import KtError
from kt.evaluation import METRICS, Sample, Scores
from kt.evaluation.samples_file import sample_rows, write_samples
from kt.results import envelope, git_describe
from kt.stats import Interval

MANIFEST = {
    "command": "eval",
    "config": {"facts": "demo", "seed": 3},
    "versions": {"kt": "0.1.0"},
    "model": {"id": "demo", "fingerprint": "ab", "revision": "main"},
    "dtype": "float32",
    "data": {"source": "demo", "sha256": "cd", "n": 10, "skipped": {"empty alt": 2}},
    "seed": 3,
    "start": "2026-01-01T00:00:00+00:00",
}
ONE = {"mean": 0.5, "ci95": [0.2, 0.8], "n": 9}


def test_the_envelope_keeps_what_the_command_found_and_says_what_it_is_about():
    found = envelope(MANIFEST, {"model": "demo", "metrics": {"a": ONE}, "before": {"a": ONE}, "protocol": {"a": "x"}})
    assert found["metrics"] == {"a": ONE} and found["protocol"] == {"a": "x"}
    assert found["results"] == {"metrics": {"a": ONE}, "before": {"a": ONE}}
    assert found["n-samples"] == {group: {"original": 10, "effective": 9} for group in ("metrics", "before")}
    assert found["config"] == {"command": "eval", "facts": "demo", "seed": 3}
    assert found["model"] == {"name": "demo", "revision": "main", "fingerprint": "ab", "dtype": "float32"}
    assert found["data"] == {"source": "demo", "sha256": "cd", "n": 10, "skipped": {"empty alt": 2}}
    assert (found["versions"], found["seed"], found["date"]) == ({"kt": "0.1.0"}, 3, MANIFEST["start"])
    assert "git" not in found
    assert envelope(MANIFEST | {"git": "v1-2"}, {})["git"] == "v1-2"


def test_rows_of_a_sweep_are_groups_by_their_label():
    rows = [{"label": "0.1", "x": 0.1, "metrics": {"a": ONE}}, {"label": "0.2", "x": 0.2, "metrics": {"a": ONE}}]
    found = envelope(MANIFEST, {"rows": rows})
    assert set(found["results"]) == {"rows.0.1.metrics", "rows.0.2.metrics"} and found["rows"] == rows


def test_results_that_have_their_own_names_keep_them():
    own = {"results": {"gsm8k": {"acc": 1}}, "n-samples": {"gsm8k": {"original": 5, "effective": 5}}}
    more = {"config": {"limit": 5}, "versions": {"lm_eval": "0.4"}}
    found = envelope(MANIFEST, own | more)
    assert found["results"] == own["results"] and found["n-samples"] == own["n-samples"]
    assert found["config"]["limit"] == 5 and found["config"]["facts"] == "demo"
    assert found["versions"] == {"kt": "0.1.0", "lm_eval": "0.4"}


def test_a_run_without_model_or_data_names_neither():
    assert {"model", "data"}.isdisjoint(envelope({"command": "env"}, {"x": 1}))


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "src" / "kt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return package


def test_git_describes_a_checkout_and_says_when_it_was_changed(checkout, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    clean = git_describe(checkout)
    assert clean is not None and not clean.endswith("-dirty")
    (checkout / "__init__.py").write_text("changed = True\n")
    assert git_describe(checkout) == f"{clean}-dirty"


def test_git_does_not_describe_a_project_in_which_kt_is_merely_installed(checkout):
    installed = checkout.parent.parent / ".venv" / "kt"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_describe(installed) is None


def test_git_says_nothing_where_there_is_none(tmp_path, checkout, monkeypatch):
    assert git_describe(tmp_path / "none") is None
    monkeypatch.setenv("PATH", "")
    assert git_describe(checkout) is None


EVIL = "<b>\u2028\ud800'\"\n, 東京"


def scores():
    samples = (
        Sample("r1", "edit", EVIL, "Paris", (1, 2), (1, 3), -0.5, "Paris", "Paris is"),
        Sample("r1", "neighbourhood", "q", "Rome", (4,), (4,), -0.1, "Rome", "Rome, a city"),
        Sample("r1", "generation", "About", None, text="one two three"),
    )
    names = ("edit_success_tf_token", "edit_success_tf_exact", "neighbourhood_same_argmax")
    values = {name: {"r1": 1.0} for name in names}
    return Scores("demo", ("r1",), samples, values, {})


def test_a_row_holds_what_was_asked_said_and_scored():
    edit, near, text = sample_rows(scores(), before=scores(), decode=lambda ids: " ".join(map(str, ids)))
    assert (edit["record"], edit["role"], edit["answer"], edit["predicted"]) == ("r1", "edit", "Paris", "1 3")
    assert edit["scores"] == {"edit_success_tf_token": 0.5, "edit_success_tf_exact": 0.0}
    assert near["scores"] == {"neighbourhood_same_argmax": 1.0} and near["log_prob"] == -0.1
    assert text["scores"] == {} and text["text"] == "one two three"
    assert {name for row in (edit, near) for name in row["scores"]} <= set(METRICS)


def test_locality_needs_the_unedited_model():
    assert list(sample_rows(scores()))[1]["scores"] == {}


def test_json_lines_survive_hostile_text(tmp_path):
    path = write_samples(tmp_path / "samples.jsonl", sample_rows(scores()))
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 4 and lines[-1] == b"" and len(path.read_text().splitlines()) == 3
    assert json.loads(lines[0])["prompt"] == EVIL


def test_parquet_holds_the_same_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = write_samples(tmp_path / "samples.parquet", sample_rows(scores()), "parquet")
    rows = parquet.read_table(path).to_pylist()
    assert [row["record"] for row in rows] == ["r1"] * 3
    assert dict(rows[0]["scores"]) == {"edit_success_tf_token": 0.5, "edit_success_tf_exact": 0.0}
    assert rows[0]["prompt"] == EVIL.replace("\ud800", "\\ud800") and rows[2]["answer"] is None


@pytest.mark.parametrize(("format", "rows", "width"), [("jsonl", 4_000, 5_000), ("parquet", 16_000, 100)])
def test_only_a_block_of_rows_is_in_memory(tmp_path, format, rows, width):
    import tracemalloc

    if format == "parquet":
        pytest.importorskip("pyarrow.parquet")
    row = {"record": "r", "role": "edit", "prompt": "p" * width, "scores": {"edit_success_tf_token": 1.0}}
    tracemalloc.start()
    try:
        write_samples(tmp_path / "s", (row | {"answer": str(i)} for i in range(rows)), format)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000


def test_a_failure_in_the_middle_leaves_no_file(tmp_path):
    def rows():
        yield {"record": "r"}
        raise ValueError("no more")

    for format in ("jsonl", "parquet"):
        with pytest.raises(ValueError, match="no more"):
            write_samples(tmp_path / "s", rows(), format)
    assert list(tmp_path.iterdir()) == []


def test_formats_and_places_that_do_not_exist_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(KtError, match="'csv'; choose jsonl or parquet"):
        write_samples(tmp_path / "s", [], "csv")
    with pytest.raises(NotWritable, match="a folder; name a file"):
        write_samples(tmp_path, [])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(KtError, match="pip install pyarrow"):
        write_samples(tmp_path / "s", [], "parquet")


def test_intervals_are_recognised_as_the_scores_write_them():
    found = envelope(MANIFEST, {"metrics": {"a": Interval(0.1, 0.0, 0.2, 7).as_dict()}})
    assert found["n-samples"]["metrics"]["effective"] == 7
