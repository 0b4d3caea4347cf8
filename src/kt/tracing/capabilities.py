"""Which shortcuts of patch.py a model allows, found out by running it: no list of families can be complete.

Two prompts are run whole, then again as patched rows that patch nothing: they must give the same answer. Most models
let a batch grow inside a forward; a few fix its size at the start, and their rows are all there from the first block.
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
    """The most that the model allows; whole rows in a fixed batch work with every one."""
    if model.remote:
        return Shortcuts(False, False)
    reuse = reuse_prefix and prefix_is_reusable(model, _LENGTH)
    ways = [Shortcuts(True, reuse), Shortcuts(True, False), Shortcuts(False, reuse)]
    found = next((way for way in ways if _holds(model, way)), Shortcuts(False, False))
    if reuse and not found.reuse:
        prefix_is_off(model, "rows patched over kept keys and values did not give the scores of whole rows")
    if not found.grow:
        shortcut_off(
            f"{model.name}: patched rows are in the batch from the first block on, because it did not let rows join "
            "inside its forward; the numbers are the same, but a trace costs about twice the work"
        )
    return found


def _holds(model: TracedModel, way: Shortcuts) -> bool:
    ids = torch.arange(2 * _LENGTH, device=model.device).reshape(2, _LENGTH) % model.vocab_size
    answers, foils = torch.tensor([1, 2]), torch.tensor([2, 1])
    whole = run_rows(model, ids, None, answers, foils, start=True, prefix=way.reuse)
    late, none = np.full(2, model.n_layers - 1), np.zeros(2, dtype=np.int64)
    side = PatchSource(whole, 1)
    group = PatchBatch(side, side, answers, foils, _LENGTH, 1, (Patch(Kind.MLP),), grow=way.grow)
    nothing = np.array([0, model.n_layers - 1])
    rows = PatchRows(np.arange(2), none, none, late, nothing, nothing, none)
    try:
        scores = patched_run(model, group, rows, _TOKEN)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError):  # shapes that the model does not take
        return False
    close = 1e-3 if whole.scores.dtype == model.dtype else 0.1
    return bool(torch.allclose(scores.cpu(), whole.scores.cpu(), rtol=close, atol=close, equal_nan=True))
