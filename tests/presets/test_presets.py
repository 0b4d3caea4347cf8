"""Presets: the numbers of the papers and repositories, inheritance, variants, and which model each is for."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GPT2Config, GPTJConfig, LlamaConfig, MistralConfig, Qwen2Config

import kt
from kt.cli import main
from kt.editing.config import setting_fields
from kt.editing.methods import METHODS, all_settings
from kt.editing.presets import configured, lineage, path_of
from kt.errors import BadFile
from kt.presets import named, preset_for, presets

BASES = {"base", "originals", "easyedit"}
SEVEN_B = dict(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32)
CONFIGS = {
    "qwen2.5-7b": Qwen2Config(num_hidden_layers=28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4),
    "mistral-7b": MistralConfig(**SEVEN_B, num_key_value_heads=8),
    "gpt-j-6b": GPTJConfig(n_layer=28, n_embd=4096, n_head=16),
    "gpt2-xl": GPT2Config(n_layer=48, n_embd=1600, n_head=25),
    "llama-7b": LlamaConfig(**SEVEN_B, max_position_embeddings=2048),
    "llama-2-7b": LlamaConfig(**SEVEN_B, max_position_embeddings=4096),
    "llama-3-8b": LlamaConfig(**SEVEN_B, num_key_value_heads=8, max_position_embeddings=8192),
}
OTHERS = {
    "a small Qwen2": Qwen2Config(num_hidden_layers=24, hidden_size=896, num_attention_heads=14, num_key_value_heads=2),
    "GPT-2": GPT2Config(),
    "Llama-2-13B": LlamaConfig(num_hidden_layers=40, hidden_size=5120, num_attention_heads=40),
    "CodeLlama-7B": LlamaConfig(**SEVEN_B, max_position_embeddings=16384),
}


def model_of(config, name="a/model"):
    return SimpleNamespace(name=name, module=SimpleNamespace(config=config))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_matches_its_preset_and_no_other(name):
    model = model_of(CONFIGS[name])
    assert [p.name for p in presets().values() if p.matches(model)] == [name]
    assert preset_for(model) is presets()[name]


@pytest.mark.parametrize("what", OTHERS)
def test_a_model_of_another_shape_matches_none(what):
    assert preset_for(model_of(OTHERS[what])) is None


def test_the_demo_model_is_matched_by_name_alone():
    demo = model_of(OTHERS["a small Qwen2"], "demo")
    assert preset_for(demo) is presets()["demo"]
    with pytest.warns(UserWarning, match="preset gpt2-xl is for another model .model_type gpt2, num_hidden_layers 48"):
        assert preset_for(demo, "gpt2-xl") is presets()["gpt2-xl"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preset_for(demo, "demo") is presets()["demo"]
        assert preset_for(demo, "originals") is presets()["originals"], "a base is for no model in particular"


def test_there_is_a_preset_for_every_model_and_bases_match_none():
    assert set(presets()) == {*CONFIGS, "demo", *BASES}
    assert {name for name, preset in presets().items() if not preset.match} == BASES


# As the papers print them: arXiv 2510.27400 section 5.1; arXiv 2412.17872 (JEEP) appendix D; EasyEdit's appendix B.
PRINTED = [
    ("qwen2.5-7b", None, None, dict(layers_mlp=(4, 5, 6, 7, 8), layers_attn=(2, 3, 4), alpha=0.3)),
    ("mistral-7b", None, None, dict(layers_mlp=(4, 5, 6, 7, 8), layers_attn=(3, 4, 5, 6), alpha=0.1)),
    ("gpt-j-6b", "rome", None, dict(layers_mlp=(5,), v_num_grad_steps=20, v_weight_decay=0.5, kl_factor=0.0625)),
    ("llama-7b", "rome", None, dict(layers_mlp=(7,), v_num_grad_steps=20, v_weight_decay=0.5, kl_factor=0.0625)),
    ("gpt-j-6b", "memit", None, dict(layers_mlp=(3, 4, 5, 6, 7, 8), v_lr=0.5, v_num_grad_steps=25, v_weight_decay=0.5,
                                     kl_factor=0.0625, clamp_norm_factor=0.75, mom2_update_weight=15000)),
    ("llama-7b", "memit", None, dict(layers_mlp=(5, 6, 7, 8, 9, 10), v_lr=0.5, v_weight_decay=0.5, kl_factor=0.0625,
                                     clamp_norm_factor=0.9, mom2_update_weight=4000)),
    ("gpt-j-6b", "pmet", None, dict(v_lr=0.2, v_num_grad_steps=30, kl_factor=1, mom2_update_weight=6000)),
    ("llama-7b", "pmet", "mcf", dict(v_lr=0.5, v_num_grad_steps=30, kl_factor=1, clamp_norm_factor=0.9,
                                     mom2_update_weight=4000)),
    ("llama-7b", "pmet", "zsre", dict(v_lr=0.5, v_num_grad_steps=30, kl_factor=1, clamp_norm_factor=1,
                                      mom2_update_weight=6000)),
    ("gpt-j-6b", "jeep", "mcf", dict(layers_mlp=(3, 4, 5, 6, 7, 8), layers_high=(15, 16), v_lr=0.5, v_num_grad_steps=30,
                                     v_weight_decay=0.5, v_weight_decay_high=0.5, kl_factor=0.0625,
                                     clamp_norm_factor=0.75, clamp_norm_factor_high=0.25, mom2_update_weight=2000,
                                     mom2_update_weight_high=2000)),
    ("gpt-j-6b", "jeep", "zsre", dict(clamp_norm_factor=0.75, clamp_norm_factor_high=0.8, mom2_update_weight=6000,
                                      mom2_update_weight_high=2000)),
    ("llama-7b", "jeep", "mcf", dict(layers_mlp=(5, 6, 7, 8, 9, 10), layers_high=(22, 23, 24), clamp_norm_factor=1,
                                     clamp_norm_factor_high=0.25, mom2_update_weight=2500,
                                     mom2_update_weight_high=1000)),
    ("llama-7b", "jeep", "zsre", dict(clamp_norm_factor=1, clamp_norm_factor_high=0.7, mom2_update_weight=6000,
                                      mom2_update_weight_high=3000)),
    ("gpt-j-6b", "ft-wd", None, dict(layers_mlp=(21,), num_steps=25, lr=5e-5, stop_loss=1e-2, modules="block")),
    ("llama-7b", "ft-wd", None, dict(layers_mlp=(23,), num_steps=25, lr=5e-5, stop_loss=1e-1, modules="block")),
    ("llama-2-7b", "rome", None, dict(layers_mlp=(5,))),
    ("llama-2-7b", "memit", None, dict(layers_mlp=(4, 5, 6, 7, 8))),
    ("llama-2-7b", "pmet", None, dict(layers_mlp=(4, 5, 6, 7, 8))),
]  # fmt: skip

# As the repositories' hparams have them.
FILES = [
    ("llama-7b", "memit", None, dict(v_num_grad_steps=30)),  # the paper says 25
    ("llama-7b", "jeep", None, dict(min_loss=0.9)),
    ("gpt2-xl", "rome", None, dict(layers_mlp=(17,), v_num_grad_steps=20, clamp_norm_factor=4, v_weight_decay=0.5,
                                   mom2_adjustment=True)),
    ("gpt2-xl", "memit", None, dict(layers_mlp=(13, 14, 15, 16, 17), v_num_grad_steps=20, clamp_norm_factor=0.75,
                                    v_weight_decay=0.5, mom2_update_weight=20000)),
    ("gpt2-xl", "ft", None, dict(layers_mlp=(1,), num_steps=25, lr=5e-4, weight_decay=0)),
    ("gpt2-xl", "ft-l", None, dict(layers_mlp=(0,), num_steps=25, lr=5e-4, norm_constraint=5e-4, batch_size=3)),
    ("gpt-j-6b", "rome", None, dict(clamp_norm_factor=4, mom2_adjustment=True)),
    ("gpt-j-6b", "ft", None, dict(layers_mlp=(21,))),
    ("gpt-j-6b", "ft-l", None, dict(layers_mlp=(0,), norm_constraint=5e-5)),
    ("gpt-j-6b", "alphaedit", None, dict(nullspace_threshold=0.02, L2=10)),
    ("llama-2-7b", "pmet", None, dict(v_num_grad_steps=20, v_lr=0.5, kl_factor=0.0625, clamp_norm_factor=1,
                                      v_weight_decay=0.5, mom2_update_weight=15000)),
    ("llama-3-8b", "alphaedit", None, dict(layers_mlp=(4, 5, 6, 7, 8), v_lr=0.1, v_num_grad_steps=25,
                                           clamp_norm_factor=0.75, v_weight_decay=0.5, L2=10)),
    ("qwen2.5-7b", "alphaedit", None, dict(v_lr=0.5, clamp_norm_factor=4, v_weight_decay=1e-3, L2=1)),
    ("qwen2.5-7b", "ft", None, dict(layers_mlp=(27,), num_steps=25, lr=5e-4, batch_size=1)),
    ("mistral-7b", "ft-l", None, dict(layers_mlp=(21,), norm_constraint=5e-5)),
    ("mistral-7b", "ft-m", None, dict(layers_mlp=(21,), norm_constraint=5e-5, batch_size=1)),
    ("gpt2-xl", "ft-m", None, dict(layers_mlp=(0,), norm_constraint=5e-4, batch_size=3)),
    *((name, "ft-m", None, dict(layers_mlp=(layer,), batch_size=1, num_steps=25, lr=5e-4, weight_decay=0,
                                objective_optimization="target_new"))
      for name, layer in (("qwen2.5-7b", 27), ("mistral-7b", 21), ("llama-2-7b", 21), ("llama-3-8b", 21),
                          ("gpt-j-6b", 21), ("llama-7b", 21))),
    ("llama-7b", "ft", None, dict(layers_mlp=(21,), batch_size=1)),
    *((name, "unke", None, dict(lr=2e-4, v_lr=0.5, v_num_grad_steps=25, v_weight_decay=1e-3, clamp_norm_factor=4))
      for name in ("qwen2.5-7b", "mistral-7b", "llama-2-7b", "llama-3-8b", "llama-7b", "gpt-j-6b", "gpt2-xl")),
    *(("llama-3-8b", method, None, dict(layers_mlp=(4, 5, 6, 7, 8), v_lr=0.5, v_num_grad_steps=25, v_weight_decay=1e-3,
                                        clamp_norm_factor=4, mom2_update_weight=15000, window=40))
      for method in ("memit-are", "alphaedit-are")),
    *((name, "alphaedit-are", None, dict(nullspace_threshold=0.02, L2=10)) for name in ("qwen2.5-7b", "llama-3-8b")),
    *((name, "lyaplock", None, dict(mom2_update_weight=1000, clamp_norm_factor=0.75, v_weight_decay=0.5))
      for name in ("gpt-j-6b", "gpt2-xl", "llama-3-8b")),
    ("gpt2-xl", "nse", None, dict(neurons=1, residual_least=35, residual_most=150, mom2_update_weight=10000)),
    ("gpt-j-6b", "nse", None, dict(neurons=0.8, residual_least=15, residual_most=100, mom2_update_weight=15000)),
    ("llama-3-8b", "nse", None, dict(neurons=1, residual_least=2.5, residual_most=50, mom2_update_weight=15000)),
    *((name, "encore", None, dict(v_lr=0.5, v_weight_decay=0.5, clamp_norm_factor=0.75, update_norm_lambda=ridge,
                                  stop_after=stop))
      for name, ridge, stop in (("llama-2-7b", 10, 3), ("llama-3-8b", 20, 2), ("gpt2-xl", 10, 4))),
    *((name, "stableedit", None, dict(layers_mlp=tuple(range(first, last + 1)), lr=1e-6, L2=1))
      for name, first, last in (("qwen2.5-7b", 18, 26), ("gpt-j-6b", 18, 26), ("llama-3-8b", 22, 30),
                                ("mistral-7b", 28, 30))),
    ("mistral-7b", "locft", None, dict(layers_mlp=(23,), lr=5e-5, batch_size=100, modules="block")),
    *((name, method, None, dict(layers_mlp=(5,), v_lr=0.5, v_num_grad_steps=25, v_weight_decay=1e-3,
                                clamp_norm_factor=4, kl_factor=0.0625, mom2_adjustment=False))
      for name in ("qwen2.5-7b", "mistral-7b", "llama-2-7b", "llama-3-8b") for method in ("rome", "r-rome")),
    *((name, method, None, dict(v_lr=0.5, v_num_grad_steps=25, v_weight_decay=1e-3, clamp_norm_factor=4,
                                kl_factor=0.0625, mom2_update_weight=15000))
      for name in ("qwen2.5-7b", "mistral-7b", "llama-2-7b") for method in ("memit", "intattn")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method", "variant", "wanted"), PRINTED + FILES)
def test_the_values_are_those_of_the_papers_and_repositories(name, method, variant, wanted):
    preset = presets()[name]
    used = preset.values(None, variant) | (preset.values(method, variant) if method else {})
    assert {key: used.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("name", sorted({*CONFIGS, "demo", *BASES}))
def test_every_value_is_a_hyper_parameter_with_symbol_and_source(name):
    preset = presets()[name]
    for variant in (None, *preset.variants):
        for value in preset.explain(None, variant):
            assert value.symbol == all_settings()[value.name].symbol
            assert len(value.source) > 10
        for method, config in METHODS.items():
            values = preset.values(method, variant)
            assert set(values) <= set(config.settings()), "a value of another method"
            config(**values)
            config.of(preset.values(None, variant))


def test_every_setting_of_every_method_has_a_symbol_a_sentence_and_a_source():
    for name, config in METHODS.items():
        for field in setting_fields(config):
            about = field.metadata["setting"]
            assert about.symbol and len(about.about) > 5 and len(about.source) > 5, (name, field.name)


@pytest.mark.parametrize("name", sorted({*CONFIGS, "demo", *BASES}))
def test_no_file_repeats_what_it_inherits(name):
    *family, own = lineage(path_of(name))
    inherited = {e[:3]: e.value for contents in family for e in contents.entries}
    assert [e for e in own.entries if e[:3] in inherited and inherited[e[:3]] == e.value] == []


def test_a_methods_own_default_never_hides_a_value_of_its_paper():
    """Merged, a method's built-in default comes over the shared value: where they differ, the preset has its own."""
    for name in CONFIGS:
        preset = presets()[name]
        for method, built_in in METHODS.items():
            if "editor" in built_in.settings():  # whose file holds its layers
                continue
            shared, own = preset.values(), preset.values(method)
            hidden = {k for k, v in built_in.own_defaults().items() if k in shared and shared[k] != v and k not in own}
            assert (name, method, hidden) == (name, method, set())


