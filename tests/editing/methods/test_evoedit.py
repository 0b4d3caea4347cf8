"""EvoEdit against its formula, the projector updated edit by edit."""

import pytest
import torch
from editing_help import REQUESTS, fast
from one_layer import LAYER, Position, close, fact_keys, fact_values
from several_layers import QUIET

import kt
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.factor import Moment
from kt.editing.closed_form.sequential import Evolving
from kt.editing.closed_form.solvers import System
from kt.editing.resolve import read_requests
from kt.errors import WorkFailed
from kt.model.sites import Kind, Site

pytestmark = QUIET


def test_each_edit_leaves_the_keys_of_the_ones_before_exactly_alone(ready):
    model, moments = ready
    options = fast("evoedit", layers_mlp=(LAYER,), nullspace_threshold=0.02, L2=0.1, statistics=moments)
    contexts, site = Contexts.of(options["context_templates"]), Site(Kind.MLP, LAYER)
    name = model.weight_name(site)
    values, vectors = torch.linalg.eigh(moments.moment_of(name).matrix())
    projector = vectors[:, values < 0.02] @ vectors[:, values < 0.02].T
    eye, earlier = torch.eye(len(projector), dtype=torch.float64), []
    with kt.EditSession(model, "evoedit", **options) as session:
        for request in REQUESTS:
            facts = read_requests(model, [request])
            keys = fact_keys(model, facts, contexts, site, Position.SUBJECT_LAST)
            now = fact_values(model, facts, Contexts(), Site(Kind.RESID, LAYER), Position.SUBJECT_LAST)
            edit = session.edit([request])
            residual = edit.targets["hidden.1"].T.double() - now
            want = residual @ keys.T @ projector @ torch.linalg.inv(keys @ keys.T @ projector + 0.1 * eye)
            close(edit.delta(name).double(), want, atol=1e-5, rtol=1e-3)
            if earlier:
                held = fact_keys(model, earlier, contexts, site, Position.SUBJECT_LAST)
                change = edit.delta(name).double()
                assert (change @ held).norm() < 1e-5 * change.norm() * held.norm()
            earlier = facts
            unit = projector @ keys / (projector @ keys).norm()
            projector = projector - unit @ unit.T


def test_a_null_space_that_is_full_is_one_line():
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random).double()  # noqa: E731
    moment = draw(6, 30)
    system = System(draw(4, 1), draw(6, 1), moment=Moment.of(moment @ moment.T), past=draw(6, 6))
    with pytest.raises(WorkFailed, match="span all 4 directions"):
        Evolving("auto", 0.1)(system)
