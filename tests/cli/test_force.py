"""`--force` of the commands that write an edit from a file, and what `kt apply-edit` says of rounding."""

import pytest


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
def test_apply_edit_shows_what_rounding_left(edited):
    rounded, exact = edited("half", "--dtype", "bf16"), edited("whole")
    assert rounded.code == exact.code == 0
    assert "survived" in rounded.out and "requests lost to rounding: 0 of 2" in " ".join(rounded.out.split())
    assert "survived" not in exact.out
    file = edited("json", "--dtype", "bf16", "--json", "-").json
    assert all(0.5 < delta["survived"] < 1.5 for delta in file["deltas"].values())
