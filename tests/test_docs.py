"""Tables in the docs are those that their commands print from the numbers that lie beside them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def printed(script, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize(("script", "rows"), [("methods.py", 45), ("sequential.py", 48)])
def test_the_tables(script, rows):
    table = printed(script, "--table")
    assert len(table.splitlines()) >= rows + 2 and table in DOC


@pytest.mark.parametrize("name", ["demo-methods", "demo-tuning"])
def test_every_method_is_measured_and_tuned(name):
    from kt.editing import METHODS

    held = json.loads((ROOT / "docs" / f"{name}.json").read_text(encoding="utf-8"))
    found = set(held) if isinstance(held, dict) else {(r["method"], r["edits"]) for r in held}
    wanted = set(METHODS) if isinstance(held, dict) else {(m, n) for m in METHODS for n in (1, 10, 100)}
    assert wanted <= found


def test_the_demo_presets_hold_what_tuning_found():
    from kt.presets import presets

    tuned = json.loads((ROOT / "docs" / "demo-tuning.json").read_text(encoding="utf-8"))
    preset = presets()["demo"]
    for method, rows in tuned.items():
        if method in ("memit", "intattn"):  # theirs are those of docs/demo-edits.md, fitted before
            continue
        best = max(rows, key=lambda row: row["score"])["setting"]
        values = preset.values() | preset.values(method)
        names = {"layers": "layers_mlp"}
        for name, value in best.items():
            if name != "alpha":
                held = values[names.get(name, name)]
                assert (list(held) if isinstance(held, tuple) else held) == value, (method, name)
