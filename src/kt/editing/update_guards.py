"""What is done to solved updates before they are written, whatever method solved them.

    rect    only the tenths of ΔW's numbers with the largest |ΔW / W| are written: four of ten
    prune   with S the sum of ΔW over a session's edits, W = W₀ + F(S): of S's singular values, those above the largest
            of W₀ become ln σ - ln σ_max(W₀) + σ_max(W₀)

RECT (Gu et al. 2024, arXiv 2401.04700) and PRUNE (Ma et al. 2024, arXiv 2405.16821), as their code has them. PRUNE's
restrains once, after the last edit; here every edit is solved on the model as it is restrained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.update import Dense, LowRank, Update

UPDATE_GUARDS = ("rect", "prune")
KEPT = 0.4
"""The share of an update's numbers that RECT writes."""
TINY = 1e-8
"""Added to W, as RECT's code does."""


def rect(update: Update, weight: Float[Tensor, "*shape"]) -> Dense:
    """The update's numbers that are largest beside the weight's, the others zero."""
    dense = update.dense().double().cpu()
    ratio = (dense / (weight.detach().double().cpu() + TINY)).abs()
    least = ratio.flatten().kthvalue(max(1, int(ratio.numel() * (1 - KEPT)))).values
    return Dense(torch.where(ratio >= least, dense, 0.0))


def prune(total: Update, original: Float[Tensor, "*shape"]) -> Update:
    """The sum of all updates of a weight with its large singular values restrained; one that is no matrix, as it is."""
    if len(total.shape) != 2:
        return total
    largest = torch.linalg.matrix_norm(original.detach().double().cpu(), 2)
    if isinstance(total, LowRank):  # its singular values are those of a matrix of its rank
        (first, left), (last, right) = (torch.linalg.qr(f.double().cpu()) for f in (total.left, total.right.T))
        u, values, v = torch.linalg.svd(left @ right.T)
        u, v = first @ u, v @ last.T
    else:
        u, values, v = torch.linalg.svd(total.dense().double().cpu(), full_matrices=False)
    restrained = torch.where(values > largest, values.log() - largest.log() + largest, values)
    return LowRank(u * restrained, v) if isinstance(total, LowRank) else Dense((u * restrained) @ v)


def added(parts: Mapping[str, Update], more: Mapping[str, Update]) -> dict[str, Update]:
    """Sums of updates by weight."""
    return {**parts, **{name: parts[name].plus(update) if name in parts else update for name, update in more.items()}}
