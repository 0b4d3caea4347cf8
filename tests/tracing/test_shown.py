"""Figures of traces and balances: one fact by token, several by role, without counting a single fact as a mean."""

import time
from dataclasses import replace

import numpy as np
import pytest
from tracing_help import FACTS, KINDS

import kt
from kt.stats import benjamini_hochberg, sign_flip_test
from kt.tracing.means import grid, role_effects
from kt.tracing.prompts import ROLES

pytestmark = pytest.mark.filterwarnings("ignore:traced all the same")


@pytest.fixture(scope="module")
def traces(gpt2):
    return [kt.causal_trace(gpt2, FACTS[:n], kinds=KINDS, keep="all", samples=3) for n in (1, 3)]


def test_one_fact_is_drawn_by_token_and_several_by_role(traces):
    one, several = (grid(t, kt.Kind.MLP, "prob") for t in traces)
    assert one["rows"] == ["The", " Fr", "an", "ce", " is"] and one["subject_rows"] == [1, 2, 3]
    assert np.allclose(one["values"], traces[0].facts[0].effect("mlp", "prob").T) and one["n"] == 3
    assert several["rows"][-1] == "Last token" and several["subject_rows"] == [0, 1, 2]
    assert several["values"].shape == (5, 3) and list(several["n"])[-1] == 3


def test_every_figure_is_drawn(traces):
    for trace in traces:
        for figure in (trace.heatmap("attn", "prob"), trace.heatmaps(), trace.curves(), trace.figure()):
            assert len(figure.data) and figure.to_json()
        assert "<table>" in trace._repr_html_()
        balance = kt.balance_factor(trace)
        assert len(balance.figure().data) and "proposed layers" in balance._repr_html_()


def test_one_fact_comes_out_of_a_trace_by_place_and_by_name(traces):
    several = traces[1]
    first, last = several[0], several[-1]
    assert (len(several), len(first), len(several[1:])) == (3, 1, 2)
    assert first.facts == several.facts[:1] and last.facts == several.facts[-1:]
    rows = [trace.heatmap("mlp").layout.yaxis.ticktext for trace in (first, traces[0])]
    assert rows[0] == rows[1]
    for fact, alone in zip(several.facts, several, strict=True):
        assert several.fact(fact.subject.upper()).facts == several.fact(fact.prompt).facts == alone.facts
    with pytest.raises(IndexError):
        several[3]


def test_a_name_of_no_traced_fact_or_of_several_is_one_line(traces):
    with pytest.raises(kt.errors.BadFact, match="no traced fact is of the name 'Atlantis'; this trace holds 'The"):
        traces[1].fact("Atlantis")
    for name in ("", " "):
        with pytest.raises(kt.errors.BadFact, match="of the name"):
            traces[1].fact(name)
    twice = replace(traces[1], facts=traces[1].facts * 2)
    with pytest.raises(kt.errors.BadFact, match=r"2 traced facts are of the name .*; give an id, or trace\[i\]"):
        twice.fact(twice.facts[0].subject)


def test_text_from_the_model_is_escaped(traces):
    html = kt.Trace(traces[0].facts, traces[0].kinds, (), dict(traces[0].metadata) | {"model": "<b>"})._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;" in html


# Tests, unmeasured cells, heads


def made(trace, n, roles=ROLES, layers=8, kinds=("mlp",), seed=0):
    """A trace of `n` facts whose effects are drawn, with a clear one at the last subject token."""
    rng = np.random.default_rng(seed)
    template = trace.facts[0]
    facts = []
    for i in range(n):
        patched = {}
        for kind in kinds:
            values = rng.normal(0, 0.02, size=(layers, len(roles), 2)).astype(np.float32)
            values[2, roles.index("subject_last")] += 0.4
            patched[kind] = {"prob": values, "logit_diff": values}
        nothing = {"prob": np.zeros(2, np.float32), "logit_diff": np.zeros(2, np.float32)}
        clean = {"prob": 1.0, "logit_diff": 1.0}
        fact = replace(template, index=i, roles=tuple(roles), tokens=tuple("x" * len(roles)), patched=patched)
        facts.append(replace(fact, corrupted=nothing, clean=clean))
    return replace(trace, facts=tuple(facts), kinds=tuple(kinds), metadata=dict(trace.metadata) | {"n_layers": layers})


def unmeasured(trace, fact, kind, layer, token):
    """The same trace without one cell of one fact."""
    chosen = trace.facts[fact]
    patched = {k: {m: v.copy() for m, v in by.items()} for k, by in chosen.patched.items()}
    for values in patched[kind].values():
        values[layer, token] = np.nan
    facts = [replace(f, patched=patched) if i == fact else f for i, f in enumerate(trace.facts)]
    return replace(trace, facts=tuple(facts))


def test_p_is_the_sign_flip_test_over_facts_and_q_is_over_all_cells_of_the_grid(traces):
    trace = made(traces[0], 9)
    found = trace.by_role("mlp", "prob")
    p = sign_flip_test(role_effects(trace, "mlp", "prob"))
    np.testing.assert_allclose(found.p, p)
    np.testing.assert_allclose(found.q, benjamini_hochberg(p))
    row = found.roles.index("subject_last")
    assert found.q[row, 2] < 0.2 and found.p[row, 2] == 2 / 2**9
    line = trace.curve("mlp", "prob")
    np.testing.assert_array_equal(line.q, found.q[row])
    np.testing.assert_array_equal(line.counts, [9] * 8)


def test_only_the_cells_with_an_effect_are_told_apart_from_zero_in_the_figure(traces):
    trace = made(traces[0], 40)
    figure = trace.heatmap("mlp", "prob")
    cells = grid(trace, "mlp", "prob")
    assert list(zip(*np.nonzero(cells["q"] < 0.05), strict=True)) == [(2, 2)]
    assert [t.name for t in figure.data].count("not told apart from zero") == 1
    assert "sign-flip test over facts" in figure.layout.annotations[-1].text


