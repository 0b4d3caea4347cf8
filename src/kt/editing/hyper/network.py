"""What the networks of MEND and MALMEN share: one network for all weights of a shape, and its gradient by hand.

A pair (k, g) is a weight's input at a token and the gradient at its output; z = [k, g], every number normalised by its
mean and deviation over the training records. The network gives [k̃, g̃], and the method makes ΔW of them.

The outer loss L is read on the model with W + ΔW in it. Its gradient G = ∂L/∂ΔW comes from an ordinary backward pass;
`surrogate` is a number whose gradient in the network's parameters is that of L. So no graph ever holds the edited
model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...model.update import Update
from ..ultraedit import Pairs


class Recipe(NamedTuple):
    """A method's defaults in training, from its paper's code where they carry over."""

    edits: int
    clip: float
    prompts: bool
    modules: str | None


class Residual(nn.Module):
    """Base of a layer z + f(z): a low-rank map shared by all weights of the shape, a scale and a shift for each.

    `right` is random and `left` zero, so that a new network passes its input on.
    """

    def __init__(self, size: int, rank: int, weights: int) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.randn(size, rank) / size**0.5)
        self.left = nn.Parameter(torch.zeros(rank, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(weights, size))
        self.shift = nn.Parameter(torch.zeros(weights, size))

    def mapped(self, z: Float[Tensor, "pair size"]) -> Float[Tensor, "pair size"]:
        return z @ self.right @ self.left + self.bias


def rectified(x: Tensor) -> Tensor:
    """max(x, 0), whose gradient at zero is 1: a new network is exactly there, and `relu` would leave it there."""
    return x.clamp(min=0)


class EditorNetwork(nn.Module, ABC):
    """Base of both networks: layers, and a rate η = e^r for each weight, so that training cannot turn its sign."""

    layer: type[Residual]
    recipe: Recipe

    def __init__(self, d_in: int, d_out: int, weights: int, rank: int, layers: int) -> None:
        super().__init__()
        self.sizes = (d_in, d_out)
        self.layers = nn.ModuleList(self.layer(d_in + d_out, rank, weights) for _ in range(layers))
        self.log_rate = nn.Parameter(torch.zeros(weights))

    def forward(self, z: Float[Tensor, "pair size"], weight: int) -> tuple[Tensor, ...]:
        """k̃ and g̃; `weight` is the number of the weight among those of its shape."""
        for layer in self.layers:
            z = layer(z, weight)
        return z.split(self.sizes, 1)

    def begin(self, pairs: Pairs, weight: int) -> None:
        """Set what follows from the first pairs of a weight, before the rate."""

    @abstractmethod
    def update(self, pairs: Pairs, z: Float[Tensor, "pair size"], weight: int) -> Update:
        """ΔW in float64; no graph."""

    @abstractmethod
    def surrogate(
        self, pairs: Pairs, z: Float[Tensor, "pair size"], weight: int, gradient: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, ""]:
        """A number whose gradient in the parameters is Σ G ∂ΔW, with G = `gradient` = ∂L/∂ΔW."""
