"""NAS beside kt's own norm guard; the own one is in tests/editing/test_session.py."""

import pytest
import torch
from editing_help import REQUESTS, fast, statistics
from families import tiny_model

import kt
from kt.editing.closed_form.aims import Position
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.keys import fact_values
from kt.editing.closed_form.norm_guards import anchor_of
from kt.editing.closed_form.post_norm import added
from kt.editing.resolve import read_requests
from kt.errors import KtError
from kt.model.sites import Kind, Site

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(targets stay below|all but singular|too much|NAS's anchor|of the wan)"
)
SAMPLE = [
    {"prompt": "The capital of {} is", "subject": "Italy", "target_new": "Seattle"},
    {"prompt": "{} was born in", "subject": "Marie Curie", "target_new": "Rome"},
    {"prompt": "{} plays the sport of", "subject": "Megan Rapinoe", "target_new": "Paris"},
]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def ready(request, corpus, tmp_path_factory):
    model = tiny_model(request.param)
    return model, statistics(model, corpus, tmp_path_factory.mktemp("cache"))


def solved_value(model, edit, requests, aim="hidden.1"):
    """v* = v0 + δ of each request, float64, from what a search found: the stream's wanted value, less what of it the
    MLP did not make."""
    facts, last = read_requests(model, requests), Position.SUBJECT_LAST
    stream = fact_values(model, facts, Contexts(), Site.parse(aim), last).T
    made = added(model, Site(Kind.MLP, 1), fact_values(model, facts, Contexts(), Site(Kind.MLP, 1), last)).T
    return edit.targets[aim].double() - stream + made, stream, made


def solve(ready, requests, **changes):
    return kt.edit(ready[0], requests, method="memit", statistics=ready[1], **fast("memit", **changes))


def test_nas_gives_a_solved_value_the_mean_norm_of_a_samples(ready):
    model = ready[0]
    anchor = solved_value(model, solve(ready, SAMPLE), SAMPLE)[0].norm(dim=1).mean()
    free, stream, made = solved_value(model, solve(ready, REQUESTS), REQUESTS)
    edit = solve(ready, REQUESTS, norm_guard="nas", norm_facts=SAMPLE)
    assert edit.manifest["norm_guard"] == "nas"
    assert edit.manifest["norm_anchors"] == {"hidden.1": pytest.approx(float(anchor), rel=1e-4)}
    scaled = stream - made + free * (anchor / free.norm(dim=1, keepdim=True))
    torch.testing.assert_close(edit.targets["hidden.1"].double(), scaled, atol=1e-3, rtol=1e-3)


def test_nas_leaves_a_request_alone_whose_value_is_longer_than_two_anchors(ready, monkeypatch):
    model = ready[0]
    monkeypatch.setattr("kt.editing.closed_form.norm_guards.anchor_of", lambda norms: float(norms.min()) / 3)
    with pytest.warns(UserWarning, match="NAS leaves 2 of 2 requests as they are"):
        edit = solve(ready, REQUESTS, norm_guard="nas", norm_facts=SAMPLE)
    assert edit.manifest["skipped"] == [r["subject"] for r in REQUESTS]
    stream = fact_values(
        model, read_requests(model, REQUESTS), Contexts(), Site.parse("hidden.1"), Position.SUBJECT_LAST
    )
    torch.testing.assert_close(edit.targets["hidden.1"].double(), stream.T, atol=1e-4, rtol=1e-4)


def test_the_longest_twentieth_is_no_part_of_the_anchor():
    norms = torch.tensor([1.0] * 38 + [50.0, 90.0])
    assert anchor_of(norms) == 1 and anchor_of(norms[-19:]) == pytest.approx((17 + 140) / 19)


def test_a_session_takes_its_anchor_once_from_the_unedited_model(ready):
    model = ready[0]
    known = solve(ready, REQUESTS, norm_guard="nas", norm_facts=SAMPLE).manifest["norm_anchors"]
    with kt.EditSession(
        model, "memit", statistics=ready[1], norm_guard="nas", requests=SAMPLE_FACTS, **fast("memit")
    ) as session:
        for request in REQUESTS:
            session.edit([request])
        assert session.steps[1].manifest["norm_anchors"] == known
        assert session.total().manifest["norm_anchors"] == known


SAMPLE_FACTS = [kt.Fact(s["prompt"], s["subject"], target=s["target_new"]) for s in SAMPLE]


def test_the_own_guard_has_one_name_and_its_older_one(ready):
    found = [solve(ready, REQUESTS, norm_guard=name) for name in ("kt", "own", True)]
    assert {edit.manifest["norm_guard"] for edit in found} == {"kt"}
    for edit in found[1:]:
        assert all(torch.equal(edit.delta(name), found[0].delta(name)) for name in found[0].names)


def test_a_guard_that_there_is_not_is_one_line(ready):
    with pytest.raises(KtError, match=r"norm_guard 'nsa' is unknown; did you mean nas\?"):
        solve(ready, REQUESTS, norm_guard="nsa")
    with pytest.raises(KtError, match="norm_facts are those that NAS's anchor"):
        solve(ready, REQUESTS, norm_guard=True, norm_facts=SAMPLE)
