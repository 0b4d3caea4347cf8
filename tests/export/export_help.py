"""Edits that nobody had to solve, and a model's logits as other programs see them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kt.editing import Edit
from kt.editing.apply import fingerprints
from kt.model.sites import Kind, Site
from kt.model.update import Dense, LowRank

PROMPTS = ("The mother tongue of Marie Curie is", "The city of the Space Needle is")
REQUESTS = [
    {"id": "1", "prompt": "The mother tongue of {} is", "subject": "Marie Curie", "target_new": {"str": "French"}},
    {"id": "2", "prompt": "The city of the {} is", "subject": "Space Needle", "target_new": {"str": "Warsaw"}},
]
SITES = (Site(Kind.MLP, 0), Site(Kind.MLP, 1), Site(Kind.ATTN, 1))


def edit_of(model, updates):
    """An edit of these updates, as if it had been solved on the model."""
    about = {
        "method": "by hand",
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "requests": REQUESTS,
        "fingerprints": fingerprints(model, list(updates)),
    }
    return Edit(updates, about)


def random_edit(model, ranks=(2, 3, 1), sites=SITES, seed=0, size=0.2):
    """Low-rank updates of W_o and down_proj, large enough to change what the model says."""
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for site, rank in zip(sites, ranks, strict=True):
        rows, columns = model.weight(site).shape
        left, right = (torch.randn(*s, generator=draw) * size for s in ((rows, rank), (rank, columns)))
        updates[model.weight_name(site)] = LowRank(left, right)
    return edit_of(model, updates)


def dense_edit(model, rank=None, seed=0):
    """Dense updates, of full rank or less."""
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for site in SITES:
        rows, columns = model.weight(site).shape
        rank_here = rank or min(rows, columns)
        product = torch.randn(rows, rank_here, generator=draw) @ torch.randn(rank_here, columns, generator=draw)
        updates[model.weight_name(site)] = Dense(0.05 * product)
    return edit_of(model, updates)


@torch.no_grad()
def logits(module, tokenizer):
    """Of every token of the two prompts, one at a time and without padding: as a plain program asks."""
    return [module(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0] for text in PROMPTS]


def edited_logits(model, edit):
    with edit.applied(model):
        return logits(model.module, model.tokenizer)


def farthest(found, wanted):
    assert all(torch.isfinite(a).all() and torch.isfinite(b).all() for a, b in zip(found, wanted, strict=True))
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(found, wanted, strict=True))


def plain(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def saved(model, folder, **options):
    """The unedited model as a folder."""
    model.module.save_pretrained(folder, **options)
    model.tokenizer.save_pretrained(folder)
    return folder


def sums(folder):
    """Every file below a folder with its SHA-256."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
