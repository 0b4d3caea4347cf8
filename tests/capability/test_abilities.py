"""lm-eval sees the loaded model, edited or not, and its figures come back with n and interval."""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kt-interp[lm-eval]'")

from harness_help import CITIES, edit_by_hand, write_tasks

import kt
from kt.capability import GSM8K_TWO_SHOT, Abilities, abilities
from kt.capability.tasks import BadTask, choose
from kt.errors import KtError, WorkFailed
from kt.evaluation.teacher import teacher_force, tokens_of


@pytest.fixture(scope="module")
def model():
    return kt.load("demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def found(model, folder):
    edit = edit_by_hand(model, 0.5)
    return abilities(model, "kt_choice,kt_text,kt_perplexity", edit=edit, include_path=folder)


def row_of(found, task):
    return next(row for row in found.rows if row.task == task)


def test_choices_are_scored_as_our_own_teacher_forcing_scores_them(model, found):
    rows = {q: [tokens_of(model, (q, right)), tokens_of(model, (q, wrong))] for q, right, wrong in CITIES}
    forced = teacher_force(model, [row for pair in rows.values() for row in pair])
    ours = [forced[a.question].log_prob > forced[b.question].log_prob for a, b in rows.values()]
    row = row_of(found, "kt_choice")
    assert row.metric == "acc,none" and row.before.n == len(CITIES)
    assert row.before.mean == pytest.approx(np.mean(ours)) and 0 < row.before.mean < 1


def test_texts_are_those_of_our_own_greedy_generation(model, found):
    texts = model.generate([q for q, _, _ in CITIES], max_new_tokens=6)
    ours = [
        re.search("([A-Z][a-z]+)|$", text.split(".")[0]).group() == c[1] for text, c in zip(texts, CITIES, strict=True)
    ]
    row = row_of(found, "kt_text")
    assert row.metric == "exact_match,first-word"
    assert row.before.mean == pytest.approx(np.mean(ours)) and row.before.mean > 0


def test_the_edit_is_in_the_model_only_for_the_second_run(model, found):
    row = row_of(found, "kt_choice")
    with edit_by_hand(model, 0.5).applied(model):
        alone = abilities(model, "kt_choice", include_path=found.config["include_path"])
    assert alone.rows[0].before.mean == row.after.mean != row.before.mean
    assert alone.rows[0].after is None and "after" not in alone.runs
    again = abilities(model, "kt_choice", include_path=found.config["include_path"])
    assert again.rows[0].before == row.before


def test_the_difference_is_paired_over_documents(found):
    row = row_of(found, "kt_choice")
    values = [[s["acc"] for s in found.samples[run]["kt_choice"]] for run in ("before", "after")]
    assert row.difference.mean == pytest.approx(row.after.mean - row.before.mean)
    expected = kt.stats.paired_bootstrap_difference(values[1], values[0])
    assert row.difference.ci95 == pytest.approx(expected.ci95) and row.difference.n == len(CITIES)


def test_a_perplexity_has_an_interval_by_its_own_aggregation(found):
    row = row_of(found, "kt_perplexity")
    total, words = np.sum([s["word_perplexity"] for s in found.samples["before"]["kt_perplexity"]], 0)
    assert row.before.mean == pytest.approx(np.exp(-total / words)) and row.higher_is_better is False
    assert row.before.low < row.before.mean < row.before.high
    assert row.difference.mean == pytest.approx(row.after.mean - row.before.mean) and row.difference.low > 0


def test_a_group_is_the_mean_over_all_documents(model, folder):
    found = abilities(model, ["kt_pair"], include_path=folder)
    group = row_of(found, "kt_pair")
    assert group.before.mean == pytest.approx(0.5)  # the second task has every label turned round
    assert group.before.n == 2 * len(CITIES) and group.before.ci95 is not None


def test_a_pattern_finds_tasks_and_limit_and_examples_mean_what_they_mean_in_lm_eval(model, folder):
    found = abilities(model, "kt_c*", include_path=folder, limit=2, num_fewshot=1)
    (row,) = found.rows
    assert row.task == "kt_choice" and row.before.n == 2
    assert found.as_dict()["n-samples"]["kt_choice"] == {"original": len(CITIES), "effective": 2}
    prompt = found.samples["before"]["kt_choice"][0]["arguments"][0][0]
    assert found.as_dict()["n-shot"] == {"kt_choice": 1} and prompt.count("\n\n") == 1


def without_padding(tokenizer):
    found = copy.deepcopy(tokenizer)
    found.pad_token = None
    return found


def test_nothing_of_the_caller_changes(model, folder, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no checkout: git would complain to lm-eval about that
    monkeypatch.setattr(model, "tokenizer", without_padding(model.tokenizer))
    tokens, weights = len(model.tokenizer), model.fingerprint()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    abilities(model, "kt_choice", include_path=folder)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert (len(model.tokenizer), model.fingerprint()) == (tokens, weights) and model.tokenizer.pad_token is None
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


def test_same_seed_same_bytes_and_what_is_saved_is_read_back(model, folder, found, tmp_path):
    again = abilities(model, "kt_choice,kt_text,kt_perplexity", edit=edit_by_hand(model, 0.5), include_path=folder)
    first, second = found.save(tmp_path / "a.json"), again.save(tmp_path / "b.json")
    assert first.read_bytes() == second.read_bytes()
    read = Abilities.load(first)
    assert [r.difference for r in read.rows] == [r.difference for r in found.rows]
    assert read.as_dict() == found.as_dict()
    assert list(found.to_dataframe()["difference_n"]) == [len(CITIES)] * 3


def test_seed_zero_gives_the_seeds_of_lm_evals_own_command(found):
    from kt.capability.lm_eval import Settings

    assert list(Settings().seeds.values()) == [0, 1234, 1234, 1234]
    assert found.config["seed"] == 0 and found.versions["kt_choice"] == 1.0


def test_the_preset_asks_two_examples_of_gsm8k_and_a_perplexity(model, folder, tmp_path):
    for ours, theirs in (("kt_text", "gsm8k"), ("kt_perplexity", "wikitext")):
        text = (folder / f"{ours}.yaml").read_text(encoding="utf-8").replace(f"task: {ours}", f"task: {theirs}")
        (tmp_path / f"{theirs}.yaml").write_text(text, encoding="utf-8")
    found = abilities(model, GSM8K_TWO_SHOT, include_path=tmp_path)
    assert [(row.task, row.metric) for row in found.rows] == [
        ("gsm8k", "exact_match,first-word"),
        ("wikitext", "word_perplexity,none"),
    ]
    assert found.as_dict()["n-shot"] == {"gsm8k": 2, "wikitext": 0}
    assert found.samples["before"]["gsm8k"][0]["arguments"][0][0].count("\n\n") == 2


@pytest.mark.slow
def test_lm_eval_knows_the_tasks_of_the_preset():
    assert choose(GSM8K_TWO_SHOT).specs == ["gsm8k", "wikitext"]


@pytest.mark.parametrize(
    ("tasks", "options", "says"),
    [
        ("kt_chioce", {}, r"no task 'kt_chioce'; is it kt_choice"),
        ("", {}, "no tasks to run"),
        ("kt_choice", {"limit": 0}, "limit 0: give a number"),
        ("kt_choice", {"limit": 2.5}, "limit 2.5: give a number"),
        ("kt_choice", {"num_fewshot": -1}, "num_fewshot -1 is below zero"),
        ("kt_choice", {"gen_kwargs": "hot"}, "gen_kwargs 'hot': write name=value"),
        ("kt_choice", {"apply_chat_template": True}, "demo has no chat template"),
        ("nowhere.yaml", {}, "task file nowhere.yaml does not exist"),
    ],
)
def test_wrong_input_is_one_line(model, folder, tasks, options, says, monkeypatch):
    # lm-eval's own tasks are fourteen thousand files: their index is not what is tested here.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", only_the_folder)
    with pytest.raises(BadTask, match=says) as caught:
        abilities(model, tasks, include_path=folder, **options)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def only_the_folder(include_path=None, include_defaults=True):
    from lm_eval.tasks import manager

    return manager.TaskManager(include_path=include_path, include_defaults=False)


def test_a_folder_that_is_not_there_is_one_line(model, tmp_path):
    with pytest.raises(BadTask, match="no such folder"):
        abilities(model, "kt_choice", include_path=tmp_path / "none")


def test_data_that_is_not_there_is_one_line(model, folder, tmp_path):
    text = (folder / "kt_choice.yaml").read_text(encoding="utf-8").replace("cities.jsonl", "gone.jsonl")
    (tmp_path / "kt_choice.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(BadTask, match=r"task kt_choice cannot be loaded: .*gone\.jsonl") as caught:
        abilities(model, "kt_choice", include_path=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_answers_nan_is_refused_and_comes_back_whole(model, folder):
    before = model.fingerprint()
    with pytest.raises(WorkFailed, match="kt_choice, document 0: a NaN"):
        abilities(model, "kt_choice", edit=edit_by_hand(model, float("inf")), include_path=folder)
    assert model.fingerprint() == before


def test_text_from_tasks_is_escaped_in_html(found):
    from dataclasses import replace

    from kt.report import Section, render

    evil = replace(found, rows=(found.rows[0]._replace(task="<script>"),))
    page = render("t", [Section("s", [evil.report_table()])])
    for shown in (evil._repr_html_(), page):
        assert "<script></td>" not in shown and "&lt;script&gt;" in shown


def test_the_command_writes_results_and_samples(folder, model, tmp_path, monkeypatch, capsys):
    from kt.cli.abilities import abilities as command
    from kt.cli.command import as_click

    monkeypatch.chdir(tmp_path)
    edit_by_hand(model, 0.5).save("edit.safetensors")
    arguments = ["--tasks", "kt_choice", "--include-path", folder, "--edit", "edit.safetensors", "-s", "-o", "run"]
    as_click("abilities", command).main(args=[*map(str, arguments), "--json", "-"], standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    assert set(result["results"]["kt_choice"]["acc,none"]) == {"before", "after", "difference", "higher_is_better"}
    for run in ("before", "after"):
        lines = Path(f"run/samples_{run}_kt_choice.jsonl").read_text().splitlines()
        assert len(lines) == len(CITIES) and json.loads(lines[0])["doc"]["question"] == CITIES[0][0]
    assert Abilities.load("run/abilities.json").rows[0].after is not None


@pytest.mark.parametrize("arguments", [[], ["--tasks", "x", "--preset", "gsm8k-two-shot"], ["--preset", "none"]])
def test_the_command_wants_tasks_or_a_preset(arguments, tmp_path, monkeypatch):
    from kt.cli.abilities import abilities as command
    from kt.cli.command import as_click

    monkeypatch.chdir(tmp_path)
    with pytest.raises(KtError, match="preset"):
        as_click("abilities", command).main(args=arguments, standalone_mode=False)
    assert not list(tmp_path.iterdir())
