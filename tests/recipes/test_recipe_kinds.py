"""Kinds of recipes beside edits: what each reads and refuses, and that it runs on the demo model."""

import json
import re
from dataclasses import replace

import pytest
import torch

import kt
from kt.cli import main
from kt.errors import BadFile, KtError
from kt.experiments.case_study import CaseStudy, Question, Reply
from kt.recipes import KINDS, names, read_recipe, run_recipe
from kt.recipes.case import CaseRun
from kt.recipes.result import SMOKE
from kt.recipes.trace_checks import _ROLES
from kt.tracing import ROLES

OTHERS = [name for name in names() if read_recipe(name).kind in ("trace", "probe", "case")]
QUICK = ("intattn-figures-1-2", "jeep-figure-2", "jeep-table-1")
OWN = {
    "trace": """
kind = "trace"
[trace]
samples = 2
[[claims]]
says = "peaks early"
section = "1"
check = "peak"
kind = "attn"
layers = [1, 5]
""",
    "probe": """
kind = "probe"
[probe]
draws = "answers"
[[claims]]
says = "promoted high up"
section = "1"
check = "stage"
stage = "promotion"
part = "high"
""",
}
SHARED = """
summary = "s"
paper = "p"
place = "Figure 9"
[data]
facts = "demo"
most = 8
[models]
"m" = "demo"
"""


