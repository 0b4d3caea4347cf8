"""MEND's formulas in float64: the update, and its gradient by hand against autograd."""

import pytest
import torch

from kt.editing.hyper.mend import Mend
from kt.editing.ultraedit import Pairs
from kt.model.update import Dense, LowRank

D_IN, D_OUT = 12, 5


def drawn(count):
    torch.manual_seed(0)
    network = Mend(D_IN, D_OUT, weights=2, rank=3, layers=2).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pairs = Pairs(torch.randn(count, D_IN).double(), torch.randn(count, D_OUT).double())
    return network, pairs, torch.randn(count, D_IN + D_OUT).double(), torch.randn(D_OUT, D_IN).double()


def formula(network, z, weight):
    for layer in network.layers:
        inner = layer.scale[weight] * (z @ layer.right @ layer.left + layer.bias) + layer.shift[weight]
        z = z + torch.where(inner > 0, inner, 0 * inner)
    rate = network.log_rate[weight].exp()
    return sum(-rate * torch.outer(row[D_IN:], row[:D_IN]) for row in z)


@pytest.mark.parametrize(("count", "form"), [(3, LowRank), (40, Dense)])
def test_update_and_gradient_are_those_of_the_formula(count, form):
    network, pairs, z, gradient = drawn(count)
    update = network.update(pairs, z, 1)
    assert isinstance(update, form)
    want = formula(network, z, 1)
    torch.testing.assert_close(update.dense(), want.detach(), rtol=1e-10, atol=1e-12)
    parameters = list(network.parameters())
    by_hand = torch.autograd.grad(network.surrogate(pairs, z, 1, gradient), parameters)
    through = torch.autograd.grad((want * gradient).sum(), parameters)
    assert all(float(g.abs().max()) > 0 for g in through)
    for one, two in zip(by_hand, through, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
