"""Run groups of facts with equal token counts: the clean, the corrupted and all patched runs.

Batch sizes affect speed and memory only: results depend on them only by rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from .._util.progress import Progress
from ..errors import WorkFailed
from ..model.memory import free_on
from ..model.model import TracedModel
from ..model.prefix import prefix_is_reusable
from ..model.sites import Site
from ..runs.journal import Journal
from .capabilities import Shortcuts
from .corrupt import Corruption
from .forward import joined, run_rows
from .patch import chunks, patched_run, rows_at, window_layers
from .patches import Patch, PatchBatch, PatchSource, Run, Source, heads
from .prompts import TracePrompt, equal_lengths

NO_JOURNAL = Journal()

_MEMORY = {"cuda": 2 << 30, "cpu": 64 << 20}
"""Bytes that one trace's largest activations and logits may take; they set the default `max_rows`."""

LEAST_ROWS = 16


class Plan(NamedTuple):
    """The settings of a run, equal for all its facts; `kinds` are labels of patches.

    `only` gives, for each of the caller's facts, the (layer, token) cells to patch by label; other cells become NaN.
    Every group of facts is a phase of `journal`.
    """

    kinds: tuple[str, ...]
    window: int
    max_rows: int
    min_gap: float
    shortcuts: Shortcuts
    direction: str = "denoise"
    only: Sequence[Mapping[str, Bool[ndarray, "layer token"]]] | Mapping[int, Any] | None = None
    journal: Journal = NO_JOURNAL

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches of `kinds`."""
        return tuple(Patch.parse(kind) for kind in self.kinds)


class Outcome(NamedTuple):
    """The measurements of one prompt; axis `metric` is p(r), then the logit difference.

    `patched` is None where clean and corrupted logit difference are less than `min_gap` apart.
    """

    case: TracePrompt
    corruption: Corruption
    clean: Float[ndarray, " metric"]
    corrupted: Float[ndarray, "metric sample"]
    patched: dict[str, Float[ndarray, "metric layer token sample"]] | None


RunGroup = Callable[[TracedModel, Sequence[TracePrompt], Sequence[Corruption], Plan], list[Outcome]]


def default_max_rows(model: TracedModel, length: int) -> int:
    """The number of rows whose MLP activations and logits fill the memory set aside for one trace.

    That memory is halved until it is at most a quarter of the free memory of the model's device. So all machines with
    enough memory use the same groups of rows and give the same bytes.
    """
    config = model.module.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 0
    size = 2 if model.dtype in (torch.float16, torch.bfloat16) else 4
    row = length * max(int(inner), 4 * model.d_model) * size + 8 * model.vocab_size
    if model.remote:  # assume the memory of one GPU there
        return max(LEAST_ROWS, _MEMORY["cuda"] // row)
    memory, free = _MEMORY.get(model.device.type, _MEMORY["cpu"]), free_on(model.device)
    while memory > max(free // 4, LEAST_ROWS * row):
        memory //= 2
    return max(LEAST_ROWS, memory // row)


def run_all(
    model: TracedModel,
    cases: Sequence[TracePrompt],
    corruptions: Sequence[Corruption],
    plan: Plan,
    progress: Progress | None,
) -> list[Outcome]:
    """Patch all cases exactly; the outcomes in the order of the cases.

    Raises:
        WorkFailed: a number is not finite.
    """
    rows = plan.max_rows // (model.n_layers * len(plan.kinds))
    return in_groups(_run_group, groups(cases, corruptions, rows), model, cases, corruptions, plan, progress)


def in_groups(
    run_group: RunGroup,
    case_groups: Iterable[Sequence[int]],
    model: TracedModel,
    cases: Sequence[TracePrompt],
    corruptions: Sequence[Corruption],
    plan: Plan,
    progress: Progress | None,
) -> list[Outcome]:
    """Apply `run_group` to every group, shared out among processes.

    The groups are the same for any number of processes, so the numbers are equal to the byte.

    Args:
        case_groups: indices into `cases`.
        progress: called with (facts done, facts in all).

    Returns:
        The outcomes in the order of the cases.
    """
    parts = [([cases[i] for i in group], [corruptions[i] for i in group]) for group in case_groups]
    n_done = list(accumulate(len(part_cases) for part_cases, _ in parts))
    measurements = plan.journal.take_each(
        "groups",
        _measured,
        {_phase(part[0]): (run_group, model, *part, plan) for part in parts},
        None if progress is None else lambda done: progress(n_done[done - 1], len(cases)),
    )
    outcomes = [
        Outcome(*fields)
        for part, arrays in zip(parts, measurements, strict=True)
        for fields in zip(*part, *arrays, strict=True)
    ]
    return sorted(outcomes, key=lambda o: o.case.index)


def _phase(cases: Sequence[TracePrompt]) -> str:
    """A name unique to these cases: the groups depend on the free memory, which may differ when a run resumes."""
    indices = [case.index for case in cases]
    digest = hashlib.sha256(str(indices).encode()).hexdigest()[:12]
    return f"group-{indices[0]:05d}-{digest}"


def _measured(run_group: RunGroup, *group: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """A group's arrays for the journal, which keeps neither cases nor corruptions: these follow from the arguments."""
    outcomes = run_group(*group)
    return [o.clean for o in outcomes], [o.corrupted for o in outcomes], [o.patched for o in outcomes]


