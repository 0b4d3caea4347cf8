"""Facts in groups of equal length through the clean, the corrupted and the patched runs.

The batches are a matter of speed and memory only: no number depends on them beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from ..errors import WorkFailed
from ..model import TracedModel
from ..progress import Progress
from ..sites import Kind
from .cases import Case, equal_lengths
from .corrupt import Corruption
from .patch import PATCH_ORDER, Group, chunks, patched_run, rows_at
from .probe import Shortcuts
from .runs import Corrupted, clean_values, corrupted_run, joined, prefix_is_reusable, readout, whole

_MEMORY = {"cuda": 2 << 30, "cpu": 64 << 20}
"""Bytes of one trace's largest activations and logits, which set the default `max_rows`."""


class Plan(NamedTuple):
    """What is the same for all facts of a run."""

    kinds: tuple[Kind, ...]
    window: int
    max_rows: int
    min_gap: float
    shortcuts: Shortcuts


class Outcome(NamedTuple):
    """The measurements of one case; axis `metric` is p(r), then the logit difference.

    `patched` is None where clean and corrupted logit difference are less than `min_gap` apart.
    """

    case: Case
    corruption: Corruption
    clean: Float[ndarray, " metric"]
    corrupted: Float[ndarray, "metric sample"]
    patched: dict[Kind, Float[ndarray, "metric layer token sample"]] | None


