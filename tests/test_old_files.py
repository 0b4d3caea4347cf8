"""Files that kt wrote before its modules moved: edits open, results load, reports build, unfinished runs resume.

tests/fixtures/before_moves/README.md says how the files were made. Only public names and the command line are used
here, so that the test stays the same whatever moves.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import kt
from kt.cli import main

OLD = Path(__file__).parent / "fixtures" / "before_moves"

RESULTS = {
    "heatmap/arrays.safetensors": kt.Trace,
    "alpha/arrays.safetensors": kt.Trace,
    "alpha/balance.json": kt.Balance,
    "probe/probe.safetensors": kt.Probe,
    "probe-edit/residual.safetensors": kt.Residual,
    "apply-edit/edit.safetensors": kt.Edit,
    "apply-edit/before.json": kt.Scores,
    "apply-edit/scores.json": kt.Scores,
    "apply-edit/control.json": kt.Scores,
    "apply-edit-steps/edit.safetensors": kt.Edit,
    "apply-edit-steps/scores.json": kt.Scores,
    "eval/before.json": kt.Scores,
    "eval/scores.json": kt.Scores,
    "eval/control.json": kt.Scores,
    "case/case.json": kt.CaseStudy,
    "sweep/sweep.json": kt.Sweep,
    "stack.json": kt.EditStack,
}
FINISHED = ("apply-edit", "apply-edit-steps", "heatmap", "alpha", "probe", "probe-edit", "eval", "case", "sweep")
CUT = {
    "memit-cut": ("apply-edit-steps", ("edit.safetensors", "before.json", "scores.json", "steps.json")),
    "heatmap-cut": ("heatmap", ("arrays.safetensors",)),
    "sweep-cut": ("sweep", ("sweep.json",)),
}
"""Of each unfinished run: the finished run of the same command, and the files that hold its results."""

KEPT = {
    name: sorted(OLD.glob(f"{name}.unfinished/phases/*.safetensors")) + sorted(OLD.glob(f"{name}/points/*.json"))
    for name in CUT
}
"""The files of finished work in each unfinished run."""

VARIES = ("versions", "seconds", "digest", "fingerprints_after", "cache_keys", "sha256")
"""Entries of a result that depend on the machine, or on every bit, or on what a cache file is named by."""
LATER = ("neighbours", "perplexity", "written_aims", "identity")
"""Entries that edits have since: see tests/editing/test_verdict.py, test_admission.py."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def old(tmp_path, monkeypatch, cache):
    """A copy of the files, which is the current folder."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KT_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def command_line(folder: Path) -> list[str]:
    """The command of a run as its manifest has it, without `kt` and `--out`; an edit that changes one request of two
    is accepted, as it was."""
    words = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["command_line"]
    assert words[0] == "kt" and words[-2] == "--out"
    return words[1:-2] + ["--force"] * (words[1] == "apply-edit")


def installed_versions(capsys) -> dict[str, str]:
    capsys.readouterr()
    assert main(["env", "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)["versions"]


def resume(name: str, capsys) -> tuple[int, str]:
    """Resume an unfinished run of the copy under the libraries that are installed now: exit code and messages."""
    settings = Path(f"{name}.unfinished") / "settings.json"
    if settings.exists():
        # A run refuses to go on under other versions than it was begun with. The versions are not the file format.
        held = json.loads(settings.read_text(encoding="utf-8"))
        settings.write_text(json.dumps(held | {"versions": installed_versions(capsys)}), encoding="utf-8")
    code = main([word for word in command_line(Path(CUT[name][0])) if word != "--quiet"] + ["--resume", name])
    return code, capsys.readouterr().err


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of nested JSON, by its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for name, item in items:
        if name not in (*VARIES, *LATER):
            yield from leaves(item, f"{path}/{name}")


def content(path: Path) -> dict[str, Any]:
    """A result's numbers and texts by name, without the entries that vary."""
    if path.suffix == ".json":
        return dict(leaves(json.loads(path.read_text(encoding="utf-8"))))
    with safe_open(path, "numpy") as file:
        held = dict(leaves(json.loads(file.metadata()["kt"])))
        return held | dict(leaves({name: file.get_tensor(name).tolist() for name in file.keys()}))  # noqa: SIM118


def _reworded(text: str) -> str:
    """A protocol in today's words: the papers have names there, no numbers."""
    return text.replace("001", "IntAttn-Edit").replace("003", "JEEP")


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal texts, and numbers that differ by no more than what another processor's rounding adds up to."""
    assert found.keys() == expected.keys()
    expected = {name: _reworded(value) if "/protocol/" in name else value for name, value in expected.items()}
    wrong = [
        (name, found[name], value)
        for name, value in expected.items()
        if found[name] != (pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value)
    ]
    assert wrong == []


