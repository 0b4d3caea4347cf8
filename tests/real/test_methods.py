"""Every closed form with no setting given: ten edits that take, and text that stays, on both models."""

import logging

import pytest
from real_help import first_probability, perplexity

import kt
from kt.editing import METHODS, key_statistics
from kt.editing.resolve import layers_by_depth
from kt.model.sites import Kind, Site

pytestmark = pytest.mark.real

CLOSED_FORMS = ("memit", "intattn", "rome", "r-rome", "intattn-rome", "pmet", "alphaedit", "emmet", "jeep")
MODELS = ("smollm2", "gemma3")
SHORT = ("smollm2", "jeep")
"""The pair that every commit can afford."""


def marks(entry):
    return [pytest.mark.real_ci] * (entry == SHORT)


ENTRIES = [pytest.param(model, method, marks=marks((model, method))) for model in MODELS for method in CLOSED_FORMS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of second moments: several methods write the same layers."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("name", "method"), ENTRIES)
def test_ten_edits_take_and_leave_the_text_as_it_was(name, method, request, facts, cache):
    model, chosen = request.getfixturevalue(name), METHODS[method]
    requests = [fact for fact in facts if first_probability(model, fact.prompt, fact.answer)[1]][:10]
    layers = {field: layers_by_depth(model, field) for field in chosen.settings() if field.startswith("layers")}
    share = {"alpha": 0.3} if chosen.writes_attention else {}
    sites = [Site(Kind.ATTN if field == "layers_attn" else Kind.MLP, i) for field, own in layers.items() for i in own]
    statistics = key_statistics(model, sites, cache_dir=cache)
    edit = kt.edit(model, requests, method=method, statistics=statistics, **layers, **share)
    before = perplexity(model)
    with edit.applied(model):
        after = perplexity(model)
    taken = sum(report.target_rank[1] == 0 for report in edit.report)
    logging.info("%s on %s: %d of 10, perplexity x %.3f", method, name, taken, after / before)
    assert len(requests) == 10 and taken >= 9
    assert after / before == pytest.approx(1, abs=0.05)
