"""Recipes of abilities: the supplement's table 5 as written down, its refusals, a run where lm-eval is there."""

import importlib.util
import re
import sys
from dataclasses import replace

import pytest
import torch

import kt
from kt.capability import GSM8K_TWO_SHOT
from kt.errors import BadFile, KtError
from kt.recipes import Cited, read_recipe, run_recipe
from kt.recipes.abilities_smoke import metric_like

NAME = "intattn-supplement-table-5"
WITH_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


def test_the_tasks_are_the_preset_of_kt_abilities_and_the_papers_figures_stand_by_model():
    recipe = read_recipe(NAME)
    assert recipe.tasks == GSM8K_TWO_SHOT and recipe.edits == 100
    memit = next(row for row in recipe.rows if row.label == "MEMIT").cited
    assert memit["qwen2.5-7b"] == (Cited(67.10), Cited(67.10), Cited(3.10)) and memit["mistral-7b"][2] == Cited(3.16)
    assert {row.method for row in recipe.rows} == {None, "intattn", "memit", "rome", "r-rome", "alphaedit"}
    assert recipe.apart == ("PPL",) and recipe.scales == {"PPL": 1.0}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("gsm8k/exact_match,strict-match", "exact_match", "write task/metric,filter"),
        ('apart = ["PPL"]', 'apart = ["PLP"]', "'PLP' is no column"),
        ('"PPL" = 1.0', '"PLP" = 1.0', "'PLP' is no column"),
        ("seeds = [0]", "seeds = [0, 1]", "one seed"),
        ('apart = ["PPL"]', 'apart = ["PPL"]\nkinds = ["mlp"]', "unknown key 'kinds'"),
        ("[abilities]", "[axis]\nname = 'edits'\nvalues = [1]\n[abilities]", "unknown key 'axis'"),
    ],
)
def test_a_wrong_recipe_is_one_line(tmp_path, old, new, words):
    import kt.recipes.reading as reading

    text = (reading.FOLDER / f"{NAME}.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "own.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(BadFile, match=re.escape(words)) as error:
        read_recipe(path)
    assert "\n" not in str(error.value)


def test_without_lm_eval_it_says_what_to_install_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # what import then does is as if it were not there
    with pytest.raises(KtError, match=re.escape("pip install 'kt-interp[lm-eval]'")) as error:
        run_recipe(read_recipe(NAME), lambda name: pytest.fail("loaded"), smoke=True)
    assert error.value.exit_code == 2


def test_smoke_tasks_stand_for_the_papers_by_what_they_measure():
    found = [metric_like(metric) for metric in read_recipe(NAME).columns.values()]
    assert found[0] == found[1] == "kt_smoke_text/exact_match,first-words"
    assert found[2] == "kt_smoke_whole/word_perplexity,none"


needs_lm_eval = pytest.mark.skipif(
    not WITH_LM_EVAL, reason="lm-eval is not installed: pip install 'kt-interp[lm-eval]'"
)


@pytest.fixture(scope="module")
def demo():
    torch.set_num_threads(1)
    return kt.load("demo")


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_a_smoke_run_gives_the_table_and_goes_on_row_by_row(demo, tmp_path):
    whole = read_recipe(NAME)
    recipe = replace(whole, rows=tuple(row for row in whole.rows if row.label in ("Before Edit", "ROME")))
    found = run_recipe(recipe, lambda name: demo, smoke=True, folder=tmp_path)
    cells = {(cell.row, cell.column): cell for cell in found.cells}
    first, accuracy = cells["Before Edit", "PPL"], cells["Before Edit", "ACC (strict)"]
    assert 1 < first.mean < 50 and first.difference is None and first.paper == Cited(3.06)
    assert 0 < accuracy.mean <= 100 and accuracy.n == 4
    assert cells["ROME", "PPL"].mean != first.mean, "measured with the edit in the model"
    (tmp_path / "qwen2.5-7b" / "points" / "001-ROME-all.json").unlink()
    again = run_recipe(recipe, lambda name: demo, smoke=True, folder=tmp_path, resume=True)
    rows, old = again.rows["qwen2.5-7b"], found.rows["qwen2.5-7b"]
    assert [row.seconds == was.seconds for row, was in zip(rows, old, strict=True)] == [True, False]
    assert again.cells == found.cells


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_the_whole_table_runs_in_smoke(demo):
    recipe = read_recipe(NAME)
    found = run_recipe(recipe, lambda name: demo, smoke=True)
    assert [row.series for row in found.rows["qwen2.5-7b"]] == [row.label for row in recipe.rows]
    assert all(cell.mean is not None for cell in found.cells)
