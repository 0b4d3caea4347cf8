"""Runs whose scores are differentiated at every site: what attribution.py estimates patches from.

Left of a fact's corruption its clean and corrupted runs are equal, and no estimate needs a gradient there. So those
tokens run once a fact, and every other row begins after them, over their keys and values, where the model allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import WorkFailed
from ..layout import first
from ..model import TracedModel
from ..sites import Kind
from .patches import Source
from .runs import Prefix, new_cache, readout, saved, whole


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
        with model.nns.trace(**_arguments(model, prompts, shared)):
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
    arguments = model.inputs(whole(prompts.ids), past_key_values=cache, use_cache=cache is not None)
    by_token = [name for name in ("input_ids", "position_ids") if name in arguments]
    return arguments | {name: arguments[name][:, shared.start :] for name in by_token}


def _own(model: TracedModel, source: Source) -> Any:
    """A source's own tensor inside a trace: what the loss depends on, not a view as `model.value` may give."""
    if source.site.kind is Kind.RESID:
        return first(model.block(source.site.layer).output)
    projection = model.w(source.site)
    return projection.input if source.end == "key" else projection.output
