"""The three modes, each against its definition."""

from dataclasses import replace

import pytest
import torch
from editing_help import REQUESTS, fast, statistics

import kt
from kt.errors import BadFile, KtError
from kt.evaluation import distributions
from kt.experiments.sequence import Steps, run_edits
from kt.facts.fact import Fact, Prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
ITALY, POLAND = Prompt("The capital of Italy is", "Rome"), Prompt("The capital of Poland is", "Warsaw")
FACTS = [
    r
    | {"id": f"r{i}", "paraphrases": ["They say that {} is"], "neighbourhood": [{"prompt": "The capital of Italy is"}]}
    for i, r in enumerate(REQUESTS)
]
THREE = [*FACTS, FACTS[0] | {"id": "r2", "subject": "Marie Curie", "target_new": "Paris", "target_true": "French"}]

NEAR = [
    Fact("The mother tongue of {}", "Danielle Darrieux", "French", target="Italy", id="a", neighbours=(ITALY,)),
    Fact("The city of the {}", "Space Needle", "Seattle", target="Warsaw", id="b", neighbours=(ITALY, POLAND)),
    Fact("The mother tongue of {}", "Marie Curie", "Polish", target="Paris", id="c", neighbours=(POLAND,)),
]


@pytest.fixture(scope="module")
def ready(setting):
    model, corpus, cache = setting
    return model, dict(method="memit", statistics=statistics(model, corpus, cache), **fast("memit"))


def run(ready, mode, requests=THREE, **more):
    model, settings = ready
    before = model.fingerprint()
    found = run_edits(model, requests, mode, **(settings | more))
    assert model.fingerprint() == before, "the run left a trace in the model"
    return found


def test_batch_is_one_edit_of_all(ready):
    found = run(ready, "batch")
    want = kt.edit(ready[0], THREE, **ready[1])
    assert all(torch.equal(found.edit.delta(n), want.delta(n)) for n in want.names)
    assert len(found.steps.steps) == 1 and found.after.metrics["edit_success_tf_exact"].n == 3


def test_single_edits_each_request_on_the_unedited_model(ready):
    model, settings = ready
    found = run(ready, "single")
    assert found.edit is None and len(found.edits) == 3
    values = {}
    before = kt.evaluate(model, THREE, generate=False)
    for request, edit in zip(THREE, found.edits, strict=True):
        want = kt.edit(model, [request], **settings)
        assert all(torch.equal(edit.delta(n), want.delta(n)) for n in want.names)
        with edit.applied(model):
            own = kt.evaluate(model, [request], before=before, generate=False)
        values |= own.values["target_prob_tf"]
    assert found.after.values["target_prob_tf"] == values
    assert found.after.records == ("r0", "r1", "r2")


def test_sequential_edits_the_model_that_the_step_before_left(ready):
    model, settings = ready
    found = run(ready, "sequential", step_size=2, evaluate="step", keep_history=True, norm_guard=True)
    assert [s.edits for s in found.steps.steps] == [2, 3] and [len(s.requests) for s in found.steps.steps] == [2, 1]
    with kt.EditSession(model, keep_history=True, norm_guard=True, **settings) as session:
        for group in (THREE[:2], THREE[2:]):
            edit = session.edit(group)
        ratios = session.norm_ratios()
    assert all(torch.equal(found.edits[1].delta(n), edit.delta(n)) for n in edit.names)
    assert found.steps.steps[-1].norm_ratios == ratios
    ns = [s.metrics["edit_success_tf_exact"]["n"] for s in found.steps.steps]
    assert ns == [2, 3], "a step is scored on all requests so far"
    with found.edit.applied(model):
        after = kt.evaluate(model, THREE, generate=False)
    for record, value in after.values["target_prob_tf"].items():
        assert found.after.values["target_prob_tf"][record] == pytest.approx(value, abs=1e-5)


def test_steps_hold_history_and_norms_where_nothing_is_said_and_the_method_can(ready):
    held = run(ready, "sequential", step_size=2, evaluate="none")
    said = run(ready, "sequential", step_size=2, evaluate="none", keep_history=True, norm_guard=True)
    assert all(torch.equal(held.edit.delta(n), said.edit.delta(n)) for n in said.edit.names)
    assert (held.steps.about["keep_history"], held.steps.about["norm_guard"]) == (True, "kt")
    free = run(ready, "sequential", step_size=2, evaluate="none", norm_guard=False).steps.about
    assert (free["keep_history"], free["norm_guard"]) == (False, False)
    whole = run(ready, "sequential", step_size=3, evaluate="none").steps.about
    assert (whole["keep_history"], whole["norm_guard"]) == (False, False), "one step is a batch"
    tuned = run_edits(ready[0], THREE, "sequential", 2, "none", method="ft", **fast("ft")).steps.about
    assert (tuned["keep_history"], tuned["norm_guard"]) == (False, False)


def test_scores_come_when_asked_for(ready):
    nothing = run(ready, "sequential", step_size=2, evaluate="none")
    assert nothing.before is nothing.after is None and all(s.metrics is None for s in nothing.steps.steps)
    end = run(ready, "sequential", step_size=2, evaluate="end")
    assert [s.metrics is None for s in end.steps.steps] == [True, False]


