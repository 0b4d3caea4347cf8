"""`--chat` on the command line: what is said, what is refused, and both ways of asking in one table."""

import json

import pytest
from chat_templates import TEMPLATES, tokenizer_of
from families import tiny_module

from kt.cli import main

FACT = ["--prompt", "What is the capital of {}?", "--subject", "Italy", "--answer", "Rome", "--target", "Paris"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chatting")
    tiny_module("llama", vocab_size=512).save_pretrained(path)
    tokenizer_of(TEMPLATES["qwen 2.5"]).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def edited(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "edit"
    options = ["--chat", "always", "--method", "ft", "--layers-mlp", "0", "--set", "num_steps=2", "--force"]
    assert main(["apply-edit", "-m", folder, *FACT, *options, "-o", str(out), "--quiet"]) == 0
    return out / "edit.safetensors"


@pytest.mark.parametrize(("given", "said"), [
    (["--chat", "allways"], "did you mean always?"),
    (["--thinking", "yes"], "choose one of on, off"),
    (["--chat-turn", "system"], "choose one of auto, user, reply"),
    (["--chat", "never", "--system", "Be brief."], "leave out --chat never"),
    (["--chat", "always", "-m", "demo"], "demo has no chat template"),
    (["--thinking", "on"], "knows no thinking"),
    (["--system", "Be brief.", "-m", "demo"], "demo has no chat template"),
    (["--system", "Be brief."], "add --chat always for its settings"),
    (["--chat-turn", "user"], "add --chat always for its settings"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(folder, capsys, given, said):
    model = [] if "-m" in given else ["-m", folder]
    assert main(["probe", *model, *FACT, *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("kt: error: ") and said in line


def test_auto_says_in_one_line_why_a_template_is_left_out(folder, capsys, tmp_path):
    assert main(["probe", "-m", folder, *FACT, "-o", str(tmp_path / "run")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "ends no text" in line]
    assert len(said) == 1 and "--chat always" in said[0]
    assert "chat" not in json.loads((tmp_path / "run" / "manifest.json").read_text())


def test_an_edit_solved_in_the_template_is_scored_both_ways(folder, edited, capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["eval", "-m", folder, *FACT, "--edit", str(edited), "--chat", "always", "-o", str(out)]) == 0
    shown = capsys.readouterr()
    assert "scored again with prompts as they stand" in shown.err
    asked = {name: json.loads((out / name).read_text()) for name in ("scores.json", "after.otherwise.json")}
    assert "in the chat template" in asked["scores.json"]["protocol"]["chat"]
    assert "chat" not in asked["after.otherwise.json"]["protocol"]
    results = json.loads((out / "results.json").read_text())
    assert results["after_otherwise"]["target_prob_tf"]["mean"] != results["metrics"]["target_prob_tf"]["mean"]
    assert json.loads((out / "manifest.json").read_text())["chat"]["head"].endswith("<|im_start|>user\n")


def test_an_edit_that_no_template_comes_into_is_scored_once(tmp_path, capsys):
    out, options = tmp_path / "edit", ["--method", "ft", "--layers-mlp", "0", "--set", "num_steps=2", "--force"]
    assert main(["apply-edit", *FACT, *options, "-o", str(out), "--quiet"]) == 0
    scored = ["eval", *FACT, "--edit", str(out / "edit.safetensors"), "-o", str(tmp_path / "run")]
    assert main(scored) == 0
    assert "scored again" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "after.otherwise.json").exists()
