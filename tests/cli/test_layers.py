"""`kt layers` as a user runs it: a trace, edits in windows, a preset file that an edit takes."""

from dataclasses import replace

import pytest

import kt as kt_package
from kt.editing.evidence import kept_settings
from kt.editing.presets import read_preset
from kt.errors import KtError
from kt.experiments.layer_search import PERPLEXITY, score

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
    assert len(windows) >= 3 and [0, 1] in windows.values() and any("by default" in name for name in windows)
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
    ran = kt(
        "apply-edit", *edit, "--preset", mine, "--set", "v_num_grad_steps=2", "--force", "--out", "edit", "--json", "-"
    )
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


def test_a_joint_method_has_both_modules_compared_and_its_alpha_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("KT_CACHE", str(tmp_path))
    model = kt_package.load("demo")
    small = {"n_trace": 12, "n_edits": 1, "windows": 1, "protocols": ("tf",)}
    found = kt_package.find_layers(model, None, "intattn", max_tokens=4000, **small)
    assert {row.series for row in found.sweep.rows} == {"intattn", "intattn, attention"}
    last = [row for row in found.sweep.rows if row.series == "intattn, attention"]
    assert all(row.settings["layers_mlp"] == list(found.chosen["layers_mlp"]) for row in last)
    assert found.chosen["alpha"] == found.balance.setting.alpha and "of 1" in found.sources["alpha"]
    assert set(kept_settings(model, "intattn")) >= {"layers_mlp", "layers_attn", "alpha"}
    assert all(0 <= score(row, {}) <= 1 for row in found.sweep.rows)
    worse = replace(last[0], metrics=dict(last[0].metrics) | {PERPLEXITY: {"mean": 4.0, "n": 3, "ci95": None}})
    assert score(worse, {PERPLEXITY: {"mean": 2.0}}) == pytest.approx(score(last[0], {}) / 2)
    with pytest.raises(KtError, match="knows 3 of 3 facts, and 10 are edited"):
        kt_package.find_layers(model, kt_package.load_facts("demo", limit=3))
