"""EAMET: its terms against their formulas, and changes that lie to each other as their keys do."""

import pytest
import torch
from editing_help import REQUESTS
from one_layer import close, given, solved
from several_layers import QUIET

import kt
from kt.editing.closed_form.objective import Alignment, SearchStep
from kt.model.sites import Site

pytestmark = QUIET
TAU = 0.07


def test_the_terms_are_the_codes_formulas():
    random = torch.Generator().manual_seed(0)
    keys, deltas = (torch.randn(*shape, generator=random).double() for shape in ((5, 61), (60, 7)))
    delta = torch.randn(1, 7, generator=random).double()
    aim = kt.editing.closed_form.TargetSite(Site("hidden", 1))
    step = SearchStep(*(torch.zeros(1, 1),) * 6, {aim: delta}, {aim: delta})
    got = Alignment(2.0, 3.0, TAU).term(keys, deltas).loss(step)
    s = torch.stack([torch.cosine_similarity(keys[:, 60], keys[:, i], 0) for i in range(60)])
    r = torch.stack([torch.cosine_similarity(delta[0], each, 0) for each in deltas])
    p, q = torch.exp(s / TAU) / torch.exp(s / TAU).sum(), torch.exp(r / TAU) / torch.exp(r / TAU).sum()
    divergence = (p * ((p + 1e-8) / (q + 1e-8)).log()).sum()
    near = s.sort(descending=True).indices[:50]
    weight = torch.exp(s[near] / TAU) / torch.exp(s[near] / TAU).sum()
    close(got[0], 2.0 * divergence + 3.0 * (weight * (s[near] - r[near]) ** 2).sum())


def test_no_change_and_no_earlier_request_ask_for_nothing():
    aim = kt.editing.closed_form.TargetSite(Site("hidden", 1))
    none = SearchStep(*(torch.zeros(1, 1),) * 6, {aim: torch.zeros(1, 7)}, {aim: torch.ones(1, 7)})
    assert Alignment().term(torch.randn(5, 3), torch.randn(2, 7)).loss(none) is None
    some = none._replace(delta={aim: torch.ones(1, 7)})
    assert Alignment().term(torch.randn(5, 1), torch.zeros(0, 7)).loss(some) is None


@pytest.mark.filterwarnings("ignore:.*changed too much")
def test_changes_lie_to_each_other_as_their_keys_do(setting):
    def apart(**factors):
        edit = solved(setting, "eamet", v_num_grad_steps=25, requests=REQUESTS, **factors)
        parts = given(setting, edit, "hidden.1")
        between = [torch.cosine_similarity(each[:, 0], each[:, 1], 0) for each in (parts.keys, parts.residuals)]
        return float((between[0] - between[1]).abs())

    free, held = apart(cs_factor=0.0, mse_factor=0.0), apart(mse_factor=50.0)
    assert held < 0.1 and held < free / 2, (held, free)
