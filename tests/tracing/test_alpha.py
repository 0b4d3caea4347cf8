"""Eq. 12 on numbers made by hand: signs, clamping, intervals, proposed layers."""

from dataclasses import replace

import numpy as np
import pytest

import kt
from kt.errors import BadFact, BadFile, WorkFailed
from kt.model.sites import Kind
from kt.model.tokens import Span
from kt.tracing import Trace, TracedFact
from kt.tracing.alpha import critical_layers


def hand_made(*facts: dict[str, list[float]]) -> Trace:
    """Facts of three tokens (subject, subject, last) whose LD by layer at the last subject token is given."""
    traced = []
    for i, effects in enumerate(facts):
        patched = {}
        for kind in (Kind.ATTN, Kind.MLP):
            cells = np.full((len(effects["mlp"]), 3, 2), 4.0)  # other tokens must not count
            cells[:, 1] = 10 * np.asarray(effects[str(kind)])[:, None]
            patched[kind] = {"prob": cells / 100, "logit_diff": cells}
        traced.append(
            TracedFact(
                index=i, id=f"{i}", relation="", prompt=f"p{i}", subject="s", ids=(1, 2, 3), tokens=("a", "b", "c"),
                span=Span(0, 2), roles=("subject_first", "subject_last", "last"), answer="x", answer_id=4,
                answer_source="given", foil="y", foil_id=5, foil_source="given", known=True, swapped_for=None,
                clean={"prob": 1.0, "logit_diff": 10.0},
                corrupted={"prob": np.zeros(2), "logit_diff": np.zeros(2)},
                patched=patched,
            )
        )  # fmt: skip
    run = {"model": "m", "window": 1, "corrupt": "noise", "samples": [2], "seed": 0, "keep": "known"}
    return Trace(tuple(traced), (Kind.ATTN, Kind.MLP), (), run | {"n_layers": len(facts[0]["mlp"])})


def test_alpha_is_a_ratio_of_sums_of_means():
    trace = hand_made({"attn": [0.3, 0.1], "mlp": [0.2, 0.4]}, {"attn": [0.0, 0.0], "mlp": [0.1, 0.1]})
    balance = kt.balance_factor(trace)
    assert balance.alpha == pytest.approx(0.4 / (0.4 + 0.8)) and balance.alpha_raw == pytest.approx(balance.alpha)
    assert balance.per_layer["attn"] == pytest.approx((0.15, 0.05))
    assert balance.per_layer["mlp"] == pytest.approx((0.15, 0.25))
    assert [f.alpha for f in balance.per_fact] == [pytest.approx(0.4), 0.0]
    assert balance.ci95 is not None and balance.ci95[0] <= balance.alpha <= balance.ci95[1]
    assert balance.warnings == ("the interval rests on 2 facts only",) and balance.n_facts == 2


def test_a_negative_sum_counts_as_none_and_is_said():
    balance = kt.balance_factor(hand_made({"attn": [-0.2, 0.1], "mlp": [0.2, 0.2]}))
    assert balance.alpha == 0 and balance.alpha_raw == pytest.approx(-0.1 / 0.3)
    assert balance.ci95 is None
    assert "attention layers sum to -0.100" in balance.warnings[0] and "outside [0, 1]" in balance.warnings[1]
    other = kt.balance_factor(hand_made({"attn": [0.4, 0.0], "mlp": [-0.1, 0.0]}))
    assert other.alpha == 1 and other.alpha_raw == pytest.approx(0.4 / 0.3)


def test_without_any_effect_there_is_no_alpha():
    with pytest.raises(WorkFailed, match="set alpha by hand"):
        kt.balance_factor(hand_made({"attn": [-0.1], "mlp": [-0.1]}))


def test_the_interval_covers_what_resampling_gives():
    rng = np.random.default_rng(1)
    facts = [{"attn": [float(a)], "mlp": [float(m)]} for a, m in rng.uniform(0.1, 1, (40, 2))]
    balance = kt.balance_factor(hand_made(*facts))
    assert balance.ci95 is not None
    low, high = balance.ci95
    assert 0.02 < high - low < 0.2 and low < balance.alpha < high and not balance.warnings
    assert kt.balance_factor(hand_made(*facts)).ci95 == (low, high)


