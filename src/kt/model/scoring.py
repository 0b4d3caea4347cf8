"""Teacher forcing: the model reads prompt and answer at once, and each token of the answer is scored where it is due.

Rows are padded on the left, so that all answers end in the last column and the logits of a few last positions suffice.
A prompt with several answers is read once where the model allows it: an answer of one token needs nothing but the
logits at the prompt's end, and of a longer one all tokens but the last are read in a second forward, over the prompt's
keys and values.

>>> row = answer_row(model, ("The capital of Italy is", "Rome"))
>>> teacher_force(model, [row])[row.question].log_prob
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.text import count
from ..errors import BadFact, WorkFailed, warn_user
from ..facts.fact import Fact
from .batches import BatchSize, batches_by_length, fits_forward, map_batches
from .effects import rendered
from .joining import prompt_gap
from .model import TracedModel
from .prefix import cached_logits, new_cache, prefix_is_reusable
from .tokens import Batch, encode_ids, joint_ids, other_first_id, pad_id, reader, token_ids

Ids = tuple[int, ...]
Question = tuple[str, str | None] | tuple[str, str | None, str]
"""A prompt, the answer that is scored after it, if there is one, and the text between them, if a fact names one."""
UNLIKELY = 0.01
"""At most this share of the other form's probability makes a join doubtful, ..."""
CREDIBLE = 1e-4
"""... if that is at least this. Behind a question SmolLM2 gives every answer less, and without this bound 7 of 940 real
answers were doubted falsely; with it one is."""
Forward = Callable[[Batch, int], Float[Tensor, "row keep vocab"]]
"""A batch and a number of last positions -> their logits in float32, as `TracedModel.logits`."""


class Row(NamedTuple):
    """One row of a forward: the tokens that the model reads, and the answer's tokens, which its end predicts.

    `other` is the answer's first token if it were joined to the prompt the other way."""

    question: Question
    read: Ids
    target: Ids
    other: int | None = None

    @property
    def keep(self) -> int:
        """Last positions whose logits are needed."""
        return max(1, len(self.target))


class TeacherForced(NamedTuple):
    """An answer's scores; a row without an answer has the next token's argmax alone.

    Args:
        target: the answer's tokens.
        predicted: the argmax where each of them is due.
        log_prob: joint natural-log probability of the answer, summed in float32; None without one.
        token_log_probs: that of each token given those before it.
        first_rank: how many tokens are strictly more probable than the first where it is due; None unless ranks were
            asked for.
        is_greedy: whether no token is more probable than the answer's own, anywhere in it; None likewise.
        other_log_prob: that of `Row.other` where the first token is due.
    """

    target: Ids
    predicted: Ids
    log_prob: float | None = None
    token_log_probs: tuple[float, ...] = ()
    first_rank: int | None = None
    is_greedy: bool | None = None
    other_log_prob: float | None = None


class SharedPrefix(NamedTuple):
    """The rows of one prompt, and `head`, the tokens that all of them read before any answer's first token is due."""

    head: Ids
    rows: tuple[Row, ...]

    @property
    def tails(self) -> list[Ids]:
        """The tokens read behind the head, each sequence once."""
        return [tail for tail in dict.fromkeys(map(self.tail, self.rows)) if tail]

    @property
    def longest_tail(self) -> int:
        return max(map(len, map(self.tail, self.rows)))

    def tail(self, row: Row) -> Ids:
        return row.read[len(self.head) :]


def answer_row(model: TracedModel, question: Question) -> Row:
    """The tokens of prompt (with what an effect puts before it) and answer, without the last, whose prediction is not
    needed."""
    prompt, answer, join = question if len(question) == 3 else (*question, None)
    prompt = rendered(model, prompt)
    if answer is None:
        return Row(question, tuple(token_ids(reader(model), prompt)), ())
    before, target = joint_ids(reader(model), prompt, answer, join)
    other = other_first_id(reader(model), prompt, answer, target[0]) if join is None else None
    return Row(question, (*before, *target[:-1]), target, other)


def readable(
    model: TracedModel, facts: Sequence[Fact], questions: Callable[[Fact], Iterable[Question]], more: int = 0
) -> list[Fact]:
    """The facts of which the model can read every question; the others are counted in a warning that names the first.

    Args:
        questions: of a fact.
        more: tokens that have to fit behind a prompt, where that is more than its answer has.

    Raises:
        BadFact: it can read none of them.
    """
    unread: dict[int, str] = {}
    for place, fact in enumerate(facts):
        for row in (answer_row(model, question) for question in questions(fact)):
            reason = model.why_unreadable(row.read + (0,) * (more - max(0, len(row.target) - 1)))
            if reason is not None:
                unread[place] = f"{fact.id}: {reason}"
                break
    if unread:
        first = next(iter(unread.values()))
        if len(unread) == len(facts):
            raise BadFact(f"{model.name} can read none of the {count(len(facts), 'record')} ({first}); give others")
        warn_user(f"{len(unread)} of {count(len(facts), 'record')} left out, which {model.name} cannot read ({first})")
    return [fact for place, fact in enumerate(facts) if place not in unread]


