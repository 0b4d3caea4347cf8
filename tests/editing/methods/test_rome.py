"""ROME against its formula: the mean key in the direction, the bare prompt's key in the denominator."""

import pytest
import torch
from editing_help import REQUESTS
from one_layer import close, delta, given, solved

import kt

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change)")


@pytest.mark.parametrize("adjusted", [True, False])
def test_the_update_is_the_papers_formula(setting, adjusted):
    edit = solved(setting, "rome", REQUESTS[:1], mom2_adjustment=adjusted)
    parts = given(setting, edit, "mlp.1", requests=REQUESTS[:1])
    direction = torch.linalg.inv(parts.moment) @ parts.keys if adjusted else parts.keys
    want = parts.residuals @ direction.T / (direction.T @ parts.bare)
    close(delta(setting, edit), want, atol=1e-5, rtol=1e-3)


def test_facts_are_solved_one_after_the_other(setting):
    """Each on the model that the facts before it left, so that the sum of lone solves is another update."""
    both = delta(setting, solved(setting, "rome"))
    apart = sum(delta(setting, solved(setting, "rome", [request])) for request in REQUESTS)
    assert float((both - apart).norm() / both.norm()) > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_later_fact_holds_the_keys_of_the_facts_before_it(setting, share):
    """u = (λC + kkᵀ)⁻¹ k̄ with the key k of the fact before, λ = d (1 - s)/s; s = 0 is the paper's u = C⁻¹k̄."""
    both, first = (solved(setting, "rome", requests, held_share=share) for requests in (REQUESTS[:2], REQUESTS[:1]))
    parts = given(setting, both, "mlp.1", requests=REQUESTS[:2])
    before, now = parts.keys[:, :1], parts.keys[:, 1:]
    held = parts.moment if share == 0 else len(before) * (1 - share) / share * parts.moment + before @ before.T
    direction = torch.linalg.solve(held, now)[:, 0]
    second = delta(setting, both) - delta(setting, first)
    across = torch.linalg.svd(second).Vh[0]
    close((across @ direction).abs() / direction.norm(), torch.ones((), dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_later_fact_holds_both_keys_of_a_fact_whose_update_met_both(setting):
    options = dict(held_share=0.999, key_cosine=0.999)
    both, first = (solved(setting, "rome", requests, **options) for requests in (REQUESTS[:2], REQUESTS[:1]))
    parts = given(setting, first, "mlp.1", requests=REQUESTS[:1])
    one, second = delta(setting, first), delta(setting, both) - delta(setting, first)
    for key in (parts.keys, parts.bare):
        close(one @ key, one @ parts.bare, rtol=1e-3, atol=1e-5)
        assert (second @ key).norm() < 0.03 * (one @ key).norm()


@pytest.mark.parametrize("name", ["held_share", "key_cosine"])
def test_a_share_or_a_cosine_of_one_is_refused(setting, name):
    with pytest.raises(kt.KtError, match=f"{name} 1 must lie"):
        solved(setting, "rome", **{name: 1.0})
