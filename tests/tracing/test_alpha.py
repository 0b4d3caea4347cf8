"""Eq. 12 on numbers made by hand: signs, clamping, intervals, proposed layers."""

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


def test_a_trace_of_one_module_has_no_balance():
    trace = hand_made({"attn": [0.3], "mlp": [0.2]})
    with pytest.raises(BadFact, match="not mlp"):
        kt.balance_factor(Trace(trace.facts, (Kind.ATTN,), (), trace.metadata))