def teacher_force(
    model: TracedModel,
    rows: Sequence[Row],
    batch_size: BatchSize = "auto",
    done: Callable[[int], None] = lambda n: None,
    *,
    share_prefixes: bool = True,
    ranks: bool = False,
    forward: Forward | None = None,
    allow_nan: bool = False,
) -> dict[Question, TeacherForced]:
    """Score every row's answer. Several processes share the forwards.

    Args:
        rows: of `answer_row`; their questions differ.
        batch_size: rows of a forward, or "auto". No score depends on it beyond rounding.
        done: called with the number of rows that each forward finished.
        share_prefixes: read each prompt once for all its answers, where the model's cache allows it.
        ranks: also compute `first_rank` and `is_greedy`, which read the vocabulary once more.
        forward: computes the logits instead of the model's own forward; every row is then read whole.
        allow_nan: return scores of NaN instead of raising.

    Raises:
        WorkFailed: the logits after a prompt are NaN.
    """
    prefixes = shared_prefixes(rows, batch_size) if share_prefixes and forward is None else []
    if prefixes and not _allows_prefixes(model, prefixes):
        prefixes = []
    shared = {row.question for prefix in prefixes for row in prefix.rows}
    alone = row_batches([row for row in rows if row.question not in shared], batch_size, model.vocab_size)

    def read_whole(batch: list[Row]) -> dict[Question, TeacherForced]:
        logits = batch_logits(model, batch, forward)
        if not allow_nan:
            refuse_nan(logits, batch)
        return {row.question: score(logits[i, logits.shape[1] - row.keep :], row, ranks) for i, row in enumerate(batch)}

    def read_once(batch: list[SharedPrefix]) -> dict[Question, TeacherForced]:
        return {row.question: score(logits, row, ranks) for row, logits in _prefix_logits(model, batch, allow_nan)}

    found = map_batches("answers", alone, read_whole, done)
    together = _prefix_batches(prefixes, batch_size, model.vocab_size)
    found += map_batches("answers to shared prompts", together, read_once, done, _n_rows)
    return {question: answer for part in found for question, answer in part.items()}


def score(logits: Float[Tensor, "keep vocab"], row: Row, ranks: bool = False) -> TeacherForced:
    """The scores of a row's answer from the logits that predict it."""
    target, predicted = row.target, tuple(logits.argmax(-1).tolist())
    if not target:
        return TeacherForced((), predicted)
    at_target = torch.arange(len(target)), list(target)
    all_log_probs = logits.log_softmax(-1)
    log_probs = all_log_probs[at_target]
    other = None if row.other is None else all_log_probs[0, row.other].item()
    scores = TeacherForced(target, predicted, log_probs.sum().item(), tuple(log_probs.tolist()), other_log_prob=other)
    if not ranks:
        return scores
    # The answer may be greedy though the argmax is another token: in 16 bits several tokens tie for the maximum.
    own = logits[at_target]
    return scores._replace(first_rank=int((logits[0] > own[0]).sum()), is_greedy=bool((own >= logits.amax(-1)).all()))


def warn_of_joins(first_tokens: Mapping[tuple[str, str], tuple[float, float]]) -> None:
    """Warn, in one line, of answers that the model would join to their prompts the other way.

    Args:
        first_tokens: by prompt and answer, the natural-log probability of the answer's first token, and of that of
            the other form (nothing for a space, a space for nothing); a hundredth is doubtful.
    """
    doubtful = {
        question: first - other
        for question, (first, other) in first_tokens.items()
        if first - other <= math.log(UNLIKELY) and other >= math.log(CREDIBLE)
    }
    if not doubtful:
        return
    (prompt, answer), ratio = min(doubtful.items(), key=lambda item: item[1])
    gap = prompt_gap(prompt, answer)
    warn_user(
        f"{len(doubtful)} of {len(first_tokens)} answers may be joined to their prompts in the wrong way: after "
        f"{prompt[-60:]!r} the model gives {gap + answer!r} {math.exp(ratio):.1g} times the probability of "
        f"{('' if gap else ' ') + answer!r} (first tokens); name the text between them with "
        '--join or "target_prefix"'
    )


def first_tokens(scores: Mapping[Question, TeacherForced]) -> dict[tuple[str, str], tuple[float, float]]:
    """What `warn_of_joins` takes, of answers whose join was kt's choice."""
    return {
        (question[0], question[1]): (score.token_log_probs[0], score.other_log_prob)
        for question, score in scores.items()
        if question[1] is not None and score.token_log_probs and score.other_log_prob is not None
    }


