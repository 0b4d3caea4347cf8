"""The training loop: packed rows, weighted answers, stochastic depth on the MLPs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from demo_data.knowledge import Item
from demo_data.text import FACTS_FIRST, SECOND_HOPS, Document, Mix, Writer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .muon import Muon

log = logging.getLogger("demo")


@dataclass(frozen=True)
class Stage:
    """One run of the learning rate: warm-up, constant, linear to zero, with fresh optimisers.

    ``peak`` scales both learning rates. ``mlp_drop`` is the share of rows whose MLP is dropped, each for an
    equal part of the stage. It spreads what the MLPs store over the layers, and so shapes the causal picture:
    see the model card.
    """

    steps: int
    mlp_drop: tuple[float, ...]
    mix: Mix
    peak: float = 1.0
    flat: float = 0.4


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the model; written to figures.json."""

    layers: int = 8
    width: int = 128
    inner: int = 512
    kept: int = 320  # units of each MLP that are left after training: see prune.py
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 2048
    positions: int = 256
    rows: int = 24
    row_tokens: int = 96
    warm_up: int = 20
    muon_lr: float = 0.02
    weight_decay: float = 0.5
    adam_lr: float = 4e-3
    answer_weight: float = 5.0
    stages: tuple[Stage, ...] = (
        Stage(800, (0.3, 0.15, 0.05), FACTS_FIRST),
        Stage(250, (0.05,), SECOND_HOPS, peak=0.5, flat=0.2),
    )


def build_model(recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """W_o is wider than the residual stream (heads * head_dim = 2 * width): more room for keys of an edit."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def rows(writer: Writer, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens, loss weights), each row whole documents with an end-of-text after each."""
    eos, pad, length = tokenizer.eos_token_id, tokenizer.pad_token_id, recipe.row_tokens
    waiting: list[tuple[list[int], list[float]]] = []
    while True:
        waiting += [_encode(writer.document(), tokenizer, recipe.answer_weight) for _ in range(64 - len(waiting))]
        ids: list[int] = []
        weights: list[float] = []
        for document in list(waiting):
            if len(ids) + len(document[0]) + 1 <= length:
                waiting.remove(document)
                ids += [*document[0], eos]
                weights += [*document[1], 1.0]
            elif not ids:  # too long for any row
                waiting.remove(document)
        gap = length - len(ids)
        yield torch.tensor(ids + [pad] * gap), torch.tensor(weights + [0.0] * gap)


def _encode(
    document: Document, tokenizer: PreTrainedTokenizerFast, answer_weight: float
) -> tuple[list[int], list[float]]:
    encoded = tokenizer(document.text, return_offsets_mapping=True, add_special_tokens=False)
    weights = [
        answer_weight if any(start < b and end > a for a, b in document.answers) else 1.0
        for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], weights


class MlpDrop:
    """Zeroes the MLP output of random rows while training, scaled so that its mean stays."""

    def __init__(self, model: LlamaForCausalLM, seed: int) -> None:
        self.share = 0.0
        self.generator = torch.Generator().manual_seed(seed)
        self.handles = [layer.mlp.register_forward_hook(self._hook) for layer in model.model.layers]

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not module.training or not self.share:
            return output
        keep = torch.rand(output.shape[0], 1, 1, generator=self.generator) >= self.share
        return output * keep / (1 - self.share)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def rate(step: int, stage: Stage, warm_up: int) -> float:
    """Warm-up, constant, then linear to zero."""
    flat = stage.flat * stage.steps
    if step < warm_up:
        return stage.peak * (step + 1) / warm_up
    return stage.peak * min(1.0, (stage.steps - step) / (stage.steps - flat))


class Trainer:
    """Holds what outlives a stage: the model, the one stream of rows, the draws of dropped MLPs, the log."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        items: Sequence[Item],
        recipe: Recipe,
        seed: int,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.writer = Writer(items, f"{seed}/train", mix=recipe.stages[0].mix)
        self.stream = rows(self.writer, tokenizer, recipe)
        self.drop = MlpDrop(model, seed)
        self.history: list[dict[str, float]] = []

    def train(self) -> list[dict[str, float]]:
        """Train in place through all stages; returns the log of losses."""
        began = time.monotonic()
        self.model.train()
        for stage in self.recipe.stages:
            self._stage(stage, began)
        self.drop.remove()
        self.model.eval()
        return self.history

    def _stage(self, stage: Stage, began: float) -> None:
        recipe = self.recipe
        self.writer.turn_to(stage.mix)
        muon, adam = self._optimisers()
        for step in range(stage.steps):
            self.drop.share = stage.mlp_drop[step * len(stage.mlp_drop) // stage.steps]
            factor = rate(step, stage, recipe.warm_up)
            for optimiser, base in ((muon, recipe.muon_lr), (adam, recipe.adam_lr)):
                for group in optimiser.param_groups:
                    group["lr"] = base * factor
            batch = [next(self.stream) for _ in range(recipe.rows)]
            ids, weights = (torch.stack(part) for part in zip(*batch, strict=True))
            loss, answer_loss = _loss(self.model, ids, weights)
            loss.backward()
            for optimiser in (muon, adam):
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            if step % 25 == 0 or step == stage.steps - 1:
                self._note(step, loss.item(), answer_loss, time.monotonic() - began)

    def _optimisers(self) -> tuple[Muon, torch.optim.AdamW]:
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in inside]
        muon = Muon(matrices, self.recipe.muon_lr, weight_decay=self.recipe.weight_decay)
        return muon, torch.optim.AdamW(others, self.recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def _note(self, step: int, loss: float, answer_loss: float, seconds: float) -> None:
        entry = {"step": step, "loss": loss, "answer_loss": answer_loss, "seconds": seconds}
        self.history.append({key: round(value, 4) for key, value in entry.items()})
        log.info("step %d loss %.3f answers %.3f (%.0f s)", step, loss, answer_loss, seconds)


def _loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    weights = weights[:, 1:]
    each = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    each = each.view_as(weights)
    answers = weights > 1
    return (each * weights).sum() / weights.sum(), each[answers].mean().item()