WITH_DEPTH = [name for name, config in METHODS.items() if config.depth and "editor" not in config.settings()]


@pytest.mark.parametrize("method", WITH_DEPTH)
def test_shared_layers_are_not_those_of_a_method_with_a_depth_of_its_own(method):
    """A preset shares MEMIT's layers; LocFT, of one layer, would write all of them."""
    for preset in presets().values():
        for variant in (None, *preset.variants):
            config, own = configured(preset, method, variant=variant), preset.values(method, variant)
            assert config.layers_mlp == own.get("layers_mlp", ()), (preset.name, "none: found by relative depth")
            assert ("layers_mlp" in config.missing_layers) == ("layers_mlp" not in own)
            shown = {value.name: value.method for value in preset.explain(method, variant)}
            assert shown.get("layers_mlp") == (method if "layers_mlp" in own else None)
    assert configured(presets()["llama-2-7b"], method, layers=[3]).layers_mlp == (3,)
    assert configured(presets()["llama-2-7b"], "memit").layers_mlp == (4, 5, 6, 7, 8)


def test_a_file_gives_a_method_with_a_depth_its_layers_in_the_methods_table(write):
    shared = "[hyper_parameters]\nlayers_mlp = [2]\n[variants.short.hyper_parameters]\nlayers_mlp = [1]\n"
    preset = named(write(shared))
    assert [configured(preset, "locft", variant=each).layers_mlp for each in (None, "short")] == [(), ()]
    assert [configured(preset, "memit", variant=each).layers_mlp for each in (None, "short")] == [(2,), (1,)]
    assert configured(named(write(shared + "[methods.locft]\nlayers_mlp = [5]\n")), "locft").layers_mlp == (5,)