def test_no_old_file_names_a_path_of_a_machine():
    rooted = re.compile(rb"(?<![\w.*/<])/(home|root|Users|tmp|work|usr|opt|var|mnt|private)/|[A-Z]:\\\\")
    assert rooted.search(b'{"file": "/home/somebody/edit.safetensors"}')
    files = [p for p in OLD.rglob("*") if p.is_file()]
    assert len(files) > 50
    assert [str(p.relative_to(OLD)) for p in files if rooted.search(p.read_bytes())] == []


@pytest.mark.parametrize("file", RESULTS)
def test_a_result_loads_and_is_saved_as_the_same_bytes(file, old):
    result = RESULTS[file].load(old / file)
    again = result.save((old / file).with_name(f"again-{Path(file).name}"))
    assert Path(again).read_bytes() == (old / file).read_bytes()


def test_the_loaded_results_are_those_that_the_commands_wrote(old):
    wrote = {name: json.loads((old / name / "results.json").read_text(encoding="utf-8")) for name in FINISHED}

    trace = kt.Trace.load("heatmap/arrays.safetensors")
    assert trace.n_facts == wrote["heatmap"]["n_facts"] == 4
    for kind in ("mlp", "attn"):
        curve = trace.curve(kind, "prob")._asdict()
        assert_close(dict(leaves(plain(curve))), dict(leaves(wrote["heatmap"]["curves"][kind]["prob"])))
    assert kt.Balance.load("alpha/balance.json").alpha == wrote["alpha"]["alpha"]
    traced = kt.balance_factor(kt.Trace.load("alpha/arrays.safetensors"))
    assert traced.alpha == pytest.approx(wrote["alpha"]["alpha"])
    probe = kt.Probe.load("probe/probe.safetensors")
    assert probe.n_facts == 4 and set(probe.set_names) == set(wrote["probe"]["sets"]["prediction"])
    residual = kt.Residual.load("probe-edit/residual.safetensors")
    assert residual.score.mean == pytest.approx(wrote["probe-edit"]["residual_score"]["mean"])
    for folder, part in (("apply-edit", "after"), ("eval", "metrics")):
        metrics = kt.Scores.load(f"{folder}/scores.json").metrics
        means = {name: metric.mean for name, metric in metrics.items()}
        assert means == pytest.approx({name: metric["mean"] for name, metric in wrote[folder][part].items()})
    case = kt.CaseStudy.load("case/case.json").as_dict()
    assert case["replies"] == wrote["case"]["replies"]
    sweep = kt.Sweep.load("sweep/sweep.json")
    assert [row.label for row in sweep.rows] == [row["label"] for row in wrote["sweep"]["rows"]] == ["0", "0.5", "1"]


