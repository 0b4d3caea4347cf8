"""What a step's logits say of every request: how likely its target is, and the words after the essence prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .target_rows import TargetRows


class Reading(NamedTuple):
    """`nll`: mean -log p of the target's tokens. `essence`: log-probabilities at the essence row's subject, None where
    no essence rows were run. `all_argmax`: every target token is the likeliest in every context."""

    nll: Float[Tensor, "fact context"]
    essence: Float[Tensor, "fact vocab"] | None
    all_argmax: Bool[Tensor, " fact"]


def read_rows(logits: Sequence[Float[Tensor, "read vocab"]], groups: Sequence[TargetRows]) -> Reading:
    """From the logits of groups of rows; the first holds all context rows, and all or none of the essence rows."""
    said, rows, essence = logits[0], groups[0], None
    if len(groups) == 2:
        essence = logits[1].log_softmax(-1)
    elif bool(rows.essence.any()):
        at_essence = rows.essence[_row_of_each_read(rows)]
        essence = said[at_essence].log_softmax(-1)
        said, rows = said[~at_essence], rows.of(~rows.essence)
    nll, argmax = _of_targets(said, rows)
    facts = len(rows.fact.unique())
    nll, argmax = (rearrange(v, "(fact context) -> fact context", fact=facts) for v in (nll, argmax))
    return Reading(nll, essence, argmax.all(-1))


def divergence(now: Tensor | None, before: Tensor | None, like: Tensor) -> Float[Tensor, " fact"]:
    """KL(now ‖ before) of log-probabilities; zero where there are none."""
    if now is None or before is None:
        return torch.zeros_like(like)
    return (now.exp() * (now - before)).sum(-1)


def _of_targets(
    logits: Float[Tensor, "read vocab"], rows: TargetRows
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """Mean -log p of each row's target, and whether all its tokens are the likeliest."""
    picked = logits.gather(1, rows.answers[rows.reads][:, None])[:, 0]
    log_p = picked - logits.logsumexp(-1)
    spread = log_p.new_zeros(rows.reads.shape).masked_scatter(rows.reads, log_p)
    best = torch.ones_like(rows.reads).masked_scatter(rows.reads, picked.detach() >= logits.detach().amax(-1))
    return -spread.sum(-1) / rows.reads.sum(-1), best.all(-1)


def _row_of_each_read(rows: TargetRows) -> Int[Tensor, " read"]:
    return rows.reads.nonzero()[:, 0]
