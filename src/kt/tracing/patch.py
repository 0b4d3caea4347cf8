"""Patched runs: one trace per patched token, all layers, patches, facts and samples as rows of a growing batch.

A run patched at layer l and token t equals its base run below l and left of t. So a row starts at the first layer that
it patches, from the base run's own block input, and holds only the tokens from t on; what these see of earlier tokens
comes from the base run's keys and values. The traced model's own input is one dummy row: its masks and rotary tables
have batch 1 and serve any number of rows.

Without a reusable prefix (recurrent layers, a short sliding window) rows hold all tokens. Where a model does not let
the batch grow, all rows are there from the first block, idle until they enter. probe.py finds out which holds.
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
from .patches import ORDER, Patch, PatchBatch, PatchRows, Source, at, columns_of, readout
from .remote_patch import patched_rows


def window_layers(layer: int, width: int, n_layers: int) -> range:
    """The layers that a window of `width` centred on `layer` patches (ROME's rule)."""
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
) -> PatchRows:
    """The rows that patch `token`, without those whose result is known.

    In the last block only the last token reaches the prediction: a patch confined to it elsewhere changes nothing.
    A block output replaced in the last block at the last token is the donor run's end. `only` names by fact and label
    the (layer, token) cells that are wanted; without it all are.
    """
    cells = []
    for number, patch in enumerate(patches):
        for layer in range(n_layers):
            span = window_layers(layer, window, n_layers)
            confined = span.start == n_layers - 1 and token < length - 1
            replaced = patch.is_hidden and span.stop == n_layers and token == length - 1
            if not confined and not replaced:
                wanted = [f for f in facts if only is None or only[f][patch.label][layer, token]]
                cells.append((wanted, (number, int(patch.is_hidden), layer, span.start, span.stop)))
    table = np.array(
        [(fact, *cell, sample) for wanted, cell in cells for fact in wanted for sample in range(samples)],
        dtype=np.int64,
    ).reshape(-1, 7)
    rows = PatchRows(*table.T)
    return rows[np.argsort(rows.enters, kind="stable")]


def chunks(rows: PatchRows, size: int) -> Iterator[PatchRows]:
    """At most `size` rows at a time."""
    for start in range(0, len(rows), size):
        yield rows[slice(start, start + size)]


@torch.no_grad()
def patched_run(model: TracedModel, group: PatchBatch, rows: PatchRows, token: int) -> Float[Tensor, "metric row"]:
    """p(r) and logit difference of every row, patched at `token`, in one trace."""
    if model.remote:
        return patched_rows(model, group, rows, token)
    start = token if group.base.run.prefixes is not None else 0
    width = 1 if group.grow else len(rows)
    cache = _opened_cache(model, group, start, width)
    facts = torch.as_tensor(rows.fact)
    answers, foils = group.answers[facts], group.foils[facts]
    scores: list[Tensor] = []
    with model.nnsight.trace(**_dummy_input(model, width, group.length, start, cache)):
        for layer in range(int(rows.enters.min()), model.n_layers):
            alive = int((rows.enters <= layer).sum()) if group.grow else len(rows)
            _let_in(model, group, rows, layer, token, start)
            if cache is not None:
                _fit_cache(cache, group, rows[:alive], layer, start)
            for kind, end in ORDER:
                source = Source(Site(kind, layer), end)
                written = list(_overwritten(group, rows, source, token))
                if written:
                    here = at(model, source, alive)
                    for where, values in written:
                        places, columns = (torch.as_tensor(w, device=here.device) for w in where)
                        here[places, token - start, columns] = values.to(here.device)
        scores.append(saved(readout(model.last_logits()[:, -1], answers, foils)))
    return scores[0]


Where = tuple[Int[ndarray, "row 1"], Int[ndarray, "row_or_1 d"]]


