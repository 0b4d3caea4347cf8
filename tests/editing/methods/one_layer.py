"""What a closed form was given at one layer, read again in float64, for the formula of its paper."""

from __future__ import annotations

from typing import NamedTuple

import torch
from editing_help import CONTEXTS, REQUESTS, fast, statistics

import kt
from kt.editing.closed_form.aims import Position
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.keys import fact_keys, fact_values
from kt.editing.resolve import read_requests
from kt.model.sites import Kind, Site

LAYER = 1
close = torch.testing.assert_close


class Given(NamedTuple):
    """Keys over contexts and of the bare prompts as columns, residuals, the second moment; float64."""

    keys: torch.Tensor
    bare: torch.Tensor
    residuals: torch.Tensor
    moment: torch.Tensor


def solved(setting, method, requests=REQUESTS, **changes):
    """An edit that writes layer 1 alone."""
    model, corpus, cache = setting
    options = fast(method, **({"layers_mlp": (LAYER,)} | changes))
    return kt.edit(model, requests, method=method, statistics=statistics(model, corpus, cache), **options)


def given(setting, edit, aim, kind=Kind.MLP, requests=REQUESTS, position=Position.SUBJECT_LAST, mean_value=False):
    """Of the write of `kind` at layer 1 whose target is `aim`, named as in `edit.targets`."""
    model, corpus, cache = setting
    facts, site = read_requests(model, requests), Site(kind, LAYER)
    contexts, bare = Contexts.of(CONTEXTS), Contexts()
    now = fact_values(model, facts, contexts if mean_value else bare, Site.parse(aim.partition("@")[0]), position)
    return Given(
        fact_keys(model, facts, contexts, site, position),
        fact_keys(model, facts, bare, site, position),
        edit.targets[aim].T.double() - now,
        statistics(model, corpus, cache).moment_of(model.weight_name(site)).matrix(),
    )


def delta(setting, edit, kind=Kind.MLP):
    return edit.delta(setting[0].weight_name(Site(kind, LAYER))).double()


def least_squares(parts, weight):
    """R Kᵀ (λC + K Kᵀ)⁻¹."""
    return parts.residuals @ parts.keys.T @ torch.linalg.inv(weight * parts.moment + parts.keys @ parts.keys.T)
