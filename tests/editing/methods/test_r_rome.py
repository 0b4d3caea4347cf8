"""R-ROME against its formula: the mean key on both sides, the value now a mean over contexts."""

import pytest
import torch
from editing_help import REQUESTS
from one_layer import close, delta, given, solved

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change)")


def test_the_update_is_the_papers_formula_and_romes_is_another(setting):
    edit = solved(setting, "r-rome", REQUESTS[:1])
    parts = given(setting, edit, "mlp.1", requests=REQUESTS[:1], mean_value=True)
    direction = torch.linalg.inv(parts.moment) @ parts.keys
    want = parts.residuals @ direction.T / (direction.T @ parts.keys)
    close(delta(setting, edit), want, atol=1e-5, rtol=1e-3)
    rome = delta(setting, solved(setting, "rome", REQUESTS[:1]))
    assert float((rome - want).norm() / want.norm()) > 1e-2
