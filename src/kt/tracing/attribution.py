"""Attribution patching: a first-order estimate of every patched run from one backward (Nanda 2023).

A run whose value at a site goes from that of its base to that of its donor is taken to answer

    f(patched) ≈ f(base) + ∇f(base) · (donor - base)

at every site (kind, layer, token), sample and metric. One forward and one backward a metric say something of all sites
at once, where exact patching needs a run for each. Denoising takes the gradient at the corrupted run of each sample
and puts clean values in; noising takes it at the clean run, once a fact. For a head the site is W_o's input, at the
head's own columns.

The estimate is exact where the model is linear between the two values, and nowhere else: docs/tracing.md says where
it fails (Kramár et al. 2024, AtP*).

A window's estimate adds up those of its layers. For `mlp` and `attn` that is the effect of *adding* all differences,
where exact patching *sets* the values: what one patched layer changes in the next one is counted here and overwritten
there. Residual streams put in at consecutive layers overwrite one another nearly whole, so for `hidden` it is the mean
of the layers' estimates (it ranks cells as the sum does, whose size is that of as many patches as the window is wide).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from .._util.progress import Progress
from ..errors import BadFact, WorkFailed
from ..model.layout import unwrap_tuple
from ..model.model import TracedModel
from ..model.prefix import Prefix, new_cache, prefix_is_reusable, saved
from ..model.sites import Kind, Site
from .corrupt import Corruption
from .engine import Outcome, Plan, in_groups, must_be_finite, placed_noise
from .forward import run_rows
from .patch import window_layers
from .patches import ORDER, Patch, Source, heads, readout, unpadded_batch
from .prompts import TracePrompt, equal_lengths

# Runs whose scores are differentiated at every site: what attribution.py estimates patches from.
#
# Left of a fact's corruption its clean and corrupted runs are equal, and no estimate needs a gradient there. So those
# tokens run once a fact, and every other row begins after them, over their keys and values, where the model allows it.


class Prompts(NamedTuple):
    """Rows of equal length, and what is read of each. `fact` is the row's place among its group's facts."""

    ids: Int[Tensor, "row pos"]
    noise: Float[Tensor, "row pos d_embed"] | None
    answers: Int[Tensor, " row"]
    foils: Int[Tensor, " row"]
    fact: Int[Tensor, " row"]

    def part(self, start: int, stop: int) -> Prompts:
        return Prompts(*(None if value is None else value[start:stop] for value in self))  # type: ignore[arg-type]


class Shared(NamedTuple):
    """The tokens left of `start`, which a group's facts share with their corruptions: keys and values by layer."""

    start: int = 0
    prefixes: Sequence[Prefix] = ()


class Slopes(NamedTuple):
    """A run from the shared tokens on: scores, values at the sources and, if asked for, both metrics' gradients."""

    scores: Float[Tensor, "metric row"]
    values: dict[Source, Float[Tensor, "row pos d"]]
    gradients: dict[Source, Float[Tensor, "metric row pos d"]]


def slopes(model: TracedModel, prompts: Prompts, shared: Shared, sources: Sequence[Source]) -> Slopes:
    """Run the prompts and differentiate both metrics; where memory runs out, half the rows at a time."""
    try:
        return run_from(model, prompts, shared, sources, graded=True)
    except torch.OutOfMemoryError:
        if len(prompts.ids) == 1:
            raise
    half = len(prompts.ids) // 2
    parts = [slopes(model, prompts.part(*ends), shared, sources) for ends in ((0, half), (half, len(prompts.ids)))]
    return Slopes(
        torch.cat([p.scores for p in parts], 1),
        {s: torch.cat([p.values[s] for p in parts]) for s in sources},
        {s: torch.cat([p.gradients[s] for p in parts], 1) for s in sources},
    )


def run_from(model: TracedModel, prompts: Prompts, shared: Shared, sources: Sequence[Source], graded: bool) -> Slopes:
    """One forward from the shared tokens on and, if `graded`, a backward for each metric.

    `sources` come in the order of the forward.

    Raises:
        WorkFailed: no gradient reaches the sites.
    """
    live: list[Tensor] = []
    values: list[Tensor] = []
    read: list[Tensor] = []
    with torch.set_grad_enabled(graded):
        with model.nnsight.trace(**_arguments(model, prompts, shared)):
            embedded = model.embed.output.detach()
            if prompts.noise is not None:
                embedded = (embedded + prompts.noise[:, shared.start :].to(embedded.device)).to(embedded.dtype)
            # The graph begins here, for no parameter asks for gradients; a clone, since a block may write in place.
            model.embed.output = embedded.requires_grad_(graded).clone()
            for source in sources:
                tensor = _own(model, source)
                values.append(saved(tensor.detach().clone()))
                if graded:
                    live.append(saved(tensor))
            read.append(saved(readout(model.last_logits()[:, -1], prompts.answers, prompts.foils)))
        gradients = _gradients(model, read[0], live) if graded else []
    shape = (len(prompts.ids), prompts.ids.shape[1] - shared.start, -1)
    return Slopes(
        read[0].detach(),
        {s: value.view(shape) for s, value in zip(sources, values, strict=True)},
        {s: both.view(2, *shape) for s, both in zip(sources, gradients, strict=False)},
    )


