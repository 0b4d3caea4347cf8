"""Editing on top of earlier edits: what is taken from the base, and what the earlier ones keep."""

from statistics import mean

import pytest
from editing_help import ATTENTION, REQUESTS, fast, solve
from editing_help import statistics as moments

import kt
from kt.editing.resolve import read_requests
from kt.editing.rounding import readings
from kt.editing.session_on_edits import SessionOnEdits
from kt.errors import KtError

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|alpha of their own)")
NEAR = [{"prompt": "{} was born in", "subject": "Danielle Darrieux", "target_new": "Warsaw"}]


@pytest.fixture(scope="module")
def first(setting):
    return solve(*setting, method="memit", requests=REQUESTS[:1])


def on_top(setting, below, requests=NEAR, method="memit", **changes):
    model, corpus, cache = setting
    asked = fast(method) | {"statistics": moments(model, corpus, cache)} | changes
    stack, facts = kt.EditStack(below), read_requests(model, requests)
    with SessionOnEdits(model, stack, facts, method=method, **asked) as session:
        return session.edit(requests)


def test_earlier_requests_keep_their_probability_better_with_their_keys_held(tmp_path, monkeypatch):
    monkeypatch.setenv("KT_CACHE", str(tmp_path))
    model = kt.load("demo")
    capitals = [fact.as_request() for fact in kt.load_facts("demo") if fact.relation == "capital"]
    old, new = capitals[:4], capitals[4:8]
    asked = {"method": "memit", "max_tokens": 3000, "v_num_grad_steps": 15, "context_templates": ["{}"]}
    first = kt.edit(model, old, **asked)
    alone = mean(r.target_prob[1] for r in first.report)
    kept, told = {}, {}
    for keep in (None, False):
        with SessionOnEdits(model, kt.EditStack([first]), new, keep_history=keep, **asked) as session:
            second = session.solve(new)
        assert second.manifest["past_keys"] == (0 if keep is False else 4)
        with kt.EditStack([first, second]).applied(model):
            kept[keep], told[keep] = (mean(r.target.prob for r in readings(model, facts)) for facts in (old, new))
    # Measured: alone 0.876, under the second edit 0.708, with the keys held 0.862; the second's own 0.887 and 0.884.
    assert kept[None] - kept[False] > 0.5 * (alone - kept[False]) > 0.05, (alone, kept)
    assert told[None] > told[False] - 0.03


def test_the_same_seed_gives_the_same_bytes_and_the_base_is_back(setting, first):
    model = setting[0]
    before = model.fingerprint()
    again = [on_top(setting, [first]).digest for _ in range(2)]
    assert again[0] == again[1] and model.fingerprint() == before
    with (
        pytest.raises(ZeroDivisionError),
        SessionOnEdits(
            model,
            kt.EditStack([first]),
            read_requests(model, NEAR),
            method="memit",
            **fast("memit"),
            statistics=moments(*setting),
        ) as session,
    ):
        session.edit(NEAR)
        1 / 0  # noqa: B018
    assert model.fingerprint() == before


def test_templates_and_second_moments_are_the_bases(setting, first):
    model, corpus, _ = setting
    free = {k: v for k, v in fast("memit").items() if k != "context_templates"}
    asked = {"method": "memit", "corpus": str(corpus.path), "max_tokens": 500, "seed": 3, **free}
    alone = kt.edit(model, NEAR, **asked)
    facts = read_requests(model, NEAR)
    with SessionOnEdits(model, kt.EditStack([first]), facts, **asked) as session:
        second = session.edit(NEAR)
    for name in ("context_templates", "statistics"):
        assert second.manifest[name] == alone.manifest[name]
    assert second.manifest["fingerprints"] != alone.manifest["fingerprints"]


def test_steps_on_top_add_up_to_an_edit_of_what_is_below(setting, first):
    model, corpus, cache = setting
    stack, asked = kt.EditStack([first]), fast() | ATTENTION | {"statistics": moments(model, corpus, cache)}
    requests = [*NEAR, REQUESTS[1]]
    with SessionOnEdits(model, stack, read_requests(model, requests), method="intattn", norm_guard=True, **asked) as s:
        for request in requests:
            s.edit([request])
        after, total = {name: model.weight(name).clone() for name in s.steps[0].names}, s.total()
    assert total.manifest["stands_on"] == [first.digest]
    both = kt.EditStack([first, total])
    assert both.grounds(model) == ["base", "below"] and both.stands_on(2) == [1]
    with both.applied(model):
        assert all((model.weight(name) - weight).abs().max() < 1e-5 for name, weight in after.items())


def test_an_earlier_edit_that_does_not_fit_is_refused_before_any_work(setting, first):
    second = on_top(setting, [first])
    with pytest.raises(KtError, match="fits neither"):
        on_top(setting, [second])


def test_a_method_without_place_for_keys_is_refused_unless_they_are_left_free(setting, first):
    with pytest.raises(KtError, match="rome has no place for earlier edits' keys"):
        on_top(setting, [first], method="rome")
    free = on_top(setting, [first], method="rome", keep_history=False)
    assert free.manifest["past_keys"] == 0 and free.manifest["stands_on"] == [first.digest]


def test_an_earlier_edit_without_keys_is_said_in_one_line(setting):
    tuned = solve(*setting, method="ft", requests=REQUESTS[:1])
    with pytest.warns(UserWarning, match=r"ft .* keeps no keys \(ft has none\)"):
        second = on_top(setting, [tuned])
    assert second.manifest["past_keys"] == 0 and second.manifest["stands_on"] == [tuned.digest]
