"""Text to tokens: prompts, subject spans, answers and padded batches.

Subject spans use the tokenizer's character offsets. An answer's tokens are the suffix of prompt and answer tokenised
together. Batches are padded on the left, so the last column holds every row's last token.
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


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a prompt, with the tokenizer's BOS at most once and without an EOS at the end."""
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
    """The tokenizer's padding id, else its EOS id, else 0: padding is masked, so any id will do."""
    return next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def subject_span(tokenizer: Any, prompt: str, subject: str) -> Span:
    """The tokens that overlap the subject's last occurrence in the prompt.

    Of several occurrences the last has seen the most context. A template with `{}` names the occurrence (see
    `template_span`).

    Raises:
        SubjectNotFound: the subject does not occur in the prompt.
    """
    start = prompt.rfind(subject) if subject else -1
    if start < 0:
        raise SubjectNotFound(f"{subject!r} does not occur in {prompt!r}; write the template with {{}}")
    return char_span(tokenizer, prompt, start, start + len(subject))


def template_span(tokenizer: Any, template: str, subject: str) -> Span:
    """The subject's tokens in the filled template; without `{}` in the template see `subject_span`."""
    start = template.find("{}")
    if start < 0:
        return subject_span(tokenizer, template, subject)
    return char_span(tokenizer, template.replace("{}", subject, 1), start, start + len(subject))


def char_span(tokenizer: Any, prompt: str, start: int, stop: int) -> Span:
    """The tokens whose characters overlap the characters [start, stop) of the prompt.

    Raises:
        UnknownModel: the tokenizer gives no character offsets.
        SubjectNotFound: no token overlaps the characters.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnknownModel(
            f"{type(tokenizer).__name__} gives no character offsets, which subject spans need; "
            "install the fast tokenizer (tokenizer.json) of this model"
        )
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    dropped = len(ids) - len(_clean(tokenizer, ids, keep_end=True))  # `token_ids` drops a second BOS
    offsets = encoded["offset_mapping"][dropped:]
    overlapping = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
    if not overlapping:
        raise SubjectNotFound(f"{prompt[start:stop]!r} has no tokens of its own in {prompt!r}")
    return Span(overlapping[0], overlapping[-1] + 1)


def target_ids(tokenizer: Any, prompt: str, answer: str) -> tuple[int, ...]:
    """The answer's ids: the suffix after the prompt's ids when prompt and answer are tokenised together.

    `prompt_gap` joins the two. If a token spans the boundary, the suffix starts at the first token that holds a
    character of the answer.

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
    """The text between prompt and answer: a space, or nothing after an opening bracket, quote, hyphen or slash."""
    return "" if prompt.endswith(("(", "[", '"', "'", "“", "‘", "-", "/")) else " "


def _clean(tokenizer: Any, ids: list[int], keep_end: bool = False) -> list[int]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if not keep_end and eos is not None and eos != bos and len(ids) > 1 and ids[-1] == eos:
        ids = ids[:-1]
    return ids
