"""EMMET against its formula: the values exactly, or with the ridge of its code."""

import pytest
import torch
from one_layer import close, delta, given, solved

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change)")


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_update_is_the_papers_formula(setting, ridge):
    edit = solved(setting, "emmet", emmet_lambda=ridge, mom2_update_weight=2.0)
    parts = given(setting, edit, "hidden.1")
    inverse = torch.linalg.inv(2.0 * parts.moment)
    inner = parts.keys.T @ inverse @ parts.keys + ridge * torch.eye(parts.keys.shape[1], dtype=torch.float64)
    want = parts.residuals @ torch.linalg.inv(inner) @ parts.keys.T @ inverse
    close(delta(setting, edit), want, atol=1e-5, rtol=1e-3)
    if not ridge:
        close(delta(setting, edit) @ parts.keys, parts.residuals, atol=1e-4, rtol=1e-3)
