"""What `causal_trace` promises beside its numbers: golden results, draws, who is left out, files, errors."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tracing_help import KINDS, draws

import kt
from kt.errors import BadFact, BadFile, SubjectNotFound, WorkFailed
from kt.model.sites import Kind
from kt.model.tokens import Span
from kt.tracing.corrupt import NO_PARTNER, embedding_spread, fact_seed
from kt.tracing.prompts import SAME_TOKEN, UNKNOWN, token_roles
from kt.tracing.run import FLAT

quiet = pytest.mark.filterwarnings("ignore:traced all the same")


def golden_facts(folder):
    described = json.loads((folder / "qwen2-tiny.trace.json").read_text())
    by_id = {f["known_id"]: f for f in json.loads((folder / "facts.json").read_text())}
    made = [
        kt.Fact(
            by_id[g["known_id"]]["template"],
            g["subject"],
            answer=g["r_str"].strip(),
            foil=g["r_prime_str"].strip(),
            id=f"f{g['known_id']}",
        )
        for g in described["facts"]
    ]
    return made, described


@pytest.mark.parametrize("window", (1, 3))
def test_golden_trace(golden, window):
    facts, described = golden_facts(golden)
    raw = load_file(golden / "qwen2-tiny.trace.safetensors")
    model = kt.load(golden / "model")
    noise = [raw[f"{fact.id}.noise"] for fact in facts]
    trace = kt.causal_trace(model, facts, kinds=KINDS, noise=noise, window=window)
    assert trace.n_facts == 5 and not trace.left_out
    for fact, told in zip(trace.facts, described["facts"], strict=True):
        assert (fact.answer_id, fact.foil_id, list(fact.span)) == (told["r"], told["r_prime"], told["subject_range"])
        assert list(fact.tokens) == told["tokens"]
        for kind in KINDS:
            known = {n: raw[f"{fact.id}.w{window}.{kind}.{n}"].numpy() for n in ("p", "logit_r", "logit_rp", "P", "LD")}
            patched = {m: values.transpose(1, 0, 2) for m, values in fact.patched[Kind(kind)].items()}
            np.testing.assert_allclose(patched["prob"], known["p"], rtol=0, atol=2e-5)
            np.testing.assert_allclose(patched["logit_diff"], known["logit_r"] - known["logit_rp"], rtol=0, atol=5e-5)
            np.testing.assert_allclose(fact.effect(kind, "prob").T, known["P"], rtol=0, atol=2e-5)
            np.testing.assert_allclose(fact.effect(kind, "logit_diff").T, known["LD"], rtol=0, atol=2e-5)


def test_golden_noise_scale_and_balance(golden):
    facts, described = golden_facts(golden)
    model = kt.load(golden / "model")
    subjects = [kt.Fact(f["template"], f["subject"]) for f in json.loads((golden / "facts.json").read_text())]
    assert embedding_spread(model, subjects) == pytest.approx(described["embedding_std"], rel=1e-6)
    noise = load_file(golden / "qwen2-tiny.trace.safetensors")
    trace = kt.causal_trace(model, facts, noise=[noise[f"{f.id}.noise"] for f in facts])
    balance = kt.balance_factor(trace)
    for ours, told in zip(balance.per_fact, described["facts"], strict=True):
        assert ours.alpha_raw == pytest.approx(told["alpha"]["w1.subject_last"], abs=2e-5)


# Draws


@quiet
def test_draws_depend_on_the_fact_and_the_seed_only(gpt2, facts):
    one, again, other = (kt.causal_trace(gpt2, facts, keep="all", samples=3, seed=s) for s in (1, 1, 2))
    backwards = kt.causal_trace(gpt2, facts[::-1], keep="all", samples=3, seed=1, max_rows=16)
    for a, b, c, d in zip(one.facts, again.facts, other.facts, backwards.facts[::-1], strict=True):
        assert a.id == d.id and (a.corrupted["prob"] == b.corrupted["prob"]).all()
        assert (a.patched[Kind.MLP]["prob"] == b.patched[Kind.MLP]["prob"]).all()
        assert np.abs(a.corrupted["logit_diff"] - c.corrupted["logit_diff"]).max() > 1e-3
        assert np.abs(a.patched[Kind.MLP]["logit_diff"] - d.patched[Kind.MLP]["logit_diff"]).max() < 1e-5


def test_every_fact_has_its_own_seed(facts):
    seeds = {fact_seed(f, s) for f in facts for s in (0, 1)}
    assert len(seeds) == 2 * len(facts) and all(0 <= s < 2**63 for s in seeds)


@quiet
def test_the_noise_level_is_three_standard_deviations_of_the_subjects_embeddings(gpt2, facts):
    trace = kt.causal_trace(gpt2, facts[:1], keep="all", samples=400)
    ids = gpt2.tokenizer("France")["input_ids"]
    std = gpt2.module.get_input_embeddings()(torch.tensor(ids)).std()
    assert trace.metadata["noise_level"] == pytest.approx(3 * float(std), rel=1e-5)
    assert trace.metadata["samples"] == [400] and trace.facts[0].corrupted["prob"].shape == (400,)


# Answers and foils


@quiet
def test_answer_and_foil_follow_the_written_order(gpt2):
    said = [
        kt.Fact("The {} is", "France", answer="Rome", foil="Paris", target="Seattle", relation="a"),
        kt.Fact("The {} is", "Italy", answer="Rome", target="Seattle", relation="a"),
        kt.Fact("The {} is", "Seattle", answer="Rome", relation="a"),
        kt.Fact("The {} is", "Paris", answer="Paris", relation="a"),
        kt.Fact("The {} is", "Warsaw"),
    ]
    trace = kt.causal_trace(gpt2, said, keep="all", samples=1)
    assert [f.foil_source for f in trace.facts] == ["given", "target", "relation", "relation", "model"]
    assert [f.foil for f in trace.facts[:4]] == ["Paris", "Seattle", "Paris", "Rome"]
    logits = gpt2.logits(gpt2.encode([said[4].prompt]))[0, 0]
    assert [trace.facts[4].answer_id, trace.facts[4].foil_id] == logits.topk(2).indices.tolist()
    assert (trace.facts[4].answer_source, trace.facts[0].answer_source) == ("model", "given")


def test_facts_left_out_are_counted_with_their_reason(gpt2):
    said = [
        kt.Fact("The {} is", "France", answer="Rome"),
        kt.Fact("The {} is", "Italy", answer="Paris", foil="Paris"),
        *(kt.Fact("The {} is", name) for name in ("Warsaw", "Seattle", "Brunmar", "Tomas", "Rapinoe")),
    ]
    trace = kt.causal_trace(gpt2, said, samples=4, noise_scale=30.0)
    assert trace.n_facts and all(f.index > 1 and abs(f.ld_clean - f.ld_corrupt) >= 0.5 for f in trace.facts)
    assert [(f.fact, f.reason) for f in trace.left_out][:2] == [(0, UNKNOWN), (1, SAME_TOKEN)]
    assert {f.reason for f in trace.left_out[2:]} <= {FLAT} and trace.n_facts + len(trace.left_out) == len(said)
    assert "1 left out: the model's" in trace.why_left_out() and trace.metadata["n_given"] == len(said)
    assert trace.metadata["min_gap"] == kt.tracing.MIN_GAP


def test_a_small_gap_is_left_out_or_warned_of(gpt2, facts):
    with pytest.raises(WorkFailed, match="less than 0\\.5 apart"):
        kt.causal_trace(gpt2, facts[:1], noise_scale=1e-3, samples=1)
    with pytest.warns(UserWarning, match="less than 0\\.5 apart"):
        trace = kt.causal_trace(gpt2, facts[:1], noise_scale=1e-3, samples=1, keep="all")
    assert FLAT in trace.metadata["warnings"][0]


def test_an_unknown_fact_is_traced_with_a_warning(gpt2):
    with pytest.warns(UserWarning, match="not the answer's"):
        trace = kt.causal_trace(gpt2, [kt.Fact("The {} is", "France", answer="Rome")], keep="all", samples=1)
    assert not trace.facts[0].known


# Swap


@quiet
def test_swap_takes_a_subject_of_the_same_length(gpt2):
    said = [
        kt.Fact("The {} is", "France", relation="a"),
        kt.Fact("The {} of", "Seattle", relation="a"),
        kt.Fact("The {} of", "Italy", relation="b"),
        kt.Fact("The {} of", "Danielle Darrieux of Paris", relation="a"),
    ]
    trace = kt.causal_trace(gpt2, said, corrupt="swap", keep="all", kinds=KINDS)
    lengths = {f.subject: f.span.stop - f.span.start for f in trace.facts}
    assert trace.n_facts >= 2
    for fact in trace.facts:
        assert fact.swapped_for != fact.subject and lengths[fact.swapped_for] == lengths[fact.subject]
        assert fact.corrupted["prob"].shape == (1,)
        swapped = gpt2.logits(gpt2.encode([f"{fact.prompt.replace(fact.subject, fact.swapped_for)}"]))[0, 0]
        assert fact.p_corrupt == pytest.approx(float(swapped.softmax(-1)[fact.answer_id]), abs=1e-6)
        assert fact.effect("hidden", "logit_diff")[-1, -1] == pytest.approx(1)
    assert NO_PARTNER in {f.reason for f in trace.left_out}


# Tables, roles, files


def test_roles():
    assert token_roles(Span(1, 4), 8) == (
        *("before", "subject_first", "subject_middle", "subject_last"),
        *("after_first", "after_middle", "after_middle", "last"),
    )
    assert token_roles(Span(0, 1), 3) == ("subject_last", "after_first", "last")
    assert token_roles(Span(0, 2), 3) == ("subject_first", "subject_last", "last")
    assert token_roles(Span(1, 3), 3) == ("before", "subject_first", "subject_last")


@pytest.fixture(scope="module")
def trace(gpt2):
    from tracing_help import FACTS

    with pytest.warns(UserWarning, match="apart"):
        return kt.causal_trace(gpt2, FACTS, kinds=KINDS, keep="all", samples=3)


def test_the_table_has_a_row_for_every_cell(trace):
    table = trace.to_dataframe()
    wanted = ["fact", "kind", "layer", "token", "role", "metric", "value", "clean", "corrupted"]
    assert list(table.columns) == wanted and np.isfinite(table["value"]).all()
    assert len(table) == sum(len(f.tokens) for f in trace.facts) * trace.n_layers * 3 * 2
    fact = trace.facts[1]
    row = table.query("fact == 1 and kind == 'mlp' and layer == 2 and token == 4 and metric == 'logit_diff'").iloc[0]
    assert row["value"] == pytest.approx(fact.effect("mlp", "logit_diff")[2, 4])
    assert (row["clean"], row["corrupted"]) == (fact.ld_clean, fact.ld_corrupt)
    patched = fact.patched[Kind.MLP]["logit_diff"][2, 4].mean()
    assert row["value"] == pytest.approx((patched - fact.ld_corrupt) / (fact.ld_clean - fact.ld_corrupt), abs=1e-5)


def test_role_means_average_a_facts_tokens_first(trace):
    grid = trace.by_role("mlp", "prob")
    assert grid.mean.shape == (len(grid.roles), trace.n_layers)
    assert (grid.low <= grid.mean)[grid.n > 1].all() and np.isnan(grid.low[grid.n == 1]).all()
    table = trace.to_dataframe().query("kind == 'mlp' and metric == 'prob'")
    means = table.groupby(["fact", "role", "layer"])["value"].mean().groupby(["role", "layer"]).mean()
    for r, role in enumerate(grid.roles):
        assert np.allclose(grid.mean[r], means[role].to_numpy())
        assert grid.n[r] == table[table["role"] == role]["fact"].nunique()
    at_last = trace.curve("mlp", "prob")
    assert (at_last.mean == grid.mean[grid.roles.index("subject_last")]).all() and at_last.n == 3


def test_a_saved_trace_loads_the_same(trace, tmp_path):
    path = trace.save(tmp_path / "trace.safetensors")
    again = kt.Trace.load(path)
    assert again.to_dataframe().equals(trace.to_dataframe()) and repr(again) == repr(trace)
    assert again.facts[0].span == trace.facts[0].span and again.metadata == trace.metadata
    assert again.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadFile):
        kt.Trace.load(path)


@quiet
def test_merged_parts_equal_the_whole(gpt2, facts):
    noise = draws(gpt2, facts)
    whole = kt.causal_trace(gpt2, facts, noise=noise, keep="all")
    parts = [kt.causal_trace(gpt2, facts[s], noise=noise[s], keep="all") for s in (slice(0, 1), slice(1, 3))]
    merged = parts[0].merge(parts[1])
    assert np.allclose(merged.to_dataframe()["value"], whole.to_dataframe()["value"], atol=1e-4)
    assert (merged.to_dataframe()["fact"] == whole.to_dataframe()["fact"]).all() and merged.metadata["n_given"] == 3
    with pytest.raises(BadFact, match="twice"):
        merged.merge(parts[1])
    with pytest.raises(BadFact, match="window"):
        merged.merge(kt.causal_trace(gpt2, facts, keep="all", window=2, samples=1))


@quiet
def test_progress_counts_facts(gpt2, facts):
    seen = []
    kt.causal_trace(gpt2, facts, keep="all", samples=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3) and seen == sorted(seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ("mlps",)}, "choose among mlp, attn, hidden"),
        ({"metrics": ("logit",)}, "prob, logit_diff"),
        ({"samples": 0}, "samples is 0"),
        ({"window": 0}, "window is 0"),
        ({"noise_scale": 0.0}, "noise_scale"),
        ({"noise_scale": 1e300}, r"at most 1e\+06"),
        ({"noise_scale": float("nan")}, "noise_scale is nan"),
        ({"corrupt": "drop"}, "noise or swap"),
        ({"keep": "some"}, "known or all"),
        ({"noise": []}, "0 tensors for 1 facts"),
        ({"noise": [torch.zeros(2, 1, 7)]}, "give \\(samples, 3, 32\\)"),
        ({"noise": [torch.zeros(2, 3, 32)], "corrupt": "swap"}, "leave one of them out"),
        ({"max_rows": 0}, "max_rows is 0"),
    ],
)
def test_wrong_arguments_say_what_to_give(gpt2, arguments, message):
    with pytest.raises(BadFact, match=message):
        kt.causal_trace(gpt2, [kt.Fact("The {} is", "France")], **arguments)


def test_no_facts_and_unknown_kinds_are_errors(gpt2, trace):
    with pytest.raises(BadFact, match="no facts"):
        kt.causal_trace(gpt2, [])
    with pytest.raises(BadFact, match="this trace holds"):
        kt.Trace(trace.facts, (Kind.MLP,), (), trace.metadata).by_role("attn")
    with pytest.raises(BadFact, match="no traced fact has a token"):
        trace.curve("mlp", "prob", at="first")
    with pytest.raises(SubjectNotFound):
        kt.causal_trace(gpt2, [kt.Fact("The is", "France")])


def test_a_number_that_is_not_finite_never_hides(gpt2, facts):
    weight = gpt2.weight(kt.Site(Kind.MLP, 1))
    with gpt2.restored([kt.Site(Kind.MLP, 1)]), torch.no_grad(), pytest.raises(WorkFailed, match="not finite"):
        weight.fill_(torch.inf)
        kt.causal_trace(gpt2, facts, keep="all", samples=1)


def test_one_token_gives_the_whole_maps_column_to_the_last_bit(tmp_path):
    model, facts = kt.load("demo"), kt.load_facts("demo", limit=6)
    how = {"kinds": ("mlp", "attn"), "samples": 3}
    whole, column = kt.causal_trace(model, facts, **how), kt.causal_trace(model, facts, **how, tokens="subject_last")
    mine, theirs = kt.balance_factor(column), kt.balance_factor(whole)
    assert (mine.alpha, mine.ci95, mine.layers, mine.per_layer) == (
        theirs.alpha, theirs.ci95, theirs.layers, theirs.per_layer
    )  # fmt: skip
    assert mine.per_fact == theirs.per_fact
    for one, other in zip(column.facts, whole.facts, strict=True):
        last = one.span.last
        assert np.array_equal(one.patched["mlp"]["logit_diff"][:, last], other.patched["mlp"]["logit_diff"][:, last])
        assert np.isnan(np.delete(one.patched["mlp"]["logit_diff"], last, 1)).all()
    again = kt.Trace.load(column.save(tmp_path / "trace.safetensors"))
    for trace in (column, again):
        table = trace.to_dataframe()
        assert trace.by_role("mlp").roles == ("subject_last",) and set(table["role"]) == {"subject_last"}
        assert not table["value"].isna().any() and len(table) == len(trace.facts) * 2 * 2 * 8
        assert trace.as_dict()["rows"] == ("subject_last",) and "Last subject token" in trace.figure().to_json()
        assert trace.tables()[0].rows == whole.tables()[0].rows
    with pytest.raises(BadFact, match="tokens 'all' and 'subject_last' do not merge"):
        whole.merge(column)
    with pytest.raises(BadFact, match="role 'last'; choose among subject_last"):
        column.curve("mlp", at="last")


def test_one_fact_traced_at_one_token_is_a_map_of_one_row():
    model, (fact,) = kt.load("demo"), kt.load_facts("demo", limit=1)
    trace = kt.causal_trace(model, fact, samples=2, keep="all", tokens="subject_last")
    assert trace.as_dict()["rows"] == [trace.facts[0].tokens[trace.facts[0].span.last]]
    assert trace.as_dict()["subject_rows"] == [0]
    for wrong, words in (({"tokens": "first"}, "choose among all, subject_last"), ({"only": []}, "give one of them")):
        with pytest.raises(BadFact, match=words):
            kt.causal_trace(model, fact, **({"tokens": "subject_last"} | wrong))
