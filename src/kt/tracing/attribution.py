"""Attribution patching: a first-order estimate of every patched run from one backward (Nanda 2023).

When the value at a site changes from the base run's to the donor run's, the score is estimated as

    f(patched) ≈ f(base) + ∇f(base) · (donor - base)

at every site (kind, layer, token), sample and metric. One forward and one backward per metric estimate all sites at
once, where exact patching needs a run for each. Denoising takes the gradient at each sample's corrupted run and patches
clean values in; noising takes it at the clean run, once per fact. A head's site is its columns of W_o's input.

The estimate is exact only where the model is linear between the two values; docs/tracing.md lists where it fails
(Kramár et al. 2024, AtP*).

A window's estimate is the sum over its layers. For `mlp` and `attn` this is the effect of *adding* all differences,
while exact patching *sets* the values: a patched layer's effect on the next one is counted here and overwritten there.
Residual streams patched at consecutive layers overwrite one another almost fully, so for `hidden` the estimate is the
mean over the layers (it ranks cells as the sum does; the sum would count one patch once per layer of the window).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from .._util.progress import Progress
from ..errors import BadFact, WorkFailed
from ..model.devices import require_gradients
from ..model.layout import unwrap_tuple
from ..model.model import TracedModel
from ..model.prefix import Prefix, new_cache, prefix_is_reusable, saved
from ..model.sites import Kind
from .corrupt import Corruption
from .engine import Outcome, Plan, groups, in_groups, must_be_finite, placed_noise
from .forward import run_rows
from .patch import window_layers
from .patches import EXPERTS, Patch, Source, heads, readout, sources_at, unpadded_batch
from .prompts import TracePrompt

# Left of a fact's corruption its clean and corrupted runs are equal, and no estimate needs a gradient there. So these
# tokens run once per fact, and the other rows begin after them, with their keys and values, if the model allows it.


class Prompts(NamedTuple):
    """Rows of equal length, and the tokens scored in each. `fact` is the row's index among its group's facts."""

    ids: Int[Tensor, "row pos"]
    noise: Float[Tensor, "row pos d_embed"] | None
    answers: Int[Tensor, "row 1"]
    foils: Int[Tensor, " row"]
    fact: Int[Tensor, " row"]

    def part(self, start: int, stop: int) -> Prompts:
        """The rows from `start` to `stop`."""
        return Prompts(*(None if value is None else value[start:stop] for value in self))  # type: ignore[arg-type]


class Shared(NamedTuple):
    """The tokens left of `start`, which a group's facts share with their corruptions: keys and values by layer."""

    start: int = 0
    prefixes: Sequence[Prefix] = ()

    @classmethod
    def left_of(cls, model: TracedModel, prompts: Prompts, start: int) -> Shared:
        """The prompts' tokens left of `start`; none if the model's cache cannot be reused."""
        if not (start and prefix_is_reusable(model, prompts.ids.shape[1])):
            return cls()
        run = run_rows(model, prompts.ids[:, :start], None, prompts.answers, prompts.foils, start=True, prefix=True)
        return cls() if run.prefixes is None else cls(start, run.prefixes)


class Slopes(NamedTuple):
    """A run from the shared tokens on: scores, values at the sources and, if asked for, both metrics' gradients."""

    scores: Float[Tensor, "metric row"]
    values: dict[Source, Float[Tensor, "row pos d"]]
    gradients: dict[Source, Float[Tensor, "metric row pos d"]]


def slopes(model: TracedModel, prompts: Prompts, shared: Shared, sources: Sequence[Source]) -> Slopes:
    """Run the prompts and differentiate both metrics; if memory runs out, half the rows at a time."""
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

    Args:
        sources: in the order of the forward.

    Raises:
        WorkFailed: no gradient reaches the sites.
    """
    live: list[Tensor] = []
    values: list[Tensor] = []
    read: list[Tensor] = []
    with torch.set_grad_enabled(graded):
        with model.nnsight.trace(**forward_arguments(model, prompts, shared)):
            embedded = model.embed.output.detach()
            if prompts.noise is not None:
                embedded = (embedded + prompts.noise[:, shared.start :].to(embedded.device)).to(embedded.dtype)
            # The graph begins here, since no parameter requires gradients; a clone, since a block may write in place.
            model.embed.output = embedded.requires_grad_(graded).clone()
            for source in sources:
                tensor = _graph_tensor(model, source)
                values.append(saved(tensor.detach().clone()))
                if graded:
                    live.append(saved(tensor))
            read.append(saved(readout(model.last_logits(), prompts.answers, prompts.foils)[:2]))
        gradients = _gradients(model, read[0], live) if graded else []
    shape = (len(prompts.ids), prompts.ids.shape[1] - shared.start, -1)
    return Slopes(
        read[0].detach(),
        {s: value.view(shape) for s, value in zip(sources, values, strict=True)},
        {s: both.view(2, *shape) for s, both in zip(sources, gradients, strict=False)},
    )


def _gradients(model: TracedModel, scores: Float[Tensor, "metric row"], live: Sequence[Tensor]) -> list[Tensor]:
    """By source, both metrics stacked. Rows are independent, so the gradient of their sum holds each row's gradient."""
    require_gradients("attribution patching (method='atp')")
    if not scores.requires_grad:
        raise WorkFailed(f"{model.name} cannot be differentiated; trace it with method='exact'")
    prob, logit_diff = scores
    of_prob = torch.autograd.grad(prob.sum(), live, retain_graph=True)
    of_logit_diff = torch.autograd.grad(logit_diff.sum(), live)
    return [torch.stack(pair) for pair in zip(of_prob, of_logit_diff, strict=True)]


