"""Facts in groups of equal length through the clean, the corrupted and the patched runs.

The batches are a matter of speed and memory only: no number depends on them beyond rounding.
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
"""Bytes of one trace's largest activations and logits, which set the default `max_rows`."""

LEAST_ROWS = 16


class Plan(NamedTuple):
    """What is the same for all facts of a run; `kinds` are labels of patches.

    `only` names, for each of the caller's facts, the (layer, token) cells to patch by label; the others come out NaN.
    Every group of facts is a phase of `journal`.
    """

    kinds: tuple[str, ...]
    window: int
    max_rows: int
    min_gap: float
    shortcuts: Shortcuts
    direction: str = "denoise"
    only: Sequence[Mapping[str, Bool[ndarray, "layer token"]]] | None = None
    journal: Journal = NO_JOURNAL

    @property
    def patches(self) -> tuple[Patch, ...]:
        return tuple(Patch.parse(kind) for kind in self.kinds)


class Outcome(NamedTuple):
    """The measurements of one case; axis `metric` is p(r), then the logit difference.

    `patched` is None where clean and corrupted logit difference are less than `min_gap` apart.
    """

    case: TracePrompt
    corruption: Corruption
    clean: Float[ndarray, " metric"]
    corrupted: Float[ndarray, "metric sample"]
    patched: dict[str, Float[ndarray, "metric layer token sample"]] | None


RunGroup = Callable[[TracedModel, Sequence[TracePrompt], Sequence[Corruption], Plan], list[Outcome]]


