"""`kt train-editor` as a user runs it: an editor, an edit by it, a resumed run, one line for bad input."""

import json
from pathlib import Path

import pytest

from kt.cli import interrupt

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = ("--layers-mlp", "0-1", "--set", "steps=4,check_every=2,edits=6,rank=4,layers=1,held_out=0.2")


@pytest.fixture(scope="module")
def records_file(tmp_path_factory):
    from editing_help import records

    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows = [
        {
            "prompt": fact.template,
            "subject": fact.subject,
            "answer": fact.answer,
            "target": fact.target,
            "paraphrases": list(fact.rephrasings),
            "neighbourhood": [{"prompt": near.prompt, "answer": near.answer or "Rome"} for near in fact.neighbours],
        }
        for fact in records()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_editor_is_trained_edits_and_resumes(kt, model_folder, records_file, facts_file, monkeypatch):
    train = ("train-editor", "-m", model_folder, "--facts", records_file, *SMALL)
    ran = kt(*train, "--out", "trained", "--json", "-")
    assert ran.code == 0, ran.err
    assert "step 4: loss" in ran.err and ran.json["sites"] == ["mlp.0", "mlp.1"]
    assert ran.json["settings"]["layers"] == 1  # of each network; `--layers-mlp` names those that are written
    assert [check["step"] for check in ran.json["history"]] == [0, 2, 4] and ran.json["n_held_out"] > 0
    edit = ("apply-edit", "-m", model_folder, "--facts", facts_file, "--method", "malmen", "--force")
    ran = kt(*edit, "--set", "editor=trained/editor.safetensors", "--out", "edit", "--json", "-")
    assert ran.code == 0 and len(ran.json["deltas"]) == 2, ran.err
    from kt.editing.hyper import train as module

    read = module._Training._check

    def cut(self, loss):
        if self.step == 4:
            raise KeyboardInterrupt
        read(self, loss)

    monkeypatch.setattr(module._Training, "_check", cut)
    assert kt(*train, "--out", "cut").code == interrupt.INTERRUPTED
    monkeypatch.setattr(module._Training, "_check", read)
    ran = kt(*train, "--resume", "cut")
    assert ran.code == 0, ran.err
    whole, resumed = (Path(run, "editor.safetensors").read_bytes() for run in ("trained", "cut"))
    assert whole == resumed


def test_a_training_that_diverges_offers_nothing_to_go_on_with(kt, model_folder, records_file):
    train = ("train-editor", "-m", model_folder, "--facts", records_file, *SMALL[:3], SMALL[3] + ",lr=1e15")
    ran = kt(*train, "--out", "apart")
    assert ran.code == 1 and "the loss is not finite at step" in ran.err and "smaller lr" in ran.err
    assert "--resume" not in ran.err and not list(Path().glob("*apart*"))


def test_bad_input_of_training_is_one_line(kt, model_folder, records_file, facts_file):
    model, facts = ("-m", model_folder), ("--facts", records_file)
    made = kt("train-editor", *model, *facts, *SMALL, "--out", "made", "--quiet")
    assert made.code == 0, made.err
    given = "editor=made/editor.safetensors"
    for arguments, words in (
        (("train-editor", *model, "--facts", facts_file), "of 4 can train an editor"),
        (("train-editor", *model, *facts, "--limit", 12), "12 records of 12 can train"),
        (("train-editor", *model, *facts, "--exclude", records_file), "24 of an excluded subject"),
        (("train-editor", *model, *facts, "--method", "memit"), "malmen, mend"),
        (("train-editor", *model, *facts, "--set", "speed=3"), "speed"),
        (("train-editor", *model, *facts, "--layers-mlp", "9"), "layers 0 to 2"),
        (("train-editor", *model, *facts, "--modules", "mlp.nothing"), "nothing"),
        (("apply-edit", *model, "--facts", facts_file, "--method", "malmen"), "needs an editor"),
        (("apply-edit", *model, "--facts", facts_file, "--method", "mend", "--set", given), "editor of malmen"),
        (("apply-edit", "--limit", 1, "--method", "malmen", "--set", given), "other weights"),
        (("apply-edit", *model, "--facts", facts_file, "--method", "malmen", "--set", "editor=none"), "no such file"),
        (
            ("apply-edit", *model, "--facts", facts_file, "--method", "malmen", "--set", f"editor={facts_file}"),
            "not a whole",
        ),
    ):
        ran = kt(*arguments)
        assert ran.code == 2 and words in ran.err, (arguments, ran.err)
        assert ran.err.startswith("kt: error: ") and ran.err.count("\n") == 1, ran.err