def forward_arguments(model: TracedModel, prompts: Prompts, shared: Shared) -> dict[str, Any]:
    """The arguments of a forward over the tokens from `start` on, with the earlier tokens in the cache."""
    cache: Any = new_cache(model) if shared.start else None
    for layer, (keys, values) in enumerate(shared.prefixes):
        rows = prompts.fact.to(keys.device)
        cache.update(keys[rows, :, : shared.start], values[rows, :, : shared.start], layer)
    arguments = model.inputs(unpadded_batch(prompts.ids), cache=cache)
    by_token = [name for name in ("input_ids", "position_ids") if name in arguments]
    return arguments | {name: arguments[name][:, shared.start :] for name in by_token}


def _graph_tensor(model: TracedModel, source: Source) -> Any:
    """A source's tensor in the autograd graph inside a trace, not a view of it, which `model.value` may give."""
    if source.site.kind is Kind.RESID:
        return unwrap_tuple(model.block(source.site.layer).output)
    projection = model.projection(source.site)
    return projection.input if source.end == "key" else projection.output


class _Estimates(NamedTuple):
    """The scores of a group's facts, and the estimated scores by patch."""

    clean: Float[ndarray, "metric fact"]
    corrupted: Float[ndarray, "metric fact sample"]
    patched: list[Float[ndarray, "metric fact layer token sample"]]


def run_all(
    model: TracedModel,
    cases: Sequence[TracePrompt],
    corruptions: Sequence[Corruption],
    plan: Plan,
    progress: Progress | None,
) -> list[Outcome]:
    """`engine.run_all` with `patched` estimated to first order.

    Raises:
        BadFact: a kind severs a module, which a gradient cannot estimate.
        WorkFailed: a number is not finite, or the model cannot be differentiated.
    """
    for patch in plan.patches:
        if patch.severed is not None:
            raise BadFact(
                f"kinds {patch.label}: no gradient says what a severed module does; trace it with method='exact'"
            )
        if patch.role.startswith(tuple(EXPERTS.values())):
            raise BadFact(f"kinds {patch.label}: experts are patched, not estimated; trace them with method='exact'")
    case_groups = groups(cases, corruptions, _graph_rows(model, plan), by_start=True)
    return in_groups(_run_group, case_groups, model, cases, corruptions, plan, progress)


