"""What is done to solved updates before they are written, whatever method solved them.

    rect    only the tenths of ΔW's numbers with the largest |ΔW / W| are written: four of ten
    prune   with S the sum of ΔW over a session's edits, W = W₀ + F(S): of S's singular values, those above the largest
            of W₀ become ln σ - ln σ_max(W₀) + σ_max(W₀)
    sphere  ΔW (I - ½ U Uᵀ), U the main directions of W's rows: with the rows at length 1, the singular vectors that
            make up half of the squares of the singular values
    simie   ΔW = (ΔW̃ - (W - W₀)) K Kᵀ (λI + ΣK Kᵀ)⁻¹, ΔW̃ solved on the unedited model, K the inputs at every token of
            the requests with ΔW̃ in the unedited model, the sum over a session's edits

RECT (Gu et al. 2024, arXiv 2401.04700), PRUNE (Ma et al. 2024, arXiv 2405.16821), SPHERE (arXiv 2510.01172, ICLR 2026)
and SimIE (Simulating Ideal Editor), as their code has them. PRUNE's restrains once, after the last edit; here every
edit is solved on the model as it is restrained. SimIE's K are of the model without ΔW̃, which loses what later layers
write for tokens that earlier ones have changed: on SmolLM2 6 of 10 facts took, and all with it. Its λ is 10,000 for
Llama-3-8B and one request an edit; here it follows from the first edit's keys (closed_form.auto_ridge).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..facts.fact import Fact
from ..model.tokens import pad_id, token_ids, wanted_ids
from ..model.update import Dense, LowRank, Update
from .closed_form.auto_ridge import Spectrum, auto_ridge
from .closed_form.factor import Moment
from .closed_form.keys import Rows
from .closed_form.solvers import RegularisedGram
from .plan import SolveContext

UPDATE_GUARDS = ("rect", "prune", "sphere", "simie")
KEPT = 0.4
"""The share of an update's numbers that RECT writes."""
TINY = 1e-8
"""Added to W, as RECT's code does, and to the length of its rows, as SPHERE's does."""
MAIN, SUPPRESSED = 0.5, 0.5
"""SPHERE's cumulative ratio η and suppression α."""
KEPT_OF_IDEAL = 0.99
"""The share that SimIE's automatic λ lets through, of the median of the tokens that the first edit changes most, one a
request. Of the median of all tokens it is too little: most are common ones, whose keys lie near to each other."""


def rect(update: Update, weight: Float[Tensor, "*shape"], changed: int | None = None) -> Dense:
    """The update's numbers that are largest beside the weight's, the others zero.

    Args:
        update: ΔW.
        weight: W, of ΔW's shape.
        changed: how many numbers the experts have that ΔW changes, of which the share is taken: of all of a mixture,
            whose other experts' numbers are zero, the share may be all that there is [default: all of ΔW's].
    """
    dense = update.dense().double().cpu()
    ratio = (dense / (weight.detach().double().cpu() + TINY)).abs()
    changed = ratio.numel() if changed is None else changed
    least = ratio.flatten().kthvalue(max(1, ratio.numel() - changed + int(changed * (1 - KEPT)))).values
    return Dense(torch.where(ratio >= least, dense, 0.0))


def prune(total: Update, original: Float[Tensor, "*shape"]) -> Update:
    """The sum of all updates of a weight with its large singular values restrained; one that is no matrix, as it is."""
    if len(total.shape) != 2:
        return total
    largest = torch.linalg.matrix_norm(original.detach().double().cpu(), 2)
    if isinstance(total, LowRank):  # its singular values are those of a matrix of its rank
        (first, left), (last, right) = (torch.linalg.qr(f.double().cpu()) for f in (total.left, total.right.T))
        u, values, v = torch.linalg.svd(left @ right.T)
        u, v = first @ u, v @ last.T
    else:
        u, values, v = torch.linalg.svd(total.dense().double().cpu(), full_matrices=False)
    restrained = torch.where(values > largest, values.log() - largest.log() + largest, values)
    return LowRank(u * restrained, v) if isinstance(total, LowRank) else Dense((u * restrained) @ v)


