"""Long answers in parts: one fact, several aims (AnyEdit's autoregressive editing, ARE; arXiv 2502.05628, its code).

An answer of more than `window` tokens is cut. Each part is a request of its own: its prompt is the fact's prompt with
the parts before it, its target the part, its aim the last token of that prompt. A part's δ is searched for with the δ
of the parts before it in place, and all are written at once, one key and one residual a part:

    ΔW = R Kᵀ (λC + K_r K_rᵀ + K Kᵀ)⁻¹,    K_r the keys of all other tokens of prompt and answer, which are held
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..._util.progress import Progress
from ...facts.fact import Fact
from ...model.chat import BEGUN, in_turn, unmarked
from ...model.sites import Site
from ...model.tokens import head_of, joint_ids, pad_id, target_ids, token_ids
from ...runs.journal import Journal
from .aims import TargetSite
from .contexts import Contexts
from .keys import Rows
from .objective import Objective
from .targets import Targets, find_targets, in_order, join_targets

if TYPE_CHECKING:
    from ...model.model import TracedModel

WORD_ENDS = re.compile(r"(?<=[^\s\u200b\u2060\ufeff])(?=\s|[^\x00-\x7f])")
"""Where an answer may be cut: behind a word, and before a letter of a script that may have no spaces."""


class Part(NamedTuple):
    """A part as a request, the number of the request that it is of, and its own number within that."""

    fact: Fact
    owner: int
    number: int


def parts_of(model: TracedModel, facts: Sequence[Fact], window: int | None) -> list[Part]:
    """The requests' parts, request by request; without a window, and of short answers, the requests themselves."""
    if window is None:
        return [Part(fact, i, 0) for i, fact in enumerate(facts)]
    return [Part(part, i, n) for i, fact in enumerate(facts) for n, part in enumerate(_cut(model, fact, window))]


def _cut(model: TracedModel, fact: Fact, window: int) -> list[Fact]:
    """Each part has as many tokens as it can, and ends where the text so far has the first tokens of the whole."""
    answer = fact.target or ""
    reader, head = model.reader, head_of(model.reader, fact.prompt, answer, fact.target_prefix)
    between = unmarked(head).removeprefix(fact.prompt.rstrip(" "))
    in_chat = between.startswith(BEGUN)
    whole = token_ids(reader, head + answer)
    cuts = [(0, len(whole) - len(target_ids(reader, fact.prompt, answer, fact.target_prefix)))]
    ends = []
    for match in WORD_ENDS.finditer(answer):
        ids = token_ids(reader, head + answer[: match.start()])
        if whole[: len(ids)] == ids:
            ends.append((match.start(), len(ids)))
    ends.append((len(answer), len(whole)))
    for end, following in pairwise(ends):
        if following[1] - cuts[-1][1] > window:
            cuts.append(end)
    if len(cuts) == 1:
        return [fact]
    parts = []
    for (start, _), (stop, _) in pairwise([*cuts, ends[-1]]):
        said, text = answer[:start].replace("{}", "{{}}"), answer[start:stop].lstrip()
        gap = answer[start : stop - len(text)] if said else between.lstrip(BEGUN)
        template = fact.template.rstrip(" ") + (between + said if said else BEGUN * in_chat)
        if said:  # a part that ends a sentence does not end the reply
            template = in_turn(reader, template, fact.prompt)
        if in_chat and stop == len(answer):
            text += reader.frame.end
        parts.append(Fact(template, fact.subject, target=text, id=fact.id, target_prefix=gap))
    return parts


def find_in_turn(
    model: TracedModel,
    parts: Sequence[Part],
    aim: TargetSite,
    contexts: Contexts,
    objective: Objective,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Targets:
    """A wanted value a part: those of all first parts, then of all second ones with the first δ in place, and so on."""
    found: list[Targets] = []
    order: list[int] = []
    shifts: dict[int, list[tuple[Fact, Tensor]]] = {}
    for number in range(max(part.number for part in parts) + 1):
        now = [i for i, part in enumerate(parts) if part.number == number]
        held = [tuple(shifts[parts[i].owner]) for i in now] if number else None
        targets = find_targets(
            model,
            [parts[i].fact for i in now],
            [aim],
            contexts,
            objective,
            progress=progress and _behind(progress, len(order), len(parts)),
            journal=(journal or Journal()).within(f"part-{number:03d}"),
            held=held,
        )
        for i, shift in zip(now, targets.wanted[aim] - targets.before[aim], strict=True):
            shifts.setdefault(parts[i].owner, []).append((parts[i].fact, shift))
        found.append(targets)
        order += now
    return in_order(join_targets(found), order)


def _behind(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


def other_keys(model: TracedModel, parts: Sequence[Part], site: Site) -> Float[Tensor, "d_in token"]:
    """Keys of all tokens of the requests and their whole answers at which no value is aimed for, float64."""
    aims: dict[int, list[int]] = {}
    whole: dict[int, tuple[int, ...]] = {}
    for fact, owner, _ in parts:
        before, target = joint_ids(model.reader, fact.prompt, fact.target or "", fact.target_prefix)
        aims.setdefault(owner, []).append(len(before) - 1)
        whole[owner] = (*before, *target)
    found = []
    rows = Rows(tuple(whole[i] for i in sorted(whole)), tuple(0 for _ in whole))
    for numbers, batch, _ in rows.batches(pad_id(model.tokenizer)):
        others = batch.mask.bool()
        for row, number in enumerate(numbers):
            others[row, batch.ids.shape[1] - len(rows.ids[number]) + torch.tensor(aims[number])] = False
        keys = model.read(batch.to(model.device), [site], "key")[site]
        found.append(keys[others.to(keys.device)].double())
    return torch.cat(found).T.cpu()
