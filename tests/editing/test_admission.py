"""An edit goes into the model that it was solved for: its weights, its config, its tokenizer."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
from edits_by_hand import random_edit
from families import byte_level_tokenizer, sentencepiece_tokenizer, tiny_module
from tokenizers import normalizers, processors

import kt
from kt.editing import apply
from kt.editing.diff import diff
from kt.errors import KtError
from kt.export import to_hf
from kt.model import identity as identities
from kt.model.identity import about, identity

NAME = "model.layers.1.mlp.down_proj.weight"


def rules(change):
    """The tokenizer with a part of its rules changed."""
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    change(tokenizer)
    return tokenizer


def lower(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def begins(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )


def merges(tokenizer):
    core = tokenizer.backend_tokenizer
    text = json.loads(core.to_str())
    text["model"]["merges"] = text["model"]["merges"][:-1]
    tokenizer._tokenizer = type(core).from_str(json.dumps(text))


OTHERS = {
    "rope_theta": (dict(rope_parameters={"rope_theta": 500.0, "rope_type": "default"}), None, "rope_theta 10000.0"),
    "activation": (dict(hidden_act="relu"), None, "hidden_act silu, and LlamaForCausalLM has relu"),
    "eps": (dict(rms_norm_eps=1e-2), None, "rms_norm_eps 1e-06"),
    "heads": (dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16), None, "head_dim 8"),
    "lower case": ({}, lower, "another tokenizer"),
    "a first token": ({}, begins, "another tokenizer"),
    "merges": ({}, merges, "another tokenizer"),
    "another kind": (
        {},
        lambda tokenizer: vars(tokenizer).update(vars(sentencepiece_tokenizer())),
        "another tokenizer",
    ),
}


@pytest.fixture(scope="module")
def base():
    return kt.load(tiny_module("llama"), tokenizer=byte_level_tokenizer())


@pytest.fixture(scope="module")
def edit(base):
    return random_edit(base, [NAME])


def like(base, other):
    """A model of the same weights, with another config or tokenizer."""
    changes, change, words = OTHERS[other]
    module = tiny_module("llama", **changes)
    module.load_state_dict(base.module.state_dict())
    model = kt.load(module, tokenizer=byte_level_tokenizer() if change is None else rules(change))
    assert model.fingerprint() == base.fingerprint() and identity(model) != identity(base)
    return model, words


@pytest.mark.parametrize("other", OTHERS)
def test_another_config_or_tokenizer_on_the_same_weights_is_refused(other, base, edit, tmp_path):
    model, words = like(base, other)
    before = model.fingerprint()
    live = kt.EditStack()
    live.apply_(model)
    for write in (
        edit.apply_,
        edit.for_model,
        lambda m: edit.applied(m).__enter__(),
        lambda m: kt.EditStack([edit]).applied(m).__enter__(),
        kt.EditStack([edit]).apply_,
        kt.EditStack([edit]).for_model,
        kt.EditStack([edit]).total,
        lambda m: live.push(edit),
        lambda m: to_hf(m, edit, tmp_path / "out", check=False),
    ):
        with pytest.raises(KtError, match=words) as refused:
            write(model)
        assert "\n" not in str(refused.value) and "force" in str(refused.value)
        assert model.fingerprint() == before and not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="forced: .*was not measured"):
        forced = edit.for_model(model, force=True)
    with forced.applied(model):  # it is an edit of this model now
        assert model.fingerprint() != before
    with pytest.warns(UserWarning, match="forced"), kt.EditStack([edit]).applied(model, force=True):
        assert model.fingerprint() != before
    assert model.fingerprint() == before


def test_a_saved_edit_knows_its_model_and_an_edit_for_another_has_another_base(base, edit, tmp_path):
    model, words = like(base, "activation")
    edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(KtError, match=words):
        kt.Edit.load(tmp_path / "edit.safetensors").apply_(model)
    assert not diff(edit, random_edit(model, [NAME])).same_base and diff(edit, random_edit(base, [NAME])).same_base


def test_an_edit_of_an_older_kt_goes_in_and_one_line_says_what_was_not_compared(base, edit):
    old = kt.Edit(edit.updates, {k: v for k, v in edit.manifest.items() if k != "identity"})
    other = like(base, "lower case")[0]
    apply.say_unnoted.cache_clear()
    with pytest.warns(UserWarning, match="did not note config and tokenizer: only its weights") as said:
        for _ in range(2):
            with old.applied(base), kt.EditStack([old]).applied(other):
                pass
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of one that was made by hand
        with kt.Edit(edit.updates, {}).applied(base):
            pass


def test_keys_that_only_one_version_of_transformers_has_tell_nothing(base, edit):
    config = edit.manifest["identity"]["config"] | {"of_another_version": 1}
    del config["pretraining_tp"]
    manifest = edit.manifest | {"identity": edit.manifest["identity"] | {"config": config}}
    with pytest.raises(KtError, match="of_another_version 1, and LlamaForCausalLM has None"):
        kt.Edit(edit.updates, manifest).apply_(base)
    later = manifest | {"versions": {"transformers": "9.0"}}
    with kt.Edit(edit.updates, later).applied(base):
        pass
    with pytest.raises(KtError, match="rope_theta"):
        kt.Edit(edit.updates, later).apply_(like(base, "rope_theta")[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_the_identity_does_not_depend_on_how_the_model_is_loaded(family, tmp_path):
    module, tokenizer = tiny_module(family), copy.deepcopy(byte_level_tokenizer())
    first = kt.load(module, tokenizer=tokenizer)
    edit = random_edit(first, [first.weight_name(first.site("mlp", 1))])
    known = identity(first)
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer(["a b c", "a"], padding=True, truncation=True, max_length=2)  # leaves its mark in the tokenizer
    module.config.use_cache, module.config.pad_token_id = False, 3
    identities._KNOWN.clear()
    again = kt.load(tmp_path)
    assert identity(first) == identity(again) == known and about(again)["config"]
    with edit.applied(again), edit.applied(kt.load(tmp_path, attn_implementation="eager")):
        pass