def sphere(update: Update, weight: Float[Tensor, "*shape"]) -> Update:
    """The update with half of its part along the weight's main directions; one that is no matrix, as it is."""
    if len(update.shape) != 2:
        return update
    rows = weight.detach().double().cpu()
    _, values, directions = torch.linalg.svd(rows / (rows.norm(dim=1, keepdim=True) + TINY), full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum()
    main = directions[: int((shares <= MAIN).sum()) + 1]

    def suppressed(matrix: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        return matrix - SUPPRESSED * (matrix @ main.T) @ main

    update = update.to(torch.float64)
    if isinstance(update, LowRank):
        return LowRank(update.left, suppressed(update.right))
    return Dense(suppressed(update.matrix))


def simie(context: SolveContext, facts: Sequence[Fact], ideal: Mapping[str, Update]) -> dict[str, Update]:
    """From what was solved on the unedited model to what the model as it stands is to be changed by.

    λ and the keys of the session's earlier edits are kept in the context's `state.running`.
    """
    tokens = _token_keys(context, facts, ideal)
    changes, running = context.changes(), context.state.running
    updates: dict[str, Update] = {}
    for name, update in ideal.items():
        keys = tokens[name]
        ridge, past = running.get(f"simie {name}", (None, keys[:, :0]))
        if ridge is None:
            most = (update.dense().double().cpu() @ keys).norm(dim=0).argsort(descending=True)
            ridge = auto_ridge(Spectrum.of_keys(keys[:, most], len(facts)), KEPT_OF_IDEAL, 1.0).ridge
        every = torch.cat([keys, past], 1)
        spread = RegularisedGram(Moment.of(torch.eye(len(keys), dtype=torch.float64)), ridge, every).solve_own(
            keys.shape[1]
        )
        wanted = update.to(torch.float64)
        if name in changes:
            wanted = wanted.plus(changes[name].scaled(-1.0))
        if isinstance(wanted, LowRank):
            updates[name] = LowRank(wanted.left, wanted.right @ keys @ spread.T)
        else:
            updates[name] = LowRank(wanted.matrix @ keys, spread.T.contiguous())
        if every.shape[1] > len(every):  # no more columns than their sum of k kᵀ needs
            values, vectors = torch.linalg.eigh(every @ every.T)
            every = vectors * values.clamp(min=0).sqrt()
        running[f"simie {name}"] = ridge, every
    return updates


def _token_keys(
    context: SolveContext, facts: Sequence[Fact], ideal: Mapping[str, Update]
) -> dict[str, Float[Tensor, "d_in token"]]:
    """What each weight reads at every token of prompts and targets, the unedited model with the edit in it; float64."""
    model = context.model
    sites = {name: model.site_of(name) for name in ideal}
    rows = []
    for fact in facts:
        target = wanted_ids(model.reader, fact)
        rows.append((*token_ids(model.reader, fact.prompt), *target))
    found: dict[str, list[Tensor]] = {name: [] for name in ideal}
    with context.unedited(), model.restored(list(ideal)):
        for name, update in ideal.items():
            model.write(name, update)
        for _, batch, _ in Rows(tuple(rows), (0,) * len(rows)).batches(pad_id(model.tokenizer)):
            read, there = model.read(batch.to(model.device), sites.values(), "key"), batch.mask.bool().cpu()
            for name, site in sites.items():
                found[name].append(read[site].cpu().double()[there])
    return {name: torch.cat(parts).T.contiguous() for name, parts in found.items()}


def added(parts: Mapping[str, Update], more: Mapping[str, Update]) -> dict[str, Update]:
    """Sums of updates by weight."""
    return {**parts, **{name: parts[name].plus(update) if name in parts else update for name, update in more.items()}}
