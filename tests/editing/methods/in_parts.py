"""An edit of long answers in parts at one layer: its keys, residuals and held keys read again, one row a forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from editing_help import statistics

import kt
from kt.editing.closed_form.parts import parts_of
from kt.model.sites import Kind, Site
from kt.model.tokens import joint_text, token_ids

FACTS = [
    kt.Fact("The mother tongue of {} is", "Danielle Darrieux", target="Italy and the city of {} Warsaw in France"),
    kt.Fact("The city of the {} is", "Space Needle", target="Warsaw, and Paris is"),
    kt.Fact("{} plays", "Megan Rapinoe", target="soccer"),
]
LAYER, WINDOW = 1, 4
SEARCH = dict(v_num_grad_steps=8, v_lr=0.3, clamp_norm_factor=20.0, v_weight_decay=0.0)


def rows_of(model, facts):
    """Each request's tokens with its answer, and the columns of its aims."""
    rows = []
    for number, fact in enumerate(facts):
        ids = token_ids(model.tokenizer, joint_text(fact.prompt, fact.target))
        own = [part.fact for part in parts_of(model, facts, WINDOW) if part.owner == number]
        rows.append((ids, [len(token_ids(model.tokenizer, part.prompt)) - 1 for part in own]))
    return rows


def streams(model, ids, put=()):
    """What down_proj reads, and the stream behind the block, at every token; `put`: (token, δ) to add to the latter."""
    seen = {}

    def behind(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        for token, shift in put:
            hidden[0, token] += shift
        seen["hidden"] = hidden[0].clone()
        return output

    block = model.module.get_submodule(model.layout.path(Kind.RESID, LAYER))
    hooks = [
        model.linear(Site(Kind.MLP, LAYER)).register_forward_hook(lambda m, i, o: seen.update(key=i[0][0].clone())),
        block.register_forward_hook(behind),
    ]
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return seen["key"].double(), seen["hidden"].double(), logits.double()


class Given(NamedTuple):
    """Keys and residuals of the aims, keys of the other tokens (columns), and the second moment; float64."""

    keys: torch.Tensor
    residuals: torch.Tensor
    held: torch.Tensor
    moment: torch.Tensor


def solved(setting, method, **weights):
    """The edit and what it was given."""
    model, corpus, cache = setting
    moments = statistics(model, corpus, cache)
    edit = kt.edit(
        model, FACTS, method=method, statistics=moments, layers_mlp=(LAYER,), window=WINDOW, **weights, **SEARCH
    )
    keys, others, residuals = [], [], []
    wanted = iter(edit.targets[f"hidden.{LAYER}@last"].double())
    for ids, columns in rows_of(model, FACTS):
        read, now, _ = streams(model, ids)
        keys += [read[c] for c in columns]
        others += [read[c] for c in range(len(ids)) if c not in columns]
        residuals += [next(wanted) - now[c] for c in columns]
    k, r, held = (torch.stack(each).T for each in (keys, residuals, others))
    return edit, Given(k, r, held, moments.moment_of(model.weight_name(Site(Kind.MLP, LAYER))).matrix())