def test_the_ridge_tuned_for_alphaedit_is_not_betaedits():
    """BetaEdit's own follows the leak, which AlphaEdit does not have."""
    demo = presets()["demo"]
    assert configured(demo, "alphaedit").L2 == 0.5 and configured(demo, "betaedit").L2 == "auto"
    same = ("nullspace_threshold", "clamp_norm_factor", "layers_mlp")
    assert [getattr(configured(demo, "betaedit"), n) for n in same] == [
        getattr(configured(demo, "alphaedit"), n) for n in same
    ]


def test_explaining_a_method_leaves_out_what_it_overrides():
    rows = presets()["gpt-j-6b"].explain("pmet")
    assert len({row.name for row in rows}) == len(rows)
    found = {row.name: (row.method, row.value) for row in rows}
    assert found["v_lr"] == ("pmet", 0.2) and found["clamp_norm_factor"] == (None, 0.75)


def test_a_method_like_another_has_its_values_and_sources():
    preset = presets()["mistral-7b"]
    assert preset.values("r-rome") == preset.values("intattn-rome") == preset.values("rome")
    assert {v.source for v in preset.explain("r-rome")} == {v.source for v in preset.explain("rome")}


def test_a_variant_wins_and_its_source_is_its_own():
    rows = {v.name: v for v in presets()["llama-7b"].explain("jeep", "zsre")}
    assert rows["mom2_update_weight"].value == 6000 and rows["mom2_update_weight"].source.endswith(
        "zsre; arXiv 2412.17872 D.7"
    )
    assert rows["clamp_norm_factor"].source.endswith("mcf; arXiv 2412.17872 D.7")
    assert presets()["llama-7b"].values("jeep", "mcf") == presets()["llama-7b"].values("jeep")


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.toml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_a_file_of_ones_own_inherits_a_shipped_preset(write):
    path = write(
        'summary = "Mine"\ninherits = "gpt-j-6b"\n[hyper_parameters]\nv_num_grad_steps = 10\n'
        '[methods.jeep]\nlayers_high = [17]\nmin_loss = 0.8\nsource = "a sweep"\nsources = {layers_high = "a probe"}\n'
    )
    preset = preset_for(model_of(OTHERS["GPT-2"]), path)
    assert preset.values()["v_num_grad_steps"] == 10 and preset.values()["layers_mlp"] == (3, 4, 5, 6, 7, 8)
    sources = {v.name: v.source for v in preset.explain("jeep")}
    assert (sources["min_loss"], sources["layers_high"]) == ("a sweep", "a probe")
    assert preset.explain()[5].source == "mine.toml"
    assert preset.variants == ("mcf", "zsre") and preset.match == {}


