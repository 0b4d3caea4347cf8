"""Edits that cost no solve: random updates of named weights, with the manifest that a solved one has."""

from __future__ import annotations

import hashlib

import torch

import kt
from kt.editing.apply import fingerprints
from kt.editing.package import about_requests, about_weights
from kt.model.update import Dense, LowRank


def random_edit(model, names, scale=0.1, rank=2, seed=0):
    """Low-rank updates of matrices, dense ones of vectors, each about `scale` times its weight's largest number."""
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for name in names:
        weight = model.weight(name)
        size = scale * float(weight.abs().max())
        if weight.dim() == 2:
            left, right = (torch.randn(s, generator=draw) for s in ((len(weight), rank), (rank, weight.shape[1])))
            updates[name] = LowRank(size * left, right)
        else:
            updates[name] = Dense(size * torch.randn(weight.shape, generator=draw))
    request = {"prompt": "The city of {} is", "subject": "Rome", "target_new": "Italy", "target_true": "French"}
    manifest = about_weights(model, updates) | about_requests([kt.facts.load.facts_from([request])[0].as_request()])
    edit = kt.Edit(updates, manifest | {"method": "by hand", "alpha": 0.0})
    with edit.applied(model):
        edit.manifest["fingerprints_after"] = fingerprints(model, names)
    return edit


def sha(model):
    """Of every byte of every parameter, without kt's own fingerprint."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.module.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def in_dtype(model, dtype):
    """The same model with its weights in another dtype."""
    return kt.load(model.module.to(dtype), tokenizer=model.tokenizer)
