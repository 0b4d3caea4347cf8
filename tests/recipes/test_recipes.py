"""Recipes: what the files hold agrees with itself, and those of edits run from end to end on the demo model."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kt
from kt.errors import BadFile, KtError
from kt.facts.fact import Fact
from kt.recipes import Cell, Cited, names, read_recipe, run_recipe
from kt.recipes.edited import EditedRecipe
from kt.recipes.result import SMOKE
from kt.recipes.table import TableRun

ROOT = Path(__file__).parents[2]
OF_EDITS = [name for name in names() if read_recipe(name).kind == "edits"]
FASTEST = "jeep-figure-6"  # no generated text
OWN = """
summary = "s"
paper = "p"
place = "Table 9"
[data]
facts = "demo"
edits = 2
[columns]
"ES" = "edit_success_tf_token"
[models]
"m" = "demo"
[[rows]]
label = "MEMIT"
method = "memit"
[rows.paper]
"m" = [[50.0, 0.5]]
"""


@pytest.fixture
def own(tmp_path):
    def write(text):
        path = tmp_path / "own.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_there_is_a_recipe_for_every_table_with_edits():
    tables = {"intattn-table-1", "intattn-table-2", *(f"intattn-supplement-table-{n}" for n in (1, 2, 3, 4))}
    assert set(names()) >= tables | {"jeep-table-2", "jeep-table-3", "jeep-table-4", "jeep-figure-4", "jeep-figure-6"}


@pytest.mark.parametrize("name", names())
def test_every_recipe_names_its_source_and_where_its_data_are(name):
    recipe = read_recipe(name)
    if recipe.kind == "methods":
        assert recipe.paper == "kt" and (ROOT / recipe.place).is_file() and recipe.notes
    else:
        assert recipe.paper.startswith("arXiv ") and re.search(r"([Tt]able|Figures?) \d", recipe.place) and recipe.notes
    assert recipe.facts == "demo" or recipe.facts.startswith("hf:") or recipe.url


@pytest.mark.parametrize("name", OF_EDITS)
def test_the_metrics_of_edits_say_how_they_ask(name):
    assert all(re.search(r"_(tf|gen|prob)(_|$)", metric) for metric in read_recipe(name).columns.values())


NOT_ITS_MEAN = {("jeep-table-2", "Unedited", "llama-7b"), ("jeep-table-4", "w/o Step2", "llama-7b")}
"""Printed scores that no rounding of the printed columns gives (docs/papers.md)."""


@pytest.mark.parametrize("name", ["jeep-table-2", "jeep-table-3", "jeep-table-4"])
def test_the_papers_scores_are_the_harmonic_means_of_its_columns(name):
    """A slip in copying a figure would show here, to the rounding of what is printed."""

    def score_of(parts):
        return 3 / sum(1 / part for part in parts)

    for row in read_recipe(name).rows:
        for model, cited in row.cited.items():
            score, *parts = (c.value for c in cited)
            least, most = (score_of([part + d for part in parts]) for d in (-0.051, 0.051))
            agrees = least - 0.051 <= score <= most + 0.051
            assert agrees != ((name, row.label, model) in NOT_ITS_MEAN), (row.label, model, score, score_of(parts))


def test_the_end_points_of_the_sweep_are_the_ablation_and_table_1():
    """α = 0 is MEMIT to the digit, and what B.2 prints; the paper's α on Mistral is its row of Table 1."""
    tables = {n: {row.label: row.cited for row in read_recipe(n).rows} for n in OF_EDITS}
    for number, model in ((1, "mistral-7b"), (2, "qwen2.5-7b")):
        curve = tables[f"intattn-supplement-table-{number}"]["IntAttn-Edit"]
        assert curve[f"{model}/0"] == tables["intattn-table-1"]["MEMIT"][f"{model}/100"]
        assert curve[f"{model}/0"] == tables["intattn-supplement-table-3"]["MLP-only"][model]
    joint = tables["intattn-table-1"]["IntAttn-Edit"]["mistral-7b/100"]
    assert tables["intattn-supplement-table-1"]["IntAttn-Edit"]["mistral-7b/0.1"] == joint


def test_the_contradictions_that_the_docs_list_are_in_the_figures():
    cited = {n: {row.label: row.cited for row in read_recipe(n).rows} for n in OF_EDITS}
    curve = {key: c[0].value for key, c in cited["intattn-supplement-table-2"]["IntAttn-Edit"].items()}
    assert max(curve, key=lambda key: curve[key]) == "qwen2.5-7b/0.2"
    sweep = cited["intattn-supplement-table-2"]["IntAttn-Edit"]["qwen2.5-7b/0.3"]
    table = cited["intattn-table-1"]["IntAttn-Edit"]["qwen2.5-7b/100"]
    assert [c.value for c in sweep[1:3]] == [53.90, 34.92] and [c.value for c in table[1:3]] == [55.04, 34.40]
    wiki = cited["intattn-table-2"]
    for edits in (100, 300, 500):
        assert wiki["IntAttn-Edit"][f"qwen2.5-7b/{edits}"][1] < wiki["MEMIT"][f"qwen2.5-7b/{edits}"][1]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('method = "memit"', 'method = "memo"', "no method 'memo'"),
        ('method = "memit"', 'methods = "memit"', "unknown key 'methods'"),
        ('summary = "s"', "", "'summary' is missing"),
        ("edits = 2", "", "'edits' is missing"),
        ('"m" = [[50.0, 0.5]]', '"n" = [50.0]', "'n' is no model"),
        ('"m" = [[50.0, 0.5]]', '"m/3" = [50.0]', "'m/3' is no model of the recipe with a value of its axis"),
        ('"m" = [[50.0, 0.5]]', '"m" = [50.0, 1.0]', "2 figures for 1 columns"),
        ('"m" = [[50.0, 0.5]]', '"m" = ["x"]', "is 'x'; give the paper's figure, a number"),
        ("edits = 2", "edits = ", "not TOML"),
    ],
)
def test_a_wrong_recipe_is_one_line(own, old, new, words):
    with pytest.raises(BadFile, match=re.escape(words)) as error:
        read_recipe(own(OWN.replace(old, new)))
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(BadFile, match="no recipe 'nonsense'; there are intattn-figure-4"):
        read_recipe("nonsense")


