"""Targets so long that a float has no room for their joint probability: they are compared by its logarithm."""

import json
import math

import pytest
from editing_help import FAST
from families import tiny_model

import kt
from kt.editing.request_report import told_prob
from kt.editing.verdict import Verdict
from kt.model.scoring import answer_row, teacher_force

pytestmark = pytest.mark.filterwarnings("ignore")
LONG = " ".join(["Rome and"] * 40)
REQUESTS = [
    {"prompt": "The capital of {} is", "subject": "France", "answer": "Paris", "target": LONG},
    {"prompt": "The capital of {} is", "subject": "Italy", "answer": "Rome", "target": "Paris"},
]


@pytest.fixture(scope="module")
def solved():
    model = tiny_model("llama", max_position_embeddings=1024)
    return model, kt.edit(model, REQUESTS, "ft", **{k: v for k, v in FAST.items() if k in ("layers_mlp", "num_steps")})


def test_the_logarithms_are_kept_with_the_edit_and_are_those_of_the_targets(solved, tmp_path):
    model, edit = solved
    assert edit.report[0].target_prob == (0.0, 0.0) and edit.report[1].target_prob[1] > 0
    row = answer_row(model, ("The capital of France is", LONG))
    before = teacher_force(model, [row])[row.question].log_prob
    (kept,) = [row["target_log_prob"] for row in edit.as_dict()["requests"] if "target_log_prob" in row]
    assert kept["before"] == pytest.approx(before, rel=1e-5) and -math.inf < kept["after"] != kept["before"]
    again = kt.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert json.dumps(again.as_dict()) == json.dumps(edit.as_dict())
    assert told_prob(before) in str(edit.tables()[0].markdown()) and "e-" in told_prob(before)


@pytest.mark.parametrize(("after", "fell"), [(-900.0, True), (-700.5, False)])
def test_a_long_target_that_became_less_likely_is_said(solved, after, fell):
    _, edit = solved
    manifest = edit.manifest | {"log_probs": [{"target": [-800.0, after]}, {}]}
    lines = [line for line in Verdict.of(manifest, edit.report).warnings if "less likely" in line and "France" in line]
    assert len(lines) == fell and all("3.7e-348 -> 1.4e-391" in line for line in lines)


def test_a_probability_is_told_by_its_logarithm_whatever_its_size():
    for value in (0.25, 1e-7, 9.96e-12):
        assert told_prob(math.log(value)) == f"{value:.1e}".replace("e-0", "e-")
    assert told_prob(-2000.0) == "2.6e-869" and told_prob(0.0) == "1.0e0"
