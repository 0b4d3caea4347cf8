"""A tiny model and its facts as a user has them: a folder and a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from families import byte_level_tokenizer, tiny_module

from kt.cli import main

SUBJECTS = ("Danielle Darrieux", "Megan Rapinoe", "Tomas Brill", "Marie Curie")
ANSWERS = ("French", "English", "Polish", "Italian")


class Ran(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_module("qwen2").save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def facts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    records = [
        {"prompt": "The mother tongue of {} is", "subject": s, "answer": a, "foil": ANSWERS[i - 1]}
        for i, (s, a) in enumerate(zip(SUBJECTS, ANSWERS, strict=True))
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("Marie Curie was born in Warsaw and lived in Paris.\nThe capital of Italy is Rome.\n" * 20)
    return path


@pytest.fixture
def kt(tmp_path, monkeypatch, capsys):
    """Run `kt` in an empty folder, with a cache of its own and no settings from outside."""
    import os

    for name in [n for n in os.environ if n.startswith("KT_")]:
        monkeypatch.delenv(name)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("KT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return run


@pytest.fixture
def refused(kt, monkeypatch):
    """Run a command that must be refused; gives its one line."""

    def run(*arguments: object, code: int = 2) -> str:
        before = sorted(Path().rglob("*"))
        ran = kt(*arguments)
        assert (ran.code, ran.out) == (code, ""), ran.err
        assert ran.err.startswith("kt: error: ") and ran.err.count("\n") == 1, ran.err
        assert sorted(Path().rglob("*")) == before
        return ran.err

    return run


@pytest.fixture
def failing(monkeypatch):
    def fail(error: BaseException) -> None:
        def raise_it(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr("kt.model.load.load", raise_it)

    return fail
