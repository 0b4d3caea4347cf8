"""How far an edit moves the next token's whole distribution where it should not: KL(unedited || edited).

The unedited model's distributions are taken once and held exactly, in float32, one row of the vocabulary a prompt;
whether they fit is known, and refused, before the first forward. Both sides are computed in batches.

>>> reference = distributions(model, facts)               # the unedited model
>>> with edit.applied(model):
...     evaluate(model, facts, before=before, reference=reference)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.progress import Progress
from ..errors import BadFact
from ..facts.fact import Fact
from ..facts.load import facts_from
from ..model.memory import require_memory
from ..model.model import TracedModel
from ..model.scoring import answer_row, batch_logits, refuse_nan, row_batches
from .samples import samples_of

_BYTES = 4


@dataclass(frozen=True)
class Distributions:
    """Natural-log probabilities of the next token after each neighbourhood prompt, on one model.

    Args:
        model: the model's name.
        rows: prompt -> its row.
        log_probs: in float32, on the CPU.
    """

    model: str
    rows: Mapping[str, int]
    log_probs: Float[Tensor, "prompt vocab"]


def distributions(
    model: TracedModel,
    requests: Sequence[Fact | Mapping[str, Any]],
    batch_size: int | str = "auto",
    progress: Progress | None = None,
) -> Distributions:
    """The model's next-token distributions on the neighbourhood prompts of the requests, each prompt once.

    Raises:
        BadFact: no request has a neighbourhood prompt.
        NotEnoughMemory: they would not fit; said before any is computed.
    """
    prompts = near_prompts(samples_of(facts_from(requests)))
    if not prompts:
        raise BadFact("no fact has a neighbourhood prompt to compare distributions on; give facts with neighbours")
    what = f"{len(prompts)} distributions over {model.vocab_size} tokens"
    require_memory(len(prompts) * model.vocab_size * _BYTES, what, "give fewer facts (--limit), or leave out --kl")
    rows = {prompt: i for i, prompt in enumerate(prompts)}
    held = torch.empty(len(prompts), model.vocab_size)
    for done, (batch, log_probs) in _after(model, prompts, batch_size):
        held[[rows[prompt] for prompt in batch]] = log_probs.cpu()
        if progress is not None:
            progress(done, len(prompts))
    return Distributions(model.name, rows, held)


def near_prompts(samples: Iterable[Any]) -> list[str]:
    """The neighbourhood prompts among the samples, each once."""
    return list(dict.fromkeys(s.prompt for s in samples if s.role == "neighbourhood"))


def divergences(
    model: TracedModel,
    reference: Distributions,
    prompts: Sequence[str],
    batch_size: int | str = "auto",
    done: Callable[[int], None] = lambda n: None,
) -> dict[str, float]:
    """KL(reference || model) in nats for every prompt.

    Raises:
        BadFact: the reference lacks a prompt, or comes from a model with another vocabulary.
    """
    missing = [prompt for prompt in prompts if prompt not in reference.rows]
    if missing:
        raise BadFact(
            f"`reference` lacks {len(missing)} of {len(prompts)} neighbourhood prompts, the first {missing[0]!r}; "
            "take the distributions on the same facts"
        )
    if reference.log_probs.shape[1] != model.vocab_size:
        raise BadFact("`reference` comes from a model with another vocabulary; take it from the unedited model itself")
    found: dict[str, float] = {}
    for _, (batch, log_q) in _after(model, prompts, batch_size):
        log_p = reference.log_probs[[reference.rows[prompt] for prompt in batch]].to(log_q.device)
        p = log_p.exp()
        # A token that the unedited model rules out adds nothing, though its logarithms are infinite.
        terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
        found |= dict(zip(batch, terms.sum(-1).clamp(min=0).tolist(), strict=True))
        done(len(batch))
    return found


def _after(
    model: TracedModel, prompts: Sequence[str], batch_size: int | str
) -> Iterator[tuple[int, tuple[list[str], Float[Tensor, "row vocab"]]]]:
    """(prompts so far, (the batch's prompts, their log probabilities)), in batches of like length."""
    rows, count = [answer_row(model, (prompt, None)) for prompt in prompts], 0
    for batch in row_batches(rows, batch_size, model.vocab_size):
        logits = batch_logits(model, batch)
        refuse_nan(logits, batch)
        count += len(batch)
        yield count, ([row.question[0] for row in batch], logits[:, -1].log_softmax(-1))
