"""`kt apply-edit` fails where the edit fails its own check; `kt eval --edit` says how many records the edit holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kt as library


@pytest.fixture
def apply(kt, model_folder, facts_file, corpus_file):
    solved = ("--method", "memit", "--layers-mlp", "0-1", "--corpus", corpus_file, "--max-tokens", 500)
    weak = ("--set", "v_num_grad_steps=2,mom2_update_weight=1000")
    return lambda *more: kt("apply-edit", "-m", model_folder, "-f", facts_file, "--limit", 2, *solved, *weak, *more)


def test_an_edit_that_fails_its_check_is_written_whole_and_exits_1(apply):
    ran = apply("-o", "run", "--merge-to", "merged", "--json", "-")
    assert ran.code == 1
    error = ran.err.strip().splitlines()[-1]
    assert "failed its own check (0 of 2 changed; perplexity " in error
    assert "2 of 2 requests ('Danielle Darrieux' -> 'Italian' (0): rank " in error
    assert ran.err.count("2 of 2 requests") == 1, "said once: as the error"
    assert "merged is not written" in error and "kept in run" in error and "--force" in error
    assert not Path("merged").exists()
    kept = library.Edit.load("run/edit.safetensors").verdict
    assert kept.changed == 0 and kept.as_dict() == ran.json["verdict"]
    assert json.loads(Path("run/results.json").read_text())["verdict"]["warnings"] == list(kept.warnings)


def test_force_accepts_it(apply):
    ran = apply("-o", "run", "--merge-to", "merged", "--force")
    assert ran.code == 0, ran.err
    assert Path("merged/config.json").is_file()
    assert "0 of 2 changed; perplexity " in ran.out
    assert "kt: warning: 2 of 2 requests" in ran.err


@pytest.mark.parametrize(
    "more", [("--dry-run",), ("--mode", "single", "-o", "run"), ("--mode", "sequential", "-o", "run")]
)
def test_every_mode_is_judged(apply, more):
    ran = apply(*more)
    assert ran.code == 1
    assert "failed its own check (0 of 2 changed; perplexity " in ran.err.strip().splitlines()[-1]
    assert Path("run").exists() == ("-o" in more)


def test_an_edit_that_holds_exits_0(kt):
    ran = kt("apply-edit", "--method", "memit", "--limit", "1-2", "--max-tokens", 20_000, "-o", "a", "--json", "-")
    assert ran.code == 0, ran.err
    verdict = ran.json["verdict"]
    assert (verdict["requests"], verdict["changed"], verdict["warnings"]) == (2, 2, [])
    assert (
        verdict["neighbours"]["n"] == 10 and 1 < verdict["perplexity"]["after"] < 1.1 * verdict["perplexity"]["before"]
    )


def test_eval_counts_the_records_that_the_edit_holds(kt, apply, model_folder, facts_file):
    assert apply("-o", "run", "--limit", 1, "--force").code == 0
    edit = "run/edit.safetensors"
    scored = ("eval", "-m", model_folder, "-f", facts_file, "--edit", edit, "--no-generate")
    ran = kt(*scored, "-o", "all")
    assert ran.code == 0, ran.err
    assert f"kt: 1 of 4 records edited by {edit}" in ran.err
    assert "1 of 4 records edited" in " ".join(ran.out.split())
    ran = kt(*scored, "--json", "-", "-o", "again")
    assert (ran.json["n_edited"], ran.json["n_records"]) == (1, 4)
    success = [metrics["edit_success_tf_token"]["n"] for metrics in (ran.json["metrics"], ran.json["before"])]
    assert success == [1, 1]
    loaded = library.Scores.load("again/scores.json")
    assert loaded.edited == (loaded.records[0],) and "1 of 4 records edited" in repr(loaded)
    none = kt(*scored, "--limit", "3-4", "--json", "-", "-o", "none")
    assert none.json["n_edited"] == 0 and "edit_success_tf_token" not in none.json["metrics"]
    whole = kt(*scored, "--limit", 1, "--json", "-", "-o", "whole")
    assert "n_edited" not in whole.json and "records edited" not in whole.err
