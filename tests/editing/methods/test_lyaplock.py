"""LyapLock against its code's formula, over three edits of one layer, with the queue written out."""

import pytest
import torch
from editing_help import REQUESTS, fast
from one_layer import LAYER, Position, close, fact_keys, fact_values
from several_layers import QUIET

import kt
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.factor import Moment
from kt.editing.closed_form.sequential import Restoring
from kt.editing.methods import METHODS
from kt.editing.resolve import read_requests
from kt.errors import KtError
from kt.model.sites import Kind, Site
from kt.model.update import Dense

pytestmark = QUIET
WEIGHT, ALPHA = 0.02, 0.7
THIRD = {"prompt": "The capital of {}", "subject": "Canada", "target_new": "Paris", "target_true": "Ottawa"}


def test_three_edits_are_what_the_formula_gives(ready):
    model, moments = ready
    options = fast("lyaplock", layers_mlp=(LAYER,), mom2_update_weight=WEIGHT, statistics=moments)
    contexts, site = Contexts.of(options["context_templates"]), Site(Kind.MLP, LAYER)
    name = model.weight_name(site)
    moment, original = moments.moment_of(name).matrix(), model.weight(name).double().clone()
    v0k0 = original @ moment
    past_kk, past_vk = torch.zeros_like(moment), torch.zeros_like(original)
    cost = z = a = queues = None
    with kt.EditSession(model, "lyaplock", cost_budget=ALPHA, **options) as session:
        for step, request in enumerate([*REQUESTS, THIRD]):
            facts, before = read_requests(model, [request]), model.weight(name).double().clone()
            keys = fact_keys(model, facts, contexts, site, Position.SUBJECT_LAST)
            now = fact_values(model, facts, Contexts(), Site(Kind.RESID, LAYER), Position.SUBJECT_LAST)
            edit = session.edit([request])
            residual = edit.targets["hidden.1"].T.double() - now
            az = 1.0 if step == 0 else a * z
            left = residual @ keys.T + az * WEIGHT * (v0k0 - before @ moment) + past_vk - before @ past_kk
            want = left @ torch.linalg.inv(keys @ keys.T + az * WEIGHT * moment + past_kk)
            close(edit.delta(name).double(), want, atol=1e-4, rtol=1e-3)
            after = model.weight(name).double()
            drift = float(((after - original) @ moment @ (after - original).T).trace())
            if cost is None:
                cost = drift
                a, z, queues = (ALPHA * cost) ** -0.5, (ALPHA * cost) ** 0.5, []
            z = max(z + a * (drift - ALPHA * cost), (ALPHA * cost) ** 0.5)
            queues.append(a * z)
            written = fact_keys(model, facts, contexts, site, Position.SUBJECT_LAST)
            past_kk, past_vk = past_kk + written @ written.T, past_vk + after @ written @ written.T
    assert queues[-1] > 1.2, "the queue never left its floor"


def test_a_session_without_history_has_no_past_keys_but_takes_changes_back(ready):
    model, moments = ready
    options = fast("lyaplock", layers_mlp=(LAYER,), mom2_update_weight=WEIGHT, statistics=moments, keep_history=False)
    with kt.EditSession(model, "lyaplock", **options) as session:
        first, second = (session.edit([request]) for request in REQUESTS)
    with kt.EditSession(model, "memit", **{k: v for k, v in options.items() if k != "cost_budget"}) as session:
        plain = [session.edit([request]) for request in REQUESTS]
    name = first.names[0]
    close(first.delta(name), plain[0].delta(name))  # the first one is MEMIT's
    assert (second.delta(name) - plain[1].delta(name)).norm() > 1e-2 * plain[1].delta(name).norm()


def test_a_first_edit_that_changes_nothing_is_not_what_later_ones_are_weighed_by():
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random).double()  # noqa: E731
    root, weight = draw(6, 30), draw(4, 6)
    moment, solver = Moment.of(root @ root.T), Restoring(budget=2.0)
    nothing, real = Dense(1e-9 * draw(4, 6)), Dense(draw(4, 6))
    first = solver.remembered(None, None, moment, weight)
    idle = solver.remembered(first, nothing, moment, weight)
    zero = solver.remembered(idle, Dense(torch.zeros(4, 6).double()), moment, weight)
    assert first == idle == zero == {"queue": 1.0}
    assert solver.remembered(zero, real, moment, weight) == solver.remembered(first, real, moment, weight)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(KtError, match="cost_budget 0 must be above zero"):
        METHODS["lyaplock"].of(dict(cost_budget=0, layers_mlp=(1,))).plan()
