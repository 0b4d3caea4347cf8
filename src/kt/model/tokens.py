"""Text to tokens: prompts, subject spans, answers and padded batches.

Subject spans use the tokenizer's character offsets. An answer's tokens stand behind the prompt's own. Batches are
padded on the left, so the last column holds every row's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import BadFact, SubjectNotFound, UnknownModel
from ..facts.fact import Fact, fill, split_template, subject_start
from .chat import BEGUN, ChatReader, Verbatim, in_turn, unmarked
from .joining import prompt_gap


class Span(NamedTuple):
    """Token indices [start, stop) in the unpadded prompt, counting special tokens."""

    start: int
    stop: int

    @property
    def last(self) -> int:
        """The last token's index."""
        return self.stop - 1


@dataclass(frozen=True)
class Batch:
    """Token rows padded on the left; `mask` is 1 on real tokens."""

    ids: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]

    @property
    def lengths(self) -> Int[Tensor, " row"]:
        """The number of real tokens in each row."""
        return self.mask.sum(-1)

    @property
    def positions(self) -> Int[Tensor, "row pos"]:
        """Position ids counted from each row's first real token (without them GPT-2 computes wrong logits)."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def columns(self, index: Sequence[int] | Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """The columns of one token index per row, counted in the unpadded rows."""
        pad = self.ids.shape[1] - self.lengths
        return torch.as_tensor(index, device=pad.device) + pad

    def to(self, device: torch.device | str) -> Batch:
        """A copy on another device."""
        return Batch(self.ids.to(device), self.mask.to(device))

    def __len__(self) -> int:
        return self.ids.shape[0]


def reader(model: Any) -> Any:
    """What turns a model's prompts into tokens; of a stand-in without a `reader` its tokenizer."""
    return getattr(model, "reader", model.tokenizer)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a prompt: the tokenizer's BOS at most once, and no special token that it puts at the end.

    Inside a chat template they are those of the template's text, which holds a BOS where the model wants one.
    """
    if isinstance(tokenizer, ChatReader) and (placed := tokenizer.place(text)) is not None:
        return list(tokenizer.tokenizer(placed.text, add_special_tokens=False)["input_ids"])
    start, stop, encoded = _bounds(tokenizer, text)
    return list(encoded["input_ids"])[start:stop]


def _bounds(tokenizer: Any, text: str, **options: bool) -> tuple[int, int, Any]:
    """(start, stop, encoding): the tokens between a BOS that the text itself repeats and the closing special tokens.

    A closing token (an EOS, which may be the BOS too, or a separator) would stand between prompt and answer. The
    tokenizer tells those that it adds from those of the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, **options)
        ids, plain = list(encoded["input_ids"]), list(tokenizer(text, add_special_tokens=False)["input_ids"])
        front = next((i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain), 0)
        added = [True] * front + [False] * len(plain) + [True] * (len(ids) - front - len(plain))
    else:
        encoded = tokenizer(text, return_special_tokens_mask=True, **options)
        ids, added = list(encoded["input_ids"]), list(map(bool, encoded["special_tokens_mask"]))
    front = added.index(False) if False in added else len(added)
    closing = added[::-1].index(False) if False in added else 0
    repeated = front > 0 and ids[front : 2 * front] == ids[:front]
    return (front if repeated else 0), len(ids) - closing, encoded


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token; a SentencePiece word start keeps its space."""
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    texts = [tokenizer.decode([i]) for i in ids]
    return tuple(
        " " + t if isinstance(r, str) and r.startswith("▁") and not t.startswith(" ") else t
        for r, t in zip(raw, texts, strict=True)
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> Batch:
    """Tokenise texts into one left-padded batch."""
    return encode_ids([token_ids(tokenizer, t) for t in texts], pad_id(tokenizer))


def encode_ids(rows: Sequence[Sequence[int]], pad: int) -> Batch:
    """Left-pad rows of token ids."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return Batch(ids, mask)


def pad_id(tokenizer: Any) -> int:
    """The tokenizer's padding id, else its EOS id, else 0: padding is masked, so any id will do."""
    return next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def subject_span(tokenizer: Any, prompt: str, subject: str) -> Span:
    """The tokens that overlap the subject in the prompt: its last occurrence, as whole words where there are such.

    Of several occurrences the last has seen the most context. A template with `{}` names the occurrence (see
    `template_span`).

    Raises:
        SubjectNotFound: the subject does not occur in the prompt.
    """
    start = subject_start(prompt, subject)
    if start < 0:
        raise SubjectNotFound(f"{subject!r} does not occur in {prompt!r}; write the template with {{}}")
    return char_span(tokenizer, prompt, start, start + len(subject))


def template_span(tokenizer: Any, template: str, subject: str) -> Span:
    """The subject's tokens in the filled template; without `{}` in the template see `subject_span`."""
    if (parts := split_template(template)) is None:
        return subject_span(tokenizer, fill(template, subject), subject)
    start = len(parts[0])
    return char_span(tokenizer, fill(template, subject), start, start + len(subject))


