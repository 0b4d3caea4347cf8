"""MEND (Mitchell et al. 2022, arXiv 2110.11309): each token's rank-one gradient through a network, summed over edits.

For every token that the answers' loss reaches, with u its input at a weight and δ the gradient at the weight's output,

    (ũ, δ̃) = network([u, δ])        layers z + max(s ⊙ (z V U + b) + o, 0)
    ΔW = -η Σ δ̃ ũᵀ                   over the tokens of all edits, η learned for each weight

Not as in the authors' code: it adds lr · Σ δ̃ ũᵀ and learns the sign, here the paper's minus stands and η is e^r; its
last layer is not rectified, the paper's is; its running mean and deviation go on changing during training, here they
are exact and taken once over the training records.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...model.update import LowRank, Update
from ..ultraedit import Pairs
from .network import EditorNetwork, Recipe, Residual, rectified


class Layer(Residual):
    def forward(self, z: Float[Tensor, "pair size"], weight: int) -> Float[Tensor, "pair size"]:
        return z + rectified(self.scale[weight] * self.mapped(z) + self.shift[weight])


class Mend(EditorNetwork):
    layer = Layer
    recipe = Recipe(edits=32, clip=100.0, prompts=True, modules=None)

    @torch.no_grad()
    def update(self, pairs: Pairs, z: Float[Tensor, "pair size"], weight: int) -> Update:
        keys, gradients = (part.double() for part in self(z, weight))
        return LowRank(-self.log_rate[weight].double().exp() * gradients.T, keys).smaller()

    def surrogate(
        self, pairs: Pairs, z: Float[Tensor, "pair size"], weight: int, gradient: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, ""]:
        keys, gradients = self(z, weight)
        return -self.log_rate[weight].exp() * ((gradients @ gradient.to(keys)) * keys).sum()
