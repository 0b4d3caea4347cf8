"""MALMEN's formulas in float64: the update, and its gradient through the solve against autograd and differences."""

import pytest
import torch

from kt.editing.hyper.malmen import Malmen
from kt.editing.ultraedit import Pairs
from kt.errors import WorkFailed

D_IN, D_OUT = 12, 5


def drawn(count, seed=0):
    """A network whose every parameter is random, pairs, their features, and a gradient G."""
    torch.manual_seed(seed)
    network = Malmen(D_IN, D_OUT, weights=2, rank=3, layers=2).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pairs = Pairs(torch.randn(count, D_IN).double(), torch.randn(count, D_OUT).double())
    return network, pairs, torch.randn(count, D_IN + D_OUT).double(), torch.randn(D_OUT, D_IN).double()


def formula(network, pairs, z, weight):
    """The module's three lines, in torch's own graph."""
    for layer in network.layers:
        inner = z @ layer.right @ layer.left + layer.bias
        z = z + layer.scale[weight] * torch.where(inner > 0, inner, 0 * inner) + layer.shift[weight]
    k, g = z[:, :D_IN], z[:, D_IN:]
    v = -network.log_rate[weight].exp() * (pairs.keys * k).sum(1, keepdim=True) * g
    system = pairs.keys.T @ pairs.keys + network.log_ridge[weight].exp() * torch.eye(D_IN).double()
    return v.T @ pairs.keys @ torch.linalg.inv(system)


@pytest.mark.parametrize("count", [1, 7, 12, 40])
def test_the_update_is_the_formula(count):
    network, pairs, z, _ = drawn(count)
    for weight in (0, 1):
        want = formula(network, pairs, z, weight).detach()
        torch.testing.assert_close(network.update(pairs, z, weight).dense(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [1, 7, 12, 40])
def test_the_gradient_by_hand_is_that_of_autograd_through_the_solve(count):
    network, pairs, z, gradient = drawn(count)
    parameters = list(network.parameters())
    by_hand = torch.autograd.grad(network.surrogate(pairs, z, 1, gradient), parameters)
    through = torch.autograd.grad((formula(network, pairs, z, 1) * gradient).sum(), parameters)
    assert all(float(g.abs().max()) > 0 for g in through)
    for one, two in zip(by_hand, through, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("count", [7, 40])
def test_the_gradient_by_hand_is_that_of_finite_differences(count):
    network, pairs, z, gradient = drawn(count)
    loss = lambda: float((network.update(pairs, z, 0).dense() * gradient).sum())  # noqa: E731
    for name, parameter in network.named_parameters():
        (slope,) = torch.autograd.grad(network.surrogate(pairs, z, 0, gradient), [parameter])
        place = int(slope.abs().argmax())
        flat = parameter.data.view(-1)
        middle, step = float(flat[place]), 1e-5
        ends = []
        for sign in (1, -1):
            flat[place] = middle + sign * step
            ends.append(loss())
        flat[place] = middle
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(slope.view(-1)[place]), rel=1e-6), name


def test_a_new_network_passes_its_input_on_and_every_layer_learns():
    network = Malmen(D_IN, D_OUT, weights=1, rank=3, layers=2)
    z = torch.randn(6, D_IN + D_OUT)
    assert torch.equal(torch.cat(network(z, 0), 1), z)
    pairs = Pairs(torch.randn(6, D_IN), torch.randn(6, D_OUT))
    network.surrogate(pairs, z, 0, torch.randn(D_OUT, D_IN)).backward()
    assert all(float(layer.left.grad.abs().max()) > 0 for layer in network.layers)


def test_a_singular_system_has_a_remedy_that_an_editor_has():
    network, pairs, z, _ = drawn(3)
    network.log_ridge.data.fill_(-1e4)  # a ridge of zero
    with pytest.raises(WorkFailed, match=r"is singular; .* train it again") as caught:
        network.update(pairs._replace(keys=torch.zeros(3, D_IN).double()), z, 0)
    assert "L2" not in str(caught.value)