def _overwritten(group: PatchBatch, rows: PatchRows, source: Source, token: int) -> Iterator[tuple[Where, Tensor]]:
    """What a source's tensor gets at the patched token: (rows, columns), and the values there.

    First the donor's values inside each row's window, then the base's own where a module is severed.
    """
    (kind, layer), end = (source.site.kind, source.site.layer), source.end
    patched = [i for i, p in enumerate(group.patches) if p.kind is kind and p.end == end]
    here = np.flatnonzero((rows.enters <= layer) & (layer < rows.stop) & rows.of(patched))
    if len(here):
        values = group.donor.read(source, rows[here], token)
        columns = columns_of(group, rows[here], end, values.shape[1])
        values = values.gather(1, torch.as_tensor(columns, device=values.device).expand(len(here), -1))
        yield (here[:, None], columns), values
    severed = [i for i, p in enumerate(group.patches) if p.severed is kind and end == "value"]
    held = np.flatnonzero((rows.enters <= layer) & rows.of(severed))
    if len(held):
        values = group.base.read(source, rows[held], token)
        yield (held[:, None], np.arange(values.shape[1])[None]), values


def _dummy_input(model: TracedModel, width: int, length: int, start: int, cache: Any) -> dict[str, object]:
    """`width` rows of padding from `start` on; every block's input is replaced."""
    arguments = {"input_ids": torch.zeros((width, length - start), dtype=torch.long, device=model.device)}
    optional = {
        # Over the cached tokens too: nnsight makes up one over `input_ids` alone, and newer transformers mask the rest.
        "attention_mask": torch.ones((width, length), dtype=torch.long, device=model.device),
        "position_ids": torch.arange(start, length, device=model.device).expand(width, -1),
        "logits_to_keep": 1,
    }
    known = {k: v for k, v in optional.items() if k in model._forward_parameters}
    return arguments | known | model.cache_arguments(cache)


def _let_in(model: TracedModel, group: PatchBatch, rows: PatchRows, layer: int, token: int, start: int) -> None:
    """Append the rows that enter at this block: the base run's input, patched for `hidden`."""
    block = model.block(layer)
    before = block.input  # read even if nobody enters: nnsight then waits for this block before going on
    places = np.flatnonzero(rows.enters == layer)
    if not len(places):
        return
    entering = rows[places]
    stored = group.base.run.inputs[layer]
    fresh = stored[group.base.places(entering, stored), start:]
    hidden = np.flatnonzero(entering.hidden)
    if len(hidden):
        values = group.donor.read(Source(Site(Kind.RESID, layer - 1), "value"), entering[hidden], token)
        fresh[torch.as_tensor(hidden, device=fresh.device), token - start] = values.to(fresh.device)
    if not group.grow:
        block.input = before.clone().index_copy_(0, torch.as_tensor(places, device=fresh.device), fresh)
    elif layer == int(rows.enters.min()):
        block.input = fresh
    else:
        block.input = torch.cat([before, fresh])


def _opened_cache(model: TracedModel, group: PatchBatch, start: int, width: int) -> Any:
    """A cache that looks `start` tokens long in every layer, for the dummy rows."""
    if not start or group.base.run.prefixes is None:
        return None
    cache = new_cache(model)
    for layer, (keys, values) in enumerate(group.base.run.prefixes):
        dummy = (held[:1, :, :start].expand(width, -1, -1, -1) for held in (keys, values))
        cache.update(*dummy, layer)
    return cache


def _fit_cache(cache: Any, group: PatchBatch, rows: PatchRows, layer: int, start: int) -> None:
    """Give this block the prefixes of the rows alive in it, and forget the block before: one layer at a time."""
    layers = cache.layers
    if layer:
        layers[layer - 1].keys = layers[layer - 1].values = None
    keys, values = group.base.run.prefixes[layer]  # type: ignore[index]
    source = group.base.places(rows, keys)
    layers[layer].keys, layers[layer].values = keys[source, :, :start], values[source, :, :start]
