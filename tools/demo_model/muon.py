"""Muon: momentum whose update is made orthogonal, for the matrices of the blocks.

On this task AdamW alone needed many times the steps (feasibility study), and the budget is minutes of two
CPU cores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each in ``stack`` (n, rows <= cols), by Newton-Schulz."""
    a, b, c = NEWTON_SCHULZ
    x = stack / (stack.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised in stacks of equal shape, with decoupled weight decay."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.5
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is None:
                    continue
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(momentum, group["momentum"])
                flat = update if update.shape[0] <= update.shape[1] else update.mT
                stacks[(flat.shape[0], flat.shape[1])].append((param, flat))
            for members in stacks.values():
                updates = orthogonalise(torch.stack([flat for _, flat in members]))
                for (param, _), update in zip(members, updates, strict=True):
                    rows, cols = param.shape
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    step = -group["lr"] * max(1.0, rows / cols) ** 0.5
                    param.add_(update if update.shape == param.shape else update.mT, alpha=step)
