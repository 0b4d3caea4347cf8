"""ROME against its formula: the mean key in the direction, the bare prompt's key in the denominator."""

import pytest
import torch
from editing_help import REQUESTS
from one_layer import close, delta, given, solved

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
