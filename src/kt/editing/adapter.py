"""LoRA adapters, through peft: ΔW = (alpha / rank) · B A on chosen projections (Hu et al. 2021, section 4.1).

A starts random, B at zero, so an untrained adapter changes nothing. For the time of a training peft's layers stand in
the module tree in the projections' places; then the projections stand there again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import need
from ..model.sites import Site
from ..model.update import LowRank

if TYPE_CHECKING:
    from ..model.model import TracedModel


NAME = "kt"


@dataclass(frozen=True)
class Adapter:
    """`alpha` / `rank` scales B A; `dropout` falls on the adapter's input only."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0

    def first_step(self, d_in: int) -> float:
        """The RMS of ΔW after one step of 1 in every number of B: peft draws A from ±1/√d_in, uniformly."""
        return self.alpha / self.rank * (self.rank / (3 * d_in)) ** 0.5


class Adapted(NamedTuple):
    """The adapter's own parameters, float32 or wider, and what they now add to each weight by its name."""

    parameters: list[nn.Parameter]
    updates: Callable[[], dict[str, LowRank]]


@contextmanager
def adapted(model: TracedModel, sites: Sequence[Site], adapter: Adapter, seed: int = 0) -> Iterator[Adapted]:
    """Adapters on the sites' projections, drawn from `seed`; the global random state is as before on exit, the module
    tree the same objects, also after an exception.

    Raises:
        KtError: peft is not installed.
    """
    need("peft", "method lora")
    from peft import LoraConfig, inject_adapter_in_model

    with model.at_rest(), model.opened(model.packing(sites)), _seeded({model.own(site).device for site in sites}, seed):
        projections = {model.layout.path(s): model.linear(s) for s in sites}
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
            lora_dropout=adapter.dropout,
            # A pattern that has to match in full: of a list's names peft also takes those that only end like them.
            target_modules="|".join(map(re.escape, projections)),
            fan_in_fan_out=any(isinstance(p, Conv1D) for p in projections.values()),
        )
        try:
            inject_adapter_in_model(config, model.module, NAME)
            layers: dict[str, Any] = {path: model.module.get_submodule(path) for path in projections}
            halves = [half[NAME] for layer in layers.values() for half in (layer.lora_A, layer.lora_B)]
            for half in halves:  # peft makes them in the weight's dtype, and its forward casts to theirs and back
                half.to(torch.promote_types(half.weight.dtype, torch.float32))
            for layer in layers.values():
                layer.lora_dropout.train()  # the model itself stays in eval mode
            yield Adapted(
                [half.weight for half in halves],
                lambda: {f"{path}.weight": low_rank(layer) for path, layer in layers.items()},
            )
        finally:
            take_out(model.module, projections)


@contextmanager
def _seeded(devices: set[torch.device], seed: int) -> Iterator[None]:
    """The generators that peft's initialisation (CPU) and dropout (the weights' devices) draw from; then as before.

    `torch.manual_seed` would seed every GPU of the machine, those of others too.
    """
    gpus = [device.index for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(gpus):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in gpus)):
            generator.manual_seed(seed)
        yield


def low_rank(layer: Any) -> LowRank:
    """A peft layer's update of its weight seen as (d_out, d_in), which A and B are for Conv1D too."""
    a, b = layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()
    return LowRank(layer.scaling[NAME] * b, a.clone()).to(torch.float32)


def take_out(module: nn.Module, projections: dict[str, nn.Module]) -> None:
    """Put the projections back, as peft's `unload` does, also after an injection that broke off half way."""
    for path, projection in projections.items():
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, projection)
    vars(module).pop("peft_config", None)
