"""`kt layers` as a user runs it: a trace, edits in windows, a preset file that an edit takes."""

import pytest

from kt.editing.presets import read_preset

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = ("--trace", 10, "--edits", 2, "--windows", 2, "--max-tokens", 1500, "--quiet")


def test_layers_are_compared_by_editing_and_kept_as_a_preset(kt, corpus_file, tmp_path):
    mine = tmp_path / "mine.toml"
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("The capital of Italy is Rome.\n\nMarie Curie was born in Warsaw.\n" * 2)
    given = ("--corpus", corpus_file, "--heldout", heldout, "--preset-to", mine, "--out", "run", "--json", "-")
    ran = kt("layers", *SMALL, *given)
    assert ran.code == 0, ran.err
    windows = {row["label"]: row["settings"]["layers_mlp"] for row in ran.json["sweep"]["rows"]}
    assert len(windows) >= 3 and [0, 1] in windows.values() and any("by relative depth" in name for name in windows)
    chosen, scores = ran.json["chosen"], ran.json["scores"]
    best = max(scores, key=scores.get)
    assert chosen["layers_mlp"] == windows[best.removeprefix("memit ")], scores
    assert all({"n", "ci95"} <= set(m) for row in ran.json["sweep"]["rows"] for m in row["metrics"].values())
    assert set(ran.json["balance"]["layer_shares"]) == {"attn", "mlp"} and ran.json["balance"]["n_facts"] <= 10
    preset = read_preset(mine)
    assert list(preset.values("memit")["layers_mlp"]) == chosen["layers_mlp"]
    explained = {value.name: value.source for value in preset.explain("memit") if value.method}
    assert set(explained) == set(chosen) and explained["layers_mlp"].startswith("best of")
    edit = ("--facts", "demo", "--limit", 1, "--method", "memit", "--corpus", corpus_file, "--max-tokens", 1500)
    ran = kt("apply-edit", *edit, "--preset", mine, "--set", "v_num_grad_steps=2", "--out", "edit", "--json", "-")
    written = [name.split(".layers.")[1].split(".")[0] for name in ran.json["deltas"]]
    assert ran.code == 0 and sorted(map(int, written)) == chosen["layers_mlp"]


def test_bad_input_of_layers_is_one_line_before_any_work(kt, tmp_path):
    there = tmp_path / "there.toml"
    there.write_text("")
    for arguments, words in (
        (("--method", "nonsense"), "--method"),
        (("--alpha", "auto"), "write a number"),
        (("--preset-to", there), "name a new file"),
        (("--preset-to", "mine.json"), "ends in .toml"),
        (("--limit", 3, "-f", "demo"), "knows"),
    ):
        ran = kt("layers", *arguments)
        assert ran.code in (1, 2) and words in ran.err.replace("\n", " "), ran.err
