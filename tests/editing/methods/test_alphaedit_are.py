"""AlphaEdit-ARE against its formula in float64."""

import pytest
import torch
from in_parts import solved
from one_layer import close, delta

from kt.editing.methods import METHODS
from kt.errors import KtError


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change|norm of)")
def test_the_parts_are_written_inside_the_null_space_and_the_other_tokens_held(setting):
    """R KᵀP (K KᵀP + K_r K_rᵀP + L2)⁻¹."""
    edit, (k, r, held, moment) = solved(setting, "alphaedit-are", L2=1e-3, nullspace_threshold=0.5)
    values, vectors = torch.linalg.eigh(moment)
    p = vectors[:, values < 0.5] @ vectors[:, values < 0.5].T
    want = r @ k.T @ p @ torch.linalg.inv((k @ k.T + held @ held.T) @ p + 1e-3 * torch.eye(len(p)).double())
    close(delta(setting, edit), want, atol=1e-4, rtol=1e-3)


def test_parts_are_not_written_at_the_subject():
    with pytest.raises(KtError, match="token before them"):
        METHODS["alphaedit-are"](layers_mlp=(1,), fact_token="subject_last")
