"""UltraEdit: pairs against plain hooks, the closed form against numpy, and what a session remembers."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from families import tiny_model

import kt
from kt.editing import ultraedit as lifelong
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.second_moment import Statistics
from kt.editing.plan import EditHistory, SolveContext
from kt.editing.ultraedit import Pairs, Running, UltraEdit, answer_pairs, ridge_fit, value_shifts
from kt.editing.verdict import TextReading
from kt.errors import UnknownSite, WorkFailed
from kt.evaluation.perplexity import check_losses
from kt.model.sites import Kind, Site
from kt.model.tokens import encode_ids, target_ids, token_ids
from kt.model.update import Dense, LowRank

FACTS = [
    kt.Fact("The mother tongue of {} is", "Danielle Darrieux", target="Italy"),
    kt.Fact("The city of the {} is", "Space Needle", target="Warsaw"),
    kt.Fact("{} plays the sport of", "Megan Rapinoe", target="Paris"),
    kt.Fact("{} works as a", "Tomas Brill", target="soccer player"),
    kt.Fact("The capital of {} is", "Italy", target="Seattle"),
    kt.Fact("{} was born in", "Marie Curie", target="Rome"),
]
MLP = [Site(Kind.MLP, layer) for layer in (0, 1, 2)]
BOTH = [Site(kind, layer) for layer in (0, 1, 2) for kind in (Kind.ATTN, Kind.MLP)]
PLAN = UltraEdit(layers=(0, 1, 2), maps=("mlp",), lr=0.01)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def setting_of(model, state=None):
    return SolveContext(model, Statistics({}), Contexts(), state or EditHistory())


def row_of(model, fact):
    answer = target_ids(model.tokenizer, fact.prompt, fact.target)
    return [*token_ids(model.tokenizer, fact.prompt), *answer[:-1]], answer


def log_probs(model, facts=FACTS):
    """Of whole answers, one row a forward."""
    found = []
    for fact in facts:
        ids, answer = row_of(model, fact)
        logp = model.logits(encode_ids([ids], 0), len(answer))[0].log_softmax(-1)
        found.append(float(logp[range(len(answer)), list(answer)].sum()))
    return np.array(found)


def write(model, solved):
    for name, written in solved.written.items():
        model.write(name, written.update)


def gains(model, solved, facts=FACTS):
    before = log_probs(model, facts)
    with model.restored(solved.written):
        write(model, solved)
        return log_probs(model, facts) - before


def dense(solved):
    return {name: written.update.dense() for name, written in solved.written.items()}


def assert_same(one, two, tolerance=1e-4):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.isfinite(one[name]).all()
        assert float((one[name] - two[name]).norm() / two[name].norm()) < tolerance, name


def pairs_of(model, facts, sites):
    return answer_pairs(model, facts, [row_of(model, fact)[1] for fact in facts], sites, tokens=2048)[0]


def hooked(model, fact, sites):
    """Keys and gradients of one fact by torch's own hooks, no padding."""
    ids, answer = row_of(model, fact)
    seen, handles = {}, []
    embed = model.module.get_input_embeddings()
    handles.append(embed.register_forward_hook(lambda _, __, out: out.requires_grad_(True)))  # or nothing flows back
    for site in sites:

        def forward(module, inputs, output, site=site):
            output.retain_grad()
            seen[site] = inputs[0], output

        handles.append(model.linear(site).register_forward_hook(forward))
    try:
        logits = model.module(input_ids=torch.tensor([ids])).logits[0, -len(answer) :]
        (-logits.log_softmax(-1)[range(len(answer)), list(answer)].sum()).backward()
    finally:
        for handle in handles:
            handle.remove()
    last = lambda t: t.detach().reshape(len(ids), -1)[-len(answer) :]  # noqa: E731
    return {site: (last(key), last(value.grad)) for site, (key, value) in seen.items()}


def numpy_update(pairs, seen, lr, ridge):
    """The module docstring's three lines; `seen` are all features of the session."""
    keys, gradients = (p.double().numpy() for p in pairs)
    mean, deviation = seen.mean(0), seen.std(0, ddof=1)
    normal = (np.concatenate([keys, gradients], 1) - mean) / (deviation + lifelong.EPSILON)
    h, g = normal[:, : keys.shape[1]], normal[:, keys.shape[1] :]
    v = -lr * (h**2).sum(1, keepdims=True) * g
    return v.T @ keys @ np.linalg.inv(keys.T @ keys + ridge * np.eye(keys.shape[1]))


