"""AlphaEdit against its formula, with the projector written out."""

import pytest
import torch
from one_layer import close, delta, given, solved

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change)")


def test_the_update_is_the_papers_formula(setting):
    edit = solved(setting, "alphaedit", nullspace_threshold=0.02, L2=0.1)
    parts = given(setting, edit, "hidden.1")
    values, vectors = torch.linalg.eigh(parts.moment)
    kept = vectors[:, values < 0.02]
    assert 0 < kept.shape[1] < len(values), "the threshold cuts nothing"
    projector = kept @ kept.T
    eye = torch.eye(len(projector), dtype=torch.float64)
    system = parts.keys @ parts.keys.T @ projector + 0.1 * eye
    want = parts.residuals @ parts.keys.T @ projector @ torch.linalg.inv(system)
    close(delta(setting, edit), want, atol=1e-5, rtol=1e-3)