def default_max_rows(model: TracedModel, length: int) -> int:
    """Rows whose MLP activations and logits fill the memory set aside for one trace.

    Half of that, a quarter and so on where it is more than a quarter of what is free on the model's device: so machines
    with memory enough group their rows alike, and give the same bytes.
    """
    config = model.module.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 0
    size = 2 if model.dtype in (torch.float16, torch.bfloat16) else 4
    row = length * max(int(inner), 4 * model.d_model) * size + 8 * model.vocab_size
    if model.remote:  # another machine's memory: as of one GPU
        return max(LEAST_ROWS, _MEMORY["cuda"] // row)
    memory, free = _MEMORY.get(model.device.type, _MEMORY["cpu"]), free_on(model.device)
    while memory > max(free // 4, LEAST_ROWS * row):
        memory //= 2
    return max(LEAST_ROWS, memory // row)


def run_all(
    model: TracedModel, cases: Sequence[TracePrompt], made: Sequence[Corruption], plan: Plan, progress: Progress | None
) -> list[Outcome]:
    """Trace all cases, in the order given.

    Raises:
        WorkFailed: a number is not finite.
    """
    return in_groups(_run_group, _groups(model, cases, made, plan), model, cases, made, plan, progress)


def in_groups(
    run_group: RunGroup,
    groups: Iterable[Sequence[int]],
    model: TracedModel,
    cases: Sequence[TracePrompt],
    made: Sequence[Corruption],
    plan: Plan,
    progress: Progress | None,
) -> list[Outcome]:
    """One measurement group by group, shared out among processes; the outcomes in the order of the cases.

    The groups are those of one process, so the numbers are to the byte.
    """
    groups = list(groups)
    parts = [([cases[i] for i in at], [made[i] for i in at]) for at in groups]
    ends = list(accumulate(len(here) for here, _ in parts))
    found = plan.journal.take_each(
        "groups",
        _measured,
        {_phase(at, cases): (run_group, model, *part, plan) for at, part in zip(groups, parts, strict=True)},
        None if progress is None else lambda done: progress(ends[done - 1], len(cases)),
    )
    outcomes = [
        Outcome(*each) for part, its in zip(parts, found, strict=True) for each in zip(*part, *its, strict=True)
    ]
    return sorted(outcomes, key=lambda o: o.case.index)


def _phase(at: Sequence[int], cases: Sequence[TracePrompt]) -> str:
    """A name that only a group of the very same cases has: with less memory free there are more groups."""
    indices = [cases[i].index for i in at]
    digest = hashlib.sha256(str(indices).encode()).hexdigest()[:12]
    return f"group-{indices[0]:05d}-{digest}"


def _measured(run_group: RunGroup, *group: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """What a group's runs gave, as a journal keeps it; the cases come back from what was asked."""
    outcomes = run_group(*group)
    return [o.clean for o in outcomes], [o.corrupted for o in outcomes], [o.patched for o in outcomes]


def _groups(
    model: TracedModel, cases: Sequence[TracePrompt], made: Sequence[Corruption], plan: Plan
) -> Iterator[list[int]]:
    """Cases with equal token counts and samples, as many together as fill one trace."""
    for samples in sorted({m.samples for m in made}):
        indices = [i for i, m in enumerate(made) if m.samples == samples]
        together = max(1, plan.max_rows // (samples * model.n_layers * len(plan.kinds)))
        for rows in equal_lengths([cases[i].ids for i in indices], together):
            yield [indices[r] for r in rows]


def _run_group(
    model: TracedModel, cases: Sequence[TracePrompt], made: Sequence[Corruption], plan: Plan
) -> list[Outcome]:
    answers, foils = torch.tensor([c.answer_id for c in cases]), torch.tensor([c.foil_id for c in cases])
    noising = plan.direction == "noise"
    clean_run = _rows(model, cases, None, plan, answers, foils, base=noising)
    corrupted_run = _rows(model, cases, made, plan, answers, foils, base=not noising)
    clean = clean_run.scores.cpu().numpy()
    corrupted = corrupted_run.scores.cpu().numpy().copy().reshape(2, len(cases), made[0].samples)
    for case, before, after in zip(cases, clean.T, corrupted.swapaxes(0, 1), strict=True):
        must_be_finite(case, before, after)
    gaps = np.abs(clean[1] - corrupted[1].mean(-1, dtype=np.float64))
    alive = [i for i in range(len(cases)) if gaps[i] >= plan.min_gap]
    patched = {}
    if alive:
        sides = PatchSource(clean_run, 1), PatchSource(corrupted_run, made[0].samples)
        base, donor = sides if noising else sides[::-1]
        group = PatchBatch(
            base,
            donor,
            answers,
            foils,
            len(cases[0].ids),
            made[0].samples,
            plan.patches,
            heads(model)[1] if any(p.head is not None for p in plan.patches) else 0,
            plan.shortcuts.grow,
        )
        only = None if plan.only is None else {i: plan.only[case.index] for i, case in enumerate(cases)}
        ends = (np.broadcast_to(clean[:, :, None], corrupted.shape), corrupted)
        patched = _patched(model, group, plan, alive, [m.first for m in made], ends if noising else ends[::-1], only)
    outcomes = []
    for i, case in enumerate(cases):
        found = {kind: values[:, i].copy() for kind, values in patched.items()} if i in alive else None
        for kind, values in (found or {}).items():
            must_be_finite(case, values if plan.only is None else values[:, plan.only[case.index][kind]])
        outcomes.append(Outcome(case, made[i], clean[:, i], corrupted[:, i], found))
    return outcomes


def _rows(
    model: TracedModel,
    cases: Sequence[TracePrompt],
    made: Sequence[Corruption] | None,
    plan: Plan,
    answers: Tensor,
    foils: Tensor,
    base: bool,
) -> Run:
    """The clean run of all cases (`made` None), or the corrupted one of all samples; `max_rows` rows at a time.

    As the base it keeps what patched runs start from and hold severed modules at, as the donor what they patch in.
    """
    prefix = plan.shortcuts.reuse and prefix_is_reusable(model, len(cases[0].ids))
    sources = _sources(plan.patches, model.n_layers, base)
    rows = [(i, s) for i in range(len(cases)) for s in range(made[0].samples if made else 1)]
    parts = []
    for at in range(0, len(rows), plan.max_rows):
        block = rows[at : at + plan.max_rows]
        which = torch.tensor([i for i, _ in block])
        ids = torch.tensor([made[i].ids if made else cases[i].ids for i, _ in block], device=model.device)
        noise = placed_noise(cases, made, block) if made else None
        parts.append(
            run_rows(model, ids, noise, answers[which], foils[which], start=base, prefix=prefix, sources=sources)
        )
    return joined(parts)


def _sources(patches: Sequence[Patch], n_layers: int, base: bool) -> set[Source]:
    if base:
        return {Source(Site(p.severed, layer), "value") for p in patches if p.severed for layer in range(n_layers)}
    return {patch.source(layer) for patch in patches for layer in range(n_layers)}


def placed_noise(
    cases: Sequence[TracePrompt], made: Sequence[Corruption], rows: Sequence[tuple[int, int]]
) -> Float[Tensor, "row pos d_embed"] | None:
    """The draws at the subjects' tokens, zeros elsewhere."""
    drawn = {i: made[i].noise() for i in {i for i, _ in rows}}
    placed: Tensor | None = None
    for row, (i, sample) in enumerate(rows):
        noise, span = drawn[i], cases[i].span
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
    ends: tuple[Float[ndarray, "metric fact sample"], Float[ndarray, "metric fact sample"]],
    only: Mapping[int, Mapping[str, ndarray]] | None,
) -> dict[str, Float[ndarray, "metric fact layer token sample"]]:
    """Every patched run; cells that are not run keep the value that they are known to have.

    That value is the base run's, and the donor's where the last block's output at the last token is replaced: `ends`.
    """
    n_layers, last = model.n_layers, group.length - 1
    base, donor = ends
    shape = (*base.shape[:2], n_layers, group.length, group.samples)
    found = {k: np.broadcast_to(base[:, :, None, None], shape).copy() for k in plan.kinds}
    for kind, patch in zip(plan.kinds, group.patches, strict=True):
        for layer in range(n_layers):
            if patch.is_hidden and window_layers(layer, plan.window, n_layers).stop == n_layers:
                found[kind][:, :, layer, last] = donor
    for token in range(min(first), group.length):
        facts = [i for i in alive if first[i] <= token]
        rows = rows_at(token, group.length, facts, group.patches, plan.window, n_layers, group.samples, only)
        for some in chunks(rows, plan.max_rows):
            scores = patched_run(model, group, some, token).cpu().numpy()
            for k, kind in enumerate(plan.kinds):
                mine = some.patch == k
                if mine.any():
                    at = some[mine]
                    found[kind][:, at.fact, at.layer, token, at.sample] = scores[:, mine]
    for i, cells in (only or {}).items():
        for kind in plan.kinds:
            found[kind][:, i, ~cells[kind]] = np.nan
    return found


def must_be_finite(case: TracePrompt, *values: ndarray) -> None:
    if not all(np.isfinite(v).all() for v in values):
        raise WorkFailed(
            f"fact {case.index} ({case.fact.prompt!r}): the model gives numbers that are not finite; "
            "load it with dtype float32 or bfloat16"
        )
