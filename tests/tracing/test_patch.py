"""The engine gives the numbers of the obvious loop, for every family, window, attention and batch size."""

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_model
from tracing_help import FACTS, KINDS, TOLERANCE, assert_equals_plain_loop, draws
from transformers import AutoModelForCausalLM, GPTBigCodeConfig

import kt
from kt.model.prefix import prefix_is_reusable
from kt.model.sites import Kind
from kt.tracing import run
from kt.tracing.capabilities import Shortcuts, shortcuts
from kt.tracing.patch import rows_at, window_layers
from kt.tracing.patches import Patch, heads

pytestmark = pytest.mark.filterwarnings("ignore:traced all the same")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_obvious_loop(family):
    assert_equals_plain_loop(tiny_model(family), FACTS[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_noising_equals_the_obvious_loop(family):
    assert_equals_plain_loop(tiny_model(family), FACTS[:1], direction="noise")


@pytest.mark.parametrize("direction", ("denoise", "noise"))
@pytest.mark.parametrize("family", FAMILIES)
def test_severed_modules_equal_the_obvious_loop(family, direction):
    kinds = ("hidden-no-mlp", "hidden-no-attn")
    assert_equals_plain_loop(tiny_model(family), FACTS[:1], kinds=kinds, direction=direction)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_equal_the_obvious_loop(family):
    assert_equals_plain_loop(tiny_model(family), FACTS[:1], kinds=("attn.h0", "attn.h3"))


@pytest.mark.parametrize("family", ("qwen3", "gptj", "opt"))
def test_everything_at_once_equals_the_obvious_loop(family):
    kinds = ("attn.h1", "hidden-no-mlp", "mlp", "hidden", "attn", "hidden-no-attn", "attn.h2")
    assert_equals_plain_loop(tiny_model(family), FACTS, kinds=kinds, window=2, direction="noise", max_rows=17)


@pytest.mark.parametrize("family", ("qwen2", "gemma2", "gpt2", "gptj"))
def test_windows_equal_the_obvious_loop(family):
    assert_equals_plain_loop(tiny_model(family), FACTS[:1], window=2)


@pytest.mark.parametrize("family", ("qwen2", "gemma3_text", "gpt2", "gpt_neox"))
def test_eager_attention_equals_the_obvious_loop(family):
    assert_equals_plain_loop(tiny_model(family, attn_implementation="eager"), FACTS[:1], window=3)


def test_odd_batch_sizes_and_mixed_lengths_equal_the_obvious_loop(qwen2):
    assert_equals_plain_loop(qwen2, FACTS, max_rows=7)


@pytest.mark.parametrize("family", FAMILIES)
def test_reusing_the_prefix_changes_nothing(family):
    model = tiny_model(family)
    noise = draws(model, FACTS[:2])
    ours, plain = (
        kt.causal_trace(model, FACTS[:2], kinds=KINDS, noise=noise, keep="all", window=2, reuse_prefix=reuse)
        for reuse in (True, False)
    )
    for a, b in zip(ours.facts, plain.facts, strict=True):
        for kind in ours.kinds:
            assert np.abs(a.patched[kind]["logit_diff"] - b.patched[kind]["logit_diff"]).max() < TOLERANCE


@pytest.mark.parametrize("family", ("mistral", "gemma3_text"))
def test_a_short_sliding_window_keeps_whole_rows(family):
    model = tiny_model(family, sliding_window=4)
    assert not prefix_is_reusable(model, 5) and prefix_is_reusable(tiny_model("qwen2"), 5)
    assert_equals_plain_loop(model, FACTS[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_allows_both_shortcuts(family):
    assert shortcuts(tiny_model(family)) == (True, True)


@pytest.mark.parametrize("way", (Shortcuts(False, True), Shortcuts(False, False)))
@pytest.mark.parametrize("family", ("qwen2", "gpt2", "gptj", "gemma3_text"))
def test_rows_that_are_there_from_the_start_give_the_same_numbers(family, way, monkeypatch):
    monkeypatch.setattr(run, "shortcuts", lambda *_: way)
    assert_equals_plain_loop(tiny_model(family), FACTS[:1], window=2, max_rows=50)


def test_a_model_with_a_fixed_batch_is_found_out_and_traced():
    old = dict(vocab_size=384, n_layer=3, n_embd=32, n_head=4, n_positions=128)
    module = AutoModelForCausalLM.from_config(GPTBigCodeConfig(**old, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    model = kt.load(module, tokenizer=tiny_model("gpt2").tokenizer)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0, 0.2)
    assert not shortcuts(model).grow
    assert_equals_plain_loop(model, FACTS[:1])


def test_known_cells_are_not_run():
    rows = rows_at(2, 5, [0], (Patch(Kind.MLP), Patch(Kind.RESID)), window=1, n_layers=3, samples=4)
    assert len(rows) == 2 * 2 * 4 and set(rows.layer) == {0, 1}
    last = rows_at(4, 5, [0], (Patch(Kind.MLP), Patch(Kind.RESID)), window=1, n_layers=3, samples=1)
    assert len(last) == 3 + 2, "at the last token only the restored last hidden state is known"
    assert (np.diff(rows.enters) >= 0).all()


def test_effects_left_of_the_subject_are_exactly_zero(gpt2, facts):
    trace = kt.causal_trace(gpt2, facts, kinds=KINDS, keep="all", samples=2)
    for fact in trace.facts:
        for kind in KINDS:
            assert (fact.effect(kind, "prob")[:, : fact.span.start] == 0).all()
            assert fact.effect(kind, "prob")[:, fact.span.start :].any()


def test_restoring_the_last_hidden_state_restores_everything(gpt2, facts):
    trace = kt.causal_trace(gpt2, facts, kinds=("hidden",), keep="all", samples=2)
    for fact in trace.facts:
        assert fact.effect("hidden", "logit_diff")[-1, -1] == pytest.approx(1)


def test_windows_are_centred_as_in_rome():
    assert [list(window_layers(layer, 1, 4)) for layer in range(4)] == [[0], [1], [2], [3]]
    assert list(window_layers(0, 3, 6)) == [0, 1] and list(window_layers(3, 3, 6)) == [2, 3, 4]
    assert list(window_layers(5, 10, 12)) == list(range(10)) and list(window_layers(3, 4, 12)) == [1, 2, 3, 4]


def test_bfloat16_is_measured_in_float32(facts):
    model = kt.load(tiny_model("qwen2").module.to(torch.bfloat16), tokenizer=tiny_model("qwen2").tokenizer)
    trace = kt.causal_trace(model, facts[:1], keep="all", samples=2)
    assert trace.facts[0].patched[Kind.MLP]["prob"].dtype == np.float32


def test_heads_stands_for_every_head(gpt2, facts):
    trace = kt.causal_trace(gpt2, facts[:1], kinds=("heads",), keep="all", samples=2)
    assert trace.kinds == ("attn.h0", "attn.h1", "attn.h2", "attn.h3")
    with pytest.raises(kt.KtError, match="heads 0 to 3, not 4"):
        kt.causal_trace(gpt2, facts[:1], kinds=("attn.h4",))


def test_a_head_is_its_columns_of_the_input_of_w_o():
    assert heads(tiny_model("qwen3")) == (4, 16) and heads(tiny_model("gpt2")) == (4, 8)


@pytest.mark.parametrize("direction", ("denoise", "noise"))
def test_only_the_cells_asked_for_are_patched(gpt2, facts, direction):
    how = {"keep": "all", "samples": 2, "direction": direction}
    everything = kt.causal_trace(gpt2, facts, kinds=("mlp", "hidden"), **how)
    rng = np.random.default_rng(0)
    only = [
        {kind: rng.random(fact.patched[kind]["prob"].shape[:2]) < 0.4 for kind in everything.kinds}
        for fact in everything.facts
    ]
    some = kt.causal_trace(gpt2, facts, kinds=("mlp", "hidden"), only=only, **how)
    for ours, whole, cells in zip(some.facts, everything.facts, only, strict=True):
        for kind in some.kinds:
            values = ours.patched[kind]["logit_diff"]
            assert np.isnan(values[~cells[kind]]).all()
            apart = np.abs(values - whole.patched[kind]["logit_diff"])[cells[kind]]
            assert apart.max(initial=0) < TOLERANCE
    assert sum(cells["mlp"].sum() for cells in only) > 5


def test_the_noising_effect_is_what_is_taken_away(gpt2, facts):
    trace = kt.causal_trace(gpt2, facts, kinds=("hidden", "mlp"), keep="all", samples=2, direction="noise")
    for fact in trace.facts:
        assert fact.effect("hidden", "logit_diff")[-1, -1] == pytest.approx(1, abs=1e-4)
        lost = fact.p_clean - fact.patched["mlp"]["prob"].mean(-1)
        assert np.allclose(fact.effect("mlp", "prob"), lost, atol=1e-7)
        assert (fact.effect("mlp", "prob")[:, : fact.span.start] == 0).all()