def plain(value: Any) -> Any:
    """Arrays as lists."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


@pytest.mark.parametrize("folder", ["apply-edit", "apply-edit-steps"])
def test_an_edit_is_applied_to_the_demo_model_and_reverted_to_the_byte(folder, old):
    model = kt.load("demo")
    before = model.fingerprint()
    assert before == json.loads((old / folder / "manifest.json").read_text(encoding="utf-8"))["model"]["fingerprint"]
    edit = kt.Edit.load(old / folder / "edit.safetensors")
    assert set(edit.state_of(model).values()) == {"base"}
    edit.apply_(model)
    assert set(edit.state_of(model).values()) == {"applied"}
    facts = kt.load_facts("facts.jsonl")[:2]
    found = kt.evaluate(model, [fact.as_request() for fact in facts], generate=False)
    held = kt.Scores.load(old / folder / "scores.json")
    for name in ("edit_success_tf_exact", "answer_prob_tf"):
        assert found.metrics[name].mean == pytest.approx(held.metrics[name].mean, rel=1e-3)
    edit.revert_(model)
    assert model.fingerprint() == before


def test_a_stack_of_old_edits_is_applied_and_reverted_to_the_byte(old):
    model = kt.load("demo")
    before = model.fingerprint()
    stack = kt.EditStack.load("stack.json")
    assert len(stack) == 2
    with stack.applied(model):
        assert model.fingerprint() != before
    assert model.fingerprint() == before


def test_an_old_edit_scores_as_it_did(old, capsys):
    assert main([*command_line(Path("eval")), "--out", "again"]) == 0, capsys.readouterr().err
    for file in ("before.json", "scores.json", "control.json"):
        assert_close(content(Path("again") / file), content(Path("eval") / file))


def test_a_report_shows_every_old_run(old, capsys):
    assert main(["report", *FINISHED, "--out", "report.html"]) == 0, capsys.readouterr().err
    page = Path("report.html").read_text(encoding="utf-8")
    sections = (
        "heatmap: Causal tracing",
        "alpha: Balance factor",
        "probe: Contrast probe",
        "probe-edit: What is left of the old facts",
        "apply-edit: Edit: intattn",
        "apply-edit-steps: Edit: memit",
        "apply-edit-steps: Edits in steps: sequential",
        "eval: Before and after",
        "case: A case",
    )
    assert [title for title in sections if title not in page] == []


@pytest.mark.parametrize("name", CUT)
def test_an_unfinished_run_goes_on_to_the_bytes_of_an_uninterrupted_one(name, old, capsys):
    finished, files = CUT[name]
    code, said = resume(name, capsys)
    assert code == 0, said
    assert not Path(f"{name}.unfinished").exists()
    if name != "sweep-cut":
        assert f"{len(KEPT[name])} finished phases are taken from" in said
    then = ["--no-norm-guard"] if name == "memit-cut" else []  # its steps held nothing: today's do
    assert main([*command_line(Path(finished)), *then, "--out", "today"]) == 0, capsys.readouterr().err

    same_machine = True
    for file in files:
        before, today, resumed = (content(Path(folder) / file) for folder in (finished, "today", name))
        assert_close(today, before)
        assert_close(resumed, today)
        same_machine &= today == before
        hashes = [moments(Path(folder) / file) for folder in (finished, "today", name)]
        assert len({tuple(each) for each in hashes}) == 1  # of the same weights
        same_machine &= hashes.count(hashes[0]) == len(hashes)
    if not same_machine:
        # Kept phases hold the bits of the machine that made them, and today's run those of this one.
        pytest.skip("this machine or its libraries round otherwise than those that made the files: equal to 1e-3")
    for file in files:
        resumed, today = ((Path(folder) / file).read_bytes() for folder in (name, "today"))
        assert timeless(resumed) == timeless(today)


def moments(file: Path) -> dict[str, str]:
    """By weight, the hashes of the second moments that a file names: they hang on every bit."""
    found = re.findall(r'sha256"?: ?{([^}]*)}', file.read_bytes().decode("utf-8", "replace").replace("\\", ""))
    return {name: held for each in found for name, held in re.findall(r'"([^"]+)": ?"([0-9a-f]{64})"', each)}


def timeless(text: bytes) -> bytes:
    """A sweep's rows say how long they took."""
    return re.sub(rb'"seconds": {[^}]*}', b'"seconds": {}', text)


def test_resumed_facts_are_those_of_the_kept_phases_on_any_machine(old, capsys):
    code, said = resume("heatmap-cut", capsys)
    assert code == 0, said
    with (
        safe_open("heatmap-cut/arrays.safetensors", "numpy") as new,
        safe_open("heatmap/arrays.safetensors", "numpy") as before,
    ):
        kept = [name for name in new.keys() if name.split(".")[0] in ("0", "1")]  # noqa: SIM118
        assert len(kept) == 12
        for name in kept:
            assert new.get_tensor(name).tobytes() == before.get_tensor(name).tobytes()


@pytest.mark.parametrize(
    ("name", "phase"), [(name, path) for name in CUT for path in KEPT[name]], ids=lambda x: getattr(x, "name", x)
)
def test_every_kept_phase_is_read(name, phase, old, capsys):
    """A phase whose name is not asked for any more would be computed anew, and nobody would notice."""
    broken = old / phase.relative_to(OLD)
    broken.write_bytes(broken.read_bytes()[:-9])
    code, said = resume(name, capsys)
    assert code == 2 and broken.name in said, said


def test_resumed_points_are_the_kept_ones_on_any_machine(old, capsys):
    code, said = resume("sweep-cut", capsys)
    assert code == 0, said
    rows = json.loads(Path("sweep-cut/sweep.json").read_text(encoding="utf-8"))["rows"]
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in KEPT["sweep-cut"]]
    assert len(kept) == 2
    for row, point in zip(rows, kept, strict=False):
        assert row == {name: point[name] for name in row}  # the seconds too: it was not solved again


def test_a_run_does_not_go_on_under_other_versions(old, capsys):
    settings = Path("heatmap-cut.unfinished/settings.json")
    held = json.loads(settings.read_text(encoding="utf-8"))
    held["versions"] = installed_versions(capsys) | {"torch": "1.0"}
    settings.write_text(json.dumps(held), encoding="utf-8")
    assert main([*command_line(Path("heatmap")), "--resume", "heatmap-cut"]) == 2
    assert "was begun with versions" in capsys.readouterr().err
