"""IntAttn-Edit for ROME: rank one in both modules, scaled 1 - α and α."""

import pytest
import torch
from editing_help import REQUESTS
from one_layer import close, delta, given, solved

from kt.model.sites import Kind

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change)")


def test_both_updates_are_romes_formula_scaled(setting):
    one = REQUESTS[:1]
    edit = solved(setting, "intattn-rome", one, layers_attn=(1,), alpha=0.25)
    for kind, share in ((Kind.MLP, 0.75), (Kind.ATTN, 0.25)):
        parts = given(setting, edit, f"{kind}.1", kind, one)
        direction = torch.linalg.inv(parts.moment) @ parts.keys
        want = share * parts.residuals @ direction.T / (direction.T @ parts.bare)
        close(delta(setting, edit, kind), want, atol=1e-5, rtol=1e-3)