def test_a_file_inherits_another_beside_it(write):
    write('inherits = "demo"\n[hyper_parameters]\nalpha = 0.2\n', "first.toml")
    second = named(write('inherits = "first.toml"\n[hyper_parameters]\nv_lr = 0.1\n', "second.toml"))
    assert (second.values()["alpha"], second.values()["v_lr"]) == (0.2, 0.1)
    assert second.values()["layers_mlp"] == presets()["demo"].values()["layers_mlp"]


BROKEN = {
    "no TOML": ("alpha = = 1", "not TOML"),
    "an unknown key": ("layers = [1]", "unknown key 'layers'"),
    "an unknown hyper-parameter": ("[hyper_parameters]\nkl_facter = 1.0", "did you mean kl_factor"),
    "an unknown method": ("[methods.mimet]\nv_lr = 1.0", "mimet.* is no method"),
    "an unknown name in a method": ("[methods.rome]\nlayer = 3", r"unknown key 'layer' in \[methods.rome\]"),
    "an unknown name in a variant": ("[variants.a.methods.rome]\nx = 3", r"\[variants.a.methods.rome\]"),
    "a source of nothing": ('[hyper_parameters]\nsources = {v_lr = "?"}', "unknown key 'v_lr'"),
    "layers that are words": ('[methods.rome]\nlayers_mlp = "abc"', r"\[methods.rome\]: layers_mlp 'abc' is no tuple"),
    "half a layer": ("[methods.rome]\nlayers_mlp = [1.5]", "must be whole numbers"),
    "a word for a number": ('[hyper_parameters]\nv_lr = "x"', "v_lr 'x' is no float"),
    "an alpha above 1": ("[hyper_parameters]\nalpha = 7", "lie between 0"),
    "an unknown base": ('inherits = "none-such"', "inherits: no preset 'none-such'; there are base, demo"),
    "a base that is not there": ('inherits = "none-such.toml"', "inherits 'none-such.toml', and there is no file"),
    "itself": ('inherits = "mine.toml"', "inherits itself"),
    "a value for a table": ("methods = 3", "methods must be a table"),
    "a value for a method": ("methods = {rome = 3}", "methods.rome must be a table"),
    "a value for a variant": ("variants = {a = 3}", "variants.a must be a table"),
    "a number for a text": ("source = 3", "source 3 must be a text"),
    "a boolean for α": ("[hyper_parameters]\nalpha = true", "alpha True must"),
    "no layers": ("[hyper_parameters]\nlayers_mlp = []", "layers_mlp is empty"),
    "a layer twice": ("[hyper_parameters]\nlayers_mlp = [2, 2]", "names a layer twice"),
    "a number for a value's source": ("[hyper_parameters]\nv_lr = 0.1\nsources = {v_lr = 5}", "v_lr 5 must be a text"),
    "like nothing": ('[methods.rome]\nlike = "mimet"', "like = 'mimet'"),
    "like itself": ('[methods.rome]\nlike = "rome"', "like = 'rome'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_line(write, what):
    text, message = BROKEN[what]
    with pytest.raises(BadFile, match=message) as raised:
        named(write(text))
    assert "\n" not in str(raised.value) and "mine.toml" in str(raised.value)


def test_two_files_that_inherit_each_other_are_an_error(write):
    write('inherits = "two.toml"', "one.toml")
    with pytest.raises(BadFile, match=r"inherits itself \(two -> one -> two\)"):
        named(write('inherits = "one.toml"', "two.toml"))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: named("none-such"), "no preset 'none-such'; there are base, demo"),
        (lambda p: p["llama-7b"].values("jeep", "zsrre"), "no variant 'zsrre'; it has mcf, zsre"),
        (lambda p: p["demo"].values(None, "zsre"), "no variant 'zsre'; it has none"),
        (lambda p: p["demo"].values("mimet"), "no method 'mimet'; there are intattn"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(ask, message):
    with pytest.raises(BadFile, match=message):
        ask(presets())


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_show_explains_every_value(capsys):
    import json

    code, out, _ = run(capsys, "presets", "show", "gpt-j-6b", "--method", "jeep", "--variant", "zsre", "--json", "-")
    assert code == 0
    found = json.loads(out)
    assert (found["preset"], found["method"], found["variant"]) == ("gpt-j-6b", "jeep", "zsre")
    row = next(row for row in found["values"] if row["name"] == "clamp_norm_factor_high")
    assert (row["method"], row["value"], row["symbol"]) == ("jeep", 0.8, "γ* (JEEP eq. 12)")
    assert "zsre" in row["source"] and row["about"]


def test_show_prints_shared_values_first_and_methods_that_agree_on_one_row(capsys):
    code, out, _ = run(capsys, "presets", "show", "qwen2.5-7b")
    assert code == 0
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    rows = [line for line in lines if len(line) == 6 and line[1]]
    assert next(row[:3] for row in rows if row[1] == "layers_mlp") == ["all", "layers_mlp", "4-8"]
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), key=lambda word: word != "all")
    assert ["rome, r-rome,", "mom2_adjustment", "false"] in [row[:3] for row in rows]
    assert "arXiv 2510.27400 section 5.1" in out