def batch_logits(
    model: TracedModel, batch: Sequence[Row], forward: Forward | None = None
) -> Float[Tensor, "row keep vocab"]:
    """Logits of as many last positions as the batch's longest answer has tokens, float32."""
    return (forward or model.logits)(
        encode_ids([row.read for row in batch], pad_id(model.tokenizer)), max(row.keep for row in batch)
    )


def row_batches(rows: Sequence[Row], batch_size: BatchSize, vocab: int) -> Iterator[list[Row]]:
    """Rows of like length together."""

    def fits(batch: list[Row]) -> bool:
        return fits_forward(batch_size, len(batch), len(batch[-1].read), max(row.keep for row in batch), vocab)

    return batches_by_length(rows, lambda row: (len(row.read), row.keep), fits)


def refuse_nan(logits: Float[Tensor, "row keep vocab"], batch: Sequence[Row]) -> None:
    """A NaN would pass as a wrong argmax and a missing probability (padding may well have some).

    Raises:
        WorkFailed: there is one where a row's answer is due.
    """
    if not logits.isnan().any():
        return
    for i, row in enumerate(batch):
        if logits[i, -row.keep :].isnan().any():
            raise WorkFailed(f"the logits after {row.question[0]!r} are NaN; an edit or a dtype broke the model")


def shared_prefixes(rows: Sequence[Row], batch_size: BatchSize = "auto") -> list[SharedPrefix]:
    """The prompts that several rows have, whose tails fit into one batch."""
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_prompt[row.question[0]].append(row)
    prefixes = []
    for same in by_prompt.values():
        columns = zip(*(row.read for row in same), strict=False)
        common = tuple(ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns))
        head = common[: min(len(row.read) - row.keep + 1 for row in same)]
        if len(same) > 1 and head:
            prefixes.append(SharedPrefix(head, tuple(same)))
    return [p for p in prefixes if batch_size == "auto" or len(p.tails) <= int(batch_size)]


def _allows_prefixes(model: TracedModel, prefixes: Sequence[SharedPrefix]) -> bool:
    """Whether keys and values can be read on; a stand-in that only has logits is asked row by row."""
    longest = max(len(row.read) for prefix in prefixes for row in prefix.rows)
    return isinstance(model, TracedModel) and prefix_is_reusable(model, longest)


def _prefix_batches(
    prefixes: Sequence[SharedPrefix], batch_size: BatchSize, vocab: int
) -> Iterator[list[SharedPrefix]]:
    """As many prompts as keep both forwards, that of the heads and that of the tails, within the budget."""

    def fits(batch: list[SharedPrefix]) -> bool:
        longest = max(prefix.longest_tail for prefix in batch)
        size = max(len(batch), sum(len(prefix.tails) for prefix in batch))
        return fits_forward(batch_size, size, len(batch[-1].head) + longest, max(1, longest), vocab)

    return batches_by_length(prefixes, lambda prefix: (len(prefix.head), prefix.longest_tail), fits)


def _n_rows(batch: Sequence[SharedPrefix]) -> int:
    return sum(len(prefix.rows) for prefix in batch)


def _prefix_logits(
    model: TracedModel, batch: Sequence[SharedPrefix], allow_nan: bool
) -> Iterator[tuple[Row, Float[Tensor, "keep vocab"]]]:
    """Every row with the logits that predict its answer: the heads in one forward, all tails in another."""
    pad = pad_id(model.tokenizer)
    heads = encode_ids([prefix.head for prefix in batch], pad)
    tails = [(i, tail) for i, prefix in enumerate(batch) for tail in prefix.tails]
    at_tail = None
    if tails:
        cache = new_cache(model)
        at_head = cached_logits(model, heads, cache)
        owners = torch.tensor([i for i, _ in tails])
        cache.batch_select_indices(owners)
        behind = encode_ids([tail for _, tail in tails], pad)
        at_tail = cached_logits(model, behind, cache, behind.ids.shape[1], past=heads.mask[owners])
    else:
        at_head = model.logits(heads)
    has_nan = not allow_nan and any(bool(x.isnan().any()) for x in (at_head, at_tail) if x is not None)
    number = {tail: i for i, tail in enumerate(tails)}
    for i, prefix in enumerate(batch):
        for row in prefix.rows:
            logits = at_head[i]
            if (tail := prefix.tail(row)) and at_tail is not None:
                logits = torch.cat([logits, at_tail[number[i, tail], -len(tail) :]])
            if has_nan:
                refuse_nan(logits[None], [row])
            yield row, logits[-row.keep :]