def test_critical_layers_follow_the_written_rule():
    assert critical_layers([0.5, 0.1, 0.1, 0.1, 0.0, 0.0]) == (0,), "one layer has half"
    assert critical_layers([0.1, 0.2, 0.3, 0.2, 0.1, 0.1, 0.0, 0.0, 0.0]) == (1, 2), "a tie goes to the lower layer"
    assert critical_layers([0.1, 0.2, 0.3, 0.25, 0.1, 0.1, 0.0, 0.0, 0.0]) == (2, 3)
    assert critical_layers([0.1] * 6) == (0, 1), "at most a third of the layers"
    assert critical_layers([-0.5, 0.0, 0.2, -0.3, 0.0, 0.0]) == (2,), "negative effects do not count"
    assert critical_layers([-0.1, -0.2, -0.3]) == ()
    assert critical_layers([0.0, 0.0, 0.0, 0.0, 0.1, 0.2]) == (5,)


def test_balances_save_and_load(tmp_path):
    balance = kt.balance_factor(
        hand_made({"attn": [0.3, -0.4], "mlp": [0.2, 0.4]}, {"attn": [0.2, 0.1], "mlp": [0.1, 0.1]})
    )
    path = balance.save(tmp_path / "balance.json")
    assert kt.Balance.load(path) == balance
    table = balance.to_dataframe()
    assert list(table["fact"]) == [0, 1] and table["alpha_raw"][1] == pytest.approx(0.6)
    path.write_text("{}")
    with pytest.raises(BadFile, match="expected a balance"):
        kt.Balance.load(path)


def drawn(n, low, high):
    rng = np.random.default_rng(1)
    return [{"attn": [float(a), 0.0], "mlp": [0.0, float(m)]} for a, m in rng.uniform(low, high, (n, 2))]


def test_an_alpha_that_the_facts_do_not_determine_is_no_setting():
    clear, few, wide = (kt.balance_factor(hand_made(*drawn(*how))) for how in ((40, 0.1, 1), (9, 0.1, 1), (12, -1, 1)))
    assert clear.setting == (clear.alpha, clear.ci95, "eq. 12")
    assert clear.stable_layers == {"attn": (0,), "mlp": (1,)} and clear.layer_shares["mlp"] == (0.0, 1.0)
    for balance in (few, wide):
        assert balance.setting is None and balance.as_dict()["setting"] is None
        assert "α is undetermined" in " ".join(balance.notes()) and "undetermined" in str(balance.tables()[0].rows)
    assert few.stable_layers == {"attn": (), "mlp": ()} and "kt layers" in " ".join(few.notes())
    assert wide.ci95[1] - wide.ci95[0] > 0.5


def test_facts_whose_own_alpha_says_nothing_are_counted():
    still, mixed, plain = {"attn": [0.01], "mlp": [0.02]}, {"attn": [-0.3], "mlp": [0.4]}, {"attn": [0.3], "mlp": [0.4]}
    balance = kt.balance_factor(hand_made(still, mixed, plain))
    assert balance.unsteady == 2 and "2 of 3 facts" in " ".join(balance.notes())


def test_the_pooled_alpha_counts_each_fact_by_its_gap():
    trace = hand_made({"attn": [0.3], "mlp": [0.1]}, {"attn": [0.1], "mlp": [0.5]})
    wide, narrow = trace.facts
    corrupted = {"prob": np.zeros(2), "logit_diff": np.full(2, 8.0)}  # a gap of 2 beside one of 10
    patched = {k: {"prob": v["prob"], "logit_diff": 8 + v["logit_diff"] / 5} for k, v in narrow.patched.items()}
    trace = replace(trace, facts=(wide, replace(narrow, corrupted=corrupted, patched=patched)))
    balance = kt.balance_factor(trace)
    assert balance.alpha == pytest.approx(0.4 / 1.0), "eq. 12: eq. 8 divides by each fact's gap first"
    assert balance.pooled == pytest.approx((0.3 * 10 + 0.1 * 2) / (0.4 * 10 + 0.6 * 2))
    assert kt.balance_factor(trace, "prob").pooled == pytest.approx(kt.balance_factor(trace, "prob").alpha)


def test_a_trace_of_one_module_has_no_balance():
    trace = hand_made({"attn": [0.3], "mlp": [0.2]})
    with pytest.raises(BadFact, match="not mlp"):
        kt.balance_factor(Trace(trace.facts, (Kind.ATTN,), (), trace.metadata))
