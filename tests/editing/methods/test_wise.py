"""WISE: what a token reads of a side memory, and which tokens read one."""

from dataclasses import replace

import pytest
import torch
from editing_help import REQUESTS, fast
from families import tiny_model
from side_memories import D_IN, book

import kt
from kt.editing.side_memory import Rule, reach, reader


def test_wise_reads_the_shard_that_holds_most_of_a_requests_own_change_where_that_reaches_the_ratio():
    """M_b x = Σ c_i δ_i is read where max_i c_i(x) / c_i(k_i) ≥ ε, with M_b zero but for the shard's own inputs."""
    its = book(Rule("part", size=3, share=0.7), 0.5)
    kept = [torch.rand(D_IN, generator=torch.Generator().manual_seed(b)) < 0.7 for b in (0, 1)]
    x = torch.cat([its.keys, its.keys * 0.4, its.unrelated])
    changes, parts = [], []
    for b, rows in enumerate((slice(0, 3), slice(3, 5))):
        keys, text = (each.double() * kept[b] for each in (its.keys[rows], its.unrelated))
        second = text.T @ text / len(text)
        second.diagonal().add_(text.square().mean())
        towards = keys @ second.inverse()
        gram = towards @ keys.T
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        coefficients = torch.linalg.inv(gram) @ towards
        changes.append(x.double() @ coefficients.T @ its.values[rows].double())
        parts.append(x.double() @ coefficients.T / (keys * coefficients).sum(1))
    share, block = torch.stack([part.amax(1) for part in parts]).max(0)
    met, value = reader(its)(x)
    assert met.tolist() == (share >= 0.5).tolist() and met[:5].all() and not met.all()
    torch.testing.assert_close(value.double(), torch.stack(changes)[block, torch.arange(len(x))], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reach(its, x), torch.cat(parts, 1) / 0.5, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_a_hundred_requests_in_a_shard_are_read_at_no_other_token_though_their_changes_add_up():
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(60, 400, generator=draw)
    its = replace(
        book(Rule("part", size=500), 0.7),
        keys=torch.randn(100, 400, generator=draw),
        values=torch.randn(100, 7, generator=draw),
        radii=torch.full((100,), 0.7),
        labels=tuple(map(str, range(100))),
        entries=tuple(range(100)),
        unrelated=text,
    )
    read, other = reader(its), torch.randn(500, 400, generator=draw)
    met, value = read(other)
    least = read(its.keys).value.norm(dim=-1).min()
    assert read(its.keys).met.all() and met.float().mean() < 0.01
    assert (value.norm(dim=-1) > 0.7 * least).float().mean() > 0.5  # the length alone would have opened it


def test_requests_whose_keys_are_nearly_one_open_the_memory_to_no_other_token():
    its = book(Rule("part", size=9), 0.7)
    keys, other = its.keys.clone(), torch.randn(500, D_IN, generator=torch.Generator().manual_seed(1))
    keys[1] = keys[0] + 1e-3 * keys[1]
    near = replace(its, keys=keys)
    assert reader(near)(keys).met.all()
    assert reader(near)(other).met.float().mean() <= reader(its)(other).met.float().mean() + 0.02


def test_two_requests_with_one_key_are_both_read():
    its = book(Rule("part", size=9), 0.7)
    twice = replace(its, keys=torch.cat([its.keys[:1], its.keys[:4]]))
    assert reader(twice)(twice.keys).met.all()


@pytest.mark.parametrize("size", [3, 9])
def test_a_request_that_the_model_answers_already_opens_the_memory_to_no_other_token(size):
    its = book(Rule("part", size=size, share=0.7), 0.5)
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


def test_a_key_that_is_next_to_nothing_opens_the_memory_to_no_other_token():
    its = book(Rule("part", size=9), 0.7)
    keys, other = its.keys.clone(), torch.randn(500, D_IN, generator=torch.Generator().manual_seed(1))
    keys[0] *= 1e-4
    assert reader(replace(its, keys=keys))(other).met.float().mean() <= reader(its)(other).met.float().mean() + 0.02


def test_keys_of_unrelated_text_that_are_zero_hold_nothing_back():
    its = book(Rule("part", size=9), 0.7)
    assert reader(replace(its, unrelated=torch.zeros(60, D_IN)))(its.keys).met.all()


def test_who_reads_a_memory_is_said_where_it_is_not_its_requests_alone(recwarn):
    from kt.editing.adapter_edit import _say_who_reads

    its, draw = book(Rule("part", size=9), 0.7), torch.Generator().manual_seed(1)
    sparse = replace(its, keys=its.keys * torch.tensor([[1.0], [1.0], [1e-4], [1.0], [1.0]]))
    _say_who_reads(sparse, torch.randn(50, D_IN, generator=draw) * 0.1)
    assert "1 of 5 requests cannot be read at their own token" in str(recwarn.pop().message)
    _say_who_reads(its, torch.cat([its.keys, torch.zeros(45, D_IN)]))
    assert "10% of the tokens of unrelated text read this memory" in str(recwarn.pop().message)
    _say_who_reads(its, torch.zeros(50, D_IN))
    assert not recwarn.list


def test_a_file_of_an_older_kt_is_read_by_todays_rule_with_a_warning():
    old = Rule("part", size=3, share=0.5).as_dict() | {"name": "activation"}
    with pytest.warns(UserWarning, match="made by an older kt, and its memory is read by today's rule"):
        assert Rule.of(old) == Rule("part", size=3, share=0.5)


def test_a_memory_without_a_change_is_said_to_be_read_by_no_token():
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="no token reads this memory"):  # the first step is the model as it is
        edit = kt.edit(model, REQUESTS, "wise", **fast("wise", layers_mlp=(1,), v_num_grad_steps=1))
    assert not edit.effect.values.any()
