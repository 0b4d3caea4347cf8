"""Layers and α that nobody gave: kept results first, one trace where α needs it, relative depth, always said."""

import re
import warnings

import numpy as np
import pytest
from editing_help import REQUESTS, solve
from families import tiny_model
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kt
from kt.editing import evidence
from kt.editing.closed_form.contexts import memit_contexts
from kt.editing.evidence import default_alpha, facts_beside, keep_balance, kept_folder, known_facts
from kt.editing.resolve import configure, layers_by_depth, resolve
from kt.tracing.alpha import Balance


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KT_CACHE", str(tmp_path / "cache"))


def balance(n=40, attn=(2, 3), shares=(0.0, 0.1, 0.9, 0.8), **more):
    about = dict.fromkeys(("model", "window", "corrupt", "samples", "seed", "keep"), 0)
    given = {"alpha": 0.4, "alpha_raw": 0.4, "ci95": (0.3, 0.5), "n_facts": n, "metric": "logit_diff", "run": about}
    given |= {"per_layer": {}, "per_layer_ci95": {}, "per_fact": (), "warnings": ()}
    return Balance(**given | {"layers": {"attn": attn, "mlp": (1,)}, "layer_shares": {"attn": shares}} | more)


def resolved(model, method, **given):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config, found = resolve(configure(model, method, **given), model, [])
    return config, found, " ".join(str(w.message) for w in caught)


@pytest.mark.filterwarnings("error")
def test_a_default_alpha_is_traced_once_on_facts_that_are_not_edited_and_kept(monkeypatch, caplog):
    model, requests = kt.load("demo"), kt.load_facts("demo", limit=3)
    traced = []
    take = evidence.traced_balance
    monkeypatch.setattr(evidence, "traced_balance", lambda m, facts, *a, **k: traced.append(facts) or take(m, facts))
    with caplog.at_level("INFO", "kt"):
        first = default_alpha(model, requests)
    assert "no alpha given for demo: tracing it once on 16 facts that it knows, about" in caplog.text
    assert len(traced) == 1 and not {f.subject for f in traced[0]} & {f.subject for f in requests}
    again = default_alpha(model, requests)
    assert len(traced) == 1 and again.value == first.value and again.source.startswith("kept")
    assert first.source.startswith("traced") and again.balance == first.balance
    _, found, said = resolved(model, "intattn")
    assert found.chosen["alpha"] == first.value and "writing alpha" in said and "kept" in found.sources["alpha"]


def test_a_balance_of_more_facts_replaces_a_kept_one_and_no_other():
    model = tiny_model("llama")
    for n, kept in ((20, 20), (12, 20), (30, 30)):
        keep_balance(model, balance(n))
        assert default_alpha(model, []).balance.n_facts == kept
    keep_balance(model, balance(40, ci95=(0.0, 0.9)))
    alpha = default_alpha(model, [])
    assert alpha.value == 0.3 and "0.40 [0.00, 0.90] of 40 facts is undetermined" in alpha.source
    assert not evidence.kept_settings(tiny_model("llama", seed=1), "memit"), "of other weights nothing is kept"


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
def test_a_method_without_alpha_traces_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "traced_balance", lambda *a, **k: pytest.fail("traced"))
    with pytest.warns(UserWarning, match=r"layers_mlp \S+ by relative depth; kt layers"):
        edit = solve(tiny_model("llama"), corpus, tmp_path, "memit", layers_mlp=None)
    assert edit.manifest["sources"]["layers_mlp"] == "by relative depth"
    given = solve(tiny_model("llama"), corpus, tmp_path, "memit")
    assert "sources" not in given.manifest and len(given.requests) == len(REQUESTS)


def test_a_kept_balance_gives_alpha_and_no_layers_for_where_a_fact_is_read_is_not_where_an_edit_takes():
    """On SmolLM2 a trace of 15 facts proposes MLP layer 0 alone: MEMIT there takes 11 of 30 facts, by depth 20."""
    model = tiny_model("llama", num_hidden_layers=4)
    keep_balance(model, balance())
    config, found, said = resolved(model, "intattn")
    assert config.alpha == 0.4 and "layers_attn" in said
    for name, traced in (("layers_mlp", "1"), ("layers_attn", "2,3")):
        assert getattr(config, name) == layers_by_depth(model, name)
        assert found.sources[name] == f"by relative depth (traced {traced}, where the fact is read)"


