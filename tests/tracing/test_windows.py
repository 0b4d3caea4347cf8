"""Peaks with a window beside single layers."""

from dataclasses import replace

import numpy as np
import pytest

import kt
from kt.tracing.windows import peak_inflation


@pytest.fixture(scope="module")
def traces():
    from families import tiny_model
    from tracing_help import FACTS

    return [
        kt.causal_trace(tiny_model("gpt2"), FACTS, kinds=("mlp", "hidden"), keep="all", samples=2, window=window)
        for window in (1, 3)
    ]


pytestmark = pytest.mark.filterwarnings("ignore:traced all the same")


def test_the_inflation_is_the_ratio_of_the_two_peaks(traces):
    single, wide = traces
    for found in peak_inflation(wide, single):
        low, high = single.curve(found.kind).mean, wide.curve(found.kind).mean
        assert found.layer == high.argmax() and found.single_layer == low.argmax()
        assert found.peak.mean == pytest.approx(high.max()) and found.single_peak.mean == pytest.approx(low.max())
        if low.max() > 0:
            assert found.inflation.mean == pytest.approx(high.max() / low.max()) and found.inflation.n == 3
        else:
            assert np.isnan(found.inflation.mean), "a ratio over nothing"
    assert peak_inflation(wide, single)[0].inflation.mean > 1


def test_the_sum_is_over_the_layers_inside_the_window(traces):
    single, wide = traces
    (mlp, _) = peak_inflation(wide, single)
    inside = {0: slice(0, 2), 1: slice(0, 3), 2: slice(1, 3)}[mlp.layer]
    assert mlp.sum_of_single.mean == pytest.approx(single.curve("mlp").mean[inside].sum())


def test_only_facts_of_both_traces_count(traces):
    single, wide = traces
    fewer = replace(single, facts=single.facts[:2])
    assert peak_inflation(wide, fewer)[0].inflation.n == 2
    with pytest.raises(kt.KtError, match="share no fact"):
        peak_inflation(wide, replace(single, facts=()))


@pytest.mark.parametrize(("name", "value"), [("window", 2), ("seed", 7), ("direction", "noise")])
def test_traces_that_differ_otherwise_are_refused(traces, name, value):
    single, wide = traces
    with pytest.raises(kt.KtError, match=name):
        peak_inflation(wide, replace(single, metadata={**single.metadata, name: value}))
