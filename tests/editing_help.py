"""Requests and quick settings that every test of editing uses."""

from __future__ import annotations

import kt
from kt.editing import METHODS, key_statistics
from kt.editing.methods import used_by
from kt.model.sites import Kind, Site

REQUESTS = [
    {
        "prompt": "The mother tongue of {}",
        "subject": "Danielle Darrieux",
        "target_new": {"str": "Italy"},
        "target_true": "French",
    },
    {
        "prompt": "The city of the {}",
        "subject": "Space Needle",
        "target_new": "Warsaw",
        "target_true": "Seattle",
    },
]
CONTEXTS = [["{}"], ["Therefore. {}", "Because I. {}"]]
FAST = dict(
    context_templates=CONTEXTS, layers_mlp=(0, 1), layers_high=(2,), v_num_grad_steps=15, v_lr=0.3,
    clamp_norm_factor=20.0, clamp_norm_factor_high=20.0, v_weight_decay=1e-4, v_weight_decay_high=1e-4,
    mom2_update_weight=0.01, L2=1e-4, nullspace_threshold=1.0, lr=0.01, norm_constraint=0.05, stop_norm=1e9,
)  # fmt: skip
ATTENTION = dict(layers_attn=(0, 1), alpha=0.4)


def fast(method="intattn", **changes):
    """The quick settings that a method has."""
    return {"context_templates": CONTEXTS} | used_by(method, FAST) | changes


def statistics(model, corpus, tmp_path):
    sites = [Site(k, layer) for k in (Kind.ATTN, Kind.MLP) for layer in model.layers_with(k)]
    return key_statistics(model, sites, corpus, max_tokens=2500, cache_dir=tmp_path)


def records():
    """Records that an editor of a tiny model is trained on."""
    names, places = ("Ana", "Bo", "Cid", "Dee", "Eva", "Finn"), ("Rome", "Paris", "Italy", "Warsaw")
    return [
        kt.Fact(
            "The mother tongue of {}",
            f"{first} {place}",
            target=places[(i + j) % 4],
            answer="French",
            rephrasings=("The city of the {}", "{} plays the sport of"),
            neighbours=(kt.Prompt("Marie Curie was born in", "Warsaw"), kt.Prompt(f"The capital of {i}{j} is")),
        )
        for i, first in enumerate(names)
        for j, place in enumerate(places)
    ]


TRAINING = dict(layers_mlp=(0, 1), rank=4, edits=6, steps=6, check_every=3, held_out=0.2, lr=0.01)


def editor_file(model, method, folder, **settings):
    """A trained editor's file."""
    path = folder / f"{method}-{model.fingerprint()[:16]}.safetensors"
    if not path.exists():
        kt.train_editor(model, records(), method, **(TRAINING | settings)).save(path)
    return path


def plan_of(method):
    """What a method does with the quick settings."""
    return METHODS[method].of(FAST | ATTENTION).plan()


def solve(model, corpus, tmp_path, method="intattn", requests=REQUESTS, check=False, **changes):
    """An edit, unread unless `check`; second moments are taken once a model and kept beside the corpus."""
    extra = ATTENTION if METHODS[method].writes_attention else {}
    if "editor" in METHODS[method].settings():
        extra = {"editor": editor_file(model, method, tmp_path)}
    return kt.edit(
        model,
        requests,
        method=method,
        check=check,
        statistics=statistics(model, corpus, corpus.path.with_name("moments")),
        **fast(method, **(extra | changes)),
    )