def groups(
    cases: Sequence[TracePrompt], corruptions: Sequence[Corruption], rows: int, by_start: bool = False
) -> Iterator[list[int]]:
    """Yield indices of cases with equal token counts and samples, at most `rows` samples (but one case) together.

    With `by_start` cases are sorted by their first corrupted token, so that a group shares a long uncorrupted prefix.
    """
    for samples in sorted({c.samples for c in corruptions}):
        indices = [i for i, c in enumerate(corruptions) if c.samples == samples]
        if by_start:
            indices.sort(key=lambda i: corruptions[i].first)
        for group in equal_lengths([cases[i].ids for i in indices], max(1, rows // samples)):
            yield [indices[i] for i in group]


def _run_group(
    model: TracedModel, cases: Sequence[TracePrompt], corruptions: Sequence[Corruption], plan: Plan
) -> list[Outcome]:
    answers, foils = torch.tensor([c.answer_id for c in cases]), torch.tensor([c.foil_id for c in cases])
    noising = plan.direction == "noise"
    clean_run = _rows(model, cases, None, plan, answers, foils, base=noising)
    corrupted_run = _rows(model, cases, corruptions, plan, answers, foils, base=not noising)
    clean = clean_run.scores.cpu().numpy()
    corrupted = corrupted_run.scores.cpu().numpy().copy().reshape(2, len(cases), corruptions[0].samples)
    for case, before, after in zip(cases, clean.T, corrupted.swapaxes(0, 1), strict=True):
        must_be_finite(case, before, after)
    gaps = np.abs(clean[1] - corrupted[1].mean(-1, dtype=np.float64))
    alive = [i for i in range(len(cases)) if gaps[i] >= plan.min_gap]
    patched = {}
    if alive:
        base, donor = PatchSource(corrupted_run, corruptions[0].samples), PatchSource(clean_run, 1)
        base_scores, donor_scores = corrupted, np.broadcast_to(clean[:, :, None], corrupted.shape)
        if noising:
            base, donor, base_scores, donor_scores = donor, base, donor_scores, base_scores
        group = PatchBatch(
            base,
            donor,
            answers,
            foils,
            len(cases[0].ids),
            corruptions[0].samples,
            plan.patches,
            heads(model)[1] if any(p.head is not None for p in plan.patches) else 0,
            plan.shortcuts.grow,
        )
        only = None if plan.only is None else {i: plan.only[case.index] for i, case in enumerate(cases)}
        patched = _patched(model, group, plan, alive, [m.first for m in corruptions], (base_scores, donor_scores), only)
    outcomes = []
    for i, case in enumerate(cases):
        by_kind = {kind: values[:, i].copy() for kind, values in patched.items()} if i in alive else None
        for kind, values in (by_kind or {}).items():
            must_be_finite(case, values if plan.only is None else values[:, plan.only[case.index][kind]])
        outcomes.append(Outcome(case, corruptions[i], clean[:, i], corrupted[:, i], by_kind))
    return outcomes


def _rows(
    model: TracedModel,
    cases: Sequence[TracePrompt],
    corruptions: Sequence[Corruption] | None,
    plan: Plan,
    answers: Tensor,
    foils: Tensor,
    base: bool,
) -> Run:
    """The clean run of all cases (`corruptions` None), or the corrupted run of all samples; `max_rows` rows at a time.

    The base run keeps block inputs, from which patched runs start, and the values of severed modules; the donor run
    keeps the values to patch in.
    """
    prefix = plan.shortcuts.reuse and prefix_is_reusable(model, len(cases[0].ids))
    layers = range(model.n_layers)
    if base:
        sources = {Source(Site(p.severed, layer), "value") for p in plan.patches if p.severed for layer in layers}
    else:
        sources = {patch.source(layer) for patch in plan.patches for layer in layers}
    rows = [(i, s) for i in range(len(cases)) for s in range(corruptions[0].samples if corruptions else 1)]
    parts = []
    for at in range(0, len(rows), plan.max_rows):
        block = rows[at : at + plan.max_rows]
        which = torch.tensor([i for i, _ in block])
        ids = torch.tensor([corruptions[i].ids if corruptions else cases[i].ids for i, _ in block], device=model.device)
        noise = placed_noise(cases, corruptions, block) if corruptions else None
        parts.append(
            run_rows(model, ids, noise, answers[which], foils[which], start=base, prefix=prefix, sources=sources)
        )
    return joined(parts)


def placed_noise(
    cases: Sequence[TracePrompt], corruptions: Sequence[Corruption], rows: Sequence[tuple[int, int]]
) -> Float[Tensor, "row pos d_embed"] | None:
    """The draws at the subjects' tokens, zeros elsewhere; None for swaps. `rows` are (case, sample) indices."""
    draws = {i: corruptions[i].noise() for i in {i for i, _ in rows}}
    placed: Tensor | None = None
    for row, (i, sample) in enumerate(rows):
        noise, span = draws[i], cases[i].span
        if noise is None:
            continue
        if placed is None:
            placed = torch.zeros((len(rows), len(cases[0].ids), noise.shape[-1]), dtype=noise.dtype)
        placed[row, span.start : span.stop] = noise[sample]
    return placed


def _patched(
    model: TracedModel,
    group: PatchBatch,
    plan: Plan,
    alive: Sequence[int],
    first: Sequence[int],
    known: tuple[Float[ndarray, "metric fact sample"], Float[ndarray, "metric fact sample"]],
    only: Mapping[int, Mapping[str, ndarray]] | None,
) -> dict[str, Float[ndarray, "metric fact layer token sample"]]:
    """Scores of every patched run, by kind. Cells whose result is known beforehand are not run (see `rows_at`).

    Args:
        alive: indices of the facts to patch.
        first: every fact's first corrupted token.
        known: scores of the base run and, for replaced outputs of the last block at the last token, the donor run.
    """
    n_layers, last = model.n_layers, group.length - 1
    base, donor = known
    shape = (*base.shape[:2], n_layers, group.length, group.samples)
    scores = {k: np.broadcast_to(base[:, :, None, None], shape).copy() for k in plan.kinds}
    for kind, patch in zip(plan.kinds, group.patches, strict=True):
        for layer in range(n_layers):
            if patch.is_hidden and window_layers(layer, plan.window, n_layers).stop == n_layers:
                scores[kind][:, :, layer, last] = donor
    for token in range(min(first), group.length):
        facts = [i for i in alive if first[i] <= token]
        rows = rows_at(token, group.length, facts, group.patches, plan.window, n_layers, group.samples, only)
        for chunk in chunks(rows, plan.max_rows):
            results = patched_run(model, group, chunk, token).cpu().numpy()
            for k, kind in enumerate(plan.kinds):
                of_kind = chunk.patch == k
                if of_kind.any():
                    cells = chunk[of_kind]
                    scores[kind][:, cells.fact, cells.layer, token, cells.sample] = results[:, of_kind]
    for i, wanted in (only or {}).items():
        for kind in plan.kinds:
            scores[kind][:, i, ~wanted[kind]] = np.nan
    return scores


def must_be_finite(case: TracePrompt, *values: ndarray) -> None:
    """Raise WorkFailed unless all values are finite."""
    if not all(np.isfinite(v).all() for v in values):
        raise WorkFailed(
            f"fact {case.index} ({case.fact.prompt!r}): the model gives numbers that are not finite; "
            "load it with dtype float32 or bfloat16"
        )
