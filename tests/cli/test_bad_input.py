"""Wrong input: exit code 2, one line on stderr that says what and what to do, nothing written."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kt as library
from kt.cli import app, checks
from kt.editing.edit import Edit
from kt.model.update import Dense
from kt.runs.folder import RunFolder

FACT = ("--prompt", "The mother tongue of {} is", "--subject", "Marie Curie")


def test_an_unknown_model(refused):
    assert "no/such-model" in refused("heatmap", "-m", "no/such-model", *FACT)


def test_a_folder_without_a_tokenizer(refused, model_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=lambda folder, names: [n for n in names if "token" in n])
    assert "tokenizer" in refused("heatmap", "-m", bare, *FACT)


def test_a_folder_that_is_no_model(refused, tmp_path):
    assert str(tmp_path) in refused("heatmap", "-m", tmp_path, *FACT)


def test_a_subject_that_is_not_in_its_prompt(refused, model_folder):
    arguments = ("--prompt", "The mother tongue of her is", "--subject", "Marie Curie")
    assert "'Marie Curie'" in refused("heatmap", "-m", model_folder, *arguments)


@pytest.mark.parametrize("target", ["", "  ", "Polish"])
def test_an_empty_or_an_unchanged_target(refused, model_folder, target):
    line = refused("apply-edit", "-m", model_folder, *FACT, "--answer", "Polish", "--target", target)
    assert "target" in line


@pytest.mark.parametrize("flag", ["--layers-mlp", "--layers-attn"])
def test_layers_that_the_model_does_not_have(refused, model_folder, corpus_file, flag):
    layers = {"--layers-mlp": "0", "--layers-attn": "0", flag: "1-7"}
    typed = [word for pair in layers.items() for word in pair]
    arguments = (*FACT, "--target", "French", "--alpha", "0.3", "--corpus", corpus_file, *typed)
    assert "has layers 0 to 2, not 3" in refused("apply-edit", "-m", model_folder, *arguments)


def test_layers_of_cov_that_the_model_does_not_have(refused, model_folder, corpus_file):
    assert "9" in refused("cov", "-m", model_folder, "--corpus", corpus_file, "--layers-mlp", "9")


def test_a_facts_file_with_a_broken_line_names_the_line(refused, model_folder, tmp_path):
    path = tmp_path / "facts.jsonl"
    good = json.dumps({"prompt": "{} is", "subject": "Marie Curie", "answer": "Polish"})
    path.write_text(f'{good}\n{good}\n{{"prompt": \n')
    assert "line 3" in refused("heatmap", "-m", model_folder, "-f", path)


@pytest.mark.parametrize("name", ["facts.json", "facts.txt", "missing.json"])
def test_a_facts_file_that_is_not_json(refused, model_folder, tmp_path, name):
    path = tmp_path / name
    if name != "missing.json":
        path.write_text("subject,answer\nMarie Curie,Polish\n")
    assert str(path) in refused("heatmap", "-m", model_folder, "-f", path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_asked_for_and_absent(refused, model_folder):
    assert "cuda" in refused("heatmap", "-m", model_folder, "--device", "cuda:0", *FACT).lower()


def test_an_unknown_dtype_device_or_method(refused, model_folder):
    assert "fp8" in refused("heatmap", "-m", model_folder, "--dtype", "fp8", *FACT)
    assert "tpu" in refused("heatmap", "-m", model_folder, "--device", "tpu", *FACT)
    line = refused("apply-edit", "-m", model_folder, *FACT, "--target", "French", "--method", "magic")
    assert "magic" in line and "memit" in line


@pytest.mark.parametrize("flag", ["--out", "--json", "--html"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(refused, model_folder, facts_file, tmp_path, flag):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "below", "/proc/kt"):
        line = refused("heatmap", "-m", "never-looked-at", "-f", facts_file, flag, place)
        assert "cannot write" in line


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        *(("heatmap", flag) for flag in ("--out", "--json", "--html")),
        *(("apply-edit", flag) for flag in ("--out", "--merge-to")),
        ("layers", "--preset-to"),
    ],
)
def test_a_link_to_nothing_is_refused_before_the_work(refused, facts_file, tmp_path, command, flag):
    (tmp_path / "link.toml").symlink_to("gone")
    line = refused(command, "-m", "never-looked-at", "-f", facts_file, flag, tmp_path / "link.toml")
    assert "is a link to gone, which is not there; make that first" in line


def test_an_output_folder_of_something_else_is_left_alone(refused, facts_file, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.txt").write_text("x")
    assert "not a run of kt" in refused("heatmap", "-m", "never", "-f", facts_file, "-o", tmp_path / "thesis")
    line = refused("apply-edit", "-m", "never", "-f", facts_file, "--merge-to", tmp_path / "thesis")
    assert "not empty" in line


def test_a_run_that_stands_there_is_left_alone(refused, facts_file):
    with RunFolder(Path("e"), "apply-edit") as made:
        Edit({"model.norm.weight": Dense(torch.ones(32))}, {}).save(made.file("edit.safetensors"))
    for command in (("heatmap",), ("eval", "--edit", "e/edit.safetensors"), ("apply-edit",), ("sweep",)):
        line = refused(*command, "-m", "never", "-f", facts_file, "-o", "e")
        assert "e holds a run already" in line and "--overwrite" in line
    line = refused("edits", "stack", "e/edit.safetensors", "--to", "e/edit.safetensors")
    assert "there already" in line
    for name in ("s.json", "page.html"):
        Path(name).write_text("mine")
    assert "s.json is there already" in refused("edits", "stack", "e/edit.safetensors", "--to", "s.json")
    assert "page.html is there already" in refused("report", "e", "--out", "page.html")


def test_a_full_disk(refused, model_folder, facts_file, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = refused(
        "heatmap", "-m", model_folder, "-f", facts_file, "--keep", "all", "--samples", 1, "--kind", "mlp", "--quiet"
    )
    assert "the disk is full" in line and ".tmp-" not in line


MALFORMED = {
    "--limit": ("heatmap", ["0", "x", "5-2", "-3", "1.5"]),
    "--noise": ("heatmap", ["3", "0s", "-1s", "xs", "nans", "1e300s", "infs"]),
    "--kind": ("heatmap", ["mlp,brain", ""]),
    "--metric": ("heatmap", ["bits"]),
    "--corrupt": ("heatmap", ["shuffle"]),
    "--keep": ("heatmap", ["some"]),
    "--samples": ("heatmap", ["0", "x"]),
    "--window": ("heatmap", ["0"]),
    "--seed": ("heatmap", ["x"]),
    "--batch-size": ("heatmap", ["0", "x", "-1"]),
    "--layers-mlp": ("apply-edit", ["4-2", "x", "4-", "1,,2", "-1"]),
    "--layers-attn": ("cov", ["4:8"]),
    "--alpha": ("apply-edit", ["1.5", "-0.1", "x", "nan"]),
    "--mode": ("apply-edit", ["x", "batch,single"]),
    "--evaluate": ("apply-edit", ["often", "step"]),
    "--step-size": ("apply-edit", ["0", "x", "2"]),
}


@pytest.mark.parametrize(("flag", "value"), [(f, v) for f, (_, values) in MALFORMED.items() for v in values])
def test_a_malformed_value_names_its_flag(refused, model_folder, facts_file, flag, value):
    command = MALFORMED[flag][0]
    facts = () if command == "cov" else ("-f", facts_file)
    line = refused(command, "-m", model_folder, *facts, f"{flag}={value}")
    assert flag.lstrip("-").split("-")[0] in line


EDIT = ("apply-edit", "--target", "French")
BEFORE_LOADING = [
    ((*EDIT, "--method", "memti"), "did you mean memit?"),
    ((*EDIT, "--preset", "lama-2-7b"), "did you mean llama-2-7b?"),
    ((*EDIT, "--set", "v_lrr=1"), "did you mean v_lr?"),
    ((*EDIT, "--method", "mend"), "mend needs an editor trained for this model"),
    ((*EDIT, "--method", "malmen", "--set", "editor=none.safetensors"), "editor=none.safetensors: no such file"),
    (
        (*EDIT, "--method", "ike", "--set", "demonstrations=none.json"),
        "demonstrations=none.json: no such file",
    ),
    ((*EDIT, "--method", "stableedit", "--set", "warmup=none.json"), "warmup=none.json: no such file"),
    ((*EDIT, "--set", "lr=1"), "intattn does not use it"),
    (("sweep", "alpha", "--set", "lr=1"), "intattn does not use it"),
    ((*EDIT, "--method", "memit", "--layers-attn", "1"), "--layers-attn: memit does not use it"),
    (("layers", "--method", "magic"), "magic"),
    ((*EDIT, "--statistics", "none.safetensors"), "no such file"),
    ((*EDIT, "--layers-mlp", "70"), "has layers 0 to 2, not 70"),
    ((*EDIT, "--set", "layers_high=70", "--method", "jeep"), "has layers 0 to 2, not 70"),
    ((*EDIT, "--resume", "none"), "no run to go on with"),
    (("probe", "--edit", "none.safetensors"), "no such file"),
    (("heatmap", "--metric", "porb"), "did you mean prob?"),
    (("heatmap", "--png", "figure.png"), "needs a browser"),
    (("heatmap", "--device", "gpu"), "unknown"),
]


@pytest.mark.parametrize(("typed", "says"), BEFORE_LOADING)
def test_what_needs_no_model_is_refused_before_one_loads(refused, failing, monkeypatch, model_folder, typed, says):
    failing(AssertionError("a model loads"))
    monkeypatch.setenv("BROWSER_PATH", "none")
    command, *more = typed
    line = refused(command, *more, "-m", model_folder, *FACT)
    assert says in line and "is kept: go on" not in line


IDLE = [
    "heatmap --top 5", "heatmap --check", "heatmap --corrupt swap --samples 3", "alpha --corrupt swap --noise 2s",
    "heatmap --limit 3", "eval --force", "eval --no-control", "eval --max-new-tokens 5", "probe --force",
    "probe --edit e.safetensors --statistic median", "case --force", "abilities --preset gsm8k-two-shot --force",
    "apply-edit --no-generate", "apply-edit --no-check", "apply-edit --png x.png", "apply-edit --dry-run --resume x",
    "apply-edit --alpha 0.3 --alpha-facts demo", "apply-edit --statistics s.safetensors --max-tokens 9",
    "apply-edit --method memit --alpha 0.3",
    "apply-edit --method ft --corpus demo", "layers --alpha 0.3", "layers --statistics s.safetensors --max-tokens 9",
    "sweep alpha --alpha 0.3", "sweep alpha --module mlp", "sweep alpha --region low", "sweep layers --no-trace",
    "edits ls --force", "edits show e.safetensors --dtype bf16",
]  # fmt: skip


@pytest.mark.parametrize("typed", IDLE)
def test_an_option_that_has_no_use_is_refused(refused, failing, typed):
    """By its name, the last one typed."""
    failing(AssertionError("a model loads"))
    for file in ("s.safetensors", "e.safetensors"):
        Path(file).touch()
    command, *more = typed.split()
    by_hand = FACT if command in ("heatmap", "alpha") else ()
    flag = [word for word in more if word.startswith("--")][-1]
    line = refused(command, *more, *by_hand)
    assert flag in line and "has no use here" in line


def test_options_as_they_come_have_a_use_and_no_row_names_one_that_its_command_lacks():
    for name, (place, *_) in app.COMMANDS.items():
        module, _, function = place.partition(":")
        command = getattr(importlib.import_module(f"kt.cli.{module}"), function)
        (parameter,) = inspect.signature(command, eval_str=True).parameters.values()
        options = parameter.annotation(command=name)
        checks.idle(options)
        for row in checks.IDLE:
            if name in row.commands.split():
                assert all(hasattr(options, each) for each in row.names.split())
                row.used(options)


WITHOUT_TORCH = """
import sys
from kt.cli import main
for line in sys.argv[1:]:
    print(main(line.split()), "torch" in sys.modules)
