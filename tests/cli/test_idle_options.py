"""Options are handed on or refused; none is taken and passed over."""

from pathlib import Path

import numpy as np
import pytest

import kt as kt_package
from kt.errors import BadFact, KtError


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("case --seed 3", "--seed has no use here: nothing is drawn by chance"),
        ("cov --seed 3", "--seed has no use here"),
        ("heatmap -f none.json --prompt {}'s --subject x", "--facts has no use here: for facts from a file only"),
        ("presets ls --method memit", "--method has no use here"),
        ("presets ls --variant mcf", "--variant has no use here"),
        *((f"run ls {flag}", "kt run ls only lists recipes") for flag in (
            "--only memit", "--limit 3", "--smoke", "--seed 1", "-f lre", "-m gpt2", "-o there"
        )),
        ("heatmap --seed -1", "--seed"),
        ("apply-edit --seed -1", "--seed"),
        ("run fig2 --seed -1", "--seed"),
        ("eval --zsre-target alt", "only zsRE's records have two targets"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_one_line(refused, typed, says):
    assert says in refused(*typed.split())


@pytest.mark.parametrize("given", [("-m", "gpt2"), ("--dtype", "bf16"), ("--no-check",)])
def test_an_edit_file_alone_is_copied_without_a_model(refused, given):
    Path("edit.safetensors").write_text("")
    line = refused("export", "edit.safetensors", "--to", "there", "--format", "edit", *given)
    assert "--format edit copies the file alone" in line


@pytest.mark.parametrize("text", ["samples = true", "seed = false", "layers = [true]"])
def test_booleans_of_a_config_file_are_no_values(refused, monkeypatch, tmp_path, text):
    file = tmp_path / "kt.toml"
    file.write_text(f"[{'probe' if 'layers' in text else 'heatmap'}]\n{text}\n")
    assert text.split()[0] in refused("probe" if "layers" in text else "heatmap", "--config", file)


@pytest.mark.parametrize(
    ("given", "shipped"),
    [((), True), (("-f", "demo"), False), (("--join", " "), False), (("-f", "lre"), False)],
)
def test_only_the_default_of_kt_layers_is_the_shipped_set(kt, monkeypatch, given, shipped):
    seen = []

    def find_layers(model, facts, *_, **__):
        seen.append(facts)
        raise KtError("enough")

    monkeypatch.setattr("kt.experiments.layer_search.find_layers", find_layers)
    assert "enough" in kt("layers", *given).err
    assert (seen[0] is None) is shipped
    if "-f" in given:
        assert [f.prompt for f in seen[0]] == [f.prompt for f in kt_package.load_facts(given[1])]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, f: kt_package.contrast_probe(m, f, batch_size=True), "batch size True"),
        (lambda m, f: kt_package.contrast_probe(m, f, seed=-1), "seed -1 is below 0"),
        (lambda m, f: kt_package.edit(m, f, seed=-1), "seed -1 is below 0"),
        (lambda m, f: kt_package.find_layers(m, f, n_trace=0, n_edits=3), "n_trace 0 must be at least 2"),
    ],
)
def test_numbers_that_cannot_be_are_refused_at_once(call, says):
    with pytest.raises(KtError, match=says):
        call(kt_package.load("demo"), kt_package.load_facts("demo", limit=4))


def test_whole_numbers_of_numpy_are_whole_numbers():
    model, facts = kt_package.load("demo"), kt_package.load_facts("demo", limit=2)
    probe = kt_package.contrast_probe(model, facts, layers=np.arange(3), batch_size=np.int64(2))
    assert [type(layer) for layer in probe.as_dict()["layers"]] == [int] * 3
    assert kt_package.evaluate(model, facts, batch_size=np.int64(2)).records


@pytest.mark.parametrize(
    ("more", "says"),
    [({"subject": ["France", "Spain"]}, "'subject' holds 2 texts"), ({3: "x"}, "the key 3 is no text")],
)
def test_a_fact_as_a_dict_is_read_whole_or_refused(more, says):
    with pytest.raises(BadFact, match=says):
        kt_package.load_facts([{"prompt": "The capital of {} is", "subject": "France", "answer": "Paris"} | more])
