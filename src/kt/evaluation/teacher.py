"""Teacher forcing: the model reads prompt and answer at once and is asked for each token of the answer.

Rows are sorted by length and padded on the left, so that the answers stand at the end of every row and the
logits of a few last positions suffice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import WorkFailed
from ..model.model import TracedModel
from ..model.sampling import continued
from ..model.tokens import encode_ids, pad_id, prompt_gap, target_ids, token_ids
from ..runs import parallel as ranks

T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")

AUTO_TOKENS = 4096
"""Tokens of a batch under batch_size="auto", padding counted."""
AUTO_LOGITS = 2**26
"""Logits of a batch under batch_size="auto": 256 MB in float32."""

Question = tuple[str, str | None]
"""A prompt and the answer that is scored after it, if there is one."""


class TeacherForced(NamedTuple):
    """The answer's tokens, the argmax where each was due, and the answer's joint log probability."""

    target: tuple[int, ...]
    predicted: tuple[int, ...]
    log_prob: float | None


class Row(NamedTuple):
    """One row of a forward: all that the model reads, and the answer whose tokens its end predicts."""

    question: Question
    read: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def keep(self) -> int:
        return max(1, len(self.target))


def teacher_force(
    model: TracedModel,
    rows: Sequence[Row],
    batch_size: int | str = "auto",
    done: Callable[[int], None] = lambda n: None,
) -> dict[Question, TeacherForced]:
    """Every row's answer; `done` hears how many rows each forward settled. Several processes share the forwards."""

    def answer(batch: list[Row]) -> dict[Question, TeacherForced]:
        keep = max(row.keep for row in batch)
        logits = model.logits(encode_ids([row.read for row in batch], pad_id(model.tokenizer)), keep=keep)
        refuse_nan(logits, batch)
        return {row.question: score(logits[i, keep - row.keep :], row.target) for i, row in enumerate(batch)}

    return shared_out("answers", batches(rows, batch_size, model.vocab_size), answer, done)


def shared_out(
    name: str,
    batches: Iterable[list[T]],
    ask: Callable[[list[T]], dict[Q, A]],
    done: Callable[[int], None],
    size: Callable[[list[T]], int] = len,
) -> dict[Q, A]:
    """What is asked batch by batch as one, the batches shared out among processes; `done` hears the size of each."""
    parts = list(batches)
    ends = [0, *accumulate(map(size, parts))]
    told = 0

    def tick(count: int) -> None:
        nonlocal told
        done(ends[count] - told)
        told = ends[count]

    found: dict[Q, A] = {}
    for part in ranks.map_over_ranks(name, parts, ask, tick):
        found |= part
    return found


def tokens_of(model: TracedModel, question: Question) -> Row:
    """The joint tokens of prompt and answer, without the last, whose prediction nobody asks for."""
    prompt, answer = question
    if answer is None:
        return Row(question, tuple(token_ids(model.tokenizer, prompt)), ())
    target = target_ids(model.tokenizer, prompt, answer)
    joint = token_ids(model.tokenizer, prompt.rstrip() + prompt_gap(prompt, answer) + answer.lstrip())
    return Row(question, tuple(joint[:-1]), target)


def score(logits: Float[Tensor, "keep vocab"], target: tuple[int, ...]) -> TeacherForced:
    """Read the answer off the logits that predict it."""
    predicted = tuple(logits.argmax(-1).tolist())
    if not target:
        return TeacherForced((), predicted, None)
    log_probs = logits.log_softmax(-1)
    return TeacherForced(target, predicted, log_probs[torch.arange(len(target)), list(target)].sum().item())


def refuse_nan(logits: Float[Tensor, "row keep vocab"], batch: Sequence[Row]) -> None:
    """A NaN would pass as a wrong argmax and a missing probability (padding may well have some)."""
    if not logits.isnan().any():
        return
    for i, row in enumerate(batch):
        if logits[i, -row.keep :].isnan().any():
            raise WorkFailed(f"the logits after {row.question[0]!r} are NaN; an edit or a dtype broke the model")