@pytest.mark.parametrize("kinds", [(Kind.MLP,), (Kind.ATTN, Kind.MLP)], ids=["mlp", "both"])
def test_every_answer_rises_in_every_family_and_the_model_stays(family, kinds):
    model = tiny_model(family)
    plan = UltraEdit((0, 1, 2), kinds, lr=0.01)
    before = model.fingerprint()
    solved = plan.solve(setting_of(model), FACTS)
    assert model.fingerprint() == before
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())
    assert sorted(solved.written) == sorted(plan.names(model))
    assert {model.site_of(name).kind for name in solved.written} == set(kinds)
    tokens = sum(len(row_of(model, f)[1]) for f in FACTS)
    for name, written in solved.written.items():
        assert isinstance(written.update, LowRank) and written.update.rank == tokens
        assert written.update.shape == tuple(model.weight(name).shape)
        assert 1 <= written.condition < 1e6 and written.residual_norm > 0
    assert (gains(model, solved) > 0).all(), gains(model, solved)


def test_pairs_are_those_of_plain_hooks_at_each_predicting_position(family):
    model = tiny_model(family)
    pairs = pairs_of(model, FACTS, BOTH)
    single = [hooked(model, fact, BOTH) for fact in FACTS]
    lengths = {len(one[BOTH[0]][0]) for one in single}
    assert len(lengths) > 1 and max(lengths) > 2, "answers of one length would not show the positions"
    for site in BOTH:
        for index, end in enumerate(("keys", "gradients")):
            want = torch.cat([one[site][index] for one in single])
            torch.testing.assert_close(getattr(pairs[site], end), want, atol=2e-5, rtol=1e-3)


