"""Side memories: the least map, what a request reads of its own, settings that leave nothing to read."""

import pytest
import torch
from editing_help import REQUESTS, fast
from families import tiny_model
from side_memories import book

import kt
from kt.editing.side_memory import Rule, least_map, reader
from kt.errors import KtError

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|give the target first|less likely|perplexity)")


def test_the_least_map_meets_its_keys_and_is_smaller_at_unrelated_ones_the_more_they_count():
    its = book(Rule("part", size=9), 0.5)
    k, d, u = (part.double() for part in (its.keys, its.values, its.unrelated))
    plain = least_map(its.keys, its.values)
    expected = d.T @ torch.linalg.pinv(k.T)
    torch.testing.assert_close(plain.left @ plain.right, expected, rtol=1e-2, atol=1e-3)
    second = u.T @ u / len(u)
    second.diagonal().add_(u.square().mean())
    towards = k @ second.inverse()
    careful = least_map(its.keys, its.values, its.unrelated)
    gram = towards @ k.T
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    by_hand = d.T @ torch.linalg.inv(gram) @ towards
    torch.testing.assert_close(careful.left @ careful.right, by_hand, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(careful(k), d, rtol=0.05, atol=0.05)
    assert careful(u).norm() < plain(u).norm()


@pytest.mark.parametrize("method", ["melo", "wise", "memoir"])
def test_a_request_reads_its_change_at_its_own_token_and_the_same_request_again_takes_the_later_target(method):
    model = tiny_model("llama")
    edit = kt.edit(model, REQUESTS, method, **fast(method, layers_mlp=(1,)))
    found = edit.effect
    assert found.rule.adds and found.values.norm(dim=-1).min() > 0
    met, value = reader(found)(found.keys)
    assert met.all()
    torch.testing.assert_close(value, found.values, rtol=0.05, atol=0.05 * float(found.values.abs().max()))
    other = kt.edit(model, [REQUESTS[0] | {"target_new": "Warsaw"}], method, **fast(method, layers_mlp=(1,))).effect
    both = found.plus(other)
    assert (len(both.labels), both.labels[0], both.entries) == (2, "Warsaw", (0, 1, 0))


def test_settings_that_leave_nothing_to_read_are_one_line():
    for method, changes, words in (
        ("melo", {"eps": 0.0}, "eps 0 is a radius"),
        ("melo", {"block_rank": 0}, "block_rank must be at least 1"),
        ("wise", {"ratio": 0.0}, "ratio 0 must be a share above 0"),
        ("wise", {"ratio": -1.0}, "ratio"),
        ("wise", {"density": 0.0}, "density 0 must"),
        ("memoir", {"overlap": 0.0}, "overlap 0 must"),
        ("memoir", {"top": 2.0}, "top 2 must"),
    ):
        with pytest.raises(KtError, match=words) as caught:
            kt.edit(tiny_model("llama"), REQUESTS, method, **changes)
        assert "\n" not in str(caught.value)
