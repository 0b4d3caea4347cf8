"""Text to tokens: the place where editing tools break.

A subject's tokens come from the tokenizer's character offsets, an answer's tokens from tokenising prompt and answer
together and taking the suffix. Batches are padded on the left, so that the last column is every row's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import BadFact, SubjectNotFound, UnknownModel


class Span(NamedTuple):
    """Token indices [start, stop) in the unpadded prompt, special tokens counted."""

    start: int
    stop: int

    @property
    def last(self) -> int:
        return self.stop - 1


@dataclass(frozen=True)
class Batch:
    """Token rows padded on the left; `mask` is 1 on real tokens."""

    ids: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]

    @property
    def lengths(self) -> Int[Tensor, " row"]:
        return self.mask.sum(-1)

    @property
    def positions(self) -> Int[Tensor, "row pos"]:
        """Position ids that count from each row's first real token (GPT-2 is wrong without them)."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def columns(self, index: Sequence[int] | Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """Columns of per-row token indices that were counted in the unpadded rows."""
        pad = self.ids.shape[1] - self.lengths
        return torch.as_tensor(index, device=pad.device) + pad

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.ids.to(device), self.mask.to(device))

    def __len__(self) -> int:
        return self.ids.shape[0]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a prompt: the tokenizer's own BOS once, never an EOS at the end."""
    return _clean(tokenizer, list(tokenizer(text)["input_ids"]))


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
    """A padding id; masked out, so any id serves when the tokenizer names none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def subject_span(tokenizer: Any, prompt: str, subject: str) -> Span:
    """The tokens that overlap the subject's last occurrence in the prompt.

    The last occurrence is the one whose state reaches the prediction position with the most context; templates
    with `{}` never leave a choice unless the subject's text stands in the template too.

    Raises:
        SubjectNotFound: the subject does not occur in the prompt.
    """
    start = prompt.rfind(subject) if subject else -1
    if start < 0:
        raise SubjectNotFound(f"{subject!r} does not occur in {prompt!r}; write the template with {{}}")
    return char_span(tokenizer, prompt, start, start + len(subject))


def template_span(tokenizer: Any, template: str, subject: str) -> Span:
    """The subject's tokens when its place is known: the template's `{}`."""
    start = template.find("{}")
    if start < 0:
        return subject_span(tokenizer, template, subject)
    return char_span(tokenizer, template.replace("{}", subject, 1), start, start + len(subject))


def char_span(tokenizer: Any, prompt: str, start: int, stop: int) -> Span:
    """The tokens whose characters overlap [start, stop)."""
    if not getattr(tokenizer, "is_fast", False):
        raise UnknownModel(
            f"{type(tokenizer).__name__} gives no character offsets, which subject spans need; "
            "install the fast tokenizer (tokenizer.json) of this model"
        )
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    dropped = len(ids) - len(_clean(tokenizer, ids, keep_end=True))  # a doubled BOS goes from the front
    offsets = encoded["offset_mapping"][dropped:]
    touched = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
    if not touched:
        raise SubjectNotFound(f"{prompt[start:stop]!r} has no tokens of its own in {prompt!r}")
    return Span(touched[0], touched[-1] + 1)


def target_ids(tokenizer: Any, prompt: str, answer: str) -> tuple[int, ...]:
    """The answer's ids: tokenise prompt and answer together, take what follows the prompt.

    A space joins the two unless one of them brings it. Where the joint text merges across the boundary, the
    suffix starts at the first token that holds a character of the answer.

    Raises:
        BadFact: the answer is empty.
    """
    if not answer.strip():
        raise BadFact(f"the answer to {prompt!r} is empty; give at least one word")
    head = prompt.rstrip()
    joint = head + prompt_gap(prompt, answer) + answer.lstrip()
    before, both = token_ids(tokenizer, head), token_ids(tokenizer, joint)
    if both[: len(before)] == before and len(both) > len(before):
        return tuple(both[len(before) :])
    return tuple(both[char_span(tokenizer, joint, len(head), len(joint)).start :])


def prompt_gap(prompt: str, answer: str) -> str:
    """The space between prompt and answer; none after an opening bracket or quote."""
    return (
        "" if prompt.rstrip().endswith(("(", "[", '"', "'", "“", "‘", "-", "/")) and not prompt[-1:].isspace() else " "
    )


def _clean(tokenizer: Any, ids: list[int], keep_end: bool = False) -> list[int]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if not keep_end and eos is not None and eos != bos and len(ids) > 1 and ids[-1] == eos:
        ids = ids[:-1]
    return ids
