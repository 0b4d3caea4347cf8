"""`--resume` takes kept phases up for the model, the corpus and the settings files that they were computed with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from families import TEXTS, byte_level_tokenizer, tiny_module

from kt.cli import main
from kt.editing.edit import Edit
from kt.runs import journal

FACT = {
    "prompt": "The mother tongue of {} is",
    "subject": "Danielle Darrieux",
    "target_new": "Italy",
    "answer": "French",
}
COMMAND = (
    "apply-edit -m model --facts facts.jsonl --corpus corpus.txt --max-tokens 300 --method memit --layers-mlp 0 "
    "--preset mine.toml --force --no-progress"
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a run that was interrupted after its first phase."""
    place = tmp_path_factory.mktemp("begun")
    tiny_module("llama").save_pretrained(place / "model")
    byte_level_tokenizer().save_pretrained(place / "model")
    (place / "facts.jsonl").write_text(json.dumps(FACT))
    (place / "corpus.txt").write_text("\n".join(TEXTS * 4))
    (place / "mine.toml").write_text("[hyper_parameters]\nv_num_grad_steps = 2\nmom2_update_weight = 0.01\n")
    keep, kept = journal.save_arrays, []

    def first_only(path, *given):
        if kept:
            raise KeyboardInterrupt
        kept.append(keep(path, *given))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("KT_CACHE", str(place / "cache"))
        patch.setattr(journal, "save_arrays", first_only)
        assert main([*COMMAND.split(), "-o", "run"]) == 130
    assert len(kept) == 1
    return place


@pytest.fixture
def place(begun, tmp_path, monkeypatch):
    shutil.copytree(begun, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("KT_CACHE", str(begun / "cache"))
    return tmp_path / "here"


def resumed(capsys, command=COMMAND):
    capsys.readouterr()
    return main([*command.split(), "--resume", "run"]), capsys.readouterr().err


def in_json(file, change):
    content = json.loads(Path(file).read_text())
    change(content)
    Path(file).write_text(json.dumps(content))


CHANGES = {
    "rope_theta": lambda: in_json("model/config.json", lambda c: c["rope_parameters"].update(rope_theta=500.0)),
    "hidden_act silu, now it is relu": lambda: in_json("model/config.json", lambda c: c.update(hidden_act="relu")),
    "tokenizer": lambda: in_json("model/tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
    "texts repetition_penalty": lambda: in_json(
        "model/generation_config.json", lambda g: g.update(repetition_penalty=2.0)
    ),
    "corpus identity": lambda: Path("corpus.txt").write_text(TEXTS[0]),
    "preset file": lambda: Path("mine.toml").write_text("[hyper_parameters]\nv_num_grad_steps = 3\n"),
}


@pytest.mark.parametrize("words", CHANGES)
def test_phases_of_another_model_or_corpus_are_refused(words, place, capsys):
    CHANGES[words]()
    code, said = resumed(capsys)
    assert code == 2 and words in said and "was begun with" in said and said.count("\n") == 1, said
    assert list((place / "run.unfinished" / "phases").iterdir())


def test_the_same_model_goes_on_wherever_its_files_were_copied(place, capsys):
    in_json("model/config.json", lambda c: c.update(use_cache=False, transformers_version="5.0"))
    code, said = resumed(capsys)
    assert code == 0 and "1 finished phases are taken" in said and "older kt" not in said, said


def test_a_run_of_an_older_kt_goes_on_and_says_what_was_not_compared(place, capsys):
    in_json("run.unfinished/settings.json", lambda s: [s.pop(n) for n in journal.SINCE if n != "versions"])
    code, said = resumed(capsys)
    assert code == 0 and "1 finished phases are taken" in said, said
    line = next(line for line in said.splitlines() if "older kt" in line)
    assert "did not note its corpus identity, model config, model parts, model tokenizer" in line, said


@pytest.mark.parametrize("typed", ["boundary", "ends"])
def test_a_run_that_was_begun_with_a_spread_of_an_old_name_goes_on_under_either(place, capsys, typed):
    """The rule is the same; an option that the older kt did not have, and nobody gives, tells nothing."""

    def older(settings):
        settings["set"] = "spread=boundary"
        for name in ("nas", "nas_facts", "update_guard", "kl"):
            del settings[name]

    in_json("run.unfinished/settings.json", older)
    code, said = resumed(capsys, f"{COMMAND} --set spread={typed}")
    assert code == 0 and "1 finished phases are taken" in said, said
    assert Edit.load("run/edit.safetensors").manifest["hyper_parameters"]["spread"] == "ends"


def test_a_run_is_not_begun_with_an_old_name_nor_gone_on_with_under_another_rule(place, capsys):
    in_json("run.unfinished/settings.json", lambda settings: settings.update(set="spread=boundary"))
    code, said = resumed(capsys, f"{COMMAND} --set spread=rest")
    assert code == 2 and "was begun with set spread=ends, now it is spread=rest" in said and said.count("\n") == 1
    capsys.readouterr()
    code = main([*COMMAND.split(), "--set", "spread=forward", "-o", "new"])
    assert code == 2 and "did you mean rest, which it was" in capsys.readouterr().err


def test_a_run_goes_on_however_the_same_way_of_asking_is_typed(place, capsys):
    """The run was begun with prompts as they stand, as every run of an older kt."""
    code, said = resumed(capsys, f"{COMMAND} --chat never")
    assert code == 0, said


def test_a_run_does_not_go_on_with_prompts_in_a_chat_template(place, capsys):
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    in_json("model/tokenizer_config.json", lambda held: held.update(chat_template=template))
    in_json("run.unfinished/settings.json", lambda held: held["model's texts"].update(chat_template=template))
    code, said = resumed(capsys, f"{COMMAND} --chat always")
    assert code == 2 and "model's chat" in said and said.count("kt: error") == 1
