"""NSE against its formula: the most active neurons, several passes, targets from the unedited weights."""

import pytest
import torch
from editing_help import REQUESTS, fast
from one_layer import LAYER, Position, close, delta, fact_values, given, solved
from several_layers import QUIET

import kt
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.passes import Again
from kt.editing.resolve import read_requests
from kt.errors import KtError, NothingToWrite, WorkFailed
from kt.model.sites import Kind, Site

pytestmark = QUIET
WEIGHT = 0.05


def of_neurons(residuals, keys, moment, share):
    scores = keys.abs().sum(1)
    order = scores.sort(descending=True)
    kept = order.indices[: int((order.values.cumsum(0) <= share * scores.sum()).nonzero()[-1]) + 1]
    k = keys[kept]
    want = torch.zeros(residuals.shape[0], len(keys), dtype=torch.float64)
    want[:, kept] = residuals @ k.T @ torch.linalg.inv(WEIGHT * moment[kept][:, kept] + k @ k.T)
    return want, len(kept)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_one_pass_is_the_codes_formula(setting, share):
    edit = solved(setting, "nse", neurons=share, passes=1, mom2_update_weight=WEIGHT)
    parts = given(setting, edit, "hidden.1")
    want, count = of_neurons(parts.residuals, parts.keys, parts.moment, share)
    assert (count == len(parts.keys)) == (share == 1)
    close(delta(setting, edit), want, atol=1e-5, rtol=1e-3)


def test_a_second_pass_writes_what_the_first_one_missed(setting):
    one = solved(setting, "nse", neurons=0.5, passes=1, mom2_update_weight=1.0)
    two = solved(setting, "nse", neurons=0.5, passes=2, mom2_update_weight=1.0)
    model, facts = setting[0], read_requests(setting[0], REQUESTS)

    def missing(edit):
        with edit.applied(model):
            now = fact_values(model, facts, Contexts(), Site(Kind.RESID, LAYER), Position.SUBJECT_LAST)
        return (edit.targets["hidden.1"].T.double() - now).norm(dim=0)

    assert (missing(two) < 0.9 * missing(one)).all()
    (name,) = two.names
    close(two.keys[name], one.keys[name])  # a request's key stands there once


def test_targets_are_searched_for_on_the_weights_from_before_the_session(ready):
    model, moments = ready
    options = fast("nse", layers_mlp=(LAYER,), mom2_update_weight=WEIGHT, statistics=moments)
    with kt.EditSession(model, "nse", **options) as session:
        alone = session.solve(REQUESTS[1:])
        session.edit(REQUESTS[:1])
        after = session.edit(REQUESTS[1:])
    close(after.targets["hidden.1"], alone.targets["hidden.1"])


def test_requests_are_chosen_by_what_they_miss(setting):
    first, now = torch.tensor([4.0, 5.0, 60.0]), torch.tensor([0.3, 0.6, 58.0])
    every = torch.ones(3, dtype=torch.bool)
    assert Again(2, "auto", "auto").chosen(first, first, every) == [0, 1]  # 60 is more than ten times 5
    assert Again(2, "auto", "auto").chosen(now, first, every) == [1]
    assert Again(2, 2.5, 50.0).chosen(first, first, every) == [0, 1]
    assert Again(2, 0.1, 100.0).chosen(now, first, every) == [0, 1, 2]
    with pytest.raises(WorkFailed, match="no residual lies between residual_least 1000000"):
        solved(setting, "nse", residual_least=1e6)
    with pytest.raises(KtError, match="spread blue gives each layer its target"):
        solved(setting, "nse", spread="blue", layers_mlp=(0, 1))


def test_requests_that_the_model_answers_already_do_not_bound_what_the_others_may_miss():
    first, asks = torch.tensor([2e-6, 3e-6, 12.0, 11.0]), torch.tensor([False, False, True, True])
    assert {2, 3} <= set(Again(2, "auto", "auto").chosen(first, first, asks))


def test_a_request_that_misses_too_much_is_named(setting):
    with pytest.warns(UserWarning, match="1 of 2 requests miss residual_most .* left as they are"):
        least, most = sorted(missed_at_first(setting))
        solved(setting, "nse", residual_most=(least + most) / 2)


def missed_at_first(setting):
    edit = solved(setting, "nse", residual_most=1e9)
    model, facts = setting[0], read_requests(setting[0], REQUESTS)
    now = fact_values(model, facts, Contexts(), Site(Kind.RESID, LAYER), Position.SUBJECT_LAST)
    return (edit.targets["hidden.1"].T.double() - now).norm(dim=0).tolist()


def test_what_nas_leaves_alone_stays_as_the_earlier_steps_left_it(ready, monkeypatch):
    model, moments = ready
    options = fast("nse", layers_mlp=(LAYER,), mom2_update_weight=WEIGHT, statistics=moments)
    with kt.EditSession(model, "nse", norm_guard="nas", **options) as session:
        session.edit(REQUESTS[:1])
        monkeypatch.setattr("kt.editing.closed_form.norm_guards.TOO_LONG", 1e-6)
        with pytest.raises(NothingToWrite, match="the norm guard leaves every request as it is"):
            session.edit(REQUESTS[1:])
