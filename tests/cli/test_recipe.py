"""`kt run` as a user runs it: the list, a recipe of one's own, what a smoke run says, bad input in one line."""

import json
from pathlib import Path

import pytest

from kt.cli.app import COMMANDS

pytestmark = [
    pytest.mark.skipif("run" not in COMMANDS, reason="kt run is not in the table of commands"),
    pytest.mark.filterwarnings("ignore"),
]
OWN = """
summary = "MEMIT on four facts"
paper = "arXiv 0000.00000"
place = "Table 9"
notes = ["A note."]
[data]
facts = "{facts}"
edits = 3
[statistics]
corpus = "{corpus}"
max_tokens = 800
[columns]
"ES" = "edit_success_tf_token"
[models]
"tiny" = "{model}"
[axis]
name = "edits"
values = [1, 3]
[[rows]]
label = "MEMIT"
method = "memit"
options = {{ v_num_grad_steps = 2, layers_mlp = [0, 1], mom2_update_weight = 0.01 }}
[rows.paper]
"tiny/3" = [[50.0, 0.5]]
"""

TWO_MODELS = """
kind = "methods"
summary = "s"
paper = "p"
place = "t"
[data]
facts = "demo"
edits = 2
[places]
batches = [2]
fluency = 0
[models]
"a" = "demo"
"b" = "{folder}"
[[rows]]
label = "ft"
method = "ft"
options = {{ num_steps = 1 }}
[[rows]]
label = "deep"
method = "ft"
options = {{ num_steps = 1, layers_mlp = [6] }}
"""


@pytest.fixture
def own(model_folder, facts_file, corpus_file, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(OWN.format(facts=facts_file, corpus=corpus_file, model=model_folder), encoding="utf-8")
    return path


def test_the_recipes_are_listed(kt):
    ran = kt("run", "ls", "--json", "-")
    assert ran.code == 0 and "intattn-table-1" in {r["name"] for r in ran.json["recipes"]}


def test_a_recipe_runs_to_the_papers_table(kt, own):
    ran = kt("run", own, "--out", "run")
    assert ran.code == 0, ran.err
    assert "arXiv 0000.00000, Table 9" in ran.out and "50 ± 0.5 (" in ran.out and "A note." in ran.err
    cells = json.loads(Path("run/results.json").read_text())["cells"]
    assert [(c["at"], c["n"]) for c in cells] == [(1.0, 1), (3.0, 3)]
    assert cells[1]["difference"] == pytest.approx(cells[1]["mean"] - 50) and cells[0]["paper"] is None
    assert "| tiny | 3 | MEMIT |" in Path("run/table.md").read_text() and Path("run/figures.html").exists()
    again = kt("run", own, "--resume", "run", "--json", "-")
    assert again.code == 0 and again.json["cells"] == cells and Path("run/tiny/points").is_dir()


def test_what_is_finished_before_a_model_that_does_not_fit_is_kept_and_said(kt, tmp_path, model_folder):
    """Rows of the first model are hours of work where it is a real one."""
    recipe = tmp_path / "two.toml"
    recipe.write_text(TWO_MODELS.format(folder=model_folder), encoding="utf-8")
    found = kt("run", recipe, "-o", tmp_path / "run")
    assert found.code == 2 and "row 'deep': " in found.err and "--only" in found.err
    assert f"; what was finished is kept: go on with --resume {tmp_path / 'run'}\n" in found.err
    again = kt("run", recipe, "--resume", tmp_path / "run", "--only", "ft")
    assert again.code == 0 and "deep" not in found.out


def test_fewer_edits_and_another_place_for_the_model(kt, own, model_folder):
    ran = kt("run", own, "--limit", 2, "-m", f"tiny={model_folder}", "--json", "-")
    assert ran.code == 0, ran.err
    assert [c["at"] for c in ran.json["cells"]] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "there are intattn-figure-4"),
        (("intattn-table-1", "-m", "gpt2"), "the recipe has mistral-7b, qwen2.5-7b"),
        (("intattn-table-1", "--smoke", "-m", "qwen2.5-7b"), "leave --model, --facts and --limit out"),
        (("jeep-table-3",), "fetch https://"),
        (("intattn-table-1", "--resume", "nowhere"), "no sweep has kept a point"),
    ],
)
def test_bad_input_is_one_line(kt, arguments, words):
    ran = kt("run", *arguments)
    assert ran.code == 2 and words in ran.err and ran.err.count("\n") == 1, ran.err
    assert [path for path in Path.cwd().rglob("*") if path.is_file()] == []
