"""Figures of traces and balances: one fact by token, several by role, without counting a single fact as a mean."""

import numpy as np
import pytest
from tracing_help import FACTS, KINDS

import kt
from kt.tracing.show import grid

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


def test_text_from_the_model_is_escaped(traces):
    html = kt.Trace(traces[0].facts, traces[0].kinds, (), dict(traces[0].metadata) | {"model": "<b>"})._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;" in html