def default_max_rows(model: TracedModel, length: int) -> int:
    """Rows whose MLP activations and logits fill the memory set aside for one trace."""
    config = model.module.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 0
    size = 2 if model.dtype in (torch.float16, torch.bfloat16) else 4
    row = length * max(int(inner), 4 * model.d_model) * size + 8 * model.vocab_size
    return max(16, _MEMORY.get(model.device.type, _MEMORY["cpu"]) // row)


def run_all(
    model: TracedModel, cases: Sequence[Case], made: Sequence[Corruption], plan: Plan, progress: Progress | None
) -> list[Outcome]:
    """Trace all cases, in the order given.

    Raises:
        WorkFailed: a number is not finite.
    """
    outcomes: list[Outcome] = []
    for at in _groups(model, cases, made, plan):
        outcomes += _run_group(model, [cases[i] for i in at], [made[i] for i in at], plan)
        if progress is not None:
            progress(len(outcomes), len(cases))
    return sorted(outcomes, key=lambda o: o.case.index)


def _groups(model: TracedModel, cases: Sequence[Case], made: Sequence[Corruption], plan: Plan) -> Iterator[list[int]]:
    """Cases with equal token counts and samples, as many together as fill one trace."""
    for samples in sorted({m.samples for m in made}):
        indices = [i for i, m in enumerate(made) if m.samples == samples]
        together = max(1, plan.max_rows // (samples * model.n_layers * len(plan.kinds)))
        for rows in equal_lengths([cases[i].ids for i in indices], together):
            yield [indices[r] for r in rows]


def _run_group(model: TracedModel, cases: Sequence[Case], made: Sequence[Corruption], plan: Plan) -> list[Outcome]:
    ids = torch.tensor([c.ids for c in cases], device=model.device)
    answers, foils = torch.tensor([c.answer_id for c in cases]), torch.tensor([c.foil_id for c in cases])
    clean = readout(model.logits(whole(ids))[:, -1], answers, foils).cpu().numpy()
    run = _corrupted(model, cases, made, plan, answers, foils)
    corrupted = run.scores.cpu().numpy().copy().reshape(2, len(cases), made[0].samples)
    for case, before, after in zip(cases, clean.T, corrupted.swapaxes(0, 1), strict=True):
        _must_be_finite(case, before, after)
    gaps = np.abs(clean[1] - corrupted[1].mean(-1, dtype=np.float64))
    alive = [i for i in range(len(cases)) if gaps[i] >= plan.min_gap]
    patched = {}
    if alive:
        values = clean_values(model, ids, plan.kinds)
        group = Group(values, run, answers, foils, ids.shape[1], made[0].samples, plan.shortcuts.grow)
        patched = _patched(model, group, plan, alive, [m.first for m in made], clean, corrupted)
    outcomes = []
    for i, case in enumerate(cases):
        found = {kind: values[:, i].copy() for kind, values in patched.items()} if i in alive else None
        _must_be_finite(case, *(found or {}).values())
        outcomes.append(Outcome(case, made[i], clean[:, i], corrupted[:, i], found))
    return outcomes


def _corrupted(
    model: TracedModel,
    cases: Sequence[Case],
    made: Sequence[Corruption],
    plan: Plan,
    answers: Tensor,
    foils: Tensor,
) -> Corrupted:
    """The corrupted run of all cases and samples, at most `max_rows` rows at a time."""
    length = len(cases[0].ids)
    reuse = plan.shortcuts.reuse and prefix_is_reusable(model, length)
    rows = [(i, s) for i in range(len(cases)) for s in range(made[0].samples)]
    parts = []
    for at in range(0, len(rows), plan.max_rows):
        block = rows[at : at + plan.max_rows]
        which = torch.tensor([i for i, _ in block])
        ids = torch.tensor([made[i].ids for i, _ in block], device=model.device)
        noise = _placed_noise(cases, made, block)
        parts.append(corrupted_run(model, ids, noise, answers[which], foils[which], reuse))
    return joined(parts)


def _placed_noise(
    cases: Sequence[Case], made: Sequence[Corruption], rows: Sequence[tuple[int, int]]
) -> Float[Tensor, "row pos d_embed"] | None:
    """The draws at the subjects' tokens, zeros elsewhere."""
    first = made[0].noise
    if first is None:
        return None
    placed = torch.zeros((len(rows), len(cases[0].ids), first.shape[-1]), dtype=first.dtype)
    for row, (i, sample) in enumerate(rows):
        noise, span = made[i].noise, cases[i].span
        if noise is not None:
            placed[row, span.start : span.stop] = noise[sample]
    return placed


def _patched(
    model: TracedModel,
    group: Group,
    plan: Plan,
    alive: Sequence[int],
    first: Sequence[int],
    clean: Float[ndarray, "metric fact"],
    corrupted: Float[ndarray, "metric fact sample"],
) -> dict[Kind, Float[ndarray, "metric fact layer token sample"]]:
    """Every patched run; cells that are not run keep the value that they are known to have.

    That value is the corrupted run's, and the clean run's where the last block's output at the last token is restored.
    """
    n_layers, last = model.n_layers, group.length - 1
    shape = (2, corrupted.shape[1], n_layers, group.length, group.samples)
    found = {k: np.broadcast_to(corrupted[:, :, None, None], shape).copy() for k in plan.kinds}
    if Kind.RESID in found:
        for layer in range(n_layers):
            if layer - (-plan.window // 2) >= n_layers:
                found[Kind.RESID][:, :, layer, last] = clean[:, :, None]
    for token in range(min(first), group.length):
        facts = [i for i in alive if first[i] <= token]
        rows = rows_at(token, group.length, facts, plan.kinds, plan.window, n_layers, group.samples)
        for some in chunks(rows, plan.max_rows):
            scores = patched_run(model, group, some, token).cpu().numpy()
            for k, kind in enumerate(PATCH_ORDER):
                mine = some.kind == k
                if mine.any():
                    at = some[mine]
                    found[kind][:, at.fact, at.layer, token, at.sample] = scores[:, mine]
    return found


def _must_be_finite(case: Case, *values: ndarray) -> None:
    if not all(np.isfinite(v).all() for v in values):
        raise WorkFailed(
            f"fact {case.index} ({case.fact.prompt!r}): the model gives numbers that are not finite; "
            "load it with dtype float32 or bfloat16"
        )
