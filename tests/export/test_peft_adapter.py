"""An adapter that plain peft loads says what the edit says, and goes again without a trace."""

import re
import sys

import pytest
import torch
from export_help import (
    SITES,
    dense_edit,
    edit_of,
    edited_logits,
    farthest,
    logits,
    plain,
    random_edit,
    saved,
    sums,
)
from families import tiny_model
from peft import PeftModel
from safetensors.torch import load_file

from kt._util.data import read_json
from kt._util.files import NotWritable
from kt.errors import KtError, WorkFailed
from kt.export import adapter, to_hf, to_peft
from kt.export.adapter import patterns
from kt.model.sites import Kind, Site
from kt.model.update import Dense, LowRank

NEAR = 2e-5


def test_plain_peft_reproduces_the_edit_in_every_family(model, tmp_path):
    """Grouped queries, parallel blocks, Conv1D, tied heads, flattened rows: whatever the family has."""
    edit, before, modules = random_edit(model), model.fingerprint(), dict(model.module.named_modules())
    made = to_peft(model, edit, tmp_path / "adapter")
    assert model.fingerprint() == before
    assert dict(model.module.named_modules()) == modules
    assert made.max_error < NEAR and made.relative_error < 1e-4
    assert [row["rank"] for row in made.weights.values()] == [2, 3, 1]
    base = plain(saved(model, tmp_path / "base"))
    unedited = logits(base, model.tokenizer)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    wanted = edited_logits(model, edit)
    assert farthest(logits(adapted, model.tokenizer), wanted) < NEAR
    assert farthest(unedited, wanted) > 1e-2


@pytest.fixture
def tiny():
    return tiny_model("qwen2")


def test_patterns_of_layer_1_do_not_reach_layer_11(tmp_path):
    """A path as a pattern is a regular expression to peft, and a dot is any character."""
    model = tiny_model("llama", num_hidden_layers=12)
    sites = [Site(kind, layer) for layer in (1, 10, 11) for kind in (Kind.MLP, Kind.ATTN)]
    ranks = (1, 2, 3, 4, 5, 6)
    edit = random_edit(model, ranks, sites)
    to_peft(model, edit, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(plain(saved(model, tmp_path / "base")), tmp_path / "adapter")
    for site, rank in zip(sites, ranks, strict=True):
        layer = adapted.base_model.model.get_submodule(model.layout.path(site.kind, site.layer))
        assert layer.r["default"] == rank and layer.scaling["default"] == 1.0
    assert farthest(logits(adapted, model.tokenizer), edited_logits(model, edit)) < NEAR


def test_a_pattern_means_its_own_path_alone():
    (pattern,) = patterns({"model.layers.1.mlp.down_proj": 1})
    as_peft = re.compile(rf"(.*\.)?({pattern})$")
    assert as_peft.match("model.layers.1.mlp.down_proj")
    for other in ("modelxlayers.1.mlp.down_proj", "a.model.layers.1.mlp.down_proj", "model.layers.11.mlp.down_proj"):
        assert not as_peft.match(other)


def test_a_reader_that_ignores_the_patterns_scales_by_one_too(tiny, tmp_path):
    to_peft(tiny, random_edit(tiny), tmp_path / "adapter")
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["rank_pattern"].values()) == [1, 2, 3]


def test_conv1d_is_told_to_peft_which_merges_it_the_right_way_round(tmp_path):
    model = tiny_model("gpt2")
    edit = random_edit(model)
    to_peft(model, edit, tmp_path / "adapter")
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["fan_in_fan_out"] is True
    adapted = PeftModel.from_pretrained(plain(saved(model, tmp_path / "base")), tmp_path / "adapter")
    assert farthest(logits(adapted.merge_and_unload(), model.tokenizer), edited_logits(model, edit)) < NEAR


def test_merging_the_adapter_gives_the_merged_folder_but_for_rounding(tiny, tmp_path):
    edit = random_edit(tiny)
    to_peft(tiny, edit, tmp_path / "adapter")
    to_hf(tiny, edit, tmp_path / "merged", check=False)
    adapted = PeftModel.from_pretrained(plain(saved(tiny, tmp_path / "base")), tmp_path / "adapter")
    ours, theirs = plain(tmp_path / "merged").state_dict(), adapted.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        tolerance = 1e-6 if name in edit.names else 0
        assert (weight - theirs[name]).abs().max() <= tolerance, name


def test_two_edits_are_swapped_on_one_base_without_loading_it_again(tiny, tmp_path):
    first, second = random_edit(tiny, seed=1), random_edit(tiny, ranks=(4, 1, 2), seed=2)
    for name, edit in (("first", first), ("second", second)):
        to_peft(tiny, edit, tmp_path / name)
    base = plain(saved(tiny, tmp_path / "base"))
    unedited = logits(base, tiny.tokenizer)
    served = PeftModel.from_pretrained(base, tmp_path / "first", adapter_name="first")
    served.load_adapter(tmp_path / "second", adapter_name="second")
    for name, edit in (("second", second), ("first", first), ("second", second)):
        served.set_adapter(name)
        assert farthest(logits(served, tiny.tokenizer), edited_logits(tiny, edit)) < NEAR
    with served.disable_adapter():
        assert farthest(logits(served, tiny.tokenizer), unedited) == 0
    assert farthest(edited_logits(tiny, first), edited_logits(tiny, second)) > 1e-2


