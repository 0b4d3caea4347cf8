"""Tables in the docs are those that their commands print from the numbers that lie beside them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def printed(script, *arguments, seconds=120):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds).stdout


@pytest.mark.parametrize(
    ("script", "page", "rows"),
    [
        ("methods.py", "methods", (45,)),
        ("sequential.py", "methods", (48,)),
        ("trust.py", "tracing", (4, 4, 3, 5)),
        ("screen_speed.py", "tracing", (2, 2)),
        ("residual.py", "probing", (12, 12, 14)),
        ("adapters.py", "reliability", (12, 8)),
        ("kill.py", "reliability", (5,)),
        ("rounding.py", "reliability", (9, 12)),
        ("fuzz.py", "reliability", (35,)),
        ("stacks.py", "edits", (24, 3)),
        ("suite.py", "performance", (15,)),
        ("fact_memory.py", "performance", (4,)),
        ("protocols.py", "evaluation", (27, 9, 9)),
        ("many_tokens.py", "evaluation", (12, 6, 4, 18)),
    ],
)
def test_the_tables(script, page, rows):
    doc = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    tables = [table.strip() for table in printed(script, "--table").split("\n\n")]
    assert len(tables) >= len(rows)
    for table, count in zip(tables, rows, strict=False):  # what a script prints beyond them is for reading there
        assert len(table.splitlines()) >= count + 2 and table in doc


@pytest.mark.parametrize("name", ["demo-methods", "demo-tuning"])
def test_every_method_is_measured_and_tuned_or_its_row_says_that_it_is_not(name):
    from kt.editing import METHODS

    held = json.loads((ROOT / "docs" / f"{name}.json").read_text(encoding="utf-8"))
    found = set(held) if isinstance(held, dict) else {(r["method"], r["edits"]) for r in held}
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    named = [m for m in METHODS if not re.search(rf"^\| `{m}` \|.*\| not measured \|$", page, re.M)]
    wanted = set(named) if isinstance(held, dict) else {(m, n) for m in named for n in (1, 10, 100)}
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


def test_the_speed_table_holds_every_part_and_no_row_that_missed_its_goal():
    record = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))
    assert set(record) == {"trace", "targets", "solve", "statistics", "eval"}
    rows = [row for part in record.values() for row in part["rows"]]
    assert [row["work"] for row in rows if not row["holds"]] == []
    assert all(row["difference"] <= row["bound"] for row in rows)
    assert sum(row["goal"] is not None for row in rows) >= 6


@pytest.mark.slow
def test_every_speed_benchmark_runs_small_and_its_results_are_equal():
    assert printed("suite.py", "--small", seconds=600).count("\n") >= 10
