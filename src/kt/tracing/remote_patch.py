"""Patched runs of remote models: every row is a whole prompt, from the first layer on.

The base and donor runs are rows of the same forward, and a patch copies from row to row. So token ids and noise are
sent, two numbers per row come back, and no state travels; the growing batch of patch.py would send the base's states at
every layer. Numbers equal those of patch.py up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from ..model.model import TracedModel
from .patches import (
    PatchBatch,
    PatchRows,
    Prompts,
    columns_of,
    patched_at,
    readout,
    severed_at,
    sources_at,
    unpadded_batch,
)


def together(parts: list[Prompts]) -> Prompts | None:
    """Concatenate prompts of equal length; None for an empty list. Either all parts have noise, or none has."""
    if not parts:
        return None
    noise = [p.noise for p in parts if p.noise is not None]
    return Prompts(torch.cat([p.ids for p in parts]), torch.cat(noise) if noise else None)


Move = tuple[Int[Tensor, "row 1"], Int[Tensor, "row 1"], Int[Tensor, "row_or_1 d"]]
"""Target rows, source rows, columns."""


@torch.no_grad()
def scores_of(
    model: TracedModel,
    parts: list[tuple[Prompts, Int[Tensor, " row"]]],
    steps: list[tuple[tuple[Any, str], list[Move]]],
    token: int,
    answers: Int[Tensor, "row 1"],
    foils: Int[Tensor, " row"] | None,
) -> Float[Tensor, "metric row"]:
    """One forward: the scores of the last rows (see `readout`).

    Args:
        parts: prompts and the indices into them that make up the rows, one part after the other.
        steps: in forward order, a module's input or output and the copies to make there at `token`.
        answers, foils: for the last rows; earlier rows are only copied from.
    """
    ids = torch.cat([prompts.ids[rows] for prompts, rows in parts])
    noise_rows, noise_columns, draw_index, draws = _noise(parts)
    root, embed, head = model.root, model.embed, model.envoy(model.layout.unembed)
    n = len(ids)
    with root.trace(**model.inputs(unpadded_batch(ids)), backend=model.backend()):
        if len(draws):
            embedded = embed.output.clone()
            noise = draws.to(embedded.device)[draw_index]
            noisy = embedded[noise_rows, noise_columns] + noise
            embedded[noise_rows, noise_columns] = noisy.to(embedded.dtype)
            embed.output = embedded
        for (envoy, end), moves in steps:
            full = getattr(envoy, end)
            full = full[0] if isinstance(full, tuple) else full
            full = full if full.dim() == 3 else full.view(n, -1, full.shape[-1])
            for targets, sources, columns in moves:
                full[targets, token, columns] = full[sources, token, columns]
        head.input = head.input[:, -1:].contiguous()
        logits = root.output.logits[-len(answers) :, -1:]
        scores: Any = readout(logits, answers, foils)
        scores.save()
    return scores.cpu()


def _noise(parts: list[tuple[Prompts, Int[Tensor, " row"]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where noise is added, (row,) and (column,), the index of the draw there, and the draws, each sent once."""
    rows, columns, draw_index, draws = [], [], [], []
    first_row, n_draws = 0, 0
    for prompts, indices in parts:
        if prompts.noise is not None:
            unique, inverse = indices.unique(return_inverse=True)
            noise = prompts.noise[unique]
            prompt, column = (noise != 0).any(-1).nonzero(as_tuple=True)
            number = torch.full(noise.shape[:2], -1)
            number[prompt, column] = torch.arange(n_draws, n_draws + len(prompt))
            row, row_column = (number[inverse] >= 0).nonzero(as_tuple=True)
            rows.append(row + first_row)
            columns.append(row_column)
            draw_index.append(number[inverse][row, row_column])
            draws.append(noise[prompt, column])
            n_draws += len(prompt)
        first_row += len(indices)
    if not draws:
        return (torch.empty(0, dtype=torch.long),) * 4
    return torch.cat(rows), torch.cat(columns), torch.cat(draw_index), torch.cat(draws)


def patched_rows(model: TracedModel, group: PatchBatch, rows: PatchRows, token: int) -> Float[Tensor, "metric row"]:
    """`patch.patched_run` for a remote model: base and donor runs are repeated from their prompts."""
    like = torch.empty(0)
    base, donor = group.base.run.prompts, group.donor.run.prompts
    assert base is not None and donor is not None
    base_rows, donor_rows = group.base.run_rows(rows, like), group.donor.run_rows(rows, like)
    bases, of_base = base_rows.unique(return_inverse=True)
    donors, of_donor = donor_rows.unique(return_inverse=True)
    n_sources = len(bases) + len(donors)
    forward_rows = (of_base.numpy(), len(bases) + of_donor.numpy(), n_sources + np.arange(len(rows)))
    return scores_of(
        model,
        [(base, bases), (donor, donors), (base, base_rows)],
        list(_steps(model, group, rows, *forward_rows)),
        token,
        *group.asked(rows),
    )


def _steps(
    model: TracedModel, group: PatchBatch, rows: PatchRows, base: ndarray, donor: ndarray, target: ndarray
) -> Iterator[tuple[tuple[Any, str], list[Move]]]:
    """Every module side at which rows are patched or severed, and the copies; indices are of the forward's rows."""
    for layer in range(int(rows.first.min()), model.n_layers):
        for source in sources_at(model, group.patches, layer):
            end, moves = source.end, []
            width = model.key_size(source.site) if end == "key" else model.d_model
            patched = patched_at(group, rows, source, rows.first)
            if len(patched):
                moves.append(_move(target[patched], donor[patched], columns_of(group, rows[patched], end, width)))
            severed = severed_at(group, rows, source)
            if len(severed):
                moves.append(_move(target[severed], base[severed], np.arange(width)[None]))
            if moves:
                yield model.point(source.site, source.end), moves


def _move(targets: ndarray, sources: ndarray, columns: ndarray) -> Move:
    return torch.as_tensor(targets[:, None]), torch.as_tensor(sources[:, None]), torch.as_tensor(columns)
