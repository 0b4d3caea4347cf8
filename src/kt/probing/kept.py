"""Word sets in the logits of a lens: their ids as tensors, and the mean probability of each set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

if TYPE_CHECKING:
    from .lens import SetTokens

Padded = tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]
"""Lists of ids as rows, and which of their entries are real."""


def set_tokens(masks: SetTokens, facts: Sequence[int]) -> tuple[list[Padded], Padded | None]:
    """The word sets of some rows, and what the last one stands outside of."""
    sets = [_padded([masks.ids[i][s] for i in facts]) for s in range(len(masks.ids[0]))]
    return sets, None if masks.outside is None else _padded([masks.outside[i] for i in facts])


def of_sets(logits: Float[Tensor, "row vocab"], total: Float[Tensor, " row"], named: Any) -> Float[Tensor, "row set"]:
    """Mean probability of each set's tokens (`named`: of `set_tokens`). Overwrites the logits."""
    prob = logits.sub_(total[:, None]).exp_()
    sets, outside = named
    means = []
    for some in sets:
        index, real = (part.to(prob.device) for part in some)
        means.append((prob.gather(1, index) * real).sum(1) / real.sum(1))
    if outside is not None:
        index, real = (part.to(prob.device) for part in outside)
        nothing = ~real.any(1, keepdim=True)  # a row without ids has a stand-in, which must keep its probability
        prob.scatter_(1, index, prob.gather(1, index) * nothing)
        means.append(prob.sum(1) / (prob.shape[1] - real.sum(1)))
    return torch.stack(means, 1).cpu()


def _padded(lists: Sequence[Int[ndarray, " token"]]) -> Padded:
    """An entry that is not real repeats its row's first id."""
    width = max((len(some) for some in lists), default=0) or 1
    index = np.stack([np.resize(some if len(some) else [0], width) for some in lists]).astype(np.int64)
    real = np.arange(width) < np.array([len(some) for some in lists])[:, None]
    return torch.as_tensor(index), torch.as_tensor(real)
