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
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from .._util.progress import Progress
from ..errors import WorkFailed
from ..model.memory import free_on
from ..model.model import TracedModel
from ..model.prefix import prefix_is_reusable
from ..runs.journal import Journal
from .capabilities import Shortcuts
from .corrupt import Corruption
from .forward import joined, run_rows
from .patch import chunks, is_replaced, patched_run, rows_at, window_layers
from .patches import Patch, PatchBatch, PatchSource, Run, heads, sources_at
from .prompts import TracePrompt, equal_lengths

NO_JOURNAL = Journal()

_MEMORY = {"cuda": 2 << 30, "cpu": 64 << 20}
"""Bytes that one trace's largest activations and logits may take; they set the default `max_rows`."""

LEAST_ROWS = 16


class Plan(NamedTuple):
    """The settings of a run, equal for all its facts; `kinds` are labels of patches.

    `scored` says which scores an outcome holds and which of them have to move by `min_gap`: `first` those of the first
    token of answer and foil, `both` also those of all their tokens, `whole` holds both and asks the second to move.
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
    scored: str = "first"

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches of `kinds`."""
        return tuple(Patch.parse(kind) for kind in self.kinds)


class Outcome(NamedTuple):
    """The measurements of one prompt; axis `metric` is p(r), the logit difference and, unless the plan scores the first
    tokens alone, the whole answer's log-probability and its difference to the whole foil's.

    `patched` is None where clean and corrupted difference are less than `min_gap` apart.
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
    row = row_size(model, length)
    if model.remote:  # assume the memory of one GPU there
        return max(LEAST_ROWS, _MEMORY["cuda"] // row)
    memory, free = _MEMORY.get(model.device.type, _MEMORY["cpu"]), free_on(model.device)
    while memory > max(free // 4, LEAST_ROWS * row):
        memory //= 2
    return max(LEAST_ROWS, memory // row)


def row_size(model: TracedModel, length: int, keep: int = 1) -> int:
    """Bytes of a row's MLP activations at `length` tokens and of its logits at `keep`."""
    config = model.module.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 0
    size = 2 if model.dtype in (torch.float16, torch.bfloat16) else 4
    return length * max(int(inner), 4 * model.d_model) * size + 8 * keep * model.vocab_size


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
    answers, foils = torch.tensor([[c.answer_id] for c in cases]), torch.tensor([c.foil_id for c in cases])
    scores = _scored(model, cases, corruptions, plan, answers, foils)
    alive = _alive(scores, plan)
    if plan.scored != "first" and alive:
        whole = _whole_scores(model, cases, corruptions, plan, scores, alive)
        scores = {name: np.concatenate([values[:2], whole[name]]) for name, values in scores.items()}
        alive = [i for i in alive if _gaps(scores, -1)[i] >= plan.min_gap]
    else:
        scores = {name: values[:2] for name, values in scores.items()}
    outcomes = []
    for i, case in enumerate(cases):
        by_kind = {kind: scores[kind][:, i].copy() for kind in plan.kinds} if i in alive else None
        for kind, values in (by_kind or {}).items():
            must_be_finite(case, values if plan.only is None else values[:, plan.only[case.index][kind]])
        outcomes.append(Outcome(case, corruptions[i], scores[CLEAN][:, i], scores[CORRUPTED][:, i], by_kind))
    return outcomes


Scores = dict[str, Float[ndarray, "metric fact ..."]]
"""The clean run's scores, the corrupted run's (.. sample), and by kind the patched runs' (.. layer token sample)."""

CLEAN, CORRUPTED = "clean", "corrupted"


def _gaps(scores: Scores, metric: int) -> Float[ndarray, " fact"]:
    """The distance between clean and mean corrupted score."""
    return np.abs(scores[CLEAN][metric] - scores[CORRUPTED][metric].mean(-1, dtype=np.float64))


def _alive(scores: Scores, plan: Plan) -> list[int]:
    """The facts whose first tokens are far enough apart; every one if these alone do not decide."""
    return [i for i, gap in enumerate(_gaps(scores, 1)) if plan.scored == "whole" or gap >= plan.min_gap]


def _whole_scores(
    model: TracedModel,
    cases: Sequence[TracePrompt],
    corruptions: Sequence[Corruption],
    plan: Plan,
    first: Scores,
    alive: Sequence[int],
) -> Scores:
    """The log-probability of the whole answer, and how far it is above that of the whole foil, of the facts `alive`.

    `first` gives those of one token. Longer ones are read behind the prompt and scored together.
    """
    answer = {name: values[2].copy() for name, values in first.items()}
    foil = {name: values[2] - values[1] for name, values in first.items()}
    for log_probs, field in ((answer, "answer_ids"), (foil, "foil_ids")):
        ids = [getattr(case, field) for case in cases]
        for length in sorted({len(ids[i]) for i in alive} - {1}):
            rows = [i for i in alive if len(ids[i]) == length]
            part = [cases[i] for i in rows], [corruptions[i] for i in rows]
            first_token = {name: values[rows][None] for name, values in log_probs.items()}
            together = _scored(model, *part, plan, torch.tensor([ids[i] for i in rows]), None, first_token)
            for name, values in together.items():
                log_probs[name][rows] = values[0]
    return {name: np.stack([answer[name], answer[name] - foil[name]]) for name in first}


