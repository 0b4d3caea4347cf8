"""Whole answers: log p of all their tokens equals plain torch with hooks, costs nothing for one token, and is shown."""

import numpy as np
import pytest
import torch
from chat_templates import TEMPLATES, tokenizer_of
from families import tiny_model
from tracing_help import FACTS, draws

import kt
from kt.errors import BadFact
from kt.model.chat import Chat
from kt.model.scoring import answer_row, teacher_force
from kt.tracing import run
from kt.tracing.capabilities import Shortcuts
from kt.tracing.prompts import SAME_TOKEN, SAME_TOKENS
from kt.tracing.run import WHOLE_FLAT

pytestmark = [
    pytest.mark.filterwarnings("ignore:traced all the same"),
    pytest.mark.filterwarnings("ignore:.*may be joined to their prompts"),
]

WHOLE = ("log_prob", "log_prob_diff")
KINDS = ("mlp", "attn", "hidden")
ASKED = [
    kt.Fact("The {} is", "France", answer=answer, foil=foil, id=answer)
    for answer, foil in (("Paris", "Seattle"), ("Tomas", "Rome"), ("Seattle", "Warsaw"))
]
"""Answers of 1, 2 and 3 tokens, foils of 3, 3 and 2."""


def parts(module, family):
    """By kind the torch modules, one a layer."""
    if family == "gpt2":
        blocks = module.transformer.h
        return {"mlp": [b.mlp.c_proj for b in blocks], "attn": [b.attn.c_proj for b in blocks], "hidden": list(blocks)}
    blocks = module.model.layers
    found = {"mlp": [b.mlp.down_proj for b in blocks], "attn": [b.self_attn.o_proj for b in blocks]}
    return found | {"hidden": list(blocks)}