def test_a_single_fact_is_tested_over_its_noise_draws_and_a_single_record_not_at_all(traces):
    one = traces[0]
    cells = grid(one, "mlp", "prob")
    draws = np.moveaxis(one.facts[0].effects("mlp", "prob"), -1, 0)
    np.testing.assert_allclose(cells["p"], sign_flip_test(draws).T)
    assert cells["p"].shape == cells["q"].shape == cells["values"].shape and cells["over"] == "noise draws"
    several = made(one, 2)
    assert np.isfinite(several.by_role("mlp").q).all()
    lone = replace(several, facts=several.facts[:1])
    assert np.isnan(lone.by_role("mlp").p).all() and np.isnan(lone.curve("mlp").q).all()


def test_cells_that_were_not_measured_leave_their_fact_out_of_mean_n_and_test(traces):
    whole = made(traces[0], 5)
    token = ROLES.index("subject_last")
    holed = unmeasured(whole, 3, "mlp", 2, token)
    found, before = holed.by_role("mlp", "prob"), whole.by_role("mlp", "prob")
    others = [f.effect("mlp", "prob")[2, token] for i, f in enumerate(whole.facts) if i != 3]
    assert found.mean[token, 2] == pytest.approx(np.mean(others)) and found.p[token, 2] == 2 / 2**4
    assert found.counts[token, 2] == 4 and found.counts.sum() == before.counts.sum() - 1
    np.testing.assert_array_equal(found.n, before.n)
    assert grid(holed, "mlp", "prob")["n"].shape == (6, 8) and grid(whole, "mlp", "prob")["n"].shape == (6,)
    assert "n = 4" in holed.heatmap("mlp", "prob").data[0].hovertext[token][2]
    assert np.isnan(holed.to_dataframe()["value"]).sum() == 2


def test_a_cell_that_no_fact_has_is_drawn_as_not_measured(traces):
    trace = made(traces[0], 3)
    for fact in range(3):
        trace = unmeasured(trace, fact, "mlp", 7, 5)
    figure = trace.heatmaps("prob")
    assert figure.data[0].z[5][7] is None and "no value" in figure.data[0].hovertext[5][7]
    assert trace.curves(at="last").to_json() and "<table>" in trace._repr_html_()


def test_infinite_effects_are_refused(traces):
    trace = made(traces[0], 2)
    trace.facts[1].patched["mlp"]["prob"][0, 0] = np.inf
    with pytest.raises(kt.errors.WorkFailed, match="effects that are infinite"):
        trace.by_role("mlp", "prob")


def test_heads_have_a_figure_of_their_own_and_stay_out_of_the_others(traces):
    trace = made(traces[0], 9, kinds=("mlp", "attn", "attn.h0", "attn.h10", "attn.h2"))
    figure = trace.heads("prob")
    assert list(figure.layout.yaxis.ticktext) == ["head 0", "head 2", "head 10"]
    expected = [trace.curve(kind, "prob").mean for kind in ("attn.h0", "attn.h2", "attn.h10")]
    np.testing.assert_allclose(np.array(figure.data[0].z, dtype=float), expected)
    assert "last subject token" in figure.layout.title.text and "q = " in figure.data[0].hovertext[0][2]
    assert len({t.xaxis for t in trace.heatmaps("prob").data}) == 2
    assert {t.name for t in trace.curves().data if t.showlegend} == {"MLP", "Attention"}
    only = replace(trace, kinds=("attn.h0", "attn.h2"))
    assert list(only.heatmaps("prob").layout.yaxis.ticktext) == ["head 0", "head 2"]
    alone = replace(trace, facts=trace.facts[:1])
    assert "n = 2" in alone.heads("prob", at="last").data[0].hovertext[0][0]
    with pytest.raises(kt.errors.BadFact, match="no single heads"):
        traces[1].heads()
    with pytest.raises(kt.errors.BadFact, match="no traced fact has a token of role"):
        replace(trace, facts=tuple(replace(f, roles=("last",) * 6) for f in trace.facts)).heads()


def test_severed_states_share_a_scale_with_the_whole_state_and_have_their_own_titles(traces):
    kinds = ("mlp", "hidden", "hidden-no-mlp", "hidden-no-attn")
    trace = made(traces[0], 3, kinds=kinds)
    for fact in trace.facts:
        fact.patched["hidden"]["prob"][0, 0] = 0.9
    maps = [t for t in trace.heatmaps("prob").data if t.showscale is not False and t.type == "heatmap"]
    assert maps[0].zmax < maps[1].zmax == maps[2].zmax == maps[3].zmax
    names = {t.name for t in trace.curves().data if t.showlegend}
    assert names == {"MLP", "Hidden state", "Hidden state, MLP severed", "Hidden state, attention severed"}


def test_the_noising_direction_takes_away(traces):
    trace = made(traces[0], 2)
    turned = replace(trace, metadata=dict(trace.metadata) | {"direction": "noise", "method": "atp"})
    text = turned.heatmaps("prob").to_json()
    assert "probability taken away" in text and "corrupted states in the clean run" in text
    assert "attribution patching" in text and "taken away" not in trace.heatmaps("prob").to_json()


def test_a_hundred_facts_by_32_layers_and_three_kinds_take_less_than_a_second(traces):
    trace = made(traces[0], 100, layers=32, kinds=("mlp", "attn", "hidden"))
    trace.by_role("mlp")
    start = time.process_time()
    for kind in trace.kinds:
        trace.by_role(kind)
    taken = time.process_time() - start
    assert taken < 2, taken
