"""The rows that a target search runs: a request's prompt in every context, and the essence prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..facts.fact import Fact, fill
from ..prompts import Batch, encode_ids, pad_id, target_ids, template_span, token_ids
from .aims import Aim, Position
from .contexts import Contexts

if TYPE_CHECKING:
    from ..model import TracedModel

ESSENCE = "{} is a"
NOWHERE = -1


@dataclass(frozen=True)
class TargetRows:
    """Per request its context rows, which end before the target's last token, then the essence row, which is cut at
    the subject's last token. Padded on the left: what is read stands in the last columns of every row.

    Attributes:
        fact: the request of each row, counted within the batch.
        essence: which rows are essence rows.
        columns: each position's column, where its δ is added; `NOWHERE` for the prompt's last token in an essence row.
        answers: the target's ids, each at the column whose logits should say it.
        reads: which of the last columns are read: the target's, and in an essence row the last.
    """

    batch: Batch
    fact: Int[Tensor, " row"]
    essence: Bool[Tensor, " row"]
    columns: dict[Position, Int[Tensor, " row"]]
    answers: Int[Tensor, "row keep"]
    reads: Bool[Tensor, "row keep"]

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def keep(self) -> int:
        """How many of the last columns hold all that is read."""
        return self.reads.shape[1]

    def where(self, position: Position) -> tuple[Int[Tensor, " place"], Int[Tensor, " place"]]:
        """(row, column) of every place that δ of this position is added to."""
        rows = (self.columns[position] != NOWHERE).nonzero()[:, 0]
        return rows, self.columns[position][rows]

    def first_touched(self, aims: Iterable[Aim]) -> int:
        """The first column that δ of any aim stands in: left of it, it changes nothing."""
        places = [self.where(aim.position)[1] for aim in aims]
        return int(torch.cat([*places, torch.tensor([self.width - 1], device=self.fact.device)]).min())

    @property
    def width(self) -> int:
        return int(self.batch.ids.shape[1])

    def of(self, rows: Bool[Tensor, " row"]) -> TargetRows:
        """Some of the rows, in the same columns."""
        return TargetRows(
            Batch(self.batch.ids[rows], self.batch.mask[rows]),
            self.fact[rows],
            self.essence[rows],
            {position: columns[rows] for position, columns in self.columns.items()},
            self.answers[rows],
            self.reads[rows],
        )

    def tight(self) -> TargetRows:
        """The same rows without the columns that only pad them."""
        spare = self.width - int(self.batch.lengths.max())
        keep = self.keep - int((~self.reads.any(0)).sum())
        return TargetRows(
            Batch(self.batch.ids[:, spare:], self.batch.mask[:, spare:]),
            self.fact,
            self.essence,
            {p: torch.where(c == NOWHERE, NOWHERE, c - spare) for p, c in self.columns.items()},
            self.answers[:, self.keep - keep :],
            self.reads[:, self.keep - keep :],
        )


def target_rows(model: TracedModel, facts: Sequence[Fact], contexts: Contexts) -> TargetRows:
    """All rows of some requests, request by request, the first of each its prompt in the first context."""
    tokenizer = model.tokenizer
    ids: list[list[int]] = []
    answers: list[tuple[int, ...]] = []  # a row's; an essence row has none
    owner: list[int] = []
    at: dict[Position, list[int]] = {position: [] for position in Position}
    for number, fact in enumerate(facts):
        answer = target_ids(tokenizer, fact.prompt, fact.target or "")
        for template in contexts.templates(fact):
            prompt = token_ids(tokenizer, fill(template, fact.subject))
            at[Position.SUBJECT_LAST].append(template_span(tokenizer, template, fact.subject).last)
            at[Position.PROMPT_LAST].append(len(prompt) - 1)
            ids.append([*prompt, *answer[:-1]])
            answers.append(answer)
            owner.append(number)
        last = template_span(tokenizer, ESSENCE, fact.subject).last
        at[Position.SUBJECT_LAST].append(last)
        at[Position.PROMPT_LAST].append(NOWHERE)
        ids.append(token_ids(tokenizer, fill(ESSENCE, fact.subject))[: last + 1])
        answers.append(())
        owner.append(number)
    batch = encode_ids(ids, pad_id(tokenizer)).to(model.device)
    columns = {position: _shifted(batch, places) for position, places in at.items()}
    return TargetRows(batch, *_per_row(owner, answers, model.device), columns, *_right_aligned(answers, model.device))


def split_rows(rows: TargetRows, aims: Collection[Aim], essence: bool, worth: float) -> list[TargetRows]:
    """The rows as they are run together: essence rows, one column wide above the lowest aim, apart from the others.

    Without `essence` they are left out. They stay with the others where that wastes fewer than `worth` tokens, which
    is what a forward of their own would cost.
    """
    if not essence:
        return [rows.of(~rows.essence).tight()]
    wasted = int(rows.essence.sum()) * (rows.width - 1 - rows.first_touched(aims))
    if wasted < worth:
        return [rows]
    return [rows.of(~rows.essence).tight(), rows.of(rows.essence).tight()]


def _shifted(batch: Batch, places: Sequence[int]) -> Int[Tensor, " row"]:
    index = torch.tensor(places, device=batch.ids.device)
    return torch.where(index == NOWHERE, NOWHERE, batch.columns(index))


def _per_row(
    owner: Sequence[int], answers: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Int[Tensor, " row"], Bool[Tensor, " row"]]:
    return torch.tensor(owner, device=device), torch.tensor([not a for a in answers], device=device)


def _right_aligned(
    answers: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Int[Tensor, "row keep"], Bool[Tensor, "row keep"]]:
    width = max(map(len, answers))
    ids = torch.zeros((len(answers), width), dtype=torch.long)
    for row, answer in enumerate(answers):
        ids[row, width - len(answer) :] = torch.tensor(answer)
    lengths = torch.tensor([max(1, len(a)) for a in answers])
    reads = torch.arange(width)[None] >= width - lengths[:, None]
    return ids.to(device), reads.to(device)
