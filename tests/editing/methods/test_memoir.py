"""MEMOIR: masks, and what a token reads through a request's."""

import torch
from side_memories import D_IN, N, book

from kt.editing.side_memory import Rule, least_map, masks, reach, reader


def test_memoir_reads_through_the_mask_of_the_request_that_shares_most_inputs():
    """TopHash: the k largest |x - μ|, at the places of a fixed shuffle; y + M (m_i ⊙ x) from an overlap of τ on."""
    its = book(Rule("overlap", share=0.25), 0.8)
    own = masks(its, its.keys)
    assert own.sum(1).tolist() == [6] * N
    far = (its.keys - its.unrelated.mean(0)).abs()
    shuffle = torch.randperm(D_IN, generator=torch.Generator().manual_seed(0))
    for mask, distance in zip(own, far, strict=True):
        assert {int(i) for i in mask.nonzero()} == {int(shuffle[i]) for i in distance.topk(6).indices}
    found = least_map(its.keys * own, its.values)
    x = torch.cat([its.keys, its.keys * 1.01, its.unrelated])
    met, value = reader(its)(x)
    assert met[:10].all() and not met.all()
    torch.testing.assert_close(value[:5], its.values, rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(value[5:10], found(x[5:10] * own), rtol=1e-4, atol=1e-4)
    assert not value[~met].any()
    torch.testing.assert_close(reach(its, x).max(1).values >= 1, met)