def _gradients(model: TracedModel, scores: Float[Tensor, "metric row"], live: Sequence[Tensor]) -> list[Tensor]:
    """By site, both metrics stacked. Rows do not see one another: the gradient of their sum holds each row's own."""
    if not scores.requires_grad:
        raise WorkFailed(f"{model.name} cannot be differentiated; trace it with method='exact'")
    prob, logit_diff = scores
    first_pass = torch.autograd.grad(prob.sum(), live, retain_graph=True)
    second_pass = torch.autograd.grad(logit_diff.sum(), live)
    return [torch.stack(pair) for pair in zip(first_pass, second_pass, strict=True)]


def _arguments(model: TracedModel, prompts: Prompts, shared: Shared) -> dict[str, Any]:
    """One forward of the tokens from `start` on, behind a cache of those before."""
    cache: Any = new_cache(model) if shared.start else None
    for layer, (keys, values) in enumerate(shared.prefixes):
        rows = prompts.fact.to(keys.device)
        cache.update(keys[rows, :, : shared.start], values[rows, :, : shared.start], layer)
    arguments = model.inputs(unpadded_batch(prompts.ids), cache=cache)
    by_token = [name for name in ("input_ids", "position_ids") if name in arguments]
    return arguments | {name: arguments[name][:, shared.start :] for name in by_token}


def _own(model: TracedModel, source: Source) -> Any:
    """A source's own tensor inside a trace: what the loss depends on, not a view as `model.value` may give."""
    if source.site.kind is Kind.RESID:
        return unwrap_tuple(model.block(source.site.layer).output)
    projection = model.projection(source.site)
    return projection.input if source.end == "key" else projection.output


class _Found(NamedTuple):
    """The scores of a group's facts, and the estimates by patch."""

    clean: Float[ndarray, "metric fact"]
    corrupted: Float[ndarray, "metric fact sample"]
    patched: list[Float[ndarray, "metric fact layer token sample"]]


def run_all(
    model: TracedModel, cases: Sequence[TracePrompt], made: Sequence[Corruption], plan: Plan, progress: Progress | None
) -> list[Outcome]:
    """What `engine.run_all` measures, with `patched` estimated to first order.

    Raises:
        BadFact: a kind that severs a module: a gradient does not say what would happen without it.
        WorkFailed: a number is not finite, or the model cannot be differentiated.
    """
    for patch in plan.patches:
        if patch.severed is not None:
            raise BadFact(
                f"kinds {patch.label}: no gradient says what a severed module does; trace it with method='exact'"
            )
    return in_groups(_run_group, _groups(model, cases, made, plan), model, cases, made, plan, progress)


