"""An adapter of random entries, whose reading the tests of MELO, WISE and MEMOIR hold against formulas."""

from __future__ import annotations

import torch

from kt.editing.adapter_edit import Adapter
from kt.model.sites import Site

N, D_IN, D_OUT = 5, 24, 7


def book(rule, radius, seed=0):
    """Five requests with random keys and changes."""
    draw = torch.Generator().manual_seed(seed)
    keys, changes, text = (torch.randn(*shape, generator=draw) for shape in ((N, D_IN), (N, D_OUT), (60, D_IN)))
    radii, labels = torch.full((N,), radius), tuple("abcde")
    unrelated = None if rule.by_distance else text
    return Adapter(Site("mlp", 1), "", radius, keys, changes, radii, labels, tuple(range(N)), rule, unrelated)
