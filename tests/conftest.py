"""Shared fixtures. beartype comes before nnsight, whose import machinery would otherwise hide from it."""

import beartype  # noqa: F401  (first: see above)
import pytest
import torch
from families import FAMILIES, tiny_model

torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny_model(family)
