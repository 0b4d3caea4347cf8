"""WISE: what a token reads of a side memory, and which tokens read one."""

import torch
from side_memories import D_IN, book

from kt.editing.side_memory import Rule, least_map, reach, reader


def test_wise_reads_the_shard_whose_output_is_largest_where_it_reaches_the_ratio_of_its_least_key():
    """‖M_b x‖ ≥ ε · min_i ‖M_b k_i‖, with M_b zero but for the shard's own inputs."""
    its = book(Rule("activation", size=3, share=0.7), 0.5)
    kept = [torch.rand(D_IN, generator=torch.Generator().manual_seed(b)) < 0.7 for b in (0, 1)]
    maps = []
    for b, rows in enumerate((slice(0, 3), slice(3, 5))):
        found = least_map(its.keys[rows] * kept[b], its.values[rows], its.unrelated * kept[b])
        maps.append(found.left @ found.right)
        assert not maps[b][:, ~kept[b]].any()
    x = torch.cat([its.keys, its.keys * 0.4, its.unrelated])
    changes = torch.stack([x.double() @ m.T for m in maps])
    least = torch.stack([changes[0, :3].norm(dim=-1).min(), changes[1, 3:5].norm(dim=-1).min()])
    shares, block = (changes.norm(dim=-1) / (0.5 * least[:, None])).max(0)
    met, value = reader(its)(x)
    assert met.tolist() == (shares >= 1).tolist() and met[:5].all() and not met.all()
    torch.testing.assert_close(value.double(), changes[block, torch.arange(len(x))], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reach(its, x)[:, [0, 3]].max(1).values, shares, rtol=1e-4, atol=1e-4)
