"""Several answers to one prompt: it is read once, and each answer's further tokens on top of its keys and values.

Under `prob` most prompts have two answers. Those of one token need nothing but the logits at the prompt's end; of a
longer one all tokens but the last are read in a second forward, over the prompt's keys and values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.model import TracedModel
from ..model.prefix import new_cache, prefix_is_reusable
from ..model.tokens import Batch, encode_ids, pad_id
from .teacher import (
    AUTO_LOGITS,
    AUTO_TOKENS,
    Question,
    Row,
    TeacherForced,
    packed,
    refuse_nan,
    score,
    shared_out,
    teacher_force,
)

Ids = tuple[int, ...]


class SharedPrefix(NamedTuple):
    """The rows of one prompt, and what all of them read first: up to the place where an answer's first token is due."""

    head: Ids
    rows: tuple[Row, ...]

    @property
    def tails(self) -> list[Ids]:
        """What is read behind the head, each once."""
        return [tail for tail in dict.fromkeys(map(self.tail, self.rows)) if tail]

    def tail(self, row: Row) -> Ids:
        return row.read[len(self.head) :]


def force(
    model: TracedModel,
    rows: Sequence[Row],
    batch_size: int | str = "auto",
    done: Callable[[int], None] = lambda n: None,
) -> dict[Question, TeacherForced]:
    """What `teacher_force` gives, to rounding, with every prompt read once where the model allows it."""
    together = families(rows) if _may_share(model, rows) else []
    if batch_size != "auto":
        together = [family for family in together if len(family.tails) <= int(batch_size)]
    shared = {row.question for family in together for row in family.rows}
    answers = teacher_force(model, [row for row in rows if row.question not in shared], batch_size, done)
    batches = _batches(together, batch_size, model.vocab_size)
    return answers | shared_out("answers to shared prompts", batches, partial(_read_once, model), done, _asked)


def _asked(batch: Sequence[SharedPrefix]) -> int:
    return sum(len(family.rows) for family in batch)


def families(rows: Sequence[Row]) -> list[SharedPrefix]:
    """The prompts that more than one row asks, shortest heads first."""
    asked: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        asked[row.question[0]].append(row)
    found = []
    for own in asked.values():
        columns = zip(*(row.read for row in own), strict=False)
        common = tuple(ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns))
        head = common[: min(len(row.read) - row.keep + 1 for row in own)]
        if len(own) > 1 and head:
            found.append(SharedPrefix(head, tuple(own)))
    return sorted(found, key=lambda family: (len(family.head), max(map(len, map(family.tail, family.rows)))))


def _may_share(model: TracedModel, rows: Sequence[Row]) -> bool:
    """Whether keys and values can be read on; what is no `TracedModel` (and only has logits) is asked row by row."""
    return isinstance(model, TracedModel) and prefix_is_reusable(model, max((len(row.read) for row in rows), default=0))


def _batches(together: Sequence[SharedPrefix], batch_size: int | str, vocab: int) -> Iterator[list[SharedPrefix]]:
    """As many prompts as neither of the two forwards grows beyond the budget with."""

    def fits(batch: list[SharedPrefix]) -> bool:
        tails = [tail for family in batch for tail in family.tails]
        size, longest = max(len(batch), len(tails)), max(map(len, tails), default=0)
        if batch_size != "auto":
            return size <= int(batch_size)
        return size * (len(batch[-1].head) + longest) <= AUTO_TOKENS and size * max(1, longest) * vocab <= AUTO_LOGITS

    return packed(together, fits)


@torch.no_grad()
def _read_once(model: TracedModel, batch: Sequence[SharedPrefix]) -> dict[Question, TeacherForced]:
    """The answers of a batch of prompts: the heads in one forward, all tails in another."""
    heads = encode_ids([family.head for family in batch], pad_id(model.tokenizer))
    tails = [(owner, tail) for owner, family in enumerate(batch) for tail in family.tails]
    if not tails:
        first, further = model.logits(heads), None
    else:
        cache = new_cache(model)
        first = _logits(model, model.inputs(heads, cache=cache), 1)
        further = _read_on(model, heads, cache, tails)
    place = {tail: i for i, tail in enumerate(tails)}
    answers: dict[Question, TeacherForced] = {}
    for owner, family in enumerate(batch):
        for row in family.rows:
            seen = first[owner]
            if (tail := family.tail(row)) and further is not None:
                seen = torch.cat([seen, further[place[owner, tail], -len(tail) :]])
            seen = seen[-row.keep :]
            refuse_nan(seen[None], [row])
            answers[row.question] = score(seen, row.target)
    return answers


def _read_on(
    model: TracedModel, heads: Batch, cache: Any, tails: Sequence[tuple[int, Ids]]
) -> Float[Tensor, "tail pos vocab"]:
    """Logits of every tail behind its head, whose row it names.

    Tails are padded on the left like all rows: padding then stands between head and tail, masked and not counted.
    """
    owners = torch.tensor([owner for owner, _ in tails])
    cache.batch_select_indices(owners)
    own = encode_ids([tail for _, tail in tails], pad_id(model.tokenizer))
    width = own.ids.shape[1]
    grown = Batch(own.ids, torch.cat([heads.mask[owners], own.mask], 1))
    arguments = model.inputs(grown, width, cache)
    if "position_ids" in arguments:
        arguments["position_ids"] = arguments["position_ids"][:, -width:]
    return _logits(model, arguments, width)


def _logits(model: TracedModel, arguments: dict[str, Any], keep: int) -> Float[Tensor, "row keep vocab"]:
    with model.nnsight.trace(**arguments):
        out = model.last_logits(keep).save()
    return out.float()