def test_a_joint_edit_is_scored_beside_its_control(ready):
    found = run(ready, "batch", method="intattn", layers_attn=(0,), alpha=0.4)
    with found.edit.control().applied(ready[0]):
        alone = kt.evaluate(ready[0], THREE, generate=False)
    assert found.control.values["target_prob_tf"] == alone.values["target_prob_tf"]
    assert run(ready, "batch").control is None


@pytest.mark.parametrize("mode", ["batch", "single", "sequential"])
def test_kl_is_against_the_unedited_model_in_every_mode(ready, mode):
    """Also after later steps, and of the control: never against the model that the step before left."""
    model, joint = ready[0], {"method": "intattn", "layers_attn": (0,), "alpha": 0.4}
    found = run(ready, mode, NEAR, kl=True, evaluate="step" if mode == "sequential" else "end", **joint)
    reference, before = distributions(model, NEAR), kt.evaluate(model, NEAR, generate=False)

    def asked(part, facts):
        with part.applied(model):
            return kt.evaluate(model, facts, before=before, reference=reference, generate=False)

    want, held = {}, {}
    groups = [NEAR] if found.edit is not None else [[fact] for fact in NEAR]
    for edit, group in zip([found.edit] if found.edit is not None else found.edits, groups, strict=True):
        want |= asked(edit, group).values["neighbourhood_kl"]
        held |= asked(edit.control(), group).values["neighbourhood_kl"]
    assert min(want.values()) > 0 and set(want) == {"a", "b", "c"}
    assert found.after.values["neighbourhood_kl"] == pytest.approx(want, rel=1e-3)
    assert found.control.values["neighbourhood_kl"] == pytest.approx(held, rel=1e-3)
    assert "neighbourhood_kl" not in found.before.metrics, "of the unedited model it would be zero by definition"


def test_kl_stands_in_the_table_and_the_figure_of_the_course(ready):
    facts = [replace(NEAR[0], neighbours=()), *NEAR[1:]]
    steps = run(ready, "sequential", facts, evaluate="step", kl=True).steps
    frame = steps.to_dataframe().query("metric == 'neighbourhood_kl'")
    assert list(frame["edits"]) == [2, 3] and list(frame["n"]) == [1, 2], "the first request has no neighbour"
    drawn = {axis.title.text for axis in steps.figure().select_yaxes()}
    assert "KL of neighbours (nats)" in {str(title).replace("<br>", " ") for title in drawn}
    without = run(ready, "sequential", evaluate="step").steps
    assert not any("KL" in str(axis.title.text) for axis in without.figure().select_yaxes())


def test_kl_that_cannot_be_is_refused_before_any_edit(ready, monkeypatch):
    monkeypatch.setattr("kt.editing.EditSession.edit", lambda *given: pytest.fail("an edit was made"))
    with pytest.raises(KtError, match="kl is a score, and evaluate is none"):
        run(ready, "batch", kl=True, evaluate="none")
    with pytest.raises(KtError, match="no fact has a neighbourhood prompt"):
        run(ready, "batch", [replace(fact, neighbours=()) for fact in NEAR], kl=True)


def test_the_course_is_drawn_tabled_and_kept(ready, tmp_path):
    found = run(ready, "sequential", step_size=1, evaluate="step")
    path = found.save(tmp_path)
    steps = Steps.load(tmp_path / "steps.json")
    assert steps.as_dict() == found.steps.as_dict()
    figure = steps.figure()
    assert {t.name for t in figure.data if t.showlegend is not False} >= {"memit"}
    frame = steps.to_dataframe()
    assert set(frame["step"]) == {1, 2, 3} and frame["metric"].str.startswith("norm ratio").any()
    assert kt.Edit.load(path).names == found.edit.names
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(BadFile, match="expected edit steps"):
        Steps.load(tmp_path / "x.json")
    (tmp_path / "single").mkdir()
    single = run(ready, "single", evaluate="none").save(tmp_path / "single")
    assert sorted(p.name for p in single.iterdir()) == [f"{i:04d}.safetensors" for i in (1, 2, 3)]


def test_contradicting_requests_may_follow_each_other_but_not_stand_together(ready):
    both = [FACTS[0], FACTS[0] | {"id": "again", "target_new": "Spain"}]
    for mode, size in (("batch", 1), ("sequential", 2)):  # one step of two as well
        with pytest.raises(KtError, match="contradict"):
            run(ready, mode, both, step_size=size, strict=True)
        with pytest.warns(UserWarning, match="1 of 2 requests contradict an earlier one and are left out"):
            assert [f.target for f in run(ready, mode, both, step_size=size).requests] == ["Italy"]
    found = run(ready, "sequential", both, step_size=1)
    (first,), (second,) = (edit.report for edit in found.edits)
    assert first.target == "Italy" and second.target == "Spain"
    assert second.target_prob[1] > second.target_prob[0], "the later one is written over the earlier"


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"mode": "twice"}, "mode"), ({"evaluate": "x"}, "evaluate"), ({"step_size": 0}, "step_size")],
)
def test_unknown_choices_are_one_line(ready, changes, words):
    with pytest.raises(KtError, match=words):
        run_edits(ready[0], THREE, **({"mode": "sequential"} | ready[1] | changes))
