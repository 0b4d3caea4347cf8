"""`kt eval` takes the unedited model's scores from the cache, says so, and writes the same bytes."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "facts.json"
    fact = {"prompt": "The mother tongue of {} is", "subject": "Marie Curie", "answer": "French", "target": "Italian",
            "neighbourhood": [{"prompt": "Tomas Brill works as a", "answer": "chemist"}]}  # fmt: skip
    path.write_text(json.dumps([fact]))
    return path


@pytest.fixture
def scored(kt, model_folder, prompts_file):
    return lambda *more: kt(
        "eval",
        "-m",
        model_folder,
        "-f",
        prompts_file,
        "--no-generate",
        "--json",
        "-",
        "-o",
        "run",
        "--overwrite",
        *more,
    )


def cached(tmp_path):
    return list((tmp_path / "cache").glob("scores-*.json"))


def test_the_second_run_takes_the_scores_of_the_first(scored, tmp_path):
    first, written = scored(), Path("run/scores.json").read_bytes()
    (file,) = cached(tmp_path)
    second = scored()
    assert first.code == second.code == 0 and second.json == first.json
    assert Path("run/scores.json").read_bytes() == written == file.read_bytes()
    assert file.name in second.err and "--no-cache" in second.err and file.name not in first.err


def test_without_the_cache_nothing_is_read_or_kept(scored, tmp_path):
    ran = scored("--no-cache")
    assert ran.code == 0 and cached(tmp_path) == []
    scored()
    (file,) = cached(tmp_path)
    file.write_text("damaged")
    again = scored("--no-cache")
    assert again.json == ran.json and file.read_text() == "damaged" and file.name not in again.err


def test_a_damaged_file_costs_time_and_no_run(scored, tmp_path):
    first = scored()
    (file,) = cached(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    second = scored()
    assert second.code == 0 and second.json == first.json and "computed again" in second.err
    assert file.read_bytes() == whole


def test_only_the_unedited_model_is_kept(kt, scored, model_folder, prompts_file, tmp_path):
    made = kt("apply-edit", "-m", model_folder, "--edits", prompts_file, "--method", "ft", "--set",
              "num_steps=10", "-o", "edit", "--evaluate", "none", "--quiet", "--force")  # fmt: skip
    assert made.code == 0, made.err
    first, second = scored("--edit", "edit/edit.safetensors"), scored("--edit", "edit/edit.safetensors")
    assert first.code == 0 and second.json == first.json and len(cached(tmp_path)) == 1
    fresh = scored("--edit", "edit/edit.safetensors", "--no-cache")
    assert fresh.json == first.json and fresh.json["metrics"] != fresh.json["before"]