def test_the_update_is_the_formula(llama):
    plan = UltraEdit((0, 2), (Kind.ATTN, Kind.MLP), lr=0.02, ridge=0.5)
    solved = dense(plan.solve(setting_of(llama), FACTS))
    for site, pairs in pairs_of(llama, FACTS, plan.sites(llama)).items():
        want = numpy_update(pairs, pairs.features.numpy(), 0.02, 0.5)
        np.testing.assert_allclose(solved[llama.weight_name(site)].numpy(), want, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("pairs", [2, 5, 50])
def test_the_authors_variance_of_a_first_edit_gives_the_same_but_for_a_factor(pairs):
    """They count the mini-batch's n pairs n / (n - 1) times; the module says what that comes to."""
    draw = torch.Generator().manual_seed(0)
    seen = Pairs(torch.randn(pairs, 4, generator=draw), torch.randn(pairs, 3, generator=draw))
    ours = Running.of(seen.features)
    theirs = Running(ours.count, ours.mean, ours.scatter * pairs / (pairs - 1))
    want = value_shifts(seen, ours, 0.1) * (1 - 1 / pairs) ** 1.5
    torch.testing.assert_close(value_shifts(seen, theirs, 0.1), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [1, 7, 12, 40])
def test_both_sides_of_the_ridge_system_give_the_same(count):
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(count, 12, generator=draw, dtype=torch.float64)
    shifts = torch.randn(count, 5, generator=draw, dtype=torch.float64)
    fit = ridge_fit(keys, shifts, 0.1, "")
    assert isinstance(fit.update, LowRank if count <= 12 else Dense) and fit.update.rank <= min(count, 12)
    system = keys.T @ keys + 0.1 * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(fit.update.dense(), shifts.T @ keys @ torch.linalg.inv(system))
    smaller = system if count > 12 else keys @ keys.T + 0.1 * torch.eye(count, dtype=torch.float64)
    true = float(torch.linalg.cond(smaller, 1))
    assert true / 3 < fit.condition < true * (1 + 1e-6)  # LAPACK's estimate is a lower bound


def test_more_tokens_than_inputs_make_a_dense_update(llama):
    facts = [kt.Fact(f"In {n} the tongue of {{}} is", f.subject, target=f.target) for n in range(4) for f in FACTS]
    solved = PLAN.solve(setting_of(llama), facts)
    assert all(isinstance(w.update, Dense) and w.update.finite for w in solved.written.values())
    pairs = pairs_of(llama, facts, MLP)
    assert len(pairs[MLP[0]].keys) > llama.key_size(MLP[0])
    for site in MLP:
        want = numpy_update(pairs[site], pairs[site].features.numpy(), PLAN.lr, PLAN.ridge)
        np.testing.assert_allclose(dense(solved)[llama.weight_name(site)].numpy(), want, atol=1e-9, rtol=1e-7)


def test_neither_batches_nor_the_order_of_facts_change_the_result(family):
    model = tiny_model(family)
    steps = []
    whole = PLAN.solve(setting_of(model), FACTS)
    one_by_one = UltraEdit((0, 1, 2), ("mlp",), lr=0.01, tokens=1).solve(
        setting_of(model), FACTS, lambda done, of: steps.append((done, of))
    )
    assert steps == [(n, len(FACTS)) for n in range(1, len(FACTS) + 1)]
    assert_same(dense(whole), dense(one_by_one), 2e-3)
    assert_same(dense(whole), dense(PLAN.solve(setting_of(model), FACTS[::-1])), 2e-3)


def test_same_facts_same_bytes(llama):
    one, two = (dense(PLAN.solve(setting_of(llama), FACTS)) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_statistics_of_two_turns_are_those_of_all_pairs_at_once(llama):
    state, seen = EditHistory(), {site: [] for site in MLP}
    with llama.restored(MLP):
        for turn in (FACTS[:4], FACTS[4:]):
            for site, pairs in pairs_of(llama, turn, MLP).items():
                seen[site].append(pairs.features.numpy())
            solved = PLAN.solve(setting_of(llama, state), turn)
            last = pairs_of(llama, turn, MLP)
            write(llama, solved)
    for site in MLP:
        everything, running = np.concatenate(seen[site]), state.running[llama.weight_name(site)]
        assert running.count == len(everything)
        np.testing.assert_allclose(running.mean, everything.mean(0), rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(running.scatter / running.count, everything.var(0), rtol=1e-9, atol=1e-18)
        want = numpy_update(last[site], everything, PLAN.lr, PLAN.ridge)
        np.testing.assert_allclose(dense(solved)[llama.weight_name(site)].numpy(), want, atol=1e-9, rtol=1e-7)


def test_merging_in_any_pieces_is_exact():
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    whole = Running.of(rows)
    for cuts in ([1, 49], [20, 30], [7, 1, 40, 2]):
        first, *rest = (Running.of(piece) for piece in rows.split(cuts))
        for piece in rest:
            first = first.merged(piece)
        assert first.count == 50
        torch.testing.assert_close(first.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(first.scatter, whole.scatter, rtol=1e-9, atol=0)


def test_a_number_that_never_varies_is_normalised_to_zero():
    rows = torch.tensor([[1 / 3, 1.0], [1 / 3, 3.0], [1 / 3, 2.0]], dtype=torch.float64)
    assert Running.of(rows).normalised(rows).tolist() == [[0, pytest.approx(-1)], [0, pytest.approx(1)], [0, 0]]


def test_later_edits_of_a_session_see_the_earlier_ones_and_sessions_never_meet(llama):
    state = EditHistory()
    with llama.restored(MLP):
        start = log_probs(llama)
        write(llama, PLAN.solve(setting_of(llama, state), FACTS[:3]))
        first = dict(state.running)
        alone = dense(PLAN.solve(setting_of(llama), FACTS[3:]))
        assert state.running == first, "another session's solve reached this one's state"
        second = PLAN.solve(setting_of(llama, state), FACTS[3:])
        assert all(state.running[n].count > first[n].count for n in first)
        assert any(float((alone[n] - d).norm() / d.norm()) > 0.01 for n, d in dense(second).items())
        write(llama, second)
        assert (log_probs(llama) > start).all()


def test_what_memory_cannot_hold_is_refused_before_any_forward(llama, monkeypatch):
    def refuses(needed, what, advice):
        tokens = sum(len(row_of(llama, fact)[1]) for fact in FACTS)
        assert f"{tokens} answer tokens at 3 weights" in what
        assert needed > 4 * 3 * tokens * (32 + 48)
        raise WorkFailed(f"{what}; {advice}")

    monkeypatch.setattr(lifelong, "require_memory", refuses)
    monkeypatch.setattr(lifelong, "answer_pairs", lambda *_: pytest.fail("a forward was run"))
    PLAN.require_room(llama)
    with pytest.raises(WorkFailed, match="fewer requests"):
        PLAN.solve(setting_of(llama), FACTS)


@pytest.mark.parametrize("before", [[], FACTS[:3]], ids=["first", "second"])
def test_an_edit_that_fails_has_not_been_seen(llama, monkeypatch, before):
    state, fingerprint = EditHistory(), llama.fingerprint()
    if before:
        PLAN.solve(setting_of(llama, state), before)
    kept, calls = dict(state.running), []

    def breaks_at_the_last(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise WorkFailed("broken")
        return ridge_fit(*arguments)

    monkeypatch.setattr(lifelong, "ridge_fit", breaks_at_the_last)
    with pytest.raises(WorkFailed, match="broken"):
        PLAN.solve(setting_of(llama, state), FACTS[3:])
    assert len(calls) == 3 and list(state.running) == list(kept)
    assert all(state.running[name] is kept[name] for name in kept)
    assert llama.fingerprint() == fingerprint


def test_modules_of_one_shape_can_share_a_normaliser(llama):
    state = EditHistory()
    plan = UltraEdit((0, 1), (Kind.ATTN, Kind.MLP), lr=0.01, shared=True)
    solved = plan.solve(setting_of(llama, state), FACTS)
    pairs = pairs_of(llama, FACTS, plan.sites(llama))
    for kind, group in ((Kind.MLP, "32x48"), (Kind.ATTN, "32x32")):
        sites = [Site(kind, layer) for layer in (0, 1)]
        both = np.concatenate([pairs[site].features.numpy() for site in sites])
        np.testing.assert_allclose(state.running[group].mean, both.mean(0), rtol=1e-10, atol=1e-13)
        for site in sites:
            want = numpy_update(pairs[site], both, 0.01, 1.0)
            np.testing.assert_allclose(dense(solved)[llama.weight_name(site)].numpy(), want, atol=1e-9, rtol=1e-7)
    assert set(state.running) == {"32x48", "32x32"}


def test_half_precision_model_is_solved_in_float64(llama):
    half = kt.load(tiny_model("llama").module.to(torch.bfloat16), tokenizer=llama.tokenizer)
    before, state = half.fingerprint(), EditHistory()
    solved = PLAN.solve(setting_of(half, state), FACTS)
    assert half.fingerprint() == before
    assert all(u.dtype == torch.float64 for u in dense(solved).values())
    assert all(r.mean.dtype == r.scatter.dtype == torch.float64 for r in state.running.values())
    assert (gains(half, solved) > 0).all()
    assert_same(dense(solved), dense(PLAN.solve(setting_of(llama), FACTS)), 0.2)


def test_double_precision_model_keeps_its_precision(llama):
    double = kt.load(tiny_model("llama").module.double(), tokenizer=llama.tokenizer)
    pairs = pairs_of(double, FACTS, MLP)
    assert all(p.keys.dtype == p.gradients.dtype == torch.float64 for p in pairs.values())


def test_one_pair_says_so_in_a_line_and_is_not_seen(llama, monkeypatch):
    state = EditHistory()
    monkeypatch.setattr(lifelong, "wanted_ids", lambda *_: (7,))
    with (
        pytest.warns(UserWarning, match="one request alone"),
        pytest.raises(WorkFailed, match="several requ") as caught,
    ):
        PLAN.solve(setting_of(llama, state), FACTS[:1])
    assert "\n" not in str(caught.value) and not state.running
    PLAN.solve(setting_of(llama, state), FACTS[:2])
    assert all(w.update.norm() > 0 for w in PLAN.solve(setting_of(llama, state), FACTS[:1]).written.values())


def test_numbers_that_are_not_finite_and_layers_that_are_not_there_are_refused():
    model, state = tiny_model("gpt2"), EditHistory()
    with pytest.raises(UnknownSite, match="layers 0 to 2"):
        UltraEdit((7,)).solve(setting_of(model, state), FACTS)
    with torch.no_grad():
        model.own(Site(Kind.MLP, 1))[0, 0] = float("nan")
    with pytest.raises(WorkFailed, match="not finite"):
        PLAN.solve(setting_of(model, state), FACTS)
    assert not state.running


def test_the_plan_says_what_it_needs(llama):
    plan = UltraEdit((2, 0, 2), (Kind.MLP, Kind.ATTN))
    assert plan.sites(llama) == [Site(k, layer) for layer in (0, 2) for k in (Kind.ATTN, Kind.MLP)]
    assert plan.names(llama) == [llama.weight_name(s) for s in plan.sites(llama)]
    assert plan.moment_sites == [] and not plan.keeps_keys and not plan.has_targets
    setting = setting_of(llama)
    plan.update_history(setting, FACTS)
    assert not setting.state.running and not setting.state.keys


def test_an_automatic_rate_starts_where_most_tokens_are_certain_to_first_order_and_grows_until_they_are_said(family):
    model = tiny_model(family)
    state = EditHistory()
    auto = UltraEdit((0, 1, 2), ("mlp",), lr="auto", ridge="auto").solve(setting_of(model, state), FACTS)
    (rate,) = {written.chosen["lr"] for written in auto.written.values()}
    given = UltraEdit((0, 1, 2), ("mlp",), lr=rate, ridge="auto").solve(setting_of(model), FACTS)
    assert_same(dense(auto), dense(given), 1e-9)
    falls, losses = [], []
    for fact in FACTS:
        fall = 0
        for site, (keys, gradients) in hooked(model, fact, MLP).items():
            update = auto.written[model.weight_name(site)].update.dense().to(keys)
            fall = fall - ((keys @ update.T) * gradients).sum(1)
        ids, answer = row_of(model, fact)
        logp = model.logits(encode_ids([ids], 0), len(answer))[0].log_softmax(-1)
        losses += (-logp[range(len(answer)), list(answer)]).tolist()
        falls += fall.tolist()
    start = rate * lifelong.automatic_rate(torch.tensor(losses), torch.tensor(falls))
    found, before = [], check_losses(model).perplexity().mean
    for each in (start * 2 ** (k / 2) for k in range(lifelong.RATES)):
        with model.restored(auto.written):
            for name, written in auto.written.items():
                model.write(name, written.update.scaled(each / rate))
            if found and not check_losses(model).perplexity().mean <= lifelong.MOST_HARM * before:
                break
            said, likely = 0, 0.0
            for ids, answer in (row_of(model, fact) for fact in FACTS):
                logp = model.logits(encode_ids([ids], 0), len(answer))[0].log_softmax(-1)
                said += logp.argmax(-1).tolist() == list(answer)
                likely += float(logp[range(len(answer)), list(answer)].sum())
        found.append((said / len(FACTS), likely, each))
        if said / len(FACTS) >= 0.9:
            break
    assert max(found)[2] == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize(("read", "steps"), [((10, 19, 20, 21), 2), ((10, 30), 0), ((10, math.nan), 0)])
def test_an_automatic_rate_grows_no_further_than_where_it_doubles_the_perplexity_of_an_unrelated_text(
    llama, monkeypatch, read, steps
):
    def rate():
        edit = UltraEdit((0, 1, 2), ("mlp",), lr="auto", ridge="auto").solve(setting_of(llama), FACTS)
        return {written.chosen["lr"] for written in edit.written.values()}.pop()

    class Said(NamedTuple):
        is_greedy: bool
        log_prob: float

    count = iter(range(100))  # each rate makes the answers likelier, and none is ever said
    monkeypatch.setattr(lifelong, "target_scores", lambda *_: [Said(False, next(count))] * len(FACTS))
    monkeypatch.setattr(lifelong, "RATES", 1)
    start = rate()
    monkeypatch.setattr(lifelong, "RATES", 6)
    assert math.log2(rate() / start) * 2 == pytest.approx(5)  # the tiny model's perplexity does not change
    texts = iter(read)  # before, and at every rate behind the start
    monkeypatch.setattr(lifelong, "read_text", lambda _: TextReading(next(texts), "a text", 10))
    assert math.log2(rate() / start) * 2 == pytest.approx(steps)
    assert next(texts, None) is None


def test_the_first_order_fall_is_the_same_in_factors_and_dense(llama):
    pairs = pairs_of(llama, FACTS, MLP)[MLP[0]]
    update = Dense(torch.randn(32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    falls = pairs.falls(update)
    low = LowRank(update.matrix, torch.eye(48, dtype=torch.float64))
    torch.testing.assert_close(falls, pairs.falls(low))


def test_the_rate_is_the_smallest_for_nine_tokens_of_ten_within_a_bound():
    rate, losses = lifelong.automatic_rate, torch.full((10,), 6.0)
    falls = torch.tensor([2.0, 3.0] + [4.0] * 8)
    assert rate(losses, falls) == pytest.approx(2)  # 6 / 3: one token of ten is left behind
    assert rate(losses, 2 * falls) == pytest.approx(1)
    stuck = torch.tensor([-1.0, 0.0] + [4.0] * 8)
    assert rate(losses, stuck) == pytest.approx(lifelong.MOST * 6 / 3.1)
    with pytest.raises(WorkFailed, match="give lr a number"):
        rate(losses, -falls)


def test_without_a_preset_it_writes_late_layers_and_traces_nothing(llama, monkeypatch):
    monkeypatch.setattr("kt.editing.resolve.trace_balance", lambda *_: pytest.fail("it was traced"))
    with pytest.warns(UserWarning, match="layers_mlp 1,2 by relative depth"):
        edit = kt.edit(llama, FACTS, method="ultraedit")
    maps = [Site(f"mlp.{role}", layer) for layer in (1, 2) for role in ("gate_proj", "up_proj")]
    assert edit.names == tuple(llama.weight_name(site) for site in maps)
    assert UltraEdit((1,)).sites(tiny_model("gpt2")) == [Site(Kind.MLP, 1)]
    assert set(edit.manifest["chosen"]) == set(edit.names)
    columns = [column.name for column in edit.tables()[1].heads]
    assert {"λ", "x", "lr"} <= set(columns) and "ε" not in columns