@torch.no_grad()
def forward(module, ids, noise, hooks):
    """Logits, with noise on the embeddings and `hooks`: pairs of a module and what to do with its output."""

    def hook(change):
        def changed(_, __, out):
            new = change(out[0] if isinstance(out, tuple) else out)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return changed

    hooks = [(module.get_input_embeddings(), lambda out: out if noise is None else out + noise), *hooks]
    handles = [part.register_forward_hook(hook(change)) for part, change in hooks]
    try:
        return module(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def plain(module, family, fact, ids, added, kind, window, direction):
    """log p of the tokens `ids` behind the prompt as (layer, token, sample), one forward a cell."""
    rows = torch.tensor([[*fact.ids, *ids[:-1]]]).expand(len(added), -1)
    noise = torch.zeros(*rows.shape, added.shape[-1])
    noise[:, slice(*fact.span)] = added
    base, donor = (noise, None) if direction == "denoise" else (None, noise)
    modules, kept = parts(module, family)[kind], {}

    def keep(layer):
        return lambda out: kept.setdefault(layer, out.clone())

    forward(module, rows, donor, [(m, keep(i)) for i, m in enumerate(modules)])
    found = np.zeros((len(modules), len(fact.ids), len(added)))
    for layer in range(len(modules)):
        for token in range(len(fact.ids)):
            span = range(max(0, layer - window // 2), min(len(modules), layer - (-window // 2)))

            def put(out, at, token=token):
                return torch.cat([out[:, :token], kept[at][:, token : token + 1], out[:, token + 1 :]], 1)

            hooks = [(modules[at], lambda out, at=at: put(out, at)) for at in span]
            log_probs = forward(module, rows, base, hooks).double().log_softmax(-1)[:, -len(ids) :]
            found[layer, token] = log_probs[:, torch.arange(len(ids)), list(ids)].sum(1)
    return found


@pytest.mark.parametrize(
    ("family", "window", "direction", "way"),
    [
        ("gpt2", 1, "denoise", None),
        ("qwen2", 2, "noise", None),
        ("gpt2", 3, "noise", Shortcuts(False, True)),
        ("qwen2", 1, "denoise", Shortcuts(True, False)),
    ],
)
def test_whole_answers_equal_plain_torch(family, window, direction, way, monkeypatch):
    if way is not None:
        monkeypatch.setattr(run, "shortcuts", lambda *_: way)
    model, noise = tiny_model(family), draws(tiny_model(family), ASKED)
    how = {"kinds": KINDS, "noise": noise, "keep": "all", "window": window, "direction": direction}
    trace = kt.causal_trace(model, ASKED, metrics=("prob", *WHOLE), max_rows=40, **how)
    first = kt.causal_trace(model, ASKED, max_rows=40, **how)
    assert [(len(f.answer_ids), len(f.foil_ids)) for f in trace.facts] == [(1, 3), (2, 3), (3, 2)]
    for fact, alone, added in zip(trace.facts, first.facts, noise, strict=True):
        for kind in KINDS:
            answer, foil = (
                plain(model.module, family, fact, ids, added, kind, window, direction)
                for ids in (fact.answer_ids, fact.foil_ids)
            )
            assert np.abs(fact.patched[kind]["log_prob"] - answer).max() < 2e-5, kind
            assert np.abs(fact.patched[kind]["log_prob_diff"] - (answer - foil)).max() < 2e-5, kind
            assert np.ptp(answer, (0, 1)).max() > 0.01, "nothing was patched"
            for metric in ("prob", "logit_diff"):
                assert np.array_equal(fact.patched[kind][metric], alone.patched[kind][metric])
        gap = fact.clean["log_prob_diff"] - fact.corrupted["log_prob_diff"].mean()
        moved = fact.patched["mlp"]["log_prob_diff"].mean(-1)
        moved = (
            moved - fact.corrupted["log_prob_diff"].mean()
            if direction == "denoise"
            else fact.clean["log_prob_diff"] - moved
        )
        assert np.allclose(fact.effect("mlp", "log_prob_diff"), moved / gap, atol=1e-4)


def test_severed_modules_heads_and_swaps_take_whole_answers(gpt2):
    """Replacing the last block's output at the prompt's end gives the donor's first token, and no other."""
    asked = [kt.Fact("The {} is", s, answer="Seattle", foil="Tomas") for s in ("France", "Warsaw", "Rapinoe")]
    how = {"kinds": ("hidden-no-mlp", "hidden-no-attn", "hidden", "attn.h1"), "keep": "all", "corrupt": "swap"}
    trace = kt.causal_trace(gpt2, asked, metrics=WHOLE, **how)
    slow = kt.causal_trace(gpt2, asked, metrics=WHOLE, reuse_prefix=False, max_rows=3, **how)
    assert trace.n_facts >= 2
    for fact, other in zip(trace.facts, slow.facts, strict=True):
        for kind in trace.kinds:
            values = fact.patched[kind]["log_prob"]
            assert np.abs(values - other.patched[kind]["log_prob"]).max() < 2e-5
        first = float(np.log(fact.clean["prob"]) - np.log(fact.corrupted["prob"][0]))
        assert fact.effect("hidden", "log_prob")[-1, -1] == pytest.approx(first, abs=1e-4)
        clean = gpt2.logits(gpt2.encode([f"{fact.prompt} {fact.answer}"]), 4)[0].log_softmax(-1)
        log_probs = clean[torch.arange(3), list(fact.answer_ids)]
        assert fact.clean["log_prob"] == pytest.approx(float(log_probs.sum()), abs=1e-5)


def forwards(model, *args, **options):
    """The forwards of a trace, and the trace."""
    calls = []
    handle = model.module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        trace = kt.causal_trace(model, *args, keep="all", samples=2, **options)
    finally:
        handle.remove()
    return len(calls), trace


def test_one_token_takes_no_forward_of_its_own_and_equals_the_first_tokens_scores(gpt2):
    n_first, _ = forwards(gpt2, FACTS)
    n_whole, trace = forwards(gpt2, FACTS, metrics=("prob", "logit_diff", *WHOLE))
    assert n_whole == n_first
    for fact in trace.facts:
        assert fact.clean["log_prob"] == pytest.approx(np.log(fact.clean["prob"]), abs=1e-5)
        for kind in trace.kinds:
            scores = fact.patched[kind]
            assert np.allclose(scores["log_prob"], np.log(scores["prob"]), atol=1e-5)
            assert np.allclose(scores["log_prob_diff"], scores["logit_diff"], atol=1e-5)
    n_long, _ = forwards(gpt2, ASKED, metrics=WHOLE)
    assert n_long > 2 * forwards(gpt2, ASKED)[0], "longer answers and foils are read behind the prompt"


def test_answers_that_begin_alike_are_traced_whole(gpt2):
    alike = kt.Fact("The {} is", "France", answer="Rome, Italy", foil="Rome")
    same = kt.Fact("The {} of", "France", answer="Paris", foil="Paris")
    trace = kt.causal_trace(gpt2, [alike, same], metrics=WHOLE, keep="all", samples=2, noise_scale=30.0)
    assert trace.n_facts == 1 and trace.left_out[0].reason == SAME_TOKENS
    assert trace.facts[0].answer_id == trace.facts[0].foil_id and np.isfinite(trace.to_dataframe()["value"]).all()
    both = kt.causal_trace(gpt2, [alike, ASKED[0]], metrics=("prob", "log_prob"), keep="all", samples=2)
    assert [fact.reason for fact in both.left_out] == [SAME_TOKEN]


def test_a_flat_whole_difference_is_said(gpt2):
    with pytest.warns(UserWarning, match="log-probability difference of the whole answers"):
        trace = kt.causal_trace(gpt2, ASKED[1:2], metrics=WHOLE, keep="all", samples=1, noise_scale=1e-3)
    assert WHOLE_FLAT in trace.metadata["warnings"][-1]


def test_files_tables_and_figures_hold_the_whole_answer(gpt2, tmp_path):
    trace = kt.causal_trace(gpt2, ASKED, metrics=("logit_diff", *WHOLE), keep="all", samples=2)
    again = kt.Trace.load(trace.save(tmp_path / "trace.safetensors"))
    assert again.to_dataframe().equals(trace.to_dataframe())
    assert set(again.to_dataframe()["metric"]) == {"logit_diff", *WHOLE}
    assert again.facts[2].answer_ids == trace.facts[2].answer_ids and len(again.facts[2].answer_ids) == 3
    assert "whole answer" in again.tables()[0].title and "whole" not in again.tables("prob")[0].title
    drawn = [again.heatmaps(metric).to_json() for metric in WHOLE]
    assert all("log p of the whole answer, 1 to 3 tokens" in text for text in drawn)
    assert "log p difference of whole answer and foil" in drawn[1] and "p(answer)" not in drawn[1]
    assert "whole answer" not in again.heatmaps("prob").to_json()
    assert [figure.name for figure in again.figures(WHOLE)][:2] == ["heatmap-log-prob", "heatmap-log-prob-diff"]
    told = again.as_dict()["whole_answer"]
    assert told["answer_tokens"] == [1, 2, 3] and told["foil_tokens"] == [3, 3, 2]
    balance = kt.balance_factor(again, "log_prob_diff")
    sums = [sum(f.effect("attn", "log_prob_diff")[:, f.span.last]) for f in trace.facts]
    assert [f.attn for f in balance.per_fact] == pytest.approx(sums)
    assert "whole answer" in balance.figure().to_json() and "whole answer" in balance.tables()[0].title
    first = kt.causal_trace(gpt2, ASKED, keep="all", samples=2)
    assert "whole_answer" not in first.as_dict() and set(
        first.merge(kt.causal_trace(gpt2, FACTS, metrics=("log_prob",), keep="all", samples=2)).metrics
    ) == {"prob", "logit_diff"}
    with pytest.raises(BadFact, match="holds no log_prob; trace again"):
        first.curve("mlp", "log_prob")
    with pytest.raises(BadFact, match="holds no log_prob_diff"):
        kt.balance_factor(first, "log_prob_diff")


def test_estimates_refuse_whole_answers(gpt2):
    with pytest.raises(BadFact, match="trace whole answers with exact"):
        kt.causal_trace(gpt2, ASKED, metrics=WHOLE, method="atp")
    with pytest.raises(BadFact, match="a screen estimates prob, logit_diff"):
        kt.screen(gpt2, ASKED, metric="log_prob")
    with pytest.raises(BadFact, match="trace whole answers with exact"):
        kt.screen(gpt2, ASKED, metrics=("log_prob",))


def test_an_answer_longer_than_the_model_reads_is_left_out():
    model = tiny_model("gpt2")
    long = kt.Fact("The {} is", "France", answer="Paris " * 130, foil="Rome")
    trace = kt.causal_trace(model, [long, ASKED[0]], metrics=WHOLE, keep="all", samples=1)
    assert trace.n_facts == 1 and "128" in trace.left_out[0].reason


@pytest.mark.parametrize("name", ("qwen 2.5", "llama 3"))
@pytest.mark.parametrize("turn", ("user", "reply"))
def test_in_a_chat_template_the_whole_answer_is_what_teacher_forcing_scores(name, turn):
    module = tiny_model("llama", vocab_size=512).module
    model = kt.load(module, tokenizer=tokenizer_of(TEMPLATES[name]), chat=Chat("always", turn=turn))
    question = "Where is {}?" if turn == "user" else "The {} is"
    asked = kt.Fact(question, "France", answer="Tomas", foil="Seattle, the city")
    (fact,) = kt.causal_trace(model, asked, metrics=WHOLE, keep="all", samples=1).facts
    rows = [answer_row(model, (asked.prompt, text)) for text in (asked.answer, asked.foil)]
    scores = teacher_force(model, rows)
    answer, foil = (scores[row.question] for row in rows)
    assert (fact.answer_ids, fact.foil_ids) == (answer.target, foil.target) and len(answer.target) < len(foil.target)
    assert fact.clean["log_prob"] == pytest.approx(answer.log_prob, abs=1e-5)
    assert fact.clean["log_prob_diff"] == pytest.approx(answer.log_prob - foil.log_prob, abs=2e-5)


def test_a_later_token_is_traced_behind_those_before_it(gpt2, tmp_path):
    """The foil goes on with its own tokens where it begins alike; else it is the model's best other token."""
    alike = kt.Fact("The {} is", "France", answer="Rome, Italy", foil="Rome, Paris")
    asked = [alike, *ASKED]
    noise = draws(gpt2, asked)
    how = {"kinds": ("attn",), "noise": noise, "keep": "all"}
    trace = kt.causal_trace(gpt2, asked, at=1, metrics=WHOLE, **how)
    first = kt.causal_trace(gpt2, asked, metrics=WHOLE, **how)
    assert [(out.fact, out.reason) for out in trace.left_out] == [(1, "the answer has no token 1")]
    assert [fact.foil_source for fact in trace.facts] == ["given", "model", "model"]
    for fact in trace.facts:
        before = first.facts[fact.index]
        assert fact.ids == (*before.ids, before.answer_ids[0]) and fact.span == before.span and fact.at == 1
        assert fact.answer_ids == before.answer_ids[1:] and fact.roles[-1] == "last"
        values = plain(gpt2.module, "gpt2", fact, fact.answer_ids, noise[fact.index], "attn", 1, "denoise")
        assert np.abs(fact.patched["attn"]["log_prob"] - values).max() < 2e-5
        rest = before.clean["log_prob"] - np.log(before.clean["prob"])
        assert fact.clean["log_prob"] == pytest.approx(rest, abs=1e-5)
    later = kt.causal_trace(gpt2, asked, at=4, metrics=WHOLE, **how)
    assert [(f.foil_source, f.foil_ids) for f in later.facts] == [("given", first.facts[0].foil_ids[4:])]
    again = kt.Trace.load(trace.save(tmp_path / "trace.safetensors"))
    assert again.facts[0].at == 1 and "at token 1 of the answer" in again.figure().to_json()
    with pytest.raises(BadFact, match="traces of at 1 and 0 do not merge"):
        trace.merge(kt.causal_trace(gpt2, FACTS, **how | {"noise": draws(gpt2, FACTS)}))
    with pytest.raises(BadFact, match="at is -1"):
        kt.causal_trace(gpt2, asked, at=-1)


def test_swaps_and_screens_take_a_later_token(gpt2):
    asked = [kt.Fact("The {} is", s, answer="Seattle") for s in ("France", "Warsaw", "Rapinoe")]
    swapped = kt.causal_trace(gpt2, asked, at=2, corrupt="swap", keep="all")
    assert swapped.n_facts >= 2 and all(len(f.answer_ids) == 1 for f in swapped.facts)
    fact = swapped.facts[0]
    other = gpt2.encode([fact.prompt.replace(fact.subject, fact.swapped_for)]).ids[0].tolist()
    ids = torch.tensor([[*other, *fact.ids[-2:]]])
    found = gpt2.module(ids).logits[0, -1].softmax(-1)[fact.answer_id]
    assert fact.p_corrupt == pytest.approx(float(found), abs=1e-6)
    found = kt.screen(gpt2, asked, at=1, top=3, keep="all", samples=1)
    assert found.exact.n_facts == 3 and len(found.exact.facts[0].tokens) == len(fact.tokens) - 1
