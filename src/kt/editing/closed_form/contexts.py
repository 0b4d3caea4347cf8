"""Context templates: short texts before the prompt, so that a key or a target does not fit one wording only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import BadFact
from ...facts.fact import Fact, fill
from ...model.chat import ChatReader, Verbatim, in_turn

if TYPE_CHECKING:
    from ...model.model import TracedModel


STARTS = ("The", "Therefore", "Because", "I", "You")  # MEMIT's five first words


@dataclass(frozen=True)
class Contexts:
    """Groups of templates with one `{}` each. A key is the mean of the groups' means, as in MEMIT's code:
    half the bare prompt, half the average over the prefixed ones."""

    groups: tuple[tuple[str, ...], ...] = (("{}",),)

    @classmethod
    def of(cls, templates: Sequence[str] | Sequence[Sequence[str]]) -> Contexts:
        """From a flat list (one group) or a list of groups."""
        groups = (tuple(templates),) if all(isinstance(t, str) for t in templates) else tuple(map(tuple, templates))
        for template in (t for group in groups for t in group):
            if not isinstance(template, str) or template.count("{}") != 1:
                raise BadFact(f"context template {template!r} must mark the place of the prompt with one {{}}")
        return cls(groups)  # type: ignore[arg-type]

    @property
    def flat(self) -> tuple[str, ...]:
        return tuple(t for group in self.groups for t in group)

    @property
    def weights(self) -> tuple[float, ...]:
        """Each template's share in a key."""
        return tuple(1 / (len(self.groups) * len(group)) for group in self.groups for _ in group)

    def templates(self, fact: Fact, tokenizer: Any) -> list[str]:
        """The fact's own template inside each context, in the bare prompt's turn; the subject's place stays marked.

        Args:
            tokenizer: what reads the prompts (`TracedModel.reader`).
        """
        return [in_turn(tokenizer, fill(context, fact.template), fact.prompt) for context in self.flat]

    def turned(self, fact: Fact, tokenizer: Any) -> bool:
        """Whether a context, judged by itself, is in another turn than the bare prompt; an older kt put it there."""
        texts = [fill(fill(context, fact.template), fact.subject) for context in self.flat]
        return isinstance(tokenizer, ChatReader) and any(
            tokenizer.in_reply(text) != tokenizer.in_reply(fact.prompt) for text in texts
        )


def memit_contexts(model: TracedModel, seed: int = 0, tokens: int = 10) -> Contexts:
    """MEMIT's: the bare prompt, and five short texts that the model itself writes.

    `tokens` counts the start word. Braces and line ends are taken out, so that a template stays a template. A model
    whose tokenizer reads none of the English start words has the bare prompt alone.
    """
    written = _written(model, seed, tokens)
    return Contexts((("{}",), written) if written else (("{}",),))


def rome_contexts(model: TracedModel, seed: int = 0, lengths: tuple[int, ...] = (5, 10)) -> Contexts:
    """ROME's: the bare prompt, ten texts of at most five tokens and ten of at most ten, all of one weight.

    Two of each length from each of EasyEdit's start words; the original draws them after its end-of-text token.
    """
    draws = ((tokens, 2 * i + j) for i, tokens in enumerate(lengths) for j in range(2))
    texts = [text for tokens, draw in draws for text in _written(model, seed + draw, tokens)]
    return Contexts((("{}", *texts),))


def _written(model: TracedModel, seed: int, tokens: int) -> tuple[str, ...]:
    """One template a start word of which the tokenizer reads something."""
    from ...model.tokens import token_ids  # not above: methods and presets are listed without torch

    starts = [Verbatim(start) for start in STARTS if token_ids(model.tokenizer, start)]
    written = model.generate(starts, tokens - 1, do_sample=True, top_k=5, seed=seed)
    prefixes = [
        " ".join((start + text).translate(str.maketrans("{}", "  ")).split())
        for start, text in zip(starts, written, strict=True)
    ]
    return tuple(f"{prefix}. {{}}" for prefix in prefixes)
