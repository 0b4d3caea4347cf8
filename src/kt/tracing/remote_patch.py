"""Patched runs the plain way, for models elsewhere: every row is a whole prompt, from the first layer on.

The runs that patched ones start and take from stand in the same forward as rows of their own, and a patch copies from
row to row. So token ids and noise are sent, two numbers a row come back, and no state travels; the growing batch of
patch.py would send the base's states at every layer. The arithmetic per row is the reference's. Numbers equal those of
patch.py to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from ..model.model import TracedModel
from ..model.sites import Site
from .patches import Prompts, Source

if TYPE_CHECKING:
    from .patches import PatchBatch, PatchRows


def together(parts: list[Prompts]) -> Prompts | None:
    """Prompts of equal length as one; None of none. Where some have no noise, none has."""
    if not parts:
        return None
    noise = [p.noise for p in parts if p.noise is not None]
    return Prompts(torch.cat([p.ids for p in parts]), torch.cat(noise) if noise else None)


Move = tuple[Int[Tensor, "row 1"], Int[Tensor, "row 1"], Int[Tensor, "row_or_1 d"]]
"""Rows that are patched, the rows they take from, columns."""


@torch.no_grad()
def scores_of(
    model: TracedModel,
    parts: list[tuple[Prompts, Int[Tensor, " row"]]],
    steps: list[tuple[tuple[Any, str], list[Move]]],
    token: int,
    answers: Int[Tensor, " row"],
    foils: Int[Tensor, " row"],
) -> Float[Tensor, "metric row"]:
    """One forward: p(r) and logit difference of the last rows.

    Args:
        parts: prompts, and which of them the rows are, one part after the other.
        steps: in forward order, a side of a module and what moves there at `token`.
        answers: of the last rows; those before are only taken from.
    """
    from .patches import readout, unpadded_batch

    ids = torch.cat([prompts.ids[rows] for prompts, rows in parts])
    at_row, at_column, which, drawn = _noise(parts)
    root, embed, head = model.root, model.embed, model.envoy(model.layout.unembed)
    n = len(ids)
    with root.trace(**model.inputs(unpadded_batch(ids)), backend=model.backend()):
        if len(drawn):
            embedded = embed.output.clone()
            noise = drawn.to(embedded.device)[which]
            embedded[at_row, at_column] = (embedded[at_row, at_column] + noise).to(embedded.dtype)
            embed.output = embedded
        for (envoy, end), moves in steps:
            full = getattr(envoy, end)
            full = full[0] if isinstance(full, tuple) else full
            full = full if full.dim() == 3 else full.view(n, -1, full.shape[-1])
            for targets, sources, columns in moves:
                full[targets, token, columns] = full[sources, token, columns]
        head.input = head.input[:, -1:].contiguous()
        logits = root.output.logits[-len(answers) :, -1]
        scores: Any = readout(logits, answers, foils)
        scores.save()
    return scores.cpu()


def _noise(parts: list[tuple[Prompts, Int[Tensor, " row"]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and columns where something is added, which draw that is, and every prompt's draws once."""
    drawn: list[Tensor] = []
    rows, columns, which = [], [], []
    first, held = 0, 0
    for prompts, taken in parts:
        if prompts.noise is not None:
            unique, again = taken.unique(return_inverse=True)
            noise = prompts.noise[unique]
            prompt, column = (noise != 0).any(-1).nonzero(as_tuple=True)
            number = torch.full(noise.shape[:2], -1)
            number[prompt, column] = torch.arange(held, held + len(prompt))
            row, place = (number[again] >= 0).nonzero(as_tuple=True)
            rows.append(row + first)
            columns.append(place)
            which.append(number[again][row, place])
            drawn.append(noise[prompt, column])
            held += len(prompt)
        first += len(taken)
    if not drawn:
        return (torch.empty(0, dtype=torch.long),) * 4
    return torch.cat(rows), torch.cat(columns), torch.cat(which), torch.cat(drawn)


def patched_rows(model: TracedModel, group: PatchBatch, rows: PatchRows, token: int) -> Float[Tensor, "metric row"]:
    """`patch.patched_run`, without anything that the runs before have kept but their prompts."""
    like = torch.empty(0)
    base, donor = group.base.run.prompts, group.donor.run.prompts
    assert base is not None and donor is not None
    starts, gives = group.base.places(rows, like), group.donor.places(rows, like)
    bases, of_base = starts.unique(return_inverse=True)
    donors, of_donor = gives.unique(return_inverse=True)
    before = len(bases) + len(donors)
    places = (of_base.numpy(), len(bases) + of_donor.numpy(), before + np.arange(len(rows)))
    facts = torch.as_tensor(rows.fact)
    return scores_of(
        model,
        [(base, bases), (donor, donors), (base, starts)],
        list(_steps(model, group, rows, *places)),
        token,
        group.answers[facts],
        group.foils[facts],
    )


def _steps(
    model: TracedModel, group: PatchBatch, rows: PatchRows, base: ndarray, donor: ndarray, own: ndarray
) -> Iterator[tuple[tuple[Any, str], list[Move]]]:
    """Every module side at which rows are patched or held, with the rows of the forward that take part."""
    from .patches import ORDER, columns_of

    for layer in range(int(rows.first.min()), model.n_layers):
        for kind, end in ORDER:
            moves = []
            patched = [i for i, p in enumerate(group.patches) if p.kind is kind and p.end == end]
            here = np.flatnonzero((rows.first <= layer) & (layer < rows.stop) & rows.of(patched))
            width = model.key_size(Site(kind, layer)) if end == "key" else model.d_model
            if len(here):
                moves.append(_move(own[here], donor[here], columns_of(group, rows[here], end, width)))
            severed = [i for i, p in enumerate(group.patches) if p.severed is kind and end == "value"]
            held = np.flatnonzero((rows.enters <= layer) & rows.of(severed))
            if len(held):
                moves.append(_move(own[held], base[held], np.arange(width)[None]))
            if moves:
                source = Source(Site(kind, layer), end)
                yield model.point(source.site, source.end), moves


def _move(targets: ndarray, sources: ndarray, columns: ndarray) -> Move:
    return torch.as_tensor(targets[:, None]), torch.as_tensor(sources[:, None]), torch.as_tensor(columns)