"""


def test_files_that_are_not_there_are_refused_without_torch():
    """Which takes seconds to import."""
    edit = "nope.safetensors"
    commands = [f"{command} --edit {edit}" for command in ("eval", "probe", "abilities --preset gsm8k-two-shot")]
    commands += [f"edits show {edit}", f"edits diff {edit} {edit}", f"edits stack {edit}", f"case --edits {edit}"]
    commands += [f"export {edit} --to x", f"apply-edit --history {edit}"]
    commands += ["revert nope", f"revert . --edit {edit}", "apply-edit --alpha-facts nope.json"]
    commands += [f"{name} -f nope.json" for name in ("eval", "heatmap", "probe", "apply-edit", "sweep alpha", "case")]
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *commands], capture_output=True, text=True, check=False)
    assert ran.stdout.splitlines() == ["2 False"] * len(commands), ran.stderr
    assert ran.stderr.count("no such file") == 11


def test_a_model_that_is_neither_here_nor_to_be_had(refused, monkeypatch):
    for name in ("./nope", "/nope", "runs/nope/deep", "nope/"):
        assert "no such folder" in refused("heatmap", "-m", name, *FACT)
    assert "HF_HUB_OFFLINE is set" in refused("heatmap", "-m", "no/such-model", *FACT)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    line = refused("heatmap", "-m", "no/such-model", *FACT)
    assert "http://127.0.0.1:9 does not answer" in line and "give the folder" in line
    assert time.monotonic() - began < 8


def test_an_unknown_flag_and_an_unknown_command(refused):
    assert "--nonsense" in refused("heatmap", "--nonsense")
    assert "nonsense" in refused("nonsense")
    assert "nonsense" in refused("ls", "nonsense")


def test_a_misspelt_variable(refused, kt, monkeypatch, facts_file):
    monkeypatch.setenv("KT_LIMT", "3")
    assert "KT_LIMT is set, and no flag has that name; did you mean KT_LIMIT?" in refused("heatmap", "-f", facts_file)
    monkeypatch.delenv("KT_LIMT")
    monkeypatch.setenv("KT_LIMIT", "3")  # of other commands
    monkeypatch.setenv("KT_LOGISTICS_HOST", "somebody else's")
    ran = kt("ls", "presets", "--quiet")
    assert ran.code == 0 and ran.err == ""
    ran = kt("ls", "presets", "--json", "-")
    assert ran.code == 0 and ran.err == "kt: warning: KT_LOGISTICS_HOST is set, and is no variable of kt\n"


def test_flags_of_a_fact_by_hand_come_together(refused, model_folder):
    assert "--subject" in refused("heatmap", "-m", model_folder, "--prompt", "{} is")
    assert "--prompt" in refused("heatmap", "-m", model_folder, "--subject", "Marie Curie")
    assert "one of them" in refused("apply-edit", "-m", model_folder, "--edits", "a.json", *FACT)


EDITED = ("--layers-mlp", "0-1", "--layers-attn", "0", "--alpha", "0.3")


def test_requests_that_contradict_each_other(refused, model_folder, tmp_path):
    record = {"prompt": "The mother tongue of {} is", "subject": "Marie Curie", "answer": "Polish"}
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(record | {"target": t}) + "\n" for t in ("French", "Italian")))
    line = refused("apply-edit", "-m", model_folder, "--edits", path, *EDITED, "--strict")
    assert "1 and 2 contradict" in line and "French" in line and "Italian" in line
    line = refused("apply-edit", "-m", model_folder, "--edits", path, *EDITED, "--strict", "--mode", "single")
    assert "each is edited alone" in line


def test_a_projector_larger_than_memory(refused, model_folder, facts_file, monkeypatch):
    monkeypatch.setattr("kt.model.memory.free_memory", lambda: 5000)
    line = refused(
        "apply-edit", "-m", model_folder, "--edits", facts_file, "--method", "alphaedit", "--layers-mlp", "0"
    )
    assert "projector" in line and "GiB" in line and "d_key 48" in line


def test_options_that_a_method_or_mode_has_no_place_for(refused, model_folder, facts_file, tmp_path):
    edits = ("apply-edit", "-m", model_folder, "--edits", facts_file)
    steps = ("--mode", "sequential", "--keep-history")
    assert "keep_history" in refused(*edits, "--method", "rome", "--layers-mlp", "0", *steps)
    assert "norm_guard" in refused(*edits, "--method", "ft", "--layers-mlp", "0", "--norm-guard")
    assert "leaves attention alone" in refused(*edits, "--method", "memit", "--layers-mlp", "0", "--alpha", "0.3")
    assert "--merge-to" in refused(*edits, *EDITED, "--mode", "single", "--merge-to", tmp_path / "x")
    assert "variant" in refused(*edits, *EDITED, "--variant", "zsre")
    assert "has layers 0 to 2" in refused(*edits, "--method", "jeep", "--layers-mlp", "0", "--set", "layers_high=7")


def test_an_edit_file_that_is_none(refused, model_folder, facts_file, tmp_path):
    path = tmp_path / "edit.safetensors"
    path.write_bytes(b"nothing of the kind")
    assert str(path) in refused("eval", "-m", model_folder, "-f", facts_file, "--edit", path)
    path = model_folder / "model.safetensors"
    assert "expected edit" in refused("eval", "-m", model_folder, "-f", facts_file, "--edit", path)


def test_report_without_runs_or_of_something_else(refused, tmp_path):
    assert "run folders" in refused("report")
    assert "not a run folder" in refused("report", tmp_path)


# Failures that are nobody's input


def test_a_bug_is_one_line_and_a_traceback_only_on_request(refused, failing, kt, monkeypatch, facts_file):
    failing(ZeroDivisionError("division by zero"))
    line = refused("heatmap", "-f", facts_file, code=1)
    assert "ZeroDivisionError: division by zero" in line and "KT_DEBUG=1" in line
    monkeypatch.setenv("KT_DEBUG", "1")
    ran = kt("heatmap", "-f", facts_file)
    assert ran.code == 1 and "Traceback" in ran.err


def test_failed_work_is_exit_code_1(refused, failing, facts_file):
    from kt.errors import WorkFailed

    failing(WorkFailed("the update is not finite"))
    assert "not finite" in refused("heatmap", "-f", facts_file, code=1)


def test_an_interruption_is_one_line_and_130(kt, failing, facts_file):
    failing(KeyboardInterrupt())
    ran = kt("heatmap", "-f", facts_file)
    assert (ran.code, ran.out, ran.err) == (130, "", "kt: interrupted; nothing was written\n")
    assert list(Path().iterdir()) == []


def test_a_weight_lost_in_rounding_is_failed_work():
    from kt.cli.apply_edit import check_changed
    from kt.editing.edit import Edit
    from kt.editing.request_report import RequestReport

    same = RequestReport("0", "p", "s", "t", None, (0.1, 0.1), (3, 3), None, None)
    lost = {"rounding": {"w": {"survived": 0.0, "error": 1.0}}}
    for manifest, why in ((lost, "rounding; load .* float32"), ({}, "too small, or its layers do not reach")):
        with pytest.raises(library.KtError, match=f"no target's probability changed: .*{why}") as caught:
            check_changed([Edit({}, manifest, (same,))])
        assert caught.value.exit_code == 1 and ("float32" in str(caught.value)) == (manifest is lost)


def test_the_exception_of_usage_errors_is_the_one_that_typer_raises():
    assert app.UsageError.__name__ == "UsageError"
