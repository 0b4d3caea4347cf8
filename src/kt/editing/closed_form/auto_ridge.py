"""The ridge that a closed form chooses itself (`mom2_update_weight="auto"`, `L2="auto"`, `emmet_lambda="auto"`).

With K̃ the keys through C's factor (K̃ = L⁻¹K, C = L Lᵀ; AlphaEdit: K̃ = PK; UltraEdit: K̃ = K) and G = K̃ᵀK̃, a solve with
the ridge λ changes the outputs at the keys by

    ΔW K = R S,   S = G (λI + G)⁻¹

so S_ii is the share of fact i's own wanted change that comes through. Of one key it is x / (λ + x), x = kᵀC⁻¹k, and
E[x] = d_key over the text that C was taken from. In a batch S_ii falls as λ grows, and lies lower where other keys are
near to k_i. The automatic ridge is

    the largest λ at which the median fact's S_ii is at least `share`, but no smaller than a hundredth of what a single
    key of the median x would take, x (1 - share) / share

A key that stands alone gets its share to rounding. The median, and not the least: two facts with one key and two wishes
have S_ii < 1/2 at every λ, and should not take the ridge from the others. The lower bound, for batches in which most
keys are near to each other: what tells such keys apart is a difference that is small beside them, and to write it would
take an update as much larger.

`share` of a layer follows from its path (`layer_share`): where several layers write into the residual stream and each
is asked for a part of what is still missing, `WANTED` of the whole arrives, and not of each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

WANTED = 0.9
"""The share of the wanted change that comes through a path, where its ridges are automatic. At d_key 18,944, with keys
of twice the mean x and five layers, λ is then 15,400; the papers' files have 15,000."""

LEAST = 0.01
"""The smallest automatic ridge, beside that of a single key."""

HALVINGS = 200
"""Of the bracket of a root, at most: to float64's last digit."""


class AutoRidge(NamedTuple):
    """A ridge that was chosen, the median fact's x, and the share that comes through of the median fact's change."""

    ridge: float
    x: float
    share: float

    def as_dict(self) -> dict[str, float]:
        """For the manifest."""
        return {"lambda": self.ridge, "x": self.x, "share": self.share}


class Spectrum(NamedTuple):
    """The eigenvalues of G, and the squares of its eigenvectors' components, a row for each fact that counts."""

    values: Float[Tensor, " r"]
    squares: Float[Tensor, "fact r"]

    @classmethod
    def of_gram(cls, gram: Float[Tensor, "n n"], count: int | None = None) -> Spectrum:
        """From G; the first `count` of its keys are facts, the others those of earlier edits."""
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        return cls(values.clamp_min(0), vectors[:count].square())

    @classmethod
    def of_keys(cls, keys: Float[Tensor, "d n"], count: int | None = None) -> Spectrum:
        """From K̃, through whichever of K̃ᵀK̃ and K̃K̃ᵀ is smaller."""
        if keys.shape[1] <= keys.shape[0]:
            return cls.of_gram(keys.T @ keys, count)
        values, vectors = torch.linalg.eigh(keys @ keys.T)
        values = values.clamp_min(0)
        # K̃ = Q √M Vᵀ. A vanishing eigenvalue has no part in any share, whatever its vector.
        inverse = torch.where(values > values[-1] * 1e-14, 1 / values, 0.0)
        return cls(values, (keys.T[:count] @ vectors).square() * inverse)

    @property
    def x(self) -> Float[Tensor, " fact"]:
        """G_ii: kᵀC⁻¹k of each fact."""
        return self.squares @ self.values

    def shares(self, ridge: float) -> Float[Tensor, " fact"]:
        """S_ii of each fact; all of them 0 at an infinite ridge."""
        through = torch.where(self.values > 0, self.values / (self.values + ridge), 0.0)
        return self.squares @ through

    def median_share(self, ridge: float) -> float:
        """Of an even number of facts, the lower of the middle two."""
        return float(self.shares(ridge).median())


def single_key_ridge(x: float, share: float) -> float:
    """λ with which `share` of one key's change comes through: x / (λ + x) = share. With x = E[x] = d_key, the ridge
    where no keys are known."""
    return x * (1 - share) / share


def auto_ridge(spectrum: Spectrum, share: float, expected: float, least: float = 0.0) -> AutoRidge:
    """The largest ridge at which at least `share` of the median fact's change comes through, within the lower bound.

    Args:
        spectrum: Of the keys.
        share: Between 0 and 1, both excluded.
        expected: x of keys that are not known, for keys that are all zero.
        least: A further lower bound.
    """
    x = float(spectrum.x.median())
    if not x > 0:
        return AutoRidge(single_key_ridge(expected, share), x, 0.0)
    alone = single_key_ridge(x, share)
    low, high = LEAST * alone, single_key_ridge(float(spectrum.values.max()), share)  # at `high` no share is above
    low = max(alone if spectrum.squares.shape == (1, 1) else low, least)
    if spectrum.squares.shape != (1, 1) and spectrum.median_share(low) > share:
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            if not low < middle < high:
                break
            low, high = (middle, high) if spectrum.median_share(middle) >= share else (low, middle)
    return AutoRidge(low, x, spectrum.median_share(low))


def layer_share(parts: Sequence[float], wanted: float = WANTED) -> float:
    """The share s of every layer's part that has to come through, for `wanted` of the whole to arrive.

    A layer is asked for the part p_l of what is still missing, and leaves 1 - s p_l of it: Π (1 - s p_l) = 1 - wanted.

    Args:
        parts: p_l of the layers whose writes add up in the value aimed at; the last one is 1.
    """
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        left = 1.0
        for part in parts:
            left *= 1 - middle * part
        low, high = (low, middle) if left <= 1 - wanted else (middle, high)
    return high