def test_data_that_no_hub_has_is_asked_for_with_its_address():
    with pytest.raises(BadFile, match=r"fetch https://memit.*multi_counterfact\.json and give it with --facts"):
        run_recipe(read_recipe("jeep-table-3"), lambda name: pytest.fail("no model is loaded before"))


def test_too_few_facts_are_refused_before_a_model_is_loaded():
    facts = [Fact("The capital of {} is", "France", "Paris", target="Rome", id="a")]
    with pytest.raises(KtError, match="edits 500 facts, and there are 1"):
        run_recipe(read_recipe("intattn-table-1"), lambda name: pytest.fail("loaded"), facts)


def cell(mean, ci95, paper, comparable=True):
    return Cell("m", None, "row", "ES", mean, ci95, 3, paper, comparable)


def test_a_cell_holds_ours_the_papers_and_the_difference():
    whole = cell(92.0, (90.0, 94.0), Cited(92.7, 0.6))
    assert str(whole) == "92.00 [90.00, 94.00] | 92.7 ± 0.6 (-0.70)"
    assert whole.difference == pytest.approx(-0.7) and whole.within is True
    assert cell(92.0, (90.0, 92.5), Cited(92.7)).within is False
    assert str(cell(None, None, Cited(20.0))) == "– | 20" and str(cell(50.0, None, None)) == "50.00"


def test_a_smoke_run_gives_no_difference_and_says_so():
    tried = cell(92.0, (90.0, 94.0), Cited(92.7), comparable=False)
    assert tried.difference is None and tried.within is None and "(" not in str(tried)
    recipe = read_recipe("intattn-table-1").smoked()
    run = TableRun(recipe, True, tuple(tried._replace(column=name) for name in recipe.columns), {}, "records")
    assert SMOKE in run.markdown() and run.as_dict()["warning"] == SMOKE
    assert SMOKE not in replace(run, smoke=False).markdown()


def test_a_smoke_run_is_small_and_of_the_demo_model():
    small = read_recipe("jeep-table-3").smoked()
    assert set(small.models.values()) == {"demo"} and small.facts == "demo" and small.edits <= 5
    assert (
        isinstance(small, EditedRecipe) and len(small.seeds) == 1 and small.variant is None and small.corpus == "demo"
    )


@pytest.fixture(scope="module")
def demo():
    torch.set_num_threads(1)
    return kt.load("demo")


def check(found, recipe):
    lines = [row for row in recipe.rows if row.method or row.unedited]
    measured = {cell.row for cell in found.cells if cell.mean is not None}
    assert measured == {row.label for row in lines}
    assert all(cell.n >= 1 for cell in found.cells if cell.mean is not None)
    assert len(found.lines()[0]) == len(found.columns())


@pytest.mark.filterwarnings("ignore")
def test_the_clamp_figure_runs_in_smoke(demo):
    recipe = read_recipe(FASTEST)
    found = run_recipe(recipe, lambda name: demo, smoke=True)
    check(found, recipe)
    assert {cell.model for cell in found.cells} == {"demo, not llama-7b"}
    assert [cell.at for cell in found.cells if cell.column == "ES"] == [0.05, 0.5, 1.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in OF_EDITS if name != FASTEST])
def test_every_recipe_runs_in_smoke(demo, name):
    recipe = read_recipe(name)
    check(run_recipe(recipe, lambda name: demo, smoke=True), recipe)


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_of_ones_own_runs_and_goes_on(demo, own, tmp_path):
    recipe = read_recipe(own(OWN.replace('method = "memit"', 'method = "memit"\noptions = { v_num_grad_steps = 2 }')))
    facts = [f for f in kt.load_facts("demo", limit=8) if f.target or f.foil]
    found = run_recipe(recipe, lambda name: demo, facts, corpus="demo", folder=tmp_path / "run")
    (only,) = found.cells
    assert only.paper == Cited(50.0, 0.5) and only.difference == pytest.approx(only.mean - 50)
    assert only.n == 2, "the first facts of the file, as many as the recipe edits"
    again = run_recipe(recipe, lambda name: demo, facts, corpus="demo", folder=tmp_path / "run", resume=True)
    assert again.sweeps["m"].rows[0].seconds == found.sweeps["m"].rows[0].seconds, "read, not solved again"
