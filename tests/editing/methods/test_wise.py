"""WISE: what a token reads of a side memory, and which tokens read one."""

from dataclasses import replace

import pytest
import torch
from editing_help import REQUESTS, fast
from families import tiny_model
from side_memories import D_IN, book

import kt
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


@pytest.mark.parametrize("size", [3, 9])
def test_a_request_that_the_model_answers_already_opens_the_memory_to_no_other_token(size):
    its = book(Rule("activation", size=size, share=0.7), 0.5)
    x = torch.cat([its.keys, its.unrelated])
    keys = torch.cat([its.keys, its.unrelated[:1] * 2])  # one more request, of no change but rounding
    for none in (torch.zeros(1, its.values.shape[1]), 1e-6 * its.values[:1]):
        fields = {"radii": torch.full((6,), 0.5), "labels": (*its.labels, "f"), "entries": (*its.entries, 5)}
        more = replace(its, keys=keys, values=torch.cat([its.values, none]), **fields)
        met = reader(more)(x).met
        assert met[:5].all() and met[5:].float().mean() <= reader(its)(x).met[5:].float().mean() + 0.2
        if size == 9:  # else another shard may read it
            assert not reader(more)(keys[5:]).met.any() and reach(more, keys[5:]).max() < 1
    alone = replace(more, values=torch.zeros_like(more.values))
    assert not reader(alone)(x).met.any() and not reach(alone, x).any()


def test_a_memory_without_a_change_is_said_to_be_read_by_no_token():
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="no token reads this memory"):  # the first step is the model as it is
        edit = kt.edit(model, REQUESTS, "wise", **fast("wise", layers_mlp=(1,), v_num_grad_steps=1))
    assert not edit.effect.values.any()