def test_a_dense_update_of_low_rank_is_exact(tiny, tmp_path):
    edit = dense_edit(tiny, rank=4)
    made = to_peft(tiny, edit, tmp_path / "adapter")
    assert [(row["rank"], row["needed"]) for row in made.weights.values()] == [(4, 4)] * 3
    assert made.about["weight_error"] < 1e-6 and made.max_error < NEAR


def test_too_small_a_rank_is_refused_with_the_error_and_allowed_on_demand(tiny, tmp_path):
    edit = dense_edit(tiny)
    with pytest.raises(WorkFailed, match=r"miss the edit by 0\.\d+ of its norm.*rank 5 of the 32 that it needs"):
        to_peft(tiny, edit, tmp_path / "adapter", max_rank=5)
    assert not list(tmp_path.iterdir())
    made = to_peft(tiny, edit, tmp_path / "adapter", max_rank=5, max_error=1.0)
    largest = [torch.linalg.svdvals(edit.delta(name)) for name in edit.names]
    missing = sum(float((s[5:] ** 2).sum()) for s in largest) / sum(float((s**2).sum()) for s in largest)
    assert made.about["weight_error"] == pytest.approx(missing**0.5, rel=1e-4)
    assert {row["rank"] for row in made.weights.values()} == {5}
    assert made.max_error > 1e-3


def test_columns_that_say_the_same_are_dropped(tiny, tmp_path):
    """Two edits added up have twice the columns, whether or not they need them."""
    edit = random_edit(tiny)
    doubled = {name: update.plus(update.scaled(0.5)) for name, update in edit.updates.items()}
    made = to_peft(tiny, edit_of(tiny, doubled), tmp_path / "adapter")
    assert [row["rank"] for row in made.weights.values()] == [2, 3, 1]
    assert made.about["weight_error"] < 1e-6


def test_what_is_no_linear_map_cannot_be_an_adapter(tiny, tmp_path):
    gains = {f"model.layers.{i}.input_layernorm.weight": Dense(torch.ones(32)) for i in range(3)}
    edit = edit_of(tiny, random_edit(tiny).updates | gains | {"model.embed_tokens.weight": Dense(torch.ones(384, 32))})
    with pytest.raises(KtError, match=r"also changes model\.layers\.0\.input_layernorm\.weight.*\(4 in all\).*hf"):
        to_peft(tiny, edit, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_update_of_zero_is_left_out(tiny, tmp_path):
    edit = random_edit(tiny)
    still = edit.names[0]
    zero = LowRank(torch.zeros(32, 2), torch.zeros(2, 48))
    made = to_peft(tiny, edit_of(tiny, edit.updates | {still: zero}), tmp_path / "adapter")
    assert set(made.weights) == set(edit.names) - {still}
    assert made.max_error < NEAR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_factors_are_rounded_and_say_by_how_much(tiny, tmp_path, dtype):
    edit = random_edit(tiny)
    with pytest.raises(WorkFailed, match="adapter-dtype float32") if dtype == torch.bfloat16 else _allowed():
        to_peft(tiny, edit, tmp_path / "strict", dtype=dtype)
    made = to_peft(tiny, edit, tmp_path / "adapter", dtype=dtype, max_error=1e-2)
    assert 1e-5 < made.about["weight_error"] < 1e-2
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {dtype}


def _allowed():
    from contextlib import nullcontext

    return nullcontext()


def test_the_same_adapter_is_the_same_bytes_and_names_no_folder_of_this_machine(tmp_path):
    import kt

    saved(tiny_model("qwen2"), tmp_path / "secret-place" / "base")
    model = kt.load(tmp_path / "secret-place" / "base", device="cpu")
    for name in ("a", "b"):
        to_peft(model, random_edit(model), tmp_path / name, check=False)
    assert sums(tmp_path / "a") == sums(tmp_path / "b")
    config = read_json(tmp_path / "a" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "base"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert all(b"secret-place" not in path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file())


def test_an_adapter_that_says_something_else_is_not_kept(tiny, tmp_path, monkeypatch):
    """Without alpha_pattern the scale is wrong, without a word from peft."""
    edit = random_edit(tiny)
    write = adapter.write_adapter

    def forgetful(model, into, parts, conv):
        write(model, into, parts, conv)
        path = into / adapter.CONFIG
        adapter.atomic_write(path, adapter.to_json(read_json(path) | {"alpha_pattern": {}}))

    monkeypatch.setattr(adapter, "write_adapter", forgetful)
    before = tiny.fingerprint()
    with pytest.raises(WorkFailed, match="other logits than the edit"):
        to_peft(tiny, edit, tmp_path / "adapter")
    assert not list(tmp_path.iterdir()) and tiny.fingerprint() == before
    assert not any("lora" in name for name, _ in tiny.module.named_modules())


def test_without_peft_one_line_says_what_to_install(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(KtError, match=r"pip install 'kt-interp\[lora\]'"):
        to_peft(tiny, random_edit(tiny), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_edit_of_another_model_and_a_taken_folder_are_refused(tiny, tmp_path):
    with pytest.raises(KtError, match="not the weights that the edit was solved for"):
        to_peft(tiny, random_edit(tiny_model("qwen2", seed=1)), tmp_path / "adapter")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").write_text("x")
    with pytest.raises(NotWritable, match="not empty"):
        to_peft(tiny, random_edit(tiny), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "mine").read_text() == "x"


def test_the_sites_of_these_tests_are_of_both_kinds():
    assert {site.kind for site in SITES} == {Kind.MLP, Kind.ATTN}
