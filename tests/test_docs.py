"""The docs hold what their commands print, and every link, file and name in them exists."""

import importlib
import json
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import kt
from kt.errors import FailedCheck, KtError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DATA = DOCS / "data"


def printed(script, *arguments, seconds=120):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds).stdout


@pytest.mark.parametrize(
    ("script", "page", "rows"),
    [
        ("quality/methods.py", "data/demo-methods", (45,)),
        ("quality/sequential.py", "data/sequential", (48,)),
        ("quality/trust.py", "data/trust", (4, 4, 3, 5)),
        ("speed/screen_speed.py", "data/screen", (2, 2)),
        ("quality/residual.py", "data/residual", (12, 12, 14)),
        ("reliability/adapters.py", "data/adapters", (12, 8)),
        ("reliability/kill.py", "data/kills", (5,)),
        ("quality/rounding.py", "data/rounding", (9, 12)),
        ("reliability/fuzz.py", "data/fuzz", (35,)),
        ("quality/chat_ways.py", "data/chat-ways", (12,)),
        ("quality/upcycled.py", "data/upcycled", (6,)),
        ("quality/quantised.py", "reliability", (4,)),
        ("quality/stacks.py", "data/stacks", (24, 3)),
        ("speed/suite.py", "performance", (15,)),
        ("speed/fact_memory.py", "performance", (4,)),
        ("quality/protocols.py", "data/demo-protocols", (27, 9, 9)),
        ("quality/many_tokens.py", "data/many-tokens", (12, 6, 4, 18)),
        ("quality/real_map.py", "data/real-map", (2, 4, 2)),
        ("quality/real_alpha.py", "data/real-alpha", (11,)),
        ("quality/real_models.py", "data/real-models", (14, 14, 14, 75, 60, 12, 10)),
        ("quality/real_models.py", "real-models", (14, 14, 14)),
    ],
)
def test_the_tables(script, page, rows):
    doc = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    tables = [table.strip() for table in printed(script, "--table").split("\n\n")]
    assert len(tables) >= len(rows)
    for table, count in zip(tables, rows, strict=False):  # what a script prints beyond them is for reading there
        assert len(table.splitlines()) >= count + 2 and table in doc


@pytest.mark.parametrize(("name", "rows"), [("demo-edits", 33), ("demo-edits-lambda100", 6)])
def test_the_tables_by_alpha(name, rows):
    table = printed("quality/demo_edits.py", "--table", str(DATA / f"{name}.json")).strip()
    assert len(table.splitlines()) == rows + 2 and table in (DATA / "demo-edits.md").read_text(encoding="utf-8")


def test_the_tables_of_methods_on_a_real_model():
    tool = runpy.run_path(str(ROOT / "benchmarks/quality/real_methods.py"))
    held = json.loads((DATA / "smollm2-methods.json").read_text(encoding="utf-8"))
    text = (DATA / "smollm2-methods.md").read_text(encoding="utf-8")
    assert tool["page"](held) == text and "| 100 | memit | 0.670 [0.580, 0.760] |" in text
    assert tool["saved"](held) == (DATA / "smollm2-methods.json").read_text(encoding="utf-8")


def test_rows_of_a_run_that_has_not_ended_are_taken_and_what_is_no_run_is_refused(tmp_path, capsys):
    tool = runpy.run_path(str(ROOT / "benchmarks/quality/real_methods.py"))
    row = json.loads((DATA / "smollm2-methods.json").read_text(encoding="utf-8"))["counterfact"]["rows"]["batch 10"][
        "scr"
    ]
    points = tmp_path / "run" / "smollm2" / "scr" / "points"
    points.mkdir(parents=True)
    (points / "000.json").write_text(json.dumps(row), encoding="utf-8")
    (points / "001.json").write_text(json.dumps(row | {"settings": {"failed": "no room"}}), encoding="utf-8")
    held = {}
    assert tool["taken"](held, "zsre", tmp_path / "run") == 1
    assert "left out: scr at 10: no room" in capsys.readouterr().err
    assert "| 10 | scr | 0.700" in tool["tables"](held["zsre"], "batch")
    for damage, words in (("{", "000.json: not JSON"), (None, "holds rows of 0 models")):
        (points / "000.json").write_text(damage, encoding="utf-8") if damage else None
        with pytest.raises(KtError, match=words):
            tool["taken"]({}, "zsre", tmp_path / ("run" if damage else "nowhere"))


INTERVAL = re.compile(r"-?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]")


@pytest.mark.parametrize(
    ("page", "section", "tables"),
    [
        ("evaluation", "## Teacher forcing flatters", ("demo-protocols", "many-tokens")),
        ("probing", "### Does a share for attention leave less?", ("residual",)),
        ("demo-edits", "# The joint edit on the demo model", ("demo-edits",)),
        ("edits", "## Solve on top", ("stacks",)),
        ("methods-measured", "## On the demo model", ("demo-methods", "sequential", "smollm2-methods")),
        ("real-models", "# On real weights", ("real-models", "real-map", "real-alpha")),
    ],
)
def test_every_interval_that_a_page_quotes_stands_in_its_table(page, section, tables):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert section in text
    quoted = set(INTERVAL.findall(text.split(section, 1)[1]))
    measured = {n for table in tables for n in INTERVAL.findall((DATA / f"{table}.md").read_text(encoding="utf-8"))}
    assert quoted
    assert quoted - measured == set()


PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "ARCHITECTURE"))])


def page_name(path):
    return str(path.relative_to(ROOT))


def anchors(text):
    """The anchors that a Markdown viewer makes of the headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path, text):
    """Relative links of a page whose file, or whose heading in it, does not exist."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


def missing_files(text):
    """Files of the repository that a text names and that do not exist."""
    text = re.sub(r"[a-z]+://\S+", "", text)
    named = set(re.findall(r"\b(?:docs|benchmarks|tests|tools|src)/[\w./-]*\.(?:json|py|md|toml|png)\b", text))
    return sorted(name for name in named if not (ROOT / name).exists())


def unknown_names(text):
    """Dotted names under `kt` that do not exist."""
    return sorted({name for name in re.findall(r"\bkt\.[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", text) if not importable(name)})


def importable(name):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            held = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(held, part) and part not in getattr(held, "__dataclass_fields__", {}):
                return False
            held = getattr(held, part, None)
        return True
    return False


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_link_file_and_name_in_the_docs_exists(path):
    text = path.read_text(encoding="utf-8")
    assert dead_links(path, text) == []
    assert missing_files(text) == []
    assert unknown_names(text) == []


def test_every_file_that_the_sources_name_exists():
    sources = [p for p in (ROOT / "src" / "kt").rglob("*") if p.suffix in {".py", ".toml", ".md"}]
    benchmarks = (ROOT / "benchmarks").rglob("*.py")
    found = {page_name(p): missing_files(p.read_text(encoding="utf-8")) for p in [*sources, *benchmarks]}
    assert {name: missing for name, missing in found.items() if missing} == {}


def test_a_dead_link_file_or_name_is_found():
    page = DOCS / "README.md"
    assert dead_links(page, "[a](nowhere.md) [b](data.md#nowhere) [c](data.md#formats)") == [
        "nowhere.md",
        "data.md#nowhere",
    ]
    assert missing_files("`docs/data/nothing.json`, `docs/data/trust.json`") == ["docs/data/nothing.json"]
    assert unknown_names("`kt.edit`, `kt.nothing`, `kt.tracing.nothing.more`") == [
        "kt.nothing",
        "kt.tracing.nothing.more",
    ]


def test_every_page_is_listed_in_the_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)\)", index))


@pytest.mark.parametrize("tokens", [pytest.param(0, marks=pytest.mark.slow), 2_000])
def test_the_python_of_the_readme_warns_of_its_verdict_alone(tmp_path, monkeypatch, tokens):
    """In an empty cache, and where `kt demo` has kept second moments over fewer tokens: reuse is no warning."""
    [block] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.setenv("PLOTLY_RENDERER", "json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KT_CACHE", str(tmp_path / "cache"))
    if tokens:
        sites = [kt.Site(kind, layer) for kind in (kt.Kind.MLP, kt.Kind.ATTN) for layer in (0, 1)]
        kt.key_statistics(kt.load("demo"), sites, max_tokens=tokens)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        exec(block, {})
    found = [each for each in caught if issubclass(each.category, UserWarning)]
    assert [each.category for each in found] == [FailedCheck], [str(each.message) for each in found]
    assert "warns here of one norm" in block and str(found[0].message).startswith("the norm of 1 of ")


@pytest.mark.parametrize("page", ["add-a-format", "add-a-figure", "add-a-family"])
def test_the_code_of_a_guide_runs(page, tmp_path, monkeypatch):
    from kt.facts.formats import FORMATS

    monkeypatch.chdir(tmp_path)
    before, names = dict(FORMATS), {}
    try:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
            exec(block, names)
    finally:
        FORMATS.clear()
        FORMATS.update(before)
    assert names


def test_every_measured_file_is_listed_with_its_command():
    listed = (DATA / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in DATA.glob("*.json")} == set(re.findall(r"`([\w-]+\.json)`", listed))


@pytest.mark.parametrize("name", ["demo-methods", "demo-tuning"])
def test_every_method_is_measured_and_tuned_or_its_row_says_that_it_is_not(name):
    from kt.editing import METHODS

    held = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    found = set(held) if isinstance(held, dict) else {(r["method"], r["edits"]) for r in held}
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    named = [m for m in METHODS if not re.search(rf"^\| `{m}` \|.*\| not measured \|$", page, re.M)]
    rows = json.loads((DATA / "demo-methods.json").read_text(encoding="utf-8"))
    default = {row["method"] for row in rows if row.get("setting") == {}}  # measured as they come, which the page says
    measured = (ROOT / "docs" / "methods-measured.md").read_text(encoding="utf-8")
    assert all(f"`{method}`" in measured.partition("at their defaults:")[2].partition(".")[0] for method in default)
    wanted = set(named) - default if isinstance(held, dict) else {(m, n) for m in named for n in (1, 10, 100)}
    assert wanted <= found


def test_the_demo_presets_hold_what_tuning_found():
    from kt.presets import presets

    tuned = json.loads((DATA / "demo-tuning.json").read_text(encoding="utf-8"))
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
    record = json.loads((DATA / "performance.json").read_text(encoding="utf-8"))
    assert set(record) == {"trace", "targets", "solve", "statistics", "eval"}
    rows = [row for part in record.values() for row in part["rows"]]
    assert [row["work"] for row in rows if not row["holds"]] == []
    assert all(row["difference"] <= row["bound"] for row in rows)
    assert sum(row["goal"] is not None for row in rows) >= 6
