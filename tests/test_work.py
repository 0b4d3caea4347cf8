"""The work that shortcuts save is counted here: one that no longer holds is slower, and nothing else would show it."""

import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from families import byte_level_tokenizer, tiny_model, tiny_module
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

import kt
from kt.editing.resolve import traced_balance
from kt.errors import ShortcutOff, shortcut_off
from kt.evaluation import evaluate
from kt.model.prefix import prefix_is_reusable
from kt.model.scoring import answer_row, teacher_force
from kt.model.tokens import template_span
from kt.tracing.capabilities import shortcuts

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "speed"))
from plain_loop import plain_trace

KINDS = ("mlp", "attn", "hidden")
separately = partial(teacher_force, share_prefixes=False)
INSTALLED = tiny_model("gpt2").cache_keyword


class OldName(GPT2LMHeadModel):
    """Code that comes with a model, written when transformers called the cache `past_key_values`."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        given = {INSTALLED: past_key_values, "position_ids": position_ids, "use_cache": use_cache}
        return super().forward(input_ids, attention_mask=attention_mask, **given)


class NewName(GPT2LMHeadModel):
    """The same, written since."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None):
        given = {INSTALLED: cache, "position_ids": position_ids, "use_cache": use_cache}
        return super().forward(input_ids, attention_mask=attention_mask, **given)


class NoCache(GPT2LMHeadModel):
    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        given = {"position_ids": position_ids, "use_cache": use_cache}
        return super().forward(input_ids, attention_mask=attention_mask, **given)


def own_code(kind):
    plain = tiny_module("gpt2")
    module = kind(plain.config).eval()
    module.load_state_dict(plain.state_dict())
    return kt.load(module, tokenizer=byte_level_tokenizer())


@pytest.fixture
def said():
    """The warnings of shortcuts that are off, as a new process would give them."""
    shortcut_off.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if w.category is ShortcutOff]
    shortcut_off.cache_clear()


def tokens_read(model, work):
    read = []
    hook = model.module.get_input_embeddings().register_forward_hook(lambda _m, ids, _out: read.append(ids[0].numel()))
    work()
    hook.remove()
    return sum(read)


def flop(work):
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


def test_an_evaluation_reads_each_prompt_once(monkeypatch, said):
    model, facts = kt.load("demo"), kt.load_facts("demo", limit=4)
    asked = {"protocols": ("tf", "prob")}
    assert tokens_read(model, lambda: evaluate(model, facts, **asked)) == 1055
    monkeypatch.setattr("kt.evaluation.run.teacher_force", separately)
    assert tokens_read(model, lambda: evaluate(model, facts, **asked)) == 1890
    assert said() == []


def test_a_trace_takes_less_than_a_quarter_of_the_plain_loops_work(said):
    """Rows start at their layer, which halves the work, and at their token, which halves it again."""
    model = tiny_model("gpt2", n_layer=8)
    fact = kt.Fact("The {} is in the city of", "Paris", answer="Rome")
    span = template_span(model.tokenizer, fact.template, fact.subject)
    noise = torch.randn(2, span.stop - span.start, 32)
    how = {"kinds": KINDS, "noise": [noise], "keep": "all"}
    ours, trace = flop(lambda: kt.causal_trace(model, [fact], **how))
    (traced,) = trace.facts
    asked = (traced.ids, *traced.span, noise, traced.answer_id, traced.foil_id, KINDS)
    plain, _ = flop(lambda: plain_trace(model, *asked))
    whole, _ = flop(lambda: kt.causal_trace(model, [fact], **how, reuse_prefix=False))
    assert len(traced.ids) == 9 and plain > 4 * ours and plain < 3 * whole
    assert said() == []


def test_a_trace_for_alpha_patches_one_token(said):
    """What α reads is one column of the map; the two runs that it starts from are the rest of the work."""
    model, facts = kt.load("demo"), kt.load_facts("demo", limit=2)
    how = {"kinds": ("mlp", "attn"), "samples": 4, "keep": "all"}
    whole, _ = flop(lambda: kt.causal_trace(model, facts, **how))
    column, trace = flop(lambda: kt.causal_trace(model, facts, **how, tokens="subject_last"))
    patched = [len(fact.ids) - fact.span.start for fact in trace.facts]
    assert min(patched) >= 4 and column < whole / 2
    for made in (lambda: traced_balance(model, facts), lambda: traced_balance(model, facts, most=None)):
        assert flop(made)[0] < 2.6 * column, "ten draws of the same column, not of the map"
    assert said() == []


@pytest.mark.parametrize(("kind", "name"), ((OldName, "past_key_values"), (NewName, "cache")))
def test_a_models_own_code_may_name_the_cache_either_way(kind, name, said):
    model, plain = own_code(kind), tiny_model("gpt2")
    rows = [answer_row(model, ("Marie Curie was born in", answer)) for answer in ("Warsaw", "Rome, Italy", "Seattle.")]
    assert model.cache_keyword == name and shortcuts(model) == (True, True)
    expected = separately(plain, rows)
    for question, answer in teacher_force(model, rows).items():
        assert answer.log_prob == pytest.approx(expected[question].log_prob, abs=1e-4)
    read = [tokens_read(each, lambda each=each: teacher_force(each, rows)) for each in (model, plain)]
    assert read[0] == read[1] < sum(len(row.read) for row in rows)
    assert said() == []


def test_a_shortcut_that_is_off_is_said_once_with_its_reason(said):
    model, plain = own_code(NoCache), tiny_model("gpt2")
    rows = [answer_row(model, ("Marie Curie was born in", answer)) for answer in ("Warsaw", "Rome, Italy")]
    for _ in range(2):
        assert shortcuts(model) == (True, False) and not prefix_is_reusable(model, 3)
        for question, answer in teacher_force(model, rows).items():
            assert answer.log_prob == pytest.approx(separately(plain, rows)[question].log_prob, abs=1e-4)
    (text,) = said()
    assert text.startswith("NoCache: keys and values") and "takes no dynamic key-value cache" in text


def test_generation_says_once_that_rows_stay_in_the_batch(said):
    model = tiny_model("llama")
    model.module.generation_config.min_new_tokens = 2
    for _ in range(2):
        model.generate(["The Space Needle", "Paris"], 3)
    (text,) = said()
    assert "rows that are done stay in the batch" in text and "sets min_new_tokens" in text


def test_a_window_shorter_than_the_prompt_is_said(said):
    model = tiny_model("mistral", sliding_window=4)
    assert not prefix_is_reusable(model, 5) and not prefix_is_reusable(model, 6)
    (text,) = said()
    assert "attention window of 4 tokens" in text