def test_layers_that_kt_layers_kept_come_before_a_trace():
    model = tiny_model("llama", num_hidden_layers=4)
    keep_balance(model, balance())
    table = '[methods.intattn]\nlayers_mlp = [3]\nlayers_attn = [1]\nalpha = 0.2\nsource = "a sweep"\n'
    (kept_folder(model) / "intattn.toml").write_text(table)
    config, found, said = resolved(model, "intattn")
    assert (config.layers_mlp, config.layers_attn, config.alpha) == ((3,), (1,), 0.2)
    assert found.sources["layers_mlp"] == "as kept (a sweep)" and re.search(r"alpha 0\.2 \(a sweep\)", said)
    assert resolved(model, "intattn", layers_mlp=(0,), alpha=0.5)[0].layers_mlp == (0,)


def test_a_method_with_a_depth_of_its_own_leaves_a_presets_shared_layers_and_the_line_denies_no_preset():
    model = kt.load("demo")
    config, found, said = resolved(model, "grace")
    assert config.layers_mlp == layers_by_depth(model, "layers_mlp", type(config).depth)
    assert found.sources["layers_mlp"] == "by relative depth, those of grace"
    assert (
        f"no layers given for demo: writing layers_mlp {config.layers_mlp[0]} by relative depth" in said
        and "no preset" not in said
    )
    assert resolved(model, "ultraedit")[0].layers_mlp == (5, 6, 7), "the preset's for this method, as measured"


def test_the_shipped_facts_are_real_and_cover_every_relation_in_turn():
    facts = kt.load_facts("lre")
    relations = list(dict.fromkeys(fact.relation for fact in facts))
    assert len(facts) > 400 and [f.relation for f in facts[: len(relations)]] == relations
    assert all(f.answer != f.foil and f.subject in f.prompt and len(f.neighbours) == 3 for f in facts)
    assert not any("\\u" in text for f in facts for text in (f.subject, f.answer))
    model = kt.load("demo")
    beside = facts_beside(model, kt.load_facts("demo", limit=1))
    known = known_facts(model, beside, 5)
    assert len(known.facts) == 5 and known.seconds_a_token > 0
    assert known.facts == [f for f in beside if f in known.facts] and np.isfinite(known.seconds_a_token)


def test_a_damaged_kept_result_counts_as_absent():
    model = tiny_model("llama", num_hidden_layers=4)
    keep_balance(model, balance())
    kept = kept_folder(model) / "balance.json"
    for damage in (kept.read_bytes()[:40], b"", b"[1]", b"\xff\xfe", b'{"kind": "balance"}'):
        kept.write_bytes(damage)
        assert "a kept result is damaged and is not used" in resolved(model, "memit")[2]
        with pytest.warns(UserWarning, match="damaged"):
            keep_balance(model, balance(12))
        assert evidence.kept_balance(model).n_facts == 12
    for values in ("layers_mlp = [1", 'layers_mlp = "ab"', "layers_mlp = [99]", "layers_mlp = [[1]]", "nothing = 1"):
        (kept_folder(model) / "memit.toml").write_text(f"[methods.memit]\n{values}\n")
        config, _, said = resolved(model, "memit")
        assert "damaged" in said and config.layers_mlp == layers_by_depth(model, "layers_mlp")
    (kept_folder(model) / "intattn.toml").write_text('[methods.intattn]\nalpha = "auto"\n')
    config, _, said = resolved(model, "intattn")
    assert "damaged" in said and config.alpha == 0.4


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|do.* not give|changed too much|less likely)")
def test_a_tokenizer_that_reads_no_english_edits_with_the_papers_alpha_and_no_contexts():
    core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, "東京": 3, "は": 4, "京都": 5}, "<s>"))
    core.normalizer = normalizers.Replace(Regex(r"[^東京都は\s]"), "")
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    reads_none = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    model = tiny_model("llama", tokenizer=reads_none)
    alpha = default_alpha(model, [])
    assert alpha.value == 0.3 and "of the shipped facts the model knows 0" in alpha.source
    edit = kt.edit(model, [kt.Fact("{} は", "東京", target="京都")], "ft", layers_mlp=(1,))
    assert edit.verdict.perplexity is None and edit.verdict.requests == 1
    assert memit_contexts(model).flat == ("{}",)
