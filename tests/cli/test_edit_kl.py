"""`kt apply-edit --kl`: how far the edit moves the neighbours' next token, beside the scores that it belongs to."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
NEAR = [{"prompt": "The mother tongue of Tomas Brill is", "answer": "Polish"}]


@pytest.fixture
def edited(kt, model_folder, corpus_file, tmp_path):
    path = tmp_path / "near.jsonl"
    subjects = {"Danielle Darrieux": "Polish", "Marie Curie": "French"}
    records = [
        {"prompt": "The mother tongue of {} is", "subject": s, "answer": "Italian", "target": t, "neighbourhood": NEAR}
        for s, t in subjects.items()
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    solve = ("--method", "memit", "--layers-mlp", "0-1", "--corpus", corpus_file, "--max-tokens", 800, "--no-generate")
    return lambda *more: kt("apply-edit", "-m", model_folder, "--edits", path, *solve, "--force", *more)


def test_kl_joins_the_scores(edited):
    ran = edited("--evaluate", "end", "--kl", "--json", "-", "-o", "run")
    assert ran.code == 0, ran.err
    assert ran.json["after"]["neighbourhood_kl"]["n"] == 2 and ran.json["after"]["neighbourhood_kl"]["mean"] > 0
    assert "neighbourhood_kl" not in ran.json["before"] and ran.json["protocol"]["neighbourhood_kl"]
    assert "neighbourhood_kl" not in edited("--evaluate", "end", "--json", "-", "-o", "plain").json["after"]


def test_kl_is_in_every_step_and_in_the_figure(edited):
    asked = ("--mode", "sequential", "--evaluate", "step", "--kl", "--html", "steps.html", "--json", "-", "-o", "run")
    ran = edited(*asked)
    assert ran.code == 0, ran.err
    assert [step["metrics"]["neighbourhood_kl"]["n"] for step in ran.json["steps"]] == [1, 2]
    page = Path("steps.html").read_text(encoding="utf-8")
    assert "KL of neighbours" in page


def test_kl_without_scores_is_one_line(edited):
    ran = edited("--kl")
    assert ran.code == 2 and "add --evaluate end" in ran.err and ran.err.count("\n") == 1
    assert list(Path().iterdir()) == []
