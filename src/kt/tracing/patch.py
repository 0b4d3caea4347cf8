"""Patched runs: one trace per patched token, all layers, kinds, facts and samples as rows of a growing batch.

A run patched at layer l and token t equals the corrupted run below l and left of t. So a row starts at the first
layer that it patches, from the corrupted run's own block input, and holds only the tokens from t on; what these see
of earlier tokens comes from the corrupted run's keys and values. The traced model's own input is one dummy row: its
masks and rotary tables have batch 1 and serve any number of rows.

Without a reusable prefix (recurrent layers, a short sliding window) rows hold all tokens. Where a model does not let
the batch grow, all rows are there from the first block, idle until they enter. probe.py finds out which holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from ..model import TracedModel
from ..sites import Kind, Site
from .runs import Corrupted, new_cache, readout, saved

PATCH_ORDER = (Kind.ATTN, Kind.MLP, Kind.RESID)
"""The order in which a block computes them: nnsight reads a forward in its own order."""


def window_layers(layer: int, width: int, n_layers: int) -> range:
    """The layers that a window of `width` centred on `layer` patches (ROME's rule)."""
    return range(max(0, layer - width // 2), min(n_layers, layer - (-width // 2)))


@dataclass(frozen=True)
class Group:
    """Facts with equal token counts, after their clean and corrupted runs."""

    clean: dict[Site, Float[Tensor, "fact pos d_model"]]
    corrupted: Corrupted
    answers: Int[Tensor, " fact"]
    foils: Int[Tensor, " fact"]
    length: int
    samples: int
    grow: bool = True


@dataclass(frozen=True)
class Rows:
    """Patched runs, one entry a row, sorted by the layer at which they enter."""

    fact: Int[ndarray, " row"]
    kind: Int[ndarray, " row"]  # index into PATCH_ORDER
    layer: Int[ndarray, " row"]  # the window's centre
    first: Int[ndarray, " row"]
    stop: Int[ndarray, " row"]
    sample: Int[ndarray, " row"]

    def __len__(self) -> int:
        return len(self.fact)

    def __getitem__(self, at: slice | ndarray) -> Rows:
        return Rows(*(getattr(self, name)[at] for name in self.__dataclass_fields__))

    @property
    def is_hidden(self) -> ndarray:
        return self.kind == PATCH_ORDER.index(Kind.RESID)

    @property
    def enters(self) -> Int[ndarray, " row"]:
        """The first block to run. A patched block output is the next block's input."""
        return self.first + self.is_hidden

    def patched(self, kind: Kind, layer: int) -> Int[ndarray, " row"]:
        """The rows whose value of `kind` is overwritten inside block `layer`."""
        inside = (self.enters <= layer) & (layer < self.stop)
        return np.flatnonzero(inside & (self.kind == PATCH_ORDER.index(kind)))


def rows_at(
    token: int, length: int, facts: Sequence[int], kinds: Sequence[Kind], window: int, n_layers: int, samples: int
) -> Rows:
    """The rows that patch `token`, without those whose result is known.

    In the last block only the last token reaches the prediction: a patch confined to it elsewhere changes nothing.
    A block output restored in the last block at the last token is the clean run.
    """
    cells = []
    for kind in kinds:
        for layer in range(n_layers):
            span = window_layers(layer, window, n_layers)
            confined = span.start == n_layers - 1 and token < length - 1
            restored = kind is Kind.RESID and span.stop == n_layers and token == length - 1
            if not confined and not restored:
                cells.append((PATCH_ORDER.index(kind), layer, span.start, span.stop))
    table = np.array(
        [(fact, *cell, sample) for cell in cells for fact in facts for sample in range(samples)], dtype=np.int64
    ).reshape(-1, 6)
    rows = Rows(*table.T)
    return rows[np.argsort(rows.enters, kind="stable")]


def chunks(rows: Rows, size: int) -> Iterator[Rows]:
    """At most `size` rows at a time."""
    for start in range(0, len(rows), size):
        yield rows[slice(start, start + size)]


@torch.no_grad()
def patched_run(model: TracedModel, group: Group, rows: Rows, token: int) -> Float[Tensor, "metric row"]:
    """p(r) and logit difference of every row, patched at `token`, in one trace."""
    start = token if group.corrupted.prefixes is not None else 0
    width = 1 if group.grow else len(rows)
    cache = _opened_cache(model, group, start, width)
    facts = torch.as_tensor(rows.fact)
    answers, foils = group.answers[facts], group.foils[facts]
    scores: list[Tensor] = []
    with model.nns.trace(**_dummy_input(model, width, group.length, start, cache)):
        for layer in range(int(rows.enters.min()), model.n_layers):
            alive = int((rows.enters <= layer).sum()) if group.grow else len(rows)
            _let_in(model, group, rows, layer, token, start)
            if cache is not None:
                _fit_cache(cache, group, rows[:alive], layer, start)
            for kind in PATCH_ORDER:
                patched = rows.patched(kind, layer)
                if len(patched):
                    values = _clean(group, rows[patched], Site(kind, layer), token)
                    here = model.value(Site(kind, layer), alive)
                    here[torch.as_tensor(patched, device=here.device), token - start] = values.to(here.device)
        scores.append(saved(readout(model.last_logits()[:, -1], answers, foils)))
    return scores[0]


def _dummy_input(model: TracedModel, width: int, length: int, start: int, cache: Any) -> dict[str, object]:
    """`width` rows of padding from `start` on; every block's input is replaced."""
    arguments: dict[str, object] = {
        "input_ids": torch.zeros((width, length - start), dtype=torch.long, device=model.device),
        "use_cache": cache is not None,
    }
    optional = {
        "position_ids": torch.arange(start, length, device=model.device).expand(width, -1),
        "past_key_values": cache,
        "logits_to_keep": 1,
    }
    return arguments | {k: v for k, v in optional.items() if v is not None and k in model._forward_parameters}


def _let_in(model: TracedModel, group: Group, rows: Rows, layer: int, token: int, start: int) -> None:
    """Append the rows that enter at this block: the corrupted run's input, patched for `hidden`."""
    block = model.block(layer)
    before = block.input  # read even if nobody enters: nnsight then waits for this block before going on
    places = np.flatnonzero(rows.enters == layer)
    if not len(places):
        return
    entering = rows[places]
    stored = group.corrupted.inputs[layer]
    source = torch.as_tensor(entering.fact * group.samples + entering.sample, device=stored.device)
    fresh = stored[source, start:]
    hidden = np.flatnonzero(entering.is_hidden)
    if len(hidden):
        values = _clean(group, entering[hidden], Site(Kind.RESID, layer - 1), token)
        fresh[torch.as_tensor(hidden, device=fresh.device), token - start] = values.to(fresh.device)
    if not group.grow:
        block.input = before.clone().index_copy_(0, torch.as_tensor(places, device=fresh.device), fresh)
    elif layer == int(rows.enters.min()):
        block.input = fresh
    else:
        block.input = torch.cat([before, fresh])


def _clean(group: Group, rows: Rows, site: Site, token: int) -> Float[Tensor, "row d_model"]:
    values = group.clean[site]
    return values[torch.as_tensor(rows.fact, device=values.device), token]


def _opened_cache(model: TracedModel, group: Group, start: int, width: int) -> Any:
    """A cache that looks `start` tokens long in every layer, for the dummy rows."""
    if not start or group.corrupted.prefixes is None:
        return None
    cache = new_cache(model)
    for layer, (keys, values) in enumerate(group.corrupted.prefixes):
        dummy = (held[:1, :, :start].expand(width, -1, -1, -1) for held in (keys, values))
        cache.update(*dummy, layer)
    return cache


def _fit_cache(cache: Any, group: Group, rows: Rows, layer: int, start: int) -> None:
    """Give this block the prefixes of the rows alive in it, and forget the block before: one layer at a time."""
    layers = cache.layers
    if layer:
        layers[layer - 1].keys = layers[layer - 1].values = None
    keys, values = group.corrupted.prefixes[layer]  # type: ignore[index]
    source = torch.as_tensor(rows.fact * group.samples + rows.sample, device=keys.device)
    layers[layer].keys, layers[layer].values = keys[source, :, :start], values[source, :, :start]