def _graph_rows(model: TracedModel, plan: Plan) -> int:
    """Rows of one autograd graph: it holds every layer, while a patched run holds one layer at a time."""
    return max(1, plan.max_rows // model.n_layers)


def _run_group(
    model: TracedModel, cases: Sequence[TracePrompt], corruptions: Sequence[Corruption], plan: Plan
) -> list[Outcome]:
    estimates = _estimated(model, *_prompts(model, cases, corruptions), [m.first for m in corruptions], plan)
    outcomes = []
    for i, (case, corruption) in enumerate(zip(cases, corruptions, strict=True)):
        clean, corrupted = estimates.clean[:, i], estimates.corrupted[:, i]
        must_be_finite(case, clean, corrupted)
        patched = None
        if abs(clean[1] - corrupted[1].mean(dtype=np.float64)) >= plan.min_gap:
            patched = {kind: values[:, i].copy() for kind, values in zip(plan.kinds, estimates.patched, strict=True)}
            must_be_finite(case, *patched.values())
            for kind, wanted in (plan.only[case.index] if plan.only else {}).items():
                patched[kind][:, ~wanted] = np.nan
        outcomes.append(Outcome(case, corruption, clean, corrupted, patched))
    return outcomes


def _prompts(
    model: TracedModel, cases: Sequence[TracePrompt], corruptions: Sequence[Corruption]
) -> tuple[Prompts, Prompts]:
    """The clean prompts, and the corrupted ones: facts x samples, samples innermost."""
    ids, corrupt = (torch.tensor([one.ids for one in items], device=model.device) for items in (cases, corruptions))
    answers, foils = torch.tensor([[c.answer_id] for c in cases]), torch.tensor([c.foil_id for c in cases])
    clean = Prompts(ids, None, answers, foils, torch.arange(len(cases)))
    rows = [(i, s) for i in range(len(cases)) for s in range(corruptions[0].samples)]
    fact = torch.tensor([i for i, _ in rows])
    noise = placed_noise(cases, corruptions, rows)
    return clean, Prompts(corrupt[fact.to(corrupt.device)], noise, answers[fact], foils[fact], fact)


def _estimated(
    model: TracedModel, clean: Prompts, corrupted: Prompts, first_token: Sequence[int], plan: Plan
) -> _Estimates:
    """All scores and estimates of a group; the corrupted rows run in blocks."""
    noising, sources = plan.direction == "noise", _sources(model, plan.patches)
    shared = Shared.left_of(model, clean, min(first_token)) if plan.shortcuts.reuse else Shared()
    clean_run = (
        slopes(model, clean, shared, sources) if noising else run_from(model, clean, shared, sources, graded=False)
    )
    scores, estimates = [], []
    size = _graph_rows(model, plan)
    for start in range(0, len(corrupted.ids), size):
        rows = corrupted.part(start, start + size)
        indices, first = torch.arange(len(rows.ids)), torch.tensor(first_token)[rows.fact] - shared.start
        if noising:
            corrupted_run = run_from(model, rows, shared, sources, graded=False)
            base = clean_run.scores[:, rows.fact.to(model.device)]
            products = gradient_times_difference(clean_run, corrupted_run, rows.fact, indices, first)
        else:
            corrupted_run = slopes(model, rows, shared, sources)
            base, products = (
                corrupted_run.scores,
                gradient_times_difference(corrupted_run, clean_run, indices, rows.fact, first),
            )
        scores.append(corrupted_run.scores.cpu().numpy())
        estimates.append(_estimates(model, base, products, shared.start, plan))
    samples = len(corrupted.ids) // len(clean.ids)
    by_sample = "metric (fact sample) ... -> metric fact ... sample"
    return _Estimates(
        clean_run.scores.cpu().numpy(),
        rearrange(np.concatenate(scores, 1), by_sample, sample=samples),
        [rearrange(np.concatenate(p, 1), by_sample, sample=samples) for p in zip(*estimates, strict=True)],
    )


def _sources(model: TracedModel, patches: Sequence[Patch]) -> list[Source]:
    """The sources to read, in the order of the forward."""
    return [source for layer in range(model.n_layers) for source in sources_at(model, patches, layer, severed=False)]


def gradient_times_difference(
    base: Slopes,
    donor: Slopes,
    base_row: Int[Tensor, " row"],
    donor_row: Int[Tensor, " row"],
    first_token: Int[Tensor, " row"],
) -> dict[Source, Float[Tensor, "metric row pos d"]]:
    """Gradient times difference, elementwise. Left of the corruption the difference is only rounding, set to 0."""
    products = {}
    for source, gradient in base.gradients.items():
        device = gradient.device
        of_base, of_donor = base_row.to(device), donor_row.to(device)
        before = torch.arange(gradient.shape[2], device=device) < first_token.to(device)[:, None]
        difference = donor.values[source][of_donor].float() - base.values[source][of_base].float()
        products[source] = gradient[:, of_base].float() * difference.masked_fill(before[..., None], 0.0)
    return products


def _estimates(
    model: TracedModel,
    base: Float[Tensor, "metric row"],
    products: Mapping[Source, Float[Tensor, "metric row pos d"]],
    start: int,
    plan: Plan,
) -> list[Float[ndarray, "metric row layer token"]]:
    """The base's scores plus each patch's estimated change, by patch; the change is 0 left of `start`."""
    estimates = []
    spans = [window_layers(layer, plan.window, model.n_layers) for layer in range(model.n_layers)]
    for patch in plan.patches:
        layers = [products.get(patch.source(layer)) for layer in range(model.n_layers)]
        changes = [None if product is None else _columns(model, patch, product).sum(-1).cpu() for product in layers]
        nothing = torch.zeros_like(next(change for change in changes if change is not None))
        by_layer = [nothing if change is None else change for change in changes]  # a layer without this part
        change = torch.nn.functional.pad(torch.stack(by_layer, 2), (start, 0))
        windows = [change[:, :, list(span)] for span in spans]
        joint = [window.mean(2) if patch.is_hidden else window.sum(2) for window in windows]
        estimates.append((base.cpu()[:, :, None, None] + torch.stack(joint, 2)).numpy())
    return estimates


def _columns(model: TracedModel, patch: Patch, product: Float[Tensor, "*row d"]) -> Float[Tensor, "*row d_patch"]:
    if patch.head is None:
        return product
    _, width = heads(model)
    return product[..., patch.head * width : (patch.head + 1) * width]
