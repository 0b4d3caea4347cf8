"""Options are handed on or refused; none is taken and passed over."""

from pathlib import Path

import pytest

import kt as kt_package
from kt.errors import KtError


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
