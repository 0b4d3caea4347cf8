"""A small causal trace in plain torch, for the figures of the model card.

It is kept apart from ``kt.tracing`` on purpose: the card's numbers should not depend on the code they are
shown with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SITES = ("attn", "mlp", "hidden", "attn_last")
LEAST_DIFFERENCE = 1.0


def subject_span(tokenizer: PreTrainedTokenizerFast, template: str, subject: str) -> tuple[list[int], int, int]:
    """Token ids of the prompt, first and one past the last token of the subject."""
    at = template.index("{}")
    encoded = tokenizer(template.format(subject), return_offsets_mapping=True)
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < at + len(subject) and b > at]
    return encoded["input_ids"], inside[0], inside[-1] + 1


class Patcher:
    """Runs rows of one prompt with noise on the subject and one clean output restored per group of rows."""

    def __init__(self, model: LlamaForCausalLM, samples: int) -> None:
        self.model, self.samples = model, samples
        self.layers = model.config.num_hidden_layers
        self.clean: dict[tuple[str, int], Tensor] | None = None
        self.last = 0
        self.saved: dict[tuple[str, int], Tensor] = {}
        self.handles = []
        for i, layer in enumerate(model.model.layers):
            self.handles += [
                layer.self_attn.register_forward_hook(self._hook(("attn", "attn_last"), i)),
                layer.mlp.register_forward_hook(self._hook(("mlp",), i)),
                layer.register_forward_hook(self._hook(("hidden",), i)),
            ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, kinds: tuple[str, ...], layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            for kind in kinds:
                at = -1 if kind == "attn_last" else self.last
                if self.clean is None:
                    self.saved[kind, layer] = value[0, at].clone()
                else:
                    value[self._rows(kind, layer), at] = self.clean[kind, layer]
            return output

        return hook

    def _rows(self, kind: str, layer: int) -> slice:
        group = 1 + SITES.index(kind) * self.layers + layer
        return slice(group * self.samples, (group + 1) * self.samples)

    @torch.no_grad()
    def run(self, ids: list[int], start: int, end: int, noise: Tensor, pair: tuple[int, int]) -> dict[str, Any]:
        """Logit difference clean, corrupted and per site; probability of the answer clean and corrupted."""
        embed = self.model.get_input_embeddings()(torch.tensor([ids]))
        self.last, self.clean, self.saved = end - 1, None, {}
        clean = self.model(inputs_embeds=embed, use_cache=False).logits[0, -1]
        groups = 1 + len(SITES) * self.layers
        rows = embed.repeat(self.samples * groups, 1, 1)
        rows[:, start:end] += noise.repeat(groups, 1, 1)
        self.clean = self.saved
        logits = self.model(inputs_embeds=rows, use_cache=False, logits_to_keep=1).logits[:, -1]
        difference = (logits[:, pair[0]] - logits[:, pair[1]]).view(groups, self.samples).mean(1)
        probability = logits[: self.samples].softmax(-1)[:, pair[0]].mean()
        return {
            "clean": (clean[pair[0]] - clean[pair[1]]).item(),
            "corrupted": difference[0].item(),
            "patched": difference[1:].view(len(SITES), self.layers),
            "p_clean": clean.softmax(-1)[pair[0]].item(),
            "p_corrupted": probability.item(),
        }


def trace(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[dict[str, Any]],
    seed: int,
    samples: int = 10,
) -> dict[str, Any]:
    """Mean normalised logit difference per site and layer; alpha = attn / (attn + mlp) at the subject."""
    generator = torch.Generator().manual_seed(seed)
    deviation = 3 * model.get_input_embeddings().weight.std().item()
    patcher = Patcher(model, samples)
    kept, clean, corrupted, skipped = [], [], [], 0
    for record in records:
        ids, start, end = subject_span(tokenizer, record["prompt"], record["subject"])
        noise = torch.randn(samples, end - start, model.config.hidden_size, generator=generator) * deviation
        pair = tuple(tokenizer(f" {record[key]}").input_ids[0] for key in ("answer", "foil"))
        result = patcher.run(ids, start, end, noise, pair)
        scale = result["clean"] - result["corrupted"]
        if scale < LEAST_DIFFERENCE:
            skipped += 1
            continue
        kept.append((result["patched"] - result["corrupted"]) / scale)
        clean.append(result["p_clean"])
        corrupted.append(result["p_corrupted"])
    patcher.remove()
    mean = torch.stack(kept).mean(0)
    curves = {kind: [round(v, 4) for v in mean[i].tolist()] for i, kind in enumerate(SITES)}
    attn, mlp = sum(curves["attn"]), sum(curves["mlp"])
    return {
        "facts": len(kept),
        "left_out": skipped,
        "samples": samples,
        "noise": round(deviation, 4),
        "p_clean": round(sum(clean) / len(clean), 4),
        "p_corrupted": round(sum(corrupted) / len(corrupted), 4),
        "normalised_logit_difference": curves,
        "alpha": round(attn / (attn + mlp), 4),
    }
