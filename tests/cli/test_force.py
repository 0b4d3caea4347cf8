"""`--force` of the commands that write an edit from a file, and what `kt apply-edit` says of rounding."""

import json
import re
from pathlib import Path

import pytest
from families import byte_level_tokenizer, tiny_module


@pytest.fixture
def edited(kt, model_folder, facts_file, corpus_file):
    """Edits of the tiny model, solved as its folder has it and in bfloat16."""
    common = ("-m", model_folder, "-f", facts_file, "--limit", 2, "--corpus", corpus_file, "--max-tokens", 500)
    solving = ("--method", "memit", "--layers-mlp", "0", "--set", "v_num_grad_steps=3,mom2_update_weight=0.01")

    def run(folder, *more):
        return kt("apply-edit", *common, *solving, "-o", folder, "--force", *more)

    return run


@pytest.mark.filterwarnings("ignore")
def test_an_edit_of_another_dtype_needs_force(kt, edited, model_folder, facts_file):
    assert edited("edit").code == 0
    file = "edit/edit.safetensors"
    asked = ("-m", model_folder, "-f", facts_file, "--dtype", "bf16")
    for command in (
        ("eval", "--edit", file, "--no-generate", *asked),
        ("case", "--edits", f"memit={file}", *asked),
        ("probe", "--edit", file, *asked),
    ):
        refused = kt(*command, "-o", "scored")
        assert refused.code == 2 and "solved in float32" in refused.err and "--force" in refused.err, refused.err
        assert len(refused.err.strip().splitlines()) == 1
        done = kt(*command, "-o", f"scored-{command[0]}", "--force")
        assert done.code == 0 and "forced: the edit was solved in float32" in done.err, done.err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["ice", "grace"])
def test_force_also_applies_an_edit_that_changes_no_weight(kt, model_folder, facts_file, method):
    asked = ("-m", model_folder, "-f", facts_file, "--limit", 2)
    assert kt("apply-edit", *asked, "--method", method, "--force", "-o", "edit").code == 0
    file = "edit/edit.safetensors"
    commands = [("eval", "--edit", file, "--no-generate"), ("case", "--edits", f"mine={file}")]
    commands += [("probe", "--edit", file)] if method == "grace" else []  # which reads prompts without their text
    for command in commands:
        refused = kt(*command, *asked, "--dtype", "bf16", "-o", "scored")
        assert refused.code == 2 and "--force" in refused.err and refused.err.count("\n") == 1, refused.err
        done = kt(*command, *asked, "--dtype", "bf16", "-o", f"scored-{command[0]}", "--force")
        assert done.code == 0 and "forced: " in done.err, done.err


@pytest.mark.filterwarnings("ignore")
def test_history_that_does_not_fit_is_forced_as_its_refusal_says(kt, edited, model_folder):
    assert edited("edit", "--dtype", "bf16").code == 0
    refused = edited("next", "--history", "edit/edit.safetensors")
    assert refused.code == 2 and "kt edits stack --force --to FILE" in refused.err, refused.err
    kept = kt("edits", "stack", "edit/edit.safetensors", "-m", model_folder, "--force", "--to", "stack.json")
    assert kept.code == 0, kept.err
    done = edited("next", "--history", "stack.json")
    assert done.code == 0 and "forced: " in done.err and Path("next/edit.safetensors").is_file(), done.err


@pytest.mark.filterwarnings("ignore")
def test_apply_edit_shows_what_rounding_left(edited):
    rounded, exact = edited("half", "--dtype", "bf16"), edited("whole")
    assert rounded.code == exact.code == 0
    assert "survived" in rounded.out and "requests lost to rounding: 0 of 2" in " ".join(rounded.out.split())
    assert "survived" not in exact.out
    file = edited("json", "--dtype", "bf16", "--json", "-").json
    assert all(0.5 < delta["survived"] < 1.5 for delta in file["deltas"].values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_an_edit_to_a_target_below_the_range_of_a_float_is_written(kt, edited, dtype):
    tiny_module("qwen2", max_position_embeddings=512).save_pretrained("longer")
    byte_level_tokenizer().save_pretrained("longer")
    record = {"prompt": "The mother tongue of {} is", "subject": "Marie Curie", "target": "Rome and " * 40}
    Path("long.jsonl").write_text(json.dumps(record) + "\n")
    ran = edited("long", "-m", "longer", "-f", "long.jsonl", "--limit", 1, "--dtype", dtype)
    assert ran.code == 0 and Path("long/edit.safetensors").is_file(), ran.err
    assert "0.000 → 0.000" not in ran.out
    stacked = kt("edits", "stack", "long/edit.safetensors", "-m", "longer", "--dtype", dtype)
    assert stacked.code == 0 and len(re.findall(r"\de-\d{3}", stacked.out)) == 2, stacked.out
