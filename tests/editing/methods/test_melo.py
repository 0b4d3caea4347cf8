"""MELO: what a token reads of its block, in float64."""

import pytest
import torch
from side_memories import book

from kt.editing.side_memory import Rule, reader


@pytest.mark.parametrize(("rank", "exact"), [(4, True), (1, False)])
def test_melo_adds_the_block_of_the_nearest_key_within_its_radius(rank, exact):
    its = book(Rule("blocks", size=2, rank=rank), 1.5)
    x = torch.cat([its.keys, its.keys + 0.1, its.keys + 9.0])
    met, value = reader(its)(x)
    assert met.tolist() == [True] * 10 + [False] * 5
    assert torch.allclose(value[:5], its.values, atol=1e-2) is exact
    for i, first in enumerate((0, 0, 2, 2, 4)):  # blocks: requests 0 and 1, 2 and 3, 4 alone
        k, d = (part[first : first + 2].double() for part in (its.keys, its.values))
        whole = d.T @ torch.linalg.pinv(k.T)
        u, s, v = torch.linalg.svd(whole)
        block = u[:, :rank] * s[:rank] @ v[:rank]
        torch.testing.assert_close(value[5 + i].double(), block @ x[5 + i].double(), rtol=1e-2, atol=1e-2)
