"""UnKE: one block is trained until its output takes a value that was found (Deng et al. 2025, arXiv 2405.15349).

A δ is searched for at the prompt's last token, in the residual stream h behind block l. Then every weight of the block
is trained (AdamW), with the states that enter it as they are, on

    mean ‖block(x) - h*‖² over the prompts' tokens  +  mean ‖block(x) - h‖² over those of unrelated texts

where h* is h + δ at the prompt's last token and h at the others; the means are over numbers. A step takes the prompts
of `batch_size` requests and all of the unrelated texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.progress import Progress
from ..facts.corpus import Corpus
from ..facts.fact import Fact
from ..model.prefix import saved
from ..model.sites import Kind, Site
from ..model.tokens import Batch, encode_ids, pad_id, token_ids
from .closed_form.aims import Position, TargetSite
from .closed_form.objective import Objective
from .closed_form.targets import find_targets
from .fine_tune import FineTune, Lesson, enter_at, entering
from .plan import PlanText, SolveContext, SolveResult

if TYPE_CHECKING:
    from ..model.model import TracedModel


def unrelated_rows(model: TracedModel, count: int, tokens: int) -> list[list[int]]:
    """The first tokens of texts of the default corpus, taken evenly over it; those of one token are left out."""
    texts = list(Corpus.open("auto", model.name).texts())
    rows = (token_ids(model.tokenizer, text)[:tokens] for text in texts[:: max(1, len(texts) // count)][:count])
    return [row for row in rows if len(row) > 1]


class OutputLesson(NamedTuple):
    """Rows, what enters the block, and the outputs that it is to have."""

    batch: Batch
    layer: int
    below: Float[Tensor, "row pos d_model"] | None
    wanted: Float[Tensor, "row pos d_model"]

    def loss(self, model: TracedModel) -> Float[Tensor, ""]:
        """The mean squared distance over the real tokens' numbers."""
        output = block_output(model, self.batch, self.layer, self.below)
        real = self.batch.mask.bool().to(output.device)
        return (output - self.wanted.to(output))[real].square().mean()


class Both(NamedTuple):
    """Two lessons as one, their losses added up; counted as the first."""

    first: OutputLesson
    second: OutputLesson

    @property
    def batch(self) -> Batch:
        return self.first.batch

    def loss(self, model: TracedModel) -> Float[Tensor, ""]:
        return self.first.loss(model) + self.second.loss(model)


def block_output(
    model: TracedModel, batch: Batch, layer: int, below: Float[Tensor, "row pos d_model"] | None
) -> Float[Tensor, "row pos d_model"]:
    """The stream behind a block, float32 or wider, with a gradient where one is wanted."""
    found: list[Any] = []
    with model.nnsight.trace(**model.inputs(batch)) as tracer:
        if below is not None:
            enter_at(model, layer, below)
        value: Any = model.value(Site(Kind.RESID, layer), len(batch))
        found.append(saved(value.clone()))
        tracer.stop()
    output: Tensor = found[0]
    return output.to(torch.promote_types(output.dtype, torch.float32))


@dataclass(frozen=True)
class LayerTuning(FineTune):
    """UnKE as a plan; `texts`: how many unrelated texts hold the block, of `tokens` tokens."""

    modules: str = "block"
    search: Objective = field(default_factory=Objective)
    texts: int = 20
    tokens: int = 64

    @property
    def aim(self) -> TargetSite:
        return TargetSite(Site(Kind.RESID, self.layers[0]), Position.PROMPT_LAST)

    @property
    def has_targets(self) -> bool:
        return True

    def describe(self) -> PlanText:
        solver = "AdamW on the block: its output to h + δ, and to h on unrelated text"
        return PlanText(str(self.aim), self.modules, solver, "–")

    def solve(self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None = None) -> SolveResult:
        given = context.model, facts, [self.aim], context.contexts, self.search
        targets = find_targets(*given, progress=progress, journal=context.journal)
        if context.guard is not None:
            targets = context.guard(context, facts, targets, self.search, {self.aim: Kind.MLP})
        trained = self._trained(context, facts, None, targets.wanted[self.aim])
        return trained._replace(targets=targets.wanted, search={self.aim: targets})

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        decays = [group | {"weight_decay": self.weight_decay * (group["params"][0].dim() > 1)} for group in groups]
        return torch.optim.AdamW(decays)

    def _epochs(
        self, context: SolveContext, facts: Sequence[Fact], *wanted: Float[Tensor, "fact d_model"]
    ) -> Iterator[Sequence[Lesson | Both]]:
        model, size = context.model, self.batch_size
        unrelated = self._held(model, unrelated_rows(model, self.texts, self.tokens))
        lessons = []
        for at in range(0, len(facts), size):
            edited = self._held(model, [token_ids(model.reader, fact.prompt) for fact in facts[at : at + size]])
            edited.wanted[:, -1] = wanted[0][at : at + size].to(edited.wanted)
            lessons.append(Both(edited, unrelated))
        return repeat(lessons, self.num_steps)

    def _held(self, model: TracedModel, rows: Sequence[Sequence[int]]) -> OutputLesson:
        """Rows whose outputs are to stay as they are."""
        batch, layer = encode_ids(rows, pad_id(model.tokenizer)), self.layers[0]
        below = entering(model, batch, layer) if layer else None
        with torch.no_grad():
            return OutputLesson(batch, layer, below, block_output(model, batch, layer, below).cpu())
