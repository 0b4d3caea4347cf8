"""`kt cache`: what it lists, what it removes, and what it leaves alone."""

import os
import time

import pytest

from kt.editing import Statistics
from kt.editing.closed_form import factor


@pytest.fixture
def filled(kt, model_folder, corpus_file, tmp_path, monkeypatch):
    """A cache with second moments over two texts, a factor, and leftovers of killed runs."""
    monkeypatch.setattr(factor, "LEAST_SIZE", 1)
    mine = ("cov", "-m", model_folder, "--corpus", corpus_file, "--max-tokens", 300)
    assert kt(*mine, "--layers-attn", "none", "--layers-mlp", "0-1").code == 0
    assert kt("cov", "-m", "demo", "--layers-attn", "none", "--layers-mlp", "0", "--max-tokens", 100).code == 0
    folder = tmp_path / "cache"
    moments = Statistics.open(next(folder.glob("cov-*-300.safetensors")))
    moments.moment_of(next(iter(moments.files))).factor()
    for name in (".tmpAb12Cd", f".cov-{'0' * 40}-300.safetensors.tmp-0a1b2c3d"):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - 9000,) * 2)
    (folder / ".tmpLive99").write_bytes(b"being written")
    (folder / f"cov-{'1' * 40}.safetensors").write_bytes(b"an older kt's, damaged")
    (folder / "mine.txt").write_text("not kt's")
    return folder


def files(kt, *typed):
    ran = kt("cache", *typed, "--json", "-")
    assert ran.code == 0, ran.err
    return ran.json["files"]


def of(found, kind):
    return [file for file in found if file["kind"] == kind]


def test_ls_says_what_each_file_is(kt, filled):
    found = files(kt, "ls")
    moments, (factor_,) = of(found, "second moment"), of(found, "factor")
    said = sorted((f["model"], f["weight"], f["corpus"], f["n_tokens"]) for f in moments)
    assert said == [
        ("demo", "model.layers.0.mlp.down_proj", "demo", 100),
        ("tiny", "model.layers.0.mlp.down_proj", "corpus.txt", 300),
        ("tiny", "model.layers.1.mlp.down_proj", "corpus.txt", 300),
    ]
    assert (factor_["model"], factor_["n_tokens"]) == ("tiny", 300)
    assert len(of(found, "temporary")) == 3 and len(of(found, "second moment of an older kt, damaged")) == 1
    assert "mine.txt" not in {f["name"] for f in found}
    assert [f["size"] for f in found] == sorted((f["size"] for f in found), reverse=True)
    assert f"{len(found)} files" in kt("cache").out


def test_kept_layers_and_alphas_are_listed_and_removed_by_the_name_that_ls_shows(kt, tmp_path):
    kept = tmp_path / "cache" / "layers" / ("5" * 40)
    kept.mkdir(parents=True)
    for name in ("balance.json", "memit.toml", "notes.txt"):
        (kept / name).write_text("{}" if name.endswith("json") else "")
    assert sorted(f["kind"] for f in files(kt, "ls")) == ["balance", "layers"]
    for short in ("layers/5555555555/balance", "layers/5555555555/memit.toml"):
        assert len(files(kt, "rm", short)) == 1
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]


def test_rm_takes_a_moment_with_its_factor_and_what_killed_runs_left(kt, filled):
    (factor_,) = of(files(kt, "ls"), "factor")
    gone = files(kt, "rm", factor_["origin"])
    assert sorted(f["kind"] for f in gone) == ["factor", "second moment", "temporary", "temporary"]
    assert (filled / ".tmpLive99").exists() and not any((filled / f["name"]).exists() for f in gone)


@pytest.mark.parametrize(
    ("typed", "left"),
    [(("-m", "demo"), 2), (("--older-than", "1h"), 3), (("-m", "tiny", "--older-than", "0m"), 1), (("--all",), 0)],
)
def test_rm_by_model_by_age_or_all(kt, filled, typed, left):
    ran = kt("cache", "rm", *typed)
    assert ran.code == 0 and "removed from" in ran.out
    assert len(of(files(kt, "ls"), "second moment")) == left
    assert (filled / "mine.txt").exists() and not (filled / ".tmpAb12Cd").exists()


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("lst",), "kt cache ls|rm"),
        (("rm",), "kt cache ls lists them), or --model"),
        (("rm", "cov-", "--all"), "kt cache ls lists them), or --model"),
        (("rm", "cov-"), "files begin with 'cov-'"),
        (("rm", "nothing"), "no file begins with 'nothing'"),
        (("rm", "-m", "gpt2"), "nothing in the cache is of the model 'gpt2'; there are: demo, tiny"),
        (("rm", "--older-than", "a week"), "30d"),
        (("ls", "--all"), "takes no names and no --all"),
    ],
)
def test_bad_input_is_one_line_and_removes_nothing(kt, filled, typed, says):
    before = sorted(path.name for path in filled.iterdir())
    ran = kt("cache", *typed)
    assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1
    assert sorted(path.name for path in filled.iterdir()) == before


def test_an_empty_cache_is_no_error(kt, tmp_path):
    ran = kt("cache", "ls", "--cache", tmp_path / "none")
    assert ran.code == 0 and "0 files" in ran.err