def _groups(
    model: TracedModel, cases: Sequence[TracePrompt], made: Sequence[Corruption], plan: Plan
) -> Iterator[list[int]]:
    """Cases with equal token counts and samples, sorted so that those share a group that begin alike."""
    for samples in sorted({m.samples for m in made}):
        indices = sorted((i for i, m in enumerate(made) if m.samples == samples), key=lambda i: made[i].first)
        for rows in equal_lengths([cases[i].ids for i in indices], max(1, _rows(model, plan) // samples)):
            yield [indices[r] for r in rows]


def _rows(model: TracedModel, plan: Plan) -> int:
    """Rows of one graph: it holds every layer, where a patched run holds one at a time."""
    return max(1, plan.max_rows // model.n_layers)


def _run_group(
    model: TracedModel, cases: Sequence[TracePrompt], made: Sequence[Corruption], plan: Plan
) -> list[Outcome]:
    found = _estimated(model, *_prompts(model, cases, made), [m.first for m in made], plan)
    outcomes = []
    for i, (case, corruption) in enumerate(zip(cases, made, strict=True)):
        before, after = found.clean[:, i], found.corrupted[:, i]
        must_be_finite(case, before, after)
        patched = None
        if abs(before[1] - after[1].mean(dtype=np.float64)) >= plan.min_gap:
            patched = {kind: values[:, i].copy() for kind, values in zip(plan.kinds, found.patched, strict=True)}
            must_be_finite(case, *patched.values())
            for kind, wanted in (plan.only[case.index] if plan.only else {}).items():
                patched[kind][:, ~wanted] = np.nan
        outcomes.append(Outcome(case, corruption, before, after, patched))
    return outcomes


def _prompts(model: TracedModel, cases: Sequence[TracePrompt], made: Sequence[Corruption]) -> tuple[Prompts, Prompts]:
    """The clean prompts, and the corrupted ones: facts x samples, samples innermost."""
    ids, corrupt = (torch.tensor([c.ids for c in some], device=model.device) for some in (cases, made))
    answers, foils = torch.tensor([c.answer_id for c in cases]), torch.tensor([c.foil_id for c in cases])
    clean = Prompts(ids, None, answers, foils, torch.arange(len(cases)))
    rows = [(i, s) for i in range(len(cases)) for s in range(made[0].samples)]
    fact = torch.tensor([i for i, _ in rows])
    noise = placed_noise(cases, made, rows)
    return clean, Prompts(corrupt[fact.to(corrupt.device)], noise, answers[fact], foils[fact], fact)


def _estimated(
    model: TracedModel, clean: Prompts, corrupted: Prompts, first_token: Sequence[int], plan: Plan
) -> _Found:
    """All scores and estimates of a group; the corrupted rows go in blocks."""
    noising, sources = plan.direction == "noise", _sources(model, plan.patches)
    shared = _shared(model, clean, min(first_token), plan)
    tidy = slopes(model, clean, shared, sources) if noising else run_from(model, clean, shared, sources, graded=False)
    scores, estimates = [], []
    for at in range(0, len(corrupted.ids), _rows(model, plan)):
        rows = corrupted.part(at, at + _rows(model, plan))
        each, its = torch.arange(len(rows.ids)), torch.tensor(first_token)[rows.fact] - shared.start
        if noising:
            noisy = run_from(model, rows, shared, sources, graded=False)
            base, moved = tidy.scores[:, rows.fact.to(model.device)], _moved(tidy, noisy, rows.fact, each, its)
        else:
            noisy = slopes(model, rows, shared, sources)
            base, moved = noisy.scores, _moved(noisy, tidy, each, rows.fact, its)
        scores.append(noisy.scores.cpu().numpy())
        estimates.append(_estimates(model, base, moved, shared.start, plan))
    samples = len(corrupted.ids) // len(clean.ids)
    patched = [np.concatenate(parts, 1) for parts in zip(*estimates, strict=True)]
    return _Found(
        tidy.scores.cpu().numpy(),
        np.concatenate(scores, 1).reshape(2, -1, samples),
        [np.moveaxis(p.reshape(2, -1, samples, *p.shape[2:]), 2, -1) for p in patched],
    )


def _shared(model: TracedModel, clean: Prompts, start: int, plan: Plan) -> Shared:
    """The tokens left of every corruption, run once a fact; none where the model's cache does not hold them."""
    if not (start and plan.shortcuts.reuse and prefix_is_reusable(model, clean.ids.shape[1])):
        return Shared()
    run = run_rows(model, clean.ids[:, :start], None, clean.answers, clean.foils, start=True, prefix=True)
    return Shared() if run.prefixes is None else Shared(start, run.prefixes)


def _sources(model: TracedModel, patches: Sequence[Patch]) -> list[Source]:
    """What to read, in the order of the forward."""
    wanted = {patch.source(layer) for patch in patches for layer in range(model.n_layers)}
    ordered = [Source(Site(kind, layer), end) for layer in range(model.n_layers) for kind, end in ORDER]
    return [source for source in ordered if source in wanted]


def _moved(
    base: Slopes,
    donor: Slopes,
    base_row: Int[Tensor, " row"],
    donor_row: Int[Tensor, " row"],
    first_token: Int[Tensor, " row"],
) -> dict[Source, Float[Tensor, "metric row pos d"]]:
    """Gradient times difference, column by column. Left of the corruption there is no difference but rounding."""
    moved = {}
    for source, gradient in base.gradients.items():
        here = gradient.device
        mine, theirs = base_row.to(here), donor_row.to(here)
        before = torch.arange(gradient.shape[2], device=here) < first_token.to(here)[:, None]
        difference = donor.values[source][theirs].float() - base.values[source][mine].float()
        moved[source] = gradient[:, mine].float() * difference.masked_fill(before[..., None], 0.0)
    return moved


def _estimates(
    model: TracedModel,
    base: Float[Tensor, "metric row"],
    moved: Mapping[Source, Float[Tensor, "metric row pos d"]],
    start: int,
    plan: Plan,
) -> list[Float[ndarray, "metric row layer token"]]:
    """The base's scores plus what each patch moves them by; nothing moves left of `start`."""
    found = []
    spans = [window_layers(layer, plan.window, model.n_layers) for layer in range(model.n_layers)]
    for patch in plan.patches:
        parts = [_columns(model, patch, moved[patch.source(layer)]).sum(-1).cpu() for layer in range(model.n_layers)]
        gained = torch.nn.functional.pad(torch.stack(parts, 2), (start, 0))
        windows = [gained[:, :, list(span)] for span in spans]
        joint = [part.mean(2) if patch.is_hidden else part.sum(2) for part in windows]
        found.append((base.cpu()[:, :, None, None] + torch.stack(joint, 2)).numpy())
    return found


def _columns(model: TracedModel, patch: Patch, product: Float[Tensor, "*row d"]) -> Float[Tensor, "*row d_patch"]:
    if patch.head is None:
        return product
    _, width = heads(model)
    return product[..., patch.head * width : (patch.head + 1) * width]
