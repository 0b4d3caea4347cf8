"""`kt probe` on a saved tiny model: what its JSON holds, its files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kt.probing import Probe
from kt.residual import Residual


@pytest.fixture
def probed(kt, model_folder, facts_file):
    return lambda *more: kt("probe", "-m", model_folder, "-f", facts_file, *more)


@pytest.fixture
def edit_file(kt, model_folder, facts_file, corpus_file):
    solve = ("--set", "v_num_grad_steps=3", "--layers-mlp", "0-1", "--corpus", corpus_file, "--max-tokens", 600)
    ran = kt(
        "apply-edit", "-m", model_folder, "--edits", facts_file, "--method", "memit", *solve, "-o", "edited", "--force"
    )
    assert ran.code == 0, ran.err
    return Path("edited/edit.safetensors")


def test_positions_answers_and_stages(probed):
    ran = probed("--json", "-", "-o", "run")
    assert ran.code == 0, ran.err
    result = ran.json
    for position in ("subject_last", "prediction"):
        for answer in ("original", "target"):
            assert np.shape(result["positions"][position][answer]["rank"]) == (3,)
            assert all(0 < p < 1 for p in result["positions"][position][answer]["prob"])
            attention = result["kinds"]["attn"][position][answer]["rank"]["median"]
            assert len(attention["mean"]) == 3 and attention["n"] == 4
    assert set(result["stages"]) == {"enrichment", "extraction", "promotion", "layers_low", "layers_high"}
    assert result["final_norm"] is True and result["n_facts"] == 4
    assert {p.name for p in Path("run").iterdir()} == {
        "manifest.json",
        "results.json",
        "probe.safetensors",
        "figures.html",
    }
    frame = Probe.load("run/probe.safetensors").to_dataframe()
    assert len(frame) == 4 * 3 * 2 * 3 * 2
    mean = (
        frame.query("kind == 'resid' and position == 'prediction' and answer == 'target'").groupby("layer").prob.mean()
    )
    assert np.allclose(mean, result["positions"]["prediction"]["target"]["prob"])


def test_whole_answers_are_read_on_request(probed):
    ran = probed("--whole", "--json", "whole.json")
    assert ran.code == 0 and "all tokens of the answers" in ran.out, ran.err
    whole = json.loads(Path("whole.json").read_text())["whole"]
    assert len(whole["original"]["log_prob"]["mean"]) == 3 and max(whole["target"]["log_prob"]["mean"]) < 0


def test_without_the_final_norm_the_numbers_are_others(probed):
    normed, raw = probed("--json", "-").json, probed("--json", "-", "--raw").json
    assert raw["final_norm"] is False
    apart = (
        np.array(raw["positions"]["prediction"]["target"]["prob"]) - normed["positions"]["prediction"]["target"]["prob"]
    )
    assert np.abs(apart).max() > 1e-6


def test_word_sets_come_from_a_file(probed):
    Path("sets.json").write_text(json.dumps({"places": ["Paris", "Rome"], "stopwords": ["the", "of"]}))
    ran = probed("--json", "-", "--sets", "sets.json", "--html", "p.html")
    assert ran.code == 0, ran.err
    assert {"places", "stopwords", "rest"} <= set(ran.json["sets"]["prediction"])
    assert np.shape(ran.json["sets"]["prediction"]["places"]["mean"]) == (3,)
    assert "Word sets" in Path("p.html").read_text() or "word sets" in Path("p.html").read_text()


def test_an_edit_is_probed_before_and_after_and_scored(probed, edit_file):
    ran = probed("--edit", edit_file, "--json", "-", "-o", "run")
    assert ran.code == 0, ran.err
    result = ran.json
    assert set(result["residual_score"]) == {"mean", "ci95", "n"}
    assert set(result["by_kind"]) == {"resid", "attn", "mlp"}
    before, after = (r["positions"]["prediction"]["target"]["prob"] for r in (result["before"], result))
    assert before != after
    assert Residual.load("run/residual.safetensors").score.n == result["residual_score"]["n"]
    shown = probed("--edit", edit_file, "--pool", "demo")
    assert "what is left of the old answer" in shown.out and "is the old answer more probable" in shown.out


def test_a_report_shows_a_probe_and_a_residual(kt, probed, edit_file):
    assert probed("-o", "one").code == 0 and probed("--edit", edit_file, "-o", "two").code == 0
    ran = kt("report", "one", "two", "--out", "page.html")
    assert ran.code == 0, ran.err
    page = Path("page.html").read_text()
    assert "Contrast probe" in page and "What is left of the old facts" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layers", "0-7"), "layers 0 to 2, not 3"),
        (("--layers", "none"), "nothing to probe"),
        (("--layers", "x"), "not a layer range"),
        (("--statistic", "mode"), "choose one of mean, median"),
        (("--sets", "missing.json"), "missing.json"),
        (("--edit", "missing.safetensors"), "missing.safetensors"),
        (("--pool", "demo"), "no place without --edit"),
        (("--edit", "there.safetensors", "--pool", "nowhere.json"), "nowhere.json"),
        (("--edit", "missing.safetensors", "--layers", "1"), "--layers has no place with --edit"),
        (("--edit", "missing.safetensors", "--whole"), "--whole has no place with --edit"),
    ],
)
def test_bad_input_is_one_line(probed, arguments, words):
    Path("there.safetensors").touch()
    ran = probed(*arguments)
    assert ran.code == 2 and words in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "JSON"), ('{"places": []}', "places"), ('{"places": {"Atlantis": ["Paris"]}}', "places")],
)
def test_empty_and_broken_sets_are_one_line(probed, content, words):
    Path("sets.json").write_text(content)
    ran = probed("--sets", "sets.json")
    assert ran.code == 2 and words in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err


def test_answers_with_one_first_token_are_counted_in_one_warning(kt, model_folder):
    fact = {
        "prompt": "The mother tongue of {} is",
        "subject": "Marie Curie",
        "answer": "Polish",
        "foil": "Polish people",
    }
    other = fact | {"subject": "Megan Rapinoe", "foil": "French"}
    Path("same.jsonl").write_text(json.dumps(fact) + "\n" + json.dumps(other) + "\n")
    ran = kt("probe", "-m", model_folder, "-f", "same.jsonl", "--json", "-")
    assert ran.code == 0, ran.err
    warned = [line for line in ran.err.splitlines() if "warning" in line]
    assert len(warned) == 1 and "1 of 2 facts" in warned[0] and "same token" in warned[0]
    assert ran.json["n_same_first_token"] == 1


def test_the_seed_of_a_probe_draws_its_intervals(probed):
    zero, again, other = (probed("--json", "-", *seed).json for seed in ((), ("--seed", 0), ("--seed", 1)))
    assert zero == again and zero["positions"] == other["positions"]
    assert zero["kinds"] != other["kinds"]


def test_a_pool_is_read_as_the_facts_are(refused, edit_file, facts_file, tmp_path):
    zsre = tmp_path / "zsre.json"
    record = {"src": "Where was Marie Curie born?", "subject": "Marie Curie", "answers": ["Warsaw"], "alt": "Rome"}
    zsre.write_text(json.dumps([record]))
    line = refused("probe", "--edit", edit_file, "-f", zsre, "--zsre-target", "alt", "--pool", facts_file)
    assert "two targets" in line and "facts.jsonl" in line
