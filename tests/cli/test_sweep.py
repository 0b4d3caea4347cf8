"""`kt sweep` as a user runs it: one table, rows in the JSON, points kept, bad input in one line."""

import json

import pytest

from kt.cli.app import COMMANDS

pytestmark = [
    pytest.mark.skipif("sweep" not in COMMANDS, reason="kt sweep is not in the table of commands"),
    pytest.mark.filterwarnings("ignore"),
]
SET = "v_num_grad_steps=3,v_lr=0.3,clamp_norm_factor=20,mom2_update_weight=0.01"


@pytest.fixture
def common(model_folder, facts_file, corpus_file):
    return (
        *("-m", model_folder, "-f", facts_file, "--corpus", corpus_file, "--max-tokens", 800, "--no-generate"),
        *("--layers-mlp", "0-1", "--layers-attn", "0-1", "--set", SET),
    )


def of_mlp(common):
    """The same for methods that leave attention alone, and for sweeps of its layers."""
    at = common.index("--layers-attn")
    return (*common[:at], *common[at + 2 :])


def test_alpha_is_swept_and_kept(kt, common):
    ran = kt("sweep", "alpha", "--grid", "0,0.5", "--no-trace", "--out", "run", "--json", "-", *common)
    assert ran.code == 0, ran.err
    assert [row["x"] for row in ran.json["rows"]] == [0.0, 0.5]
    assert ran.json["rows"][0]["metrics"]["target_prob_tf"]["n"] == 4 and "values" not in ran.json["rows"][0]
    from pathlib import Path

    assert json.loads(Path("run/results.json").read_text())["rows"] == ran.json["rows"]
    assert {p.name for p in Path("run").iterdir()} >= {"points", "settings.json", "sweep.json", "figures.html"}
    again = kt("sweep", "alpha", "--grid", "0,0.5", "--no-trace", "--resume", "run", "--json", "-", *common)
    assert again.code == 0, again.err
    assert again.json["rows"] == ran.json["rows"], "finished points are read, seconds and all"
    other = kt("sweep", "alpha", "--grid", "0,0.7", "--no-trace", "--resume", "run", *common)
    assert other.code == 2 and "begun with points" in other.err and other.err.count("\n") == 1
    assert (Path("run") / "results.json").exists(), "a refused resume leaves the run as it was"