def _scored(
    model: TracedModel,
    cases: Sequence[TracePrompt],
    corruptions: Sequence[Corruption],
    plan: Plan,
    answers: Int[Tensor, "fact keep"],
    foils: Int[Tensor, " fact"] | None,
    first_token: Scores | None = None,
) -> Scores:
    """Clean, corrupted and patched scores (see `readout`) of a group; no patched ones if no fact is alive.

    Args:
        first_token: of an answer of several tokens the clean and corrupted log-probability of the first.
    """
    noising = plan.direction == "noise"
    clean_run = _rows(model, cases, None, plan, answers, foils, base=noising)
    corrupted_run = _rows(model, cases, corruptions, plan, answers, foils, base=not noising)
    clean = clean_run.scores.cpu().numpy()
    corrupted = corrupted_run.scores.cpu().numpy().copy().reshape(len(clean), len(cases), corruptions[0].samples)
    for case, before, after in zip(cases, clean.T, corrupted.swapaxes(0, 1), strict=True):
        must_be_finite(case, before, after)
    scores: Scores = {CLEAN: clean, CORRUPTED: corrupted}
    alive = list(range(len(cases))) if foils is None else _alive(scores, plan)
    if not alive:
        return scores
    base, donor = PatchSource(corrupted_run, corruptions[0].samples), PatchSource(clean_run, 1)
    group = PatchBatch(
        *((donor, base) if noising else (base, donor)),
        answers,
        foils,
        len(cases[0].ids) + answers.shape[1] - 1,
        corruptions[0].samples,
        plan.patches,
        heads(model)[1] if any(p.head is not None for p in plan.patches) else 0,
        plan.shortcuts.grow,
    )

    def base_and_donor(of: Scores) -> list[Float[ndarray, "metric fact sample"]]:
        both = [of[CORRUPTED], np.broadcast_to(of[CLEAN][:, :, None], of[CORRUPTED].shape)]
        return both[::-1] if noising else both

    unpatched, replaced = base_and_donor(scores)
    if first_token is not None:  # only the first token's prediction changes with the last block's output
        before, after = base_and_donor(first_token)
        replaced = unpatched + (after - before)
    only = None if plan.only is None else {i: plan.only[case.index] for i, case in enumerate(cases)}
    return scores | _patched(model, group, plan, alive, [m.first for m in corruptions], (unpatched, replaced), only)


def _rows_at_once(model: TracedModel, group_length: int, keep: int, plan: Plan) -> int:
    """`max_rows`, fewer where tokens behind the prompt take memory too."""
    return max(1, plan.max_rows * row_size(model, group_length) // row_size(model, group_length + keep - 1, keep))


def _rows(
    model: TracedModel,
    cases: Sequence[TracePrompt],
    corruptions: Sequence[Corruption] | None,
    plan: Plan,
    answers: Int[Tensor, "fact keep"],
    foils: Int[Tensor, " fact"] | None,
    base: bool,
) -> Run:
    """The clean run of all cases (`corruptions` None), or the corrupted run of all samples; `max_rows` rows at a time.

    Behind each prompt the model reads all of the answer but its last token.

    The base run keeps block inputs, from which patched runs start, and the values of severed modules; the donor run
    keeps the values to patch in.
    """
    behind = answers[:, :-1]
    prefix = plan.shortcuts.reuse and prefix_is_reusable(model, len(cases[0].ids) + behind.shape[1])
    layers = range(model.n_layers)
    which_ones = {"patched": not base, "severed": base}
    sources = [source for layer in layers for source in sources_at(model, plan.patches, layer, **which_ones)]
    rows = [(i, s) for i in range(len(cases)) for s in range(corruptions[0].samples if corruptions else 1)]
    parts = []
    size = _rows_at_once(model, len(cases[0].ids), answers.shape[1], plan)
    for at in range(0, len(rows), size):
        block = rows[at : at + size]
        which = torch.tensor([i for i, _ in block])
        prompts = torch.tensor([corruptions[i].ids if corruptions else cases[i].ids for i, _ in block])
        ids = torch.cat([prompts, behind[which]], 1).to(model.device)
        noise = placed_noise(cases, corruptions, block) if corruptions else None
        if noise is not None:
            noise = torch.nn.functional.pad(noise, (0, 0, 0, behind.shape[1]))
        asked = answers[which], None if foils is None else foils[which]
        parts.append(run_rows(model, ids, noise, *asked, start=base, prefix=prefix, sources=sources))
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
        known: scores of the base run, and those with the last block's output at the prompt's last token replaced.
    """
    n_layers, length = model.n_layers, group.prompt_length
    base, replaced = known
    shape = (*base.shape[:2], n_layers, length, group.samples)
    scores = {k: np.broadcast_to(base[:, :, None, None], shape).copy() for k in plan.kinds}
    for kind, patch in zip(plan.kinds, group.patches, strict=True):
        for layer in range(n_layers):
            if is_replaced(patch, window_layers(layer, plan.window, n_layers), n_layers, group.keep):
                scores[kind][:, :, layer, length - 1] = replaced
    size = _rows_at_once(model, length, group.keep, plan)
    for token in range(min(first), length):
        facts = [i for i in alive if first[i] <= token]
        rows = rows_at(token, length, facts, group.patches, plan.window, n_layers, group.samples, only, group.keep)
        for chunk in chunks(rows, size):
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
