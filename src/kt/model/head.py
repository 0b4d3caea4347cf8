"""The head of a 16-bit model, read in float32.

In bfloat16 a logit between 16 and 32 comes in steps of 1/8, whatever the states before it are: a logit difference of
0.05 is then 0 or 0.125, and many tokens tie. The products of 16-bit numbers are exact in float32, so head and tail are
computed there; everything before the head runs as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .packed import is_packed

_CHUNK = 1 << 20
"""Numbers of the head that are in float32 at once (4 MB, about a cache): a copy of a whole head may have gigabytes."""


def is_widened(head: nn.Module) -> bool:
    """Whether a head is read in float32: a plain linear map whose 16-bit weights are here and are not trained."""
    if type(head) is not nn.Linear or is_packed(head) or head.weight.is_meta or head.weight.requires_grad:
        return False
    return head.weight.dtype in (torch.bfloat16, torch.float16)


def wide_linear(head: nn.Linear, states: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocab"]:
    """The head's output in float32, with gradients for the states."""
    weight = head.weight
    logits = _WideProduct.apply(states.to(weight.device).float(), weight)
    return logits if head.bias is None else logits + head.bias.float()


class _WideProduct(torch.autograd.Function):
    """states @ weight.T, chunk by chunk; autograd alone would keep every float32 chunk for its way back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        logits = states.new_empty((*states.shape[:-1], len(weight)))
        for rows in _chunks(weight):
            logits[..., rows] = functional.linear(states, weight[rows].float())
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        products = (gradient[..., rows] @ weight[rows].float() for rows in _chunks(weight))
        return sum(products, torch.zeros((), device=gradient.device)), None  # type: ignore[return-value]


def _chunks(weight: Tensor) -> list[slice]:
    size = max(1, _CHUNK // weight.shape[1])
    return [slice(start, start + size) for start in range(0, len(weight), size)]