@pytest.fixture
def own(tmp_path):
    def write(kind, old="", new=""):
        head, _, tables = OWN[kind].partition("\n[")
        text = f"{head}\n{SHARED}\n[{tables}"
        assert old in text
        path = tmp_path / "own.toml"
        path.write_text(text.replace(old, new), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def demo():
    torch.set_num_threads(1)
    return kt.load("demo")


def test_there_is_a_recipe_of_every_kind_and_of_every_figure():
    assert {read_recipe(name).kind for name in names()} == set(KINDS)
    figures = {"intattn-figures-1-2", "intattn-supplement-figures-1-2", "jeep-figure-2", "jeep-figure-5"}
    assert figures | {"jeep-table-1", "intattn-supplement-table-5"} <= set(names())


def test_the_roles_that_claims_may_name_are_those_of_tracing():
    assert _ROLES == ROLES


@pytest.mark.parametrize(
    ("kind", "old", "new", "words"),
    [
        ("trace", 'kind = "trace"', 'kind = "traces"', "no kind of recipe 'traces'; there are edits, trace"),
        ("trace", "most = 8", "edits = 8", "unknown key 'edits'; known are facts, url, format, most"),
        ("trace", "samples = 2", "draws = 2", "[trace] of"),
        ("trace", "[trace]", '[probe]\ndraws = "answers"\n[trace]', "unknown key 'probe'"),
        ("trace", "[trace]", '[columns]\n"ES" = "edit_success_tf_token"\n[trace]', "unknown key 'columns'"),
        ("trace", 'check = "peak"', 'check = "stage"', "no check 'stage'; there are peak, role"),
        ("trace", 'check = "peak"', 'check = "falls"', "check falls: unknown key 'layers'"),
        ("trace", 'kind = "attn"', "", "'kind' is missing"),
        ("trace", 'kind = "attn"', 'kind = "atn"', "kind has no 'atn'; there are mlp, attn"),
        ("trace", 'kind = "attn"', 'kind = "attn"\nat = "object"', "at has no 'object'"),
        ("trace", "layers = [1, 5]", 'part = "early"', "part has no 'early'; there are low, middle, high"),
        ("trace", 'says = "peaks early"', "", "'says' is missing"),
        ("probe", 'draws = "answers"', 'draws = "sets"', "belong together"),
        ("probe", 'draws = "answers"', 'draws = "answer"', "draws has no 'answer'; there are answers, sets"),
        ("probe", 'stage = "promotion"', 'stage = "stage"', "stage has no 'stage'"),
        ("probe", 'draws = "answers"', 'draws = "answers"\nsamples = 3', "unknown key 'samples'"),
    ],
)
def test_keys_and_values_of_another_kind_are_one_line(own, kind, old, new, words):
    with pytest.raises(BadFile, match=re.escape(words)) as error:
        read_recipe(own(kind, old, new))
    assert "\n" not in str(error.value)


def test_an_argument_that_a_kind_does_not_take_is_refused_before_a_model_is_loaded(own):
    recipe, load = read_recipe(own("trace")), lambda name: pytest.fail("loaded")
    with pytest.raises(KtError, match="draws answers and no word sets"):
        run_recipe(read_recipe("jeep-figure-2"), load, sets="demo", smoke=True)
    for argument in ({"resume": True}, {"corpus": "demo"}, {"sets": "demo"}):
        with pytest.raises(KtError, match=f"kind trace, which has no use for {next(iter(argument))}"):
            run_recipe(recipe, load, **argument)


def check_smoke(found, recipe, folder):
    assert found.smoke and found.n_facts > 0 and SMOKE in found.markdown()
    assert all(verdict.holds is None for verdict in found.verdicts), "a smoke run judges nothing"
    measured = [v for v in found.verdicts if not v.finding.reason]
    assert measured and all(v.finding.value.n > 0 for v in measured)
    held = json.loads(json.dumps(found.as_dict()))
    assert held["kind"] == recipe.kind and [c["says"] for c in held["claims"]] == [c.says for c in recipe.claims]
    assert bool(found.figures()) == (recipe.kind != "case")
    found.save(folder)
    assert [path.parent.name for path in folder.glob("*/*")] == list(recipe.models)
    for table in found.tables():
        assert {len(line) for line in table.rows} == {len(table.columns)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_one_recipe_of_each_kind_runs_in_smoke(demo, name, tmp_path):
    recipe = read_recipe(name)
    check_smoke(run_recipe(recipe, lambda name: demo, smoke=True), recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in QUICK])
def test_the_other_recipes_run_in_smoke(demo, name, tmp_path):
    recipe = read_recipe(name)
    check_smoke(run_recipe(recipe, lambda name: demo, smoke=True), recipe, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_ones_own_judges_its_claim_and_gives_the_same_bytes_again(demo, own):
    recipe = read_recipe(own("trace"))
    assert recipe.n_facts == 8 and recipe.limited(2).n_facts == 2 and recipe.limited(9) is recipe
    first, again = (run_recipe(recipe.limited(2), lambda name: demo).as_dict() for _ in range(2))
    assert first["claims"][0]["holds"] in (True, False) and first["warning"] is None
    assert first["n_facts"] <= 2 and json.dumps(first) == json.dumps(again)


@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_table_results_figures_and_raw_measurements(own, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["run", str(own("trace")), "--limit", "2", "--out", str(folder)]) == 0
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"manifest.json", "results.json", "table.md", "figures.html", "m/arrays.safetensors"}
    held = json.loads((folder / "results.json").read_text())
    assert held["claims"][0]["says"] == "peaks early" and held["models"]["m"]["curves"]["attn"]["prob"]["n"] <= 2
    assert "peaks early" in capsys.readouterr().out and "peaks early" in (folder / "table.md").read_text()
    assert main(["run", str(own("trace")), "--resume", str(folder)]) == 2
    assert main(["run", str(own("trace")), "--corpus", "demo", "--out", str(tmp_path / "no")]) == 2
    said = capsys.readouterr().err
    assert said.count("which has no use for") == 2 and not (tmp_path / "no").exists()


def test_the_case_shows_the_record_that_the_paper_shows(demo):
    recipe = read_recipe("jeep-table-1")
    with pytest.raises(KtError, match=r"the record of 'Henry S\. LeBlanc', which none of 40 facts is about"):
        run_recipe(recipe.limited(3), lambda name: pytest.fail("loaded"), kt.load_facts("demo", limit=40))


def test_what_a_model_says_is_no_mark_up_in_the_table(demo):
    recipe = read_recipe("jeep-table-1")
    replies = {"unedited": (Reply("<b>a|b\u202e\n", True),), "MEMIT": (Reply("c", False),)}
    study = CaseStudy("m", "r", (Question("edited", "<i>", ("x",)),), replies)
    run = CaseRun(replace(recipe, claims=()), False, {"llama-7b": study}, ())
    text = run.markdown()
    assert "&lt;i&gt;" in text and "a\\|b\\u202e" in text and "<b>" not in text
    cells = run.held()["cells"]
    assert [cell["agrees"] for cell in cells] == [False, None, None] and cells[0]["paper"]["text"] == "Canada"
