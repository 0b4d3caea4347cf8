"""Takes dead hidden units out of the MLPs.

Weight decay starves about a quarter of the units: their gate and up rows shrink until the unit's output is some 1e-6 of
the others'. They do nothing for the model, but an edit's key still holds them, and its closed form, which weighs each
direction by how rarely the corpus excites it, would write thousands of times the weight's own norm into just these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@torch.no_grad()
def prune(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], kept: int
) -> list[float]:
    """Keep the `kept` units of each MLP that add most to the residual stream: rms of the unit times its column's norm.

    In place. Returns per layer the contribution of the weakest unit kept, as a share of the strongest.
    """
    if kept >= model.config.intermediate_size:
        return []
    shares = []
    for layer, power in zip(model.model.layers, unit_power(model, tokenizer, documents), strict=True):
        mlp = layer.mlp
        strength = power.sqrt() * mlp.down_proj.weight.float().norm(dim=0)
        best = strength.topk(kept)
        alive = best.indices.sort().values
        shares.append(round(float(best.values[-1] / best.values[0]), 4))
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            linear = getattr(mlp, name)
            linear.weight = nn.Parameter(linear.weight.index_select(axis, alive).clone())
            linear.out_features, linear.in_features = linear.weight.shape
        mlp.intermediate_size = kept
    model.config.intermediate_size = kept
    return shares


@torch.no_grad()
def unit_power(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[Tensor]:
    """Mean square of every hidden unit over the documents' tokens, by layer."""
    sums = [torch.zeros(model.config.intermediate_size) for _ in model.model.layers]

    def adder(total: Tensor):
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            total.add_(args[0][0].float().square().sum(0))

        return hook

    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(adder(total))
        for layer, total in zip(model.model.layers, sums, strict=True)
    ]
    tokens = 0
    for text in documents:
        ids = torch.tensor([tokenizer(text).input_ids])
        model(input_ids=ids, use_cache=False)
        tokens += ids.shape[1]
    for handle in handles:
        handle.remove()
    return [total / tokens for total in sums]