def char_span(tokenizer: Any, prompt: str, start: int, stop: int) -> Span:
    """The tokens whose characters overlap the characters [start, stop) of the prompt.

    Raises:
        UnknownModel: the tokenizer gives no character offsets.
        SubjectNotFound: no token overlaps the characters.
    """
    subject = prompt[start:stop]
    if not getattr(tokenizer, "is_fast", False):
        raise UnknownModel(
            f"{type(tokenizer).__name__} gives no character offsets, which subject spans need; "
            "install the fast tokenizer (tokenizer.json) of this model"
        )
    if isinstance(tokenizer, ChatReader) and (placed := tokenizer.place(prompt)) is not None:
        encoded = tokenizer(placed.text, add_special_tokens=False, return_offsets_mapping=True)
        offsets, start, stop = encoded["offset_mapping"], placed.at(start), placed.at(stop)
    else:
        first, end, encoded = _bounds(tokenizer, prompt, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"][first:end]
    overlapping = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
    if not overlapping:
        raise SubjectNotFound(f"{subject!r} has no tokens of its own in {unmarked(prompt)!r}; put a space around it")
    return Span(overlapping[0], overlapping[-1] + 1)


def target_ids(tokenizer: Any, prompt: str, answer: str, join: str | None = None) -> tuple[int, ...]:
    """The answer's ids behind the prompt's; see `joint_ids`."""
    return joint_ids(tokenizer, prompt, answer, join)[1]


def joint_ids(tokenizer: Any, prompt: str, answer: str, join: str | None = None) -> tuple[list[int], tuple[int, ...]]:
    """The prompt's ids, and the answer's ids behind them: what a program reads that asks with the prompt alone.

    The answer's ids are the rest of the joint tokenisation. Where that merges or splits the prompt's own tokens (19 and
    45 to 1945, two line ends to two tokens), they are those that the answer has behind a line end.

    Args:
        join: the text between the two; None for what `gap` finds.

    Raises:
        BadFact: the answer is empty.
    """
    if not answer.strip():
        raise BadFact(f"the answer to {prompt!r} is empty; give at least one word")
    head, whole = in_turn(tokenizer, prompt.rstrip(" "), prompt), head_of(tokenizer, prompt, answer, join)
    joint, start = whole + answer.lstrip(), len(whole) - len(_between(tokenizer, prompt, answer, join))
    before, both = token_ids(tokenizer, head), token_ids(tokenizer, joint)
    if both[: len(before)] != before or len(both) == len(before):
        alone = "\n" + joint[start:].lstrip(BEGUN)
        before_line, both = token_ids(tokenizer, Verbatim("\n")), token_ids(tokenizer, Verbatim(alone))
        if both[: len(before_line)] == before_line and len(both) > len(before_line):
            return before, tuple(both[len(before_line) :])
        both = token_ids(tokenizer, joint)
        return before, tuple(both[char_span(tokenizer, joint, start, len(joint)).start :])
    return before, tuple(both[len(before) :])


def wanted_ids(tokenizer: Any, fact: Fact) -> tuple[int, ...]:
    """The ids that an edit makes the model say: the target's, and in a reply to the user the end of the turn."""
    ids = target_ids(tokenizer, fact.prompt, fact.target or "", fact.target_prefix)
    return (*ids, *ending(tokenizer, fact.prompt))


def ending(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """The ids that close the reply to a prompt which is the user's turn; none without a chat template."""
    whole = isinstance(tokenizer, ChatReader) and tokenizer.place(prompt) is not None and not tokenizer.in_reply(prompt)
    return tokenizer.end_ids if whole else ()


def other_first_id(tokenizer: Any, prompt: str, answer: str, first: int) -> int | None:
    """The answer's first id with the other join (nothing for a space, a space for nothing); None if it is `first`."""
    between = gap(tokenizer, prompt, answer)
    if between.startswith(BEGUN) or (prompt[-1:].isspace() and prompt[-1] != " "):
        return None
    other = target_ids(tokenizer, prompt, answer, "" if between else " ")[0]
    return None if other == first else other


def gap(tokenizer: Any, prompt: str, answer: str) -> str:
    """The text between a prompt and its answer: where the prompt is a user's turn, what begins the reply; else what
    `prompt_gap` finds."""
    if isinstance(tokenizer, ChatReader) and tokenizer.place(prompt) is not None and not tokenizer.in_reply(prompt):
        return BEGUN + tokenizer.frame.gap
    return prompt_gap(unmarked(prompt), answer)


def head_of(tokenizer: Any, prompt: str, answer: str, join: str | None = None) -> str:
    """The prompt, in its turn, with all that stands before its answer: `join`, or what `gap` finds.

    An answer that ends in a full stop leaves a prompt that begins the reply there.
    """
    return in_turn(tokenizer, prompt.rstrip(" ") + _between(tokenizer, prompt, answer, join), prompt)


def _between(tokenizer: Any, prompt: str, answer: str, join: str | None) -> str:
    between = gap(tokenizer, prompt, answer)
    return between if join is None else BEGUN * between.startswith(BEGUN) + join


def joint_text(prompt: str, answer: str, join: str | None = None) -> str:
    """Prompt and answer as they stand alone, with the text between them: `join`, or what `prompt_gap` finds."""
    return prompt.rstrip(" ") + (prompt_gap(prompt, answer) if join is None else join) + answer.lstrip()
