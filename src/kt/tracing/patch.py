"""Patched runs: one trace per patched token, all layers, patches, facts and samples as rows of a growing batch.

A run patched at layer l and token t equals its base run below l and left of t. So a row starts at the first layer that
it patches, from the base run's block input, and holds only the tokens from t on; these see earlier tokens through the
base run's keys and values. The traced model's own input is one dummy row: its masks and rotary tables have batch 1 and
serve any number of rows.

Without a reusable prefix (recurrent layers, a short sliding window) rows hold all tokens. If a model does not let the
batch grow, all rows run from the first block, idle until they enter. capabilities.py tests which shortcuts are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from ..model.model import TracedModel
from ..model.prefix import new_cache, saved
from ..model.sites import Kind, Site
from .patches import (
    Patch,
    PatchBatch,
    PatchRows,
    Source,
    columns_of,
    live_tensor,
    patched_at,
    readout,
    severed_at,
    sources_at,
)
from .remote_patch import patched_rows


def window_layers(layer: int, width: int, n_layers: int) -> range:
    """The layers of a window of `width` layers centred on `layer` (ROME's rule)."""
    return range(max(0, layer - width // 2), min(n_layers, layer - (-width // 2)))


def rows_at(
    token: int,
    length: int,
    facts: Sequence[int],
    patches: Sequence[Patch],
    window: int,
    n_layers: int,
    samples: int,
    only: Mapping[int, Mapping[str, ndarray]] | None = None,
    keep: int = 1,
) -> PatchRows:
    """The rows that patch `token`, without rows whose result is known beforehand.

    Two results are known. In the last block a token reaches only the prediction of the next one, so a patch confined to
    that block left of the prompt's last token changes nothing. Replacing the last block's output there gives the
    donor's score of the first token that is predicted (see `is_replaced`).

    Args:
        token: the patched token's position.
        length: tokens of every prompt.
        keep: tokens of the answer, of which all but the last stand behind the prompt.
        only: the (layer, token) cells to run, by fact and label; None for all.
    """
    cells = []
    for number, patch in enumerate(patches):
        for layer in range(n_layers):
            span = window_layers(layer, window, n_layers)
            confined = span.start == n_layers - 1 and token < length - 1
            replaced = token == length - 1 and is_replaced(patch, span, n_layers, keep)
            if not confined and not replaced:
                wanted = [f for f in facts if only is None or only[f][patch.label][layer, token]]
                cells.append((wanted, (number, int(patch.is_hidden), layer, span.start, span.stop)))
    table = np.array(
        [(fact, *cell, sample) for wanted, cell in cells for fact in wanted for sample in range(samples)],
        dtype=np.int64,
    ).reshape(-1, 7)
    rows = PatchRows(*table.T)
    return rows[np.argsort(rows.enters, kind="stable")]


def is_replaced(patch: Patch, window: range, n_layers: int, keep: int) -> bool:
    """Whether the patch at the prompt's last token replaces the last block's output and no more than that matters.

    Blocks below it matter to an answer of several tokens: those behind the first read the prompt's last token there.
    """
    return patch.is_hidden and (window.stop == n_layers if keep == 1 else window.start == n_layers - 1)


def chunks(rows: PatchRows, size: int) -> Iterator[PatchRows]:
    """Yield at most `size` rows at a time."""
    for start in range(0, len(rows), size):
        yield rows[slice(start, start + size)]


@torch.no_grad()
def patched_run(model: TracedModel, group: PatchBatch, rows: PatchRows, token: int) -> Float[Tensor, "metric row"]:
    """The scores of every row (see `readout`), patched at `token`, in one trace."""
    if model.remote:
        return patched_rows(model, group, rows, token)
    start = token if group.base.run.prefixes is not None else 0
    width = 1 if group.grow else len(rows)
    cache = _dummy_cache(model, group, start, width)
    answers, foils = group.asked(rows)
    scores: list[Tensor] = []
    with model.nnsight.trace(**_dummy_input(model, width, group, start, cache)):
        for layer in range(int(rows.enters.min()), model.n_layers):
            alive = int((rows.enters <= layer).sum()) if group.grow else len(rows)
            _enter(model, group, rows, layer, token, start)
            if cache is not None:
                _fit_cache(cache, group, rows[:alive], layer, start)
            mixture, added = Source(Site(Kind.MLP, layer), "value"), list[tuple[Where, Tensor]]()
            for source in sources_at(model, group.patches, layer):
                writes = list(_writes(group, rows, source, token))
                whole = Source(model.whole(source.site), "value")
                if source.site != whole.site:  # parts come right before their whole, which is written for all of them
                    added += _changes(live_tensor(model, source, alive), writes, token - start) if writes else []
                    continue
                _write(model, mixture, alive, added, token - start, add=True)
                added = []
                _write(model, source, alive, writes, token - start)
            _write(model, mixture, alive, added, token - start, add=True)
        scores.append(saved(readout(model.last_logits(group.keep), answers, foils)))
    return scores[0]


def _write(
    model: TracedModel,
    source: Source,
    alive: int,
    writes: Sequence[tuple[Where, Tensor]],
    column: int,
    add: bool = False,
) -> None:
    """Inside a trace: put values into a source's tensor, or add them."""
    if not writes:
        return
    tensor = live_tensor(model, source, alive)
    for where, values in writes:
        targets, columns = (torch.as_tensor(w, device=tensor.device) for w in where)
        values = values.to(tensor.device)
        if add:
            values = tensor[targets, column, columns] + values
        tensor[targets, column, columns] = values


def _changes(
    tensor: Float[Tensor, "row pos d"], writes: Sequence[tuple[Where, Tensor]], column: int
) -> list[tuple[Where, Tensor]]:
    """What to add to a mixture's output, so that a part of it is as it is to be."""
    changes = []
    for where, values in writes:
        targets, columns = (torch.as_tensor(w, device=tensor.device) for w in where)
        changes.append((where, values.to(tensor.device) - tensor[targets, column, columns]))
    return changes


Where = tuple[Int[ndarray, "row 1"], Int[ndarray, "row_or_1 d"]]


def _writes(group: PatchBatch, rows: PatchRows, source: Source, token: int) -> Iterator[tuple[Where, Tensor]]:
    """Yield what to write into a source's tensor at the patched token: (rows, columns) and the values.

    First come the donor's values inside each row's window, then the base's values for severed modules.
    """
    patched = patched_at(group, rows, source, rows.enters)
    if len(patched):
        values = group.donor.read(source, rows[patched], token)
        columns = columns_of(group, rows[patched], source.end, values.shape[1])
        values = values.gather(1, torch.as_tensor(columns, device=values.device).expand(len(patched), -1))
        yield (patched[:, None], columns), values
    severed = severed_at(group, rows, source)
    if len(severed):
        values = group.base.read(source, rows[severed], token)
        yield (severed[:, None], np.arange(values.shape[1])[None]), values


def _dummy_input(model: TracedModel, width: int, group: PatchBatch, start: int, cache: Any) -> dict[str, object]:
    """`width` rows of padding from `start` on; every block's input is replaced."""
    length = group.length
    arguments = {"input_ids": torch.zeros((width, length - start), dtype=torch.long, device=model.device)}
    optional = {
        # Over the cached tokens too: nnsight makes up one over `input_ids` alone, and newer transformers mask the rest.
        "attention_mask": torch.ones((width, length), dtype=torch.long, device=model.device),
        "position_ids": torch.arange(start, length, device=model.device).expand(width, -1),
        "logits_to_keep": group.keep,
    }
    known = {k: v for k, v in optional.items() if k in model._forward_parameters}
    return arguments | known | model.cache_arguments(cache)


def _enter(model: TracedModel, group: PatchBatch, rows: PatchRows, layer: int, token: int, start: int) -> None:
    """Append the rows that enter at this block: the base run's input, patched for `hidden`."""
    block = model.block(layer)
    before = block.input  # read even if no row enters: nnsight then waits for this block before going on
    indices = np.flatnonzero(rows.enters == layer)
    if not len(indices):
        return
    entering = rows[indices]
    stored = group.base.run.inputs[layer]
    fresh = stored[group.base.run_rows(entering, stored), start:]
    hidden = np.flatnonzero(entering.hidden)
    if len(hidden):
        values = group.donor.read(Source(Site(Kind.RESID, layer - 1), "value"), entering[hidden], token)
        fresh[torch.as_tensor(hidden, device=fresh.device), token - start] = values.to(fresh.device)
    if not group.grow:
        block.input = before.clone().index_copy_(0, torch.as_tensor(indices, device=fresh.device), fresh)
    elif layer == int(rows.enters.min()):
        block.input = fresh
    else:
        block.input = torch.cat([before, fresh])


def _dummy_cache(model: TracedModel, group: PatchBatch, start: int, width: int) -> Any:
    """A KV cache of `start` tokens in every layer, for the dummy rows."""
    if not start or group.base.run.prefixes is None:
        return None
    cache = new_cache(model)
    for layer, (keys, values) in enumerate(group.base.run.prefixes):
        dummy = (states[:1, :, :start].expand(width, -1, -1, -1) for states in (keys, values))
        cache.update(*dummy, layer)
    return cache


def _fit_cache(cache: Any, group: PatchBatch, rows: PatchRows, layer: int, start: int) -> None:
    """Give this block the prefixes of the rows alive in it, and free the previous block's: one layer at a time."""
    layers = cache.layers
    if layer:
        layers[layer - 1].keys = layers[layer - 1].values = None
    keys, values = group.base.run.prefixes[layer]  # type: ignore[index]
    indices = group.base.run_rows(rows, keys)
    layers[layer].keys, layers[layer].values = keys[indices, :, :start], values[indices, :, :start]
