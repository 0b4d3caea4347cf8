"""CrispEdit: gradients without the directions to which the loss on other text is curved (arXiv 2602.15823, its code).

The curvature of a linear map is taken as Kronecker factors (K-FAC; Martens and Grosse 2015): A is the second moment of
its inputs, B that of the gradients at its outputs, of -log p of a text's own next tokens. With A = U_A Σ_A U_Aᵀ and
B = U_B Σ_B U_Bᵀ, a direction u_B u_Aᵀ has the curvature σ_B σ_A. Adam is given

    G ← U_B ((U_Bᵀ G U_A) ⊙ M) U_Aᵀ

where M keeps the products σ_B σ_A that lie below the one with which the largest, added up, reach `energy` of all. Adam
scales each number of the projected gradient by itself, so that a step is only nearly free of what M takes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import KtError, WorkFailed
from ..model.sites import Site
from ..model.tokens import Batch, encode_ids, pad_id
from .closed_form.factor import PROJECTOR_COPIES, require_room
from .closed_form.keys import Rows
from .fine_tune import FineTune, Projection
from .layer_tuning import unrelated_rows
from .plan import PlanText, SolveContext

if TYPE_CHECKING:
    from ..model.model import TracedModel

TOKENS, PER_FORWARD = 64, 1024
"""Of a text, and of a forward and backward."""


def gradient_moments(model: TracedModel, sites: Sequence[Site], texts: int) -> dict[Site, Float[Tensor, "d_out d_out"]]:
    """B: the mean of g gᵀ over texts' tokens, g the gradient of their summed -log p at a map's output; float64."""
    rows = unrelated_rows(model, texts, TOKENS)
    totals = {site: torch.zeros(model.value_size(site), model.value_size(site), dtype=torch.float64) for site in sites}
    count = 0
    read = Rows(tuple(tuple(row[:-1]) for row in rows), tuple(0 for _ in rows))
    for numbers, batch, _ in read.batches(pad_id(model.tokenizer), PER_FORWARD):
        following = encode_ids([rows[i][1:] for i in numbers], 0)

        def loss(logits: Float[Tensor, "row keep vocab"], following: Batch = following) -> Float[Tensor, ""]:
            picked = logits.log_softmax(-1).gather(-1, following.ids.to(logits.device)[..., None])[..., 0]
            return -(picked * following.mask.to(picked)).sum()

        row, column = batch.mask.nonzero().T
        pairs = model.linear_io(batch, sites, loss, batch.ids.shape[1], (row, column))
        for site in sites:
            gradients = pairs[site][1].double()
            totals[site] += gradients.T @ gradients
        count += len(row)
    if not all(bool(torch.isfinite(total).all()) for total in totals.values()):
        raise WorkFailed("gradients of the texts are not finite; load the model in bfloat16 or float32")
    return {site: total / count for site, total in totals.items()}


def flat(
    input_values: Float[Tensor, " d_in"], output_values: Float[Tensor, " d_out"], energy: float
) -> Bool[Tensor, "d_out d_in"]:
    """M: which products of eigenvalues lie below the one with which the largest reach `energy` of all."""
    products = torch.outer(output_values.clamp(min=0), input_values.clamp(min=0))
    largest = products.flatten().sort(descending=True).values
    reached = int(torch.searchsorted(largest.cumsum(0), energy * largest.sum()))
    return products < largest[min(reached, len(largest) - 1)]


@dataclass(frozen=True)
class Projected(FineTune):
    """CrispEdit as a plan; `texts`: how many B is taken over."""

    energy: float = 0.99
    texts: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules == "block":
            raise KtError("crispedit projects the gradients of linear maps; name them (modules=mlp), not a whole block")
        if not 0 < self.energy < 1:
            raise KtError(f"energy {self.energy:g} must lie above 0 and below 1: the share that gradients lose")

    @property
    def moment_sites(self) -> list[Site]:
        return self.sites

    def require_room(self, model: TracedModel) -> None:
        model.require_linear(self.sites, "crispedit")
        for site in self.sites:
            require_room(f"the eigenvectors of {model.weight_name(site)}", model.key_size(site), PROJECTOR_COPIES)

    def describe(self) -> PlanText:
        return super().describe()._replace(solver="Adam on the weights, G ← U_B((U_BᵀGU_A) ⊙ M)U_Aᵀ")

    def _projections(self, context: SolveContext) -> list[Projection]:
        moments = gradient_moments(context.model, self.sites, self.texts)
        return [self._projection(context, site, moments[site]) for site in self.sites]

    def _projection(self, context: SolveContext, site: Site, outputs: Float[Tensor, "d_out d_out"]) -> Projection:
        model = context.model
        moment = context.moment(model.weight_name(site), model.key_size(site)).matrix()
        (a, u_a), (b, u_b) = torch.linalg.eigh(moment), torch.linalg.eigh(outputs)
        own, weight = model.own(site), model.weight(site)
        left, right, mask = (each.to(own.device) for each in (u_b, u_a, flat(a, b, self.energy)))
        turned = weight.stride() != own.stride()  # of a Conv1D: (d_in, d_out)

        def project(gradient: Tensor) -> Tensor:
            seen = gradient.T if turned else gradient
            seen = left.to(seen) @ ((left.to(seen).T @ seen @ right.to(seen)) * mask) @ right.to(seen).T
            return seen.T if turned else seen

        return project
