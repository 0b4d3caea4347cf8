"""PMET: two values searched for together, the MLP's written; its discounted likelihood."""

import pytest
import torch
from one_layer import close, delta, given, least_squares, solved

from kt.editing.closed_form.objective import KL, DiscountedNLL, SearchStep, StopAtArgmax
from kt.editing.methods.pmet import PMET
from kt.model.sites import Kind

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change)")


def test_the_mlps_update_is_memits_formula_for_the_mlps_own_value(setting):
    edit = solved(setting, "pmet", mom2_update_weight=0.05, searched="published")
    assert set(edit.targets) == {"mlp.1", "attn.1"} and len(edit.names) == 1
    close(delta(setting, edit), least_squares(given(setting, edit, "mlp.1"), 0.05), atol=1e-5, rtol=1e-4)


def test_both_modules_can_be_written(setting):
    edit = solved(setting, "pmet", modules="both", mom2_update_weight=0.05)
    for kind in (Kind.MLP, Kind.ATTN):
        parts = given(setting, edit, f"{kind}.1", kind)
        close(delta(setting, edit, kind), least_squares(parts, 0.05), atol=1e-5, rtol=1e-4)


def test_by_default_only_what_is_written_is_searched_for(setting):
    edit = solved(setting, "pmet", mom2_update_weight=0.05)
    assert set(edit.targets) == {"mlp.1"}
    close(delta(setting, edit), least_squares(given(setting, edit, "mlp.1"), 0.05), atol=1e-5, rtol=1e-4)


def test_a_request_whose_target_was_the_likeliest_counts_a_tenth():
    nll, no = torch.tensor([[1.0, 3.0], [2.0, 4.0]]), torch.tensor([False, False])
    step = SearchStep(nll, None, None, no, torch.tensor([True, False]), no.long(), {}, {})
    assert DiscountedNLL().loss(step).tolist() == pytest.approx([0.2, 3.0])


def test_a_search_ends_at_the_argmax_only_while_the_weighted_kl_is_small():
    before, now = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    yes, nll = torch.tensor([True]), torch.zeros(1, 1)
    kl = float((now.exp() * (now - before)).sum())
    step = SearchStep(nll, now, before, yes, yes, yes.long(), {}, {})
    assert float(KL(0.5).loss(step)) == pytest.approx(0.5 * kl)
    for factor, ends in ((0.009 / kl, True), (0.011 / kl, False)):
        assert bool(StopAtArgmax(factor).done(step, nll[:, 0])) == ends


def test_its_own_defaults_come_before_a_presets_shared_values():
    assert PMET.own_defaults() == {"spread": "sqrt", "v_weight_decay": 0.5}
