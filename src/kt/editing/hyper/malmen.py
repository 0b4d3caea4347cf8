"""MALMEN (Tan, Zhang and Fu 2024, arXiv 2311.04661): a network's value shifts, joined by least squares.

For every token of the answers, with k its key at a weight and g the gradient at the weight's output,

    (k̃, g̃) = network([k, g])                       layers z + s ⊙ max(z A B + b, 0) + o
    v = -η (kᵀk̃) g̃                                  the wanted change of the weight's output for input k
    ΔW = V Hᵀ (H Hᵀ + e^λ I)⁻¹                       over the tokens of all edits; H has the k as columns, V the v

With an identity network this is UltraEdit. The solve is not differentiated by autograd but by hand: with G = ∂L/∂ΔW,

    D = (H Hᵀ + e^λ I)⁻¹ Gᵀ,   ∂L/∂V = (Hᵀ D)ᵀ,   ∂L/∂λ = -e^λ ⟨D, ΔWᵀ⟩

Not as in the authors' code: it reads the gradients of n // batch files and the keys of ⌈n / batch⌉, which agree only
where the batch size divides the number of edits (here nothing is cut into files); its running variance mixes n and
n - 1 (here it is exact, and taken once over the training records); η can change its sign (here it is e^r).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...model.update import Update
from ..closed_form.auto_ridge import WANTED, Spectrum, auto_ridge
from ..ultraedit import Pairs, ridge_fit
from .network import EditorNetwork, Recipe, Residual, rectified

AGAIN = "the editor learned too small a ridge for these records; train it again with a smaller lr"
"""The remedy of a singular system: e^λ is learned, and no setting of an edit."""


class Layer(Residual):
    def forward(self, z: Float[Tensor, "pair size"], weight: int) -> Float[Tensor, "pair size"]:
        return z + self.scale[weight] * rectified(self.mapped(z)) + self.shift[weight]


class Malmen(EditorNetwork):
    layer = Layer
    recipe = Recipe(edits=128, clip=1.0, prompts=False, modules="mlp")

    def __init__(self, d_in: int, d_out: int, weights: int, rank: int, layers: int) -> None:
        super().__init__(d_in, d_out, weights, rank, layers)
        self.log_ridge = nn.Parameter(torch.zeros(weights))

    @torch.no_grad()
    def begin(self, pairs: Pairs, weight: int) -> None:
        """λ at which most of the median token's change comes through; the authors begin at 0."""
        self.log_ridge[weight] = math.log(auto_ridge(Spectrum.of_keys(pairs.keys.double().T), WANTED, 1.0).ridge)

    def shifts(self, pairs: Pairs, z: Float[Tensor, "pair size"], weight: int) -> Float[Tensor, "pair d_out"]:
        keys, gradients = self(z, weight)
        along = (pairs.keys.to(keys) * keys).sum(1, keepdim=True)
        return -self.log_rate[weight].exp() * along * gradients

    @torch.no_grad()
    def update(self, pairs: Pairs, z: Float[Tensor, "pair size"], weight: int) -> Update:
        shifts = self.shifts(pairs, z, weight).double()
        return ridge_fit(pairs.keys.double(), shifts, float(self.log_ridge[weight].double().exp()), AGAIN).update

    def surrogate(
        self, pairs: Pairs, z: Float[Tensor, "pair size"], weight: int, gradient: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, ""]:
        shifts = self.shifts(pairs, z, weight)
        with torch.no_grad():
            ridge = self.log_ridge[weight].double().exp()
            by_shift, by_ridge = solve_gradients(pairs.keys.double(), shifts.double(), ridge, gradient.double())
        return (shifts * by_shift.to(shifts)).sum() + self.log_ridge[weight] * (ridge * by_ridge).to(shifts)


def solve_gradients(
    keys: Float[Tensor, "pair d_in"],
    shifts: Float[Tensor, "pair d_out"],
    ridge: Float[Tensor, ""],
    gradient: Float[Tensor, "d_out d_in"],
) -> tuple[Float[Tensor, "pair d_out"], Float[Tensor, ""]]:
    """The module's ∂L/∂V and ∂L/∂(ridge), by whichever system is smaller.

    With fewer pairs than inputs, P = Hᵀ H + ridge I (a row a pair): Hᵀ D = P⁻¹ Hᵀ Gᵀ and ⟨D, ΔWᵀ⟩ = ⟨P⁻¹ Vᵀ, Hᵀ D⟩.
    """
    few = keys.shape[0] <= keys.shape[1]
    system = keys @ keys.T if few else keys.T @ keys
    system.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(system)
    if few:
        by_shift = torch.cholesky_solve(keys @ gradient.T, factor)
        return by_shift, -(torch.cholesky_solve(shifts, factor) * by_shift).sum()
    solved = torch.cholesky_solve(gradient.T, factor)
    update = torch.cholesky_solve(keys.T @ shifts, factor)
    return keys @ solved, -(solved * update).sum()
