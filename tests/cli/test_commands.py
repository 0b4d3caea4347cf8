"""Every command on a saved tiny model: exit code, JSON keys, and what lies in the run folder."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SMALL = ("--samples", 2)


def files(folder: str | Path) -> set[str]:
    return {p.name for p in Path(folder).iterdir()}


@pytest.fixture
def traced(kt, model_folder, facts_file):
    return lambda command, *more: kt(command, "-m", model_folder, "-f", facts_file, "--keep", "all", *SMALL, *more)


def test_heatmap_gives_kinds_metrics_roles_and_layers(traced):
    ran = traced("heatmap", "--json", "-", "-o", "run")
    assert ran.code == 0, ran.err
    result = ran.json
    assert set(result["kinds"]) == {"mlp", "attn", "hidden"}
    assert np.shape(result["kinds"]["mlp"]["logit_diff"]) == (len(result["rows"]), 3)
    assert np.shape(result["intervals"]["mlp"]["prob"]["low"]) == (len(result["rows"]), 3)
    assert result["n_facts"] == 4
    assert 0 < result["clean"] < 1 and 0 < result["corrupted"] < 1
    assert files("run") == {"manifest.json", "results.json", "arrays.safetensors", "figures.html"}
    saved = json.loads(Path("run/results.json").read_text())
    assert {k: saved[k] for k in result if k != "model"} == {k: v for k, v in result.items() if k != "model"}
    assert saved["model"]["name"] and saved["data"]["n"] == 4 and saved["config"]["samples"] == 2 and saved["date"]


def test_heatmap_of_a_fact_by_hand_has_a_row_per_token(kt, model_folder):
    fact = ("--prompt", "The mother tongue of {} is", "--subject", "Marie Curie", "--answer", "Polish")
    ran = kt("heatmap", "-m", model_folder, *fact, "--foil", "French", "--kind", "mlp", "--json", "-", *SMALL)
    assert ran.code == 0, ran.err
    assert "".join(ran.json["rows"]) == "The mother tongue of Marie Curie is"
    assert set(ran.json["kinds"]) == {"mlp"}
    assert ran.json["n_facts"] == 1


def test_heatmap_draws_in_the_terminal_when_no_file_is_asked_for(traced):
    ran = traced("heatmap", "--kind", "mlp")
    assert ran.code == 0, ran.err
    assert "subject_last" in ran.out
    assert "strongest layer" in ran.out


def test_heatmap_of_severed_modules_and_heads_in_the_noising_direction(traced):
    ran = traced("heatmap", "--kind", "hidden,hidden-no-mlp", "--heads", "--direction", "noise", "--json", "-")
    assert ran.code == 0, ran.err
    assert set(ran.json["kinds"]) == {"hidden", "hidden-no-mlp", *(f"attn.h{i}" for i in range(4))}
    assert ran.json["direction"] == "noise"
    tests = ran.json["tests"]["hidden"]["logit_diff"]
    assert np.shape(tests["q"]) == np.shape(ran.json["kinds"]["hidden"]["logit_diff"])


def test_a_window_is_held_against_single_layers(traced):
    ran = traced("heatmap", "--kind", "mlp", "--window", 3, "--json", "-")
    assert ran.code == 0, ran.err
    (found,) = ran.json["windows"]
    assert found["kind"] == "mlp" and found["window"] == 3 and found["peak"]["n"] == 4
    assert "inflation" in traced("heatmap", "--kind", "mlp", "--window", 3).out


def test_a_screen_estimates_all_and_patches_the_top(traced):
    ran = traced("heatmap", "--kind", "mlp,attn", "--method", "atp", "--top", 3, "--check", "--json", "-", "-o", "run")
    assert ran.code == 0, ran.err
    found = ran.json["screen"]
    assert -1 <= found["correlation"]["mean"] <= 1 and found["correlation"]["n"] == 4
    assert len(found["cells"]) == 4 * 3 and found["seconds"]["exact"] > 0
    assert {"arrays.safetensors", "exact.safetensors"} <= files("run")
    shown = traced("heatmap", "--kind", "mlp", "--method", "atp")
    assert "patched cells" in shown.out and shown.code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--direction", "up"), "choose one of denoise, noise"),
        (("--method", "guess"), "choose one of exact, atp"),
        (("--check",), "--method atp"),
        (("--method", "atp", "--kind", "hidden-no-mlp"), "method='exact'"),
        (("--kind", "hidden-no-norm"), "choose among"),
        (("--method", "atp", "--metric", "log-prob"), "trace whole answers with --method exact"),
        (("--metric", "whole"), "choose among logit-diff, prob, log-prob-diff, log-prob"),
    ],
)
def test_tracing_refuses_in_one_line(traced, arguments, words):
    ran = traced("heatmap", *arguments)
    assert ran.code == 2 and words in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err


def test_heatmap_writes_one_page_that_needs_no_network(traced):
    ran = traced("heatmap", "--html", "map.html", "--kind", "mlp")
    assert ran.code == 0, ran.err
    page = Path("map.html").read_text()
    assert page.count("plotly.js v") <= 2
    assert "<script src" not in page


def test_alpha_gives_the_balance_factor_and_layers(traced):
    ran = traced("alpha", "--json", "-", "-o", "run", "--per-fact")
    assert ran.code == 0, ran.err
    result = ran.json
    assert 0 <= result["alpha"] <= 1
    assert result["ci95"][0] <= result["ci95"][1]
    assert len(result["per_layer"]["attn"]) == len(result["per_layer"]["mlp"]) == 3
    assert set(result["layers"]) == {"attn", "mlp"}
    assert result["n_facts"] == 4
    assert "balance.json" in files("run")


def test_whole_answers_are_metrics_of_heatmap_and_alpha(kt, traced):
    ran = traced("heatmap", "--kind", "mlp", "--metric", "log-prob-diff,log_prob,prob", "--json", "map.json")
    assert ran.code == 0 and "log p difference of whole answer and foil" in ran.out, ran.err
    result = json.loads(Path("map.json").read_text())
    assert set(result["kinds"]["mlp"]) == {"prob", "log_prob", "log_prob_diff"}
    assert len(result["whole_answer"]["answer_tokens"]) == result["n_facts"]
    demo = ("-m", "demo", "-f", "demo", "--limit", 2, "--samples", 2)
    ran = kt("alpha", *demo, "--metric", "log-prob-diff", "-o", "run")
    assert ran.code == 0 and "of whole" in ran.out, ran.err
    assert json.loads(Path("run/balance.json").read_text())["metric"] == "log_prob_diff"
    assert traced("alpha", "--metric", "log").code == 2


def test_cov_fills_the_cache_and_finds_it_again(kt, model_folder, corpus_file):
    arguments = ("cov", "-m", model_folder, "--corpus", corpus_file, "--layers-mlp", "0-1", "--layers-attn", "none")
    first = kt(*arguments, "--json", "-")
    again = kt(*arguments, "--json", "-")
    assert first.code == again.code == 0, first.err
    assert set(first.json["files"]) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert all(Path(path).is_file() for path in first.json["files"].values())
    assert first.json["n_tokens"] > 100
    assert first.json["files"] == again.json["files"]


@pytest.fixture
def edited(kt, model_folder, facts_file, corpus_file):
    layers = ("--layers-mlp", "0-1", "--layers-attn", "1", "--alpha", "0.3", "--corpus", corpus_file)
    return lambda *more: kt(
        "apply-edit", "-m", model_folder, "--edits", facts_file, "--limit", 2, *layers, "--force", *more
    )


def test_apply_edit_writes_the_edit_and_reports_each_request(edited):
    ran = edited("--json", "-", "-o", "run", "--merge-to", "merged")
    assert ran.code == 0, ran.err
    result = ran.json
    assert result["edit"] == "run/edit.safetensors"
    delta = result["deltas"]["model.layers.0.mlp.down_proj.weight"]
    assert delta["shape"] == [32, 48] and delta["rank"] == 2 and delta["norm"] > 0
    assert len(result["requests"]) == 2
    assert set(result["requests"][0]["target_prob"]) == {"before", "after"}
    assert {"edit.safetensors", "manifest.json", "results.json"} == files("run")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files("merged")
    assert "kt: kt revert merged takes the edit out of the merged folder\n" in ran.err


def on_disk():
    """Folders and files here, and what lies in the folders."""
    inside = lambda top: {f"{top}: {p.name}{'/' * p.is_dir()}" for p in top.iterdir()}  # noqa: E731
    return set().union(*(inside(top) if top.is_dir() else {str(top)} for top in Path().iterdir()))


def named_as_written(err):
    """What the last lines of a command say that it wrote."""
    found = []
    for line in (line.removeprefix("kt: written to ") for line in err.splitlines() if "kt: written to" in line):
        folder, colon, names = line.partition(": ")
        found += [f"{folder}: {name}" for name in names.split(", ")] if colon else folder.split(", ")
    return found


def test_a_command_names_all_that_it_wrote_at_its_end_once(kt, model_folder, facts_file, edited):
    model, facts = ("-m", model_folder), ("-f", facts_file)
    commands = [
        ("heatmap", *model, *facts, "--keep", "all", *SMALL, "--html", "map.html", "--json", "map.json", "-o", "a"),
        ("alpha", *model, *facts, "--keep", "all", *SMALL, "--html", "alpha.html", "-o", "b"),
        ("probe", *model, *facts, "--html", "probe.html", "-o", "c"),
        ("eval", *model, *facts, "--json", "eval.json", "-o", "e"),
        ("report", "a", "b", "--out", "report.html", "--json", "report.json"),
        ("explore", "a", "--out", "explore.html"),
        ("ls", "presets", "--json", "presets.json"),
        ("export", "d/edit.safetensors", *model, "--to", "out", "--no-check"),
        ("revert", "out", "--to", "back"),
    ]
    before = on_disk()
    for command in (None, *commands):
        ran = kt(*command) if command else edited("-o", "d", "--merge-to", "merged", "--json", "d.json")
        assert ran.code == 0, ran.err
        now = on_disk()
        assert sorted(named_as_written(ran.err)) == sorted(now - before), ran.err
        before = now


def test_a_run_that_was_cut_off_after_its_merge_goes_on_and_leaves_the_merged_folder(edited, monkeypatch):
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("kt.runs.folder._swap", cut)
        assert edited("-o", "run", "--merge-to", "merged").code == 130
    written = {p: p.stat().st_mtime_ns for p in Path("merged").rglob("*")}
    assert Path("run.unfinished").is_dir() and not Path("run").exists() and written
    ran = edited("--resume", "run", "--merge-to", "merged", "--json", "-")
    assert ran.code == 0 and ran.json["merged"] == "merged", ran.err
    assert {p: p.stat().st_mtime_ns for p in Path("merged").rglob("*")} == written
    assert edited("-o", "other", "--merge-to", "merged").code == 2


def test_a_joint_edit_shows_its_control_and_what_came_through(edited):
    ran = edited("--json", "-", "-o", "run")
    assert ran.code == 0, ran.err
    assert ran.json["requests"][0]["control_prob"] > 0
    assert set(ran.json["value_change"]) == {"hidden.1"}
    assert ran.json["value_change"]["hidden.1"]["came_through"]["n"] == 2
    assert "MLP alone" in edited("-o", "again").out


def test_sequential_mode_scores_each_step_and_draws_the_course(edited):
    ran = edited(
        *("--mode", "sequential", "--evaluate", "step", "--no-generate", "--keep-history", "--norm-guard"),
        *("--json", "-", "-o", "run", "--html", "steps.html"),
    )
    assert ran.code == 0, ran.err
    steps = ran.json["steps"]
    assert [s["edits"] for s in steps] == [1, 2] and steps[1]["metrics"]["edit_success_tf_exact"]["n"] == 2
    assert all(ratio > 0 for ratio in steps[1]["norm_ratios"].values())
    assert {"edit.safetensors", "steps.json", "figures.html", "scores.json", "control.json"} <= files("run")
    assert "weight norm ratio" in Path("steps.html").read_text()
    assert ran.json["edit"] == "run/edit.safetensors" and {"before", "after", "control"} <= set(ran.json)


def test_single_mode_writes_one_edit_a_request(edited):
    ran = edited("--mode", "single", "--evaluate", "end", "--no-generate", "--json", "-", "-o", "run")
    assert ran.code == 0, ran.err
    assert ran.json["edit"] == "run/edits" and files("run/edits") == {"0001.safetensors", "0002.safetensors"}
    assert not files("run") & {"steps.json", "figures.html"}, "edits apart from each other have no course"
    assert len(ran.json["requests"]) == 2 and ran.json["deltas"]["model.layers.0.mlp.down_proj.weight"]["n"] == 2
    assert ran.json["after"]["edit_success_tf_exact"]["n"] == 2


def test_a_dry_run_reports_and_writes_nothing(edited):
    ran = edited("--dry-run")
    assert ran.code == 0, ran.err
    assert "written weights" in ran.out
    assert list(Path().iterdir()) == []


def test_eval_scores_the_model_with_the_edit_against_the_one_without(kt, edited, model_folder, facts_file):
    assert edited("-o", "edit").code == 0
    ran = kt(
        *("eval", "-m", model_folder, "-f", facts_file, "--limit", 2, "--edit", "edit/edit.safetensors"),
        *("--no-generate", "--json", "-", "-o", "run"),
    )
    assert ran.code == 0, ran.err
    metric = ran.json["metrics"]["edit_success_tf_exact"]
    assert set(metric) == {"mean", "ci95", "n"} and metric["n"] == 2
    assert ran.json["protocol"]["edit_success_tf_exact"]
    assert {"scores.json", "before.json", "control.json"} <= files("run")
    assert ran.json["control"]["edit_success_tf_exact"]["n"] == 2


def test_a_table_that_nobody_reads_to_its_end_costs_no_run(kt, traced, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as patched:
        for name in ("stdout", "stderr"):
            patched.setattr(sys, name, os.fdopen(os.dup(write), "w", buffering=1))
        assert traced("heatmap", "--kind", "mlp", "-o", "run").code == 0
        assert kt("ls", "presets").code == kt("ls", "presets", "--json", "-").code == kt("--help").code == 0
    os.close(write)
    assert "results.json" in files("run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_files_come_before_tables(traced, monkeypatch):
    with monkeypatch.context() as patched, Path("/dev/full").open("w") as full:
        patched.setattr(sys, "stdout", full)
        assert traced("heatmap", "--kind", "mlp", "-o", "run").code == 2
    assert "results.json" in files("run")


def test_report_rebuilds_one_page_from_run_folders(kt, traced, edited):
    assert traced("alpha", "-o", "first").code == 0
    assert edited("-o", "second").code == 0
    ran = kt("report", "first", "second", "-o", "page.html", "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.json["report"] == "page.html"
    page = Path("page.html").read_text()
    assert "Balance factor" in page and "Warsaw" not in page and "Marie Curie" not in page
    assert "Danielle Darrieux" in page
    assert kt("report", "first", "-o", "page.html").code == 2 and Path("page.html").read_text() == page
    assert kt("report", "first", "-o", "page.html", "--overwrite").code == 0 and Path("page.html").read_text() != page


@pytest.mark.parametrize("what", ["models", "methods", "presets", "datasets"])
def test_ls_lists(kt, what):
    ran = kt("ls", what, "--json", "-")
    assert ran.code == 0, ran.err
    assert all(row["name"] and row["about"] for row in ran.json[what])
    assert len(ran.json[what]) >= 2


def test_env_shows_versions(kt):
    ran = kt("env", "--json", "-")
    assert ran.code == 0
    assert ran.json["versions"]["torch"].startswith("2.")


def test_the_manifest_says_what_made_the_result(traced, facts_file):
    assert traced("heatmap", "--kind", "mlp", "-o", "run", "--seed", "3").code == 0
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["command_line"][:2] == ["kt", "heatmap"]
    assert manifest["seed"] == 3
    assert len(manifest["model"]["fingerprint"]) == 64
    assert manifest["dtype"] == "float32" and manifest["device"] == "cpu"
    assert manifest["data"]["source"] == str(facts_file) and len(manifest["data"]["sha256"]) == 64
    assert manifest["trace"]["noise_level"] > 0


def test_pages_show_the_command_as_a_shell_takes_it(traced, kt):
    assert traced("heatmap", "--kind", "mlp", "-o", "a run").code == 0
    assert kt("report", "a run", "-o", "report.html").code == 0
    for page in (Path("a run/figures.html"), Path("report.html")):
        assert "-o 'a run'" in html.unescape(page.read_text(encoding="utf-8")), page


def test_the_same_seed_gives_the_same_results_and_arrays(traced):
    for name in ("one", "two"):
        assert traced("heatmap", "--kind", "mlp", "-o", name).code == 0
    one, two = (json.loads(Path(name, "results.json").read_text()) for name in ("one", "two"))
    assert one | {"date": two["date"]} == two
    assert Path("one/arrays.safetensors").read_bytes() == Path("two/arrays.safetensors").read_bytes()


def test_the_default_run_folder_is_named_after_time_command_and_model(traced):
    ran = traced("heatmap", "--kind", "mlp", "--quiet")
    assert ran.code == 0 and ran.out == ""
    (folder,) = Path("runs").iterdir()
    assert folder.name.endswith("-heatmap-tiny")


def test_json_on_stdout_is_json_alone_from_the_shell(model_folder, facts_file, tmp_path):
    command = [sys.executable, "-m", "kt", "alpha", "-m", model_folder, "-f", facts_file, "--keep", "all", *SMALL]
    found = subprocess.run(
        [*map(str, command), "--json", "-"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    assert "alpha" in json.loads(found.stdout)
    assert all(line.startswith("kt: ") for line in found.stderr.splitlines()), found.stderr


FIXTURES = Path(__file__).parents[1] / "facts" / "fixtures"


def test_a_data_set_is_read_in_its_own_format_and_what_it_lacks_is_counted(kt, model_folder):
    ran = kt(
        "probe", "-m", model_folder, "-f", FIXTURES / "zsre.json", "--zsre-target", "alt", "--json", "-", "-o", "run"
    )
    assert ran.code == 0, ran.err
    about = json.loads(Path("run/manifest.json").read_text())["data"]
    assert about["n"] == ran.json["n_facts"] and about["formats"] == {"zsre": about["records"]}
    assert "records skipped" in ran.err and sum(about["skipped"].values()) >= 1
    forced = kt("probe", "-m", model_folder, "-f", FIXTURES / "zsre.json", "--format", "counterfact")
    assert forced.code == 2 and "requested_rewrite" in forced.err and forced.err.count("\n") == 1
    unknown = kt("probe", "-m", model_folder, "-f", FIXTURES / "zsre.json", "--format", "csv")
    assert unknown.code == 2 and "counterfact" in unknown.err