def test_presets_alone_lists_them_as_ls_does(capsys):
    assert run(capsys, "presets") == run(capsys, "presets", "ls") == run(capsys, "ls", "presets")
    _, out, _ = run(capsys, "ls", "presets")
    assert "--variant mcf or zsre" in " ".join(out.split()) and "qwen2.5-7b" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("show",),
        ("show", "none-such"),
        ("show", "none-such.toml"),
        ("show", "demo", "--variant", "zsre"),
        ("show", "demo", "--method", "mimet"),
        ("gpt2-xl",),
        ("ls", "gpt2-xl"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(capsys, arguments):
    code, out, err = run(capsys, "presets", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("kt: error: ")


def test_the_documents_table_is_what_the_files_say():
    """docs/presets.md lists layers, α and variants by hand; this holds them to the presets."""
    from kt.cli.presets import written

    text = (Path(kt.__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    listed = {
        row[0]: row[1:] for row in re.findall(r"^\| `([\w.-]+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|", text, re.M)
    }
    for name, preset in presets().items():
        if name not in BASES:
            shared = preset.values()
            names = ("layers_mlp", "layers_attn", "alpha")
            wanted = [written(shared[n]) if n in shared else "–" for n in names]
            assert listed[name] == (*wanted, ", ".join(preset.variants) or "–"), name
    assert set(listed) == set(presets()) - BASES
    named = re.search(r"layers of their own \((.*?)\)", " ".join(text.split()))
    assert named and set(re.findall(r"`([\w-]+)`", named[1])) == set(WITH_DEPTH)
