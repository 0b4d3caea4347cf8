"""Which shortcuts of patch.py a model allows. A trial run decides, since no list of families can be complete.

Two prompts run once plainly and once as patched rows that patch nothing; both runs must give the same answer. Most
models let a batch grow inside a forward; a few fix its size at the start, and then all rows run from the first block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..errors import shortcut_off
from ..model.model import TracedModel
from ..model.prefix import prefix_is_off, prefix_is_reusable
from ..model.sites import Kind
from .forward import run_rows
from .patch import patched_run
from .patches import Patch, PatchBatch, PatchRows, PatchSource

_LENGTH, _TOKEN = 4, 2


class Shortcuts(NamedTuple):
    """`grow`: rows may join at any block. `reuse`: earlier tokens' keys and values may come from another run."""

    grow: bool
    reuse: bool


def shortcuts(model: TracedModel, reuse_prefix: bool = True) -> Shortcuts:
    """The fastest shortcuts under which patched runs of this model stay right; every model works without any."""
    if model.remote:
        return Shortcuts(False, False)
    reuse = reuse_prefix and prefix_is_reusable(model, _LENGTH)
    candidates = [Shortcuts(True, reuse), Shortcuts(True, False), Shortcuts(False, reuse)]
    exact = next((candidate for candidate in candidates if _is_exact(model, candidate)), Shortcuts(False, False))
    if reuse and not exact.reuse:
        prefix_is_off(model, "rows patched over kept keys and values did not give the scores of whole rows")
    if not exact.grow:
        shortcut_off(
            f"{model.name}: patched rows are in the batch from the first block on, because it did not let rows join "
            "inside its forward; the numbers are the same, but a trace costs about twice the work"
        )
    return exact


def _is_exact(model: TracedModel, candidate: Shortcuts) -> bool:
    ids = torch.arange(2 * _LENGTH, device=model.device).reshape(2, _LENGTH) % model.vocab_size
    answers, foils = torch.tensor([[1], [2]]), torch.tensor([2, 1])
    plain = run_rows(model, ids, None, answers, foils, start=True, prefix=candidate.reuse)
    source = PatchSource(plain, 1)
    group = PatchBatch(source, source, answers, foils, _LENGTH, 1, (Patch(Kind.MLP),), grow=candidate.grow)
    zeros, centre = np.zeros(2, dtype=np.int64), np.full(2, model.n_layers - 1)
    enter = np.array([0, model.n_layers - 1])  # windows from `enter` to `enter`: one row enters early, one late
    rows = PatchRows(np.arange(2), zeros, zeros, centre, enter, enter, zeros)
    try:
        scores = patched_run(model, group, rows, _TOKEN)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, AttributeError):  # what the model does not take (MPT: an empty layer)
        return False
    tolerance = 1e-3 if plain.scores.dtype == model.dtype else 0.1
    return bool(torch.allclose(scores.cpu(), plain.scores.cpu(), rtol=tolerance, atol=tolerance, equal_nan=True))
