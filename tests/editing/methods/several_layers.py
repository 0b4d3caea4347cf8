"""Edits of the stream over three layers, and the update that a layer's target asks for, in float64."""

import pytest
import torch
from editing_help import CONTEXTS, REQUESTS, fast

import kt
from kt.editing.closed_form.aims import Position
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.keys import fact_keys, fact_values
from kt.editing.resolve import read_requests
from kt.model.sites import Kind, Site

LAYERS = (0, 1, 2)
QUIET = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change|changed too)")


def edited(ready, method="memit", layers=LAYERS, **changes):
    weight = {"mom2_update_weight": 0.05} if method != "alphaedit" else {}
    options = fast(method, layers_mlp=layers) | weight | changes
    return kt.edit(ready[0], REQUESTS, method=method, statistics=ready[1], **options)


def formula(ready, layer, target, part=1.0):
    """part · (z - h) Kᵀ (λC + K Kᵀ)⁻¹ at a layer of the model as it stands, z at the stream of `target`'s aim."""
    model, moments = ready
    aim, wanted = target
    facts, site = read_requests(model, REQUESTS), Site(Kind.MLP, layer)
    keys = fact_keys(model, facts, Contexts.of(CONTEXTS), site, Position.SUBJECT_LAST)
    now = fact_values(model, facts, Contexts(), Site.parse(aim), Position.SUBJECT_LAST)
    moment = moments.moment_of(model.weight_name(site)).matrix()
    return part * (wanted.T.double() - now) @ keys.T @ torch.linalg.inv(0.05 * moment + keys @ keys.T)


def only(edit, layer, model):
    """The part of an edit that it writes at a layer."""
    name = model.weight_name(Site(Kind.MLP, layer))
    return kt.Edit({name: edit.updates[name]}, {})