def batches(rows: Sequence[Row], batch_size: int | str, vocab: int) -> Iterator[list[Row]]:
    """Rows of similar length together: a fixed number of them, or as many as the "auto" budgets allow."""

    def fits(batch: list[Row]) -> bool:
        if batch_size != "auto":
            return len(batch) <= int(batch_size)
        keep = max(row.keep for row in batch)
        return len(batch) * len(batch[-1].read) <= AUTO_TOKENS and len(batch) * keep * vocab <= AUTO_LOGITS

    yield from packed(sorted(rows, key=lambda r: (len(r.read), r.keep)), fits)


def packed(items: Iterable[T], fits: Callable[[list[T]], bool]) -> Iterator[list[T]]:
    """Consecutive items in batches as large as `fits` allows; an item that fits nowhere stands alone."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) > 1 and not fits(batch):
            yield batch[:-1]
            batch = [item]
    if batch:
        yield batch


# Continuations of many prompts: each prompt once, for its longest wish; the shorter wishes are its first tokens.

AUTO_WRITTEN_TOKENS = 8192
"""Tokens of a batch under batch_size="auto", those to come counted: what the key-value cache has to hold."""

GenerationRequest = tuple[str, int]
"""A prompt and the number of tokens to add."""


def continuations(
    model: TracedModel,
    wishes: Iterable[GenerationRequest],
    batch_size: int | str = "auto",
    done: Callable[[int], None] = lambda n: None,
    **sampling: Any,
) -> dict[GenerationRequest, str]:
    """Fulfil every wish, greedily unless `sampling` (do_sample, top_k, seed) says otherwise.

    `done` hears how many wishes each batch has fulfilled.
    """
    if not isinstance(model, TracedModel):  # a stand-in that only generates
        return each_by_itself(model, wishes, done, **sampling)
    lengths: dict[str, set[int]] = defaultdict(set)
    for prompt, tokens in wishes:
        lengths[prompt].add(tokens)
    read = {prompt: len(token_ids(model.tokenizer, prompt)) for prompt in lengths}

    def fits(batch: list[str]) -> bool:
        width = max(read[prompt] for prompt in batch) + max(max(lengths[prompt]) for prompt in batch)
        return len(batch) * width <= AUTO_WRITTEN_TOKENS if batch_size == "auto" else len(batch) <= int(batch_size)

    def fulfil(batch: list[str]) -> dict[GenerationRequest, str]:
        limits = [max(lengths[prompt]) for prompt in batch]
        texts: dict[GenerationRequest, str] = {}
        for prompt, found in zip(batch, continued(model, batch, limits, **sampling), strict=True):
            texts |= {(prompt, tokens): found.text(model.tokenizer, tokens) for tokens in lengths[prompt]}
        return texts

    batches = packed(sorted(lengths, key=lambda prompt: (max(lengths[prompt]), read[prompt])), fits)
    return shared_out("continuations", batches, fulfil, done, lambda batch: sum(len(lengths[p]) for p in batch))


def each_by_itself(
    model: TracedModel,
    wishes: Iterable[GenerationRequest],
    done: Callable[[int], None] = lambda n: None,
    **sampling: Any,
) -> dict[GenerationRequest, str]:
    """The same texts the simple way: one wish at a time."""
    texts: dict[GenerationRequest, str] = {}
    for prompt, tokens in dict.fromkeys(wishes):
        (texts[prompt, tokens],) = model.generate([prompt], tokens, **sampling)
        done(1)
    return texts


def room(model: TracedModel, prompt: str, total: int) -> int:
    """How many tokens may follow the prompt, up to `total` with it or to the model's last position.

    Rounded down to a multiple of ten: prompts of like length can then share a batch.
    """
    config = model.module.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or total
    free = min(total, longest) - len(token_ids(model.tokenizer, prompt))
    return max(0, free // 10 * 10)