def test_an_unfinished_sweep_is_taken_up(kt, common, monkeypatch):
    from pathlib import Path

    from kt.experiments import sweep as running

    measure, calls = running._measure, []

    def dies(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(running, "_measure", dies)
    ran = kt("sweep", "layers", "--grid", "0;1", "--alpha", "0.4", "--out", "run", *of_mlp(common))
    assert ran.code == 130 and "--resume run" in ran.err and "nothing was written" not in ran.err
    assert {p.name for p in Path("run").iterdir()} == {"points", "settings.json"}
    again = kt("sweep", "layers", "--grid", "0;1", "--alpha", "0.4", "--resume", "run", "--json", "-", *of_mlp(common))
    assert again.code == 0 and [row["label"] for row in again.json["rows"]] == ["0", "1"]
    assert len(calls) == 3 and Path("run/results.json").exists()


def test_modules_show_what_the_joint_edit_adds(kt, common):
    ran = kt("sweep", "modules", "--alpha", "0.4", *common)
    assert ran.code == 0, ran.err
    assert "paired differences" in ran.out and "joint - MLP only" in ran.out


def test_edits_take_several_methods(kt, common):
    ran = kt("sweep", "edits", "--grid", "1,3", "--method", "memit,emmet", "--json", "-", *of_mlp(common))
    assert ran.code == 0, ran.err
    assert [(r["series"], r["edits"]) for r in ran.json["rows"]] == [
        ("memit", 1), ("memit", 3), ("emmet", 1), ("emmet", 3)
    ]  # fmt: skip


def test_the_protocols_are_kt_evals(kt, common):
    asked = ("alpha", "--grid", "0", "--no-trace", "--protocol", "prob,tf", "--out", "run", "--json", "-", *common)
    ran = kt("sweep", *asked)
    assert ran.code == 0, ran.err
    metrics = ran.json["rows"][0]["metrics"]
    assert {"efficacy_prob_success", "edit_success_tf_exact"} <= set(
        metrics
    ) and "fluency_ngram_entropy_gen" not in metrics
    assert "P(new) > P(old)" in kt("sweep", *asked[: -len(common) - 4], "--resume", "run", *common).out
    other = kt("sweep", "alpha", "--grid", "0", "--no-trace", "--protocol", "tf", "--resume", "run", *common)
    assert other.code == 2 and "begun with protocols ['tf', 'prob'], now it is ['tf']" in other.err


def test_an_option_that_eval_has_too_is_evals():
    from typing import get_args, get_type_hints

    from kt.cli.apply_edit import EditOptions
    from kt.cli.eval import EvalOptions
    from kt.cli.sweep import SweepOptions

    for command, names in ((SweepOptions, ("protocol", "heldout")), (EditOptions, ("kl",))):
        for name in names:
            mine, evals = (get_args(get_type_hints(c, include_extras=True)[name])[1] for c in (command, EvalOptions))
            assert (mine.param_decls, mine.help) == (evals.param_decls, evals.help), name
            assert getattr(command, name) == getattr(EvalOptions, name)


def test_facts_without_what_is_asked_for_give_a_table_and_no_figure(kt, common, tmp_path):
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "The mother tongue of {} is", "subject": "Marie Curie", "target": "Polish"}\n')
    arguments = [bare if str(a).endswith("facts.jsonl") else a for a in common]
    ran = kt("sweep", "alpha", "--grid", "0", "--no-trace", "--protocol", "prob", "--json", "-", *arguments)
    assert ran.code == 0 and "no figure" in ran.err, ran.err
    assert ran.json["rows"][0]["metrics"] == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing",), "unknown; choose one of alpha"),
        (("alpha", "--grid", "a,b"), "write numbers"),
        (("alpha", "--grid", "0:1:0"), "step above 0"),
        (("alpha", "--grid", "0,1.5", "--no-trace"), "must lie between"),
        (("alpha", "--grid", "0:2:0.5"), "alpha 1.5 must lie between"),
        (("layers", "--module", "mlpp"), "did you mean mlp?"),
        (("edits", "--grid", "1.5"), "whole"),
        (("edits", "--grid", "100", "--method", "memit"), "edits 100 facts, and there are 4"),
        (("layers", "--grid", "1;x", "--alpha", "0.5"), "not a layer range"),
        (("modules", "--grid", "1"), "no meaning for modules"),
        (("modules", "--method", "memit"), "writes no attention"),
        (("clamp", "--method", "memit", "--region", "high"), "no high region"),
        (("clamp", "--method", "memit", "--region", "low"), "clamp_norm_factor is what is swept"),
        (("alpha", "--method", "memit"), "leaves attention alone"),
        (("layers", "--alpha", "0.5"), "layers_attn is what is swept"),
        (("alpha", "--method", "memit,jeep"), "only a sweep of edits"),
        (("alpha", "--resume", "nowhere"), "no sweep has kept a point"),
        (("layers", "--alpha", "per-fact"), "one α for all"),
        (("alpha", "--protocol", "tf,nothing"), "'nothing' is unknown; choose among tf, gen, prob, wild, mello, ppl"),
        (("alpha", "--protocol", "wild"), "--no-generate leaves nothing for wild"),
        (("alpha", "--protocol", "gen"), "leaves no protocol"),
        (("alpha", "--heldout", "x.txt"), "--heldout is read by ppl"),
        (("alpha", "--protocol", "ppl", "--heldout", "none.txt"), "no corpus 'none.txt'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(kt, common, arguments, words):
    from pathlib import Path

    ran = kt("sweep", *arguments, *(of_mlp(common) if "--method" in arguments else common))
    assert ran.code == 2 and words in ran.err and ran.err.count("\n") == 1, ran.err
    assert list(Path.cwd().iterdir()) in ([], [Path.cwd() / "runs"])
