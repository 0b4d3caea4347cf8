"""How far an edit moves the next token's whole distribution where it should not: KL(unedited || edited).

The unedited model's distributions are computed once and kept in float32, one row of the vocabulary a prompt. Memory
that is too small for them is refused before the first forward.

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

from .._util.progress import Progress, counter
from ..errors import BadFact
from ..facts.load import FactsLike, distinct_facts, facts_from
from ..model.batches import BatchSize
from ..model.memory import require_memory
from ..model.model import TracedModel
from ..model.scoring import answer_row, batch_logits, refuse_nan, row_batches
from .samples import readable_facts, samples_of


@dataclass(frozen=True)
class Distributions:
    """Natural-log probabilities of the next token after each neighbourhood prompt, on one model.

    Args:
        model: the model's name.
        rows: prompt -> its row.
        log_probs: float32, on the CPU.
    """

    model: str
    rows: Mapping[str, int]
    log_probs: Float[Tensor, "prompt vocab"]


def distributions(
    model: TracedModel,
    requests: FactsLike,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> Distributions:
    """The model's next-token distributions on the neighbourhood prompts of the requests, each prompt once.

    Args:
        batch_size: prompts of a forward, or "auto".
        progress: called with (prompts done, prompts in all).

    Raises:
        BadFact: no request has a neighbourhood prompt.
        NotEnoughMemory: they would not fit; raised before any is computed.
    """
    prompts = near_prompts(samples_of(readable_facts(model, distinct_facts(facts_from(requests), whole=True))))
    if not prompts:
        raise BadFact("no fact has a neighbourhood prompt to compare distributions on; give facts with neighbours")
    what = f"{len(prompts)} distributions over {model.vocab_size} tokens"
    require_memory(len(prompts) * model.vocab_size * 4, what, "give fewer facts (--limit), or leave out --kl")
    rows = {prompt: i for i, prompt in enumerate(prompts)}
    table, tick = torch.empty(len(prompts), model.vocab_size), counter(progress, len(prompts))
    for batch, log_probs in _next_token(model, prompts, batch_size):
        table[[rows[prompt] for prompt in batch]] = log_probs.cpu()
        tick(len(batch))
    return Distributions(model.name, rows, table)


def near_prompts(samples: Iterable[Any]) -> list[str]:
    """The neighbourhood prompts among the samples, each once."""
    return list(dict.fromkeys(s.prompt for s in samples if s.role == "neighbourhood"))


def divergences(
    model: TracedModel,
    reference: Distributions,
    prompts: Sequence[str],
    batch_size: BatchSize = "auto",
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
    kl: dict[str, float] = {}
    for batch, log_q in _next_token(model, prompts, batch_size):
        log_p = reference.log_probs[[reference.rows[prompt] for prompt in batch]].to(log_q.device)
        p = log_p.exp()
        # A token that the unedited model rules out adds nothing, though its logarithms are infinite.
        terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
        kl |= dict(zip(batch, terms.sum(-1).clamp(min=0).tolist(), strict=True))
        done(len(batch))
    return kl


def _next_token(
    model: TracedModel, prompts: Sequence[str], batch_size: BatchSize
) -> Iterator[tuple[list[str], Float[Tensor, "row vocab"]]]:
    """(prompts, log probabilities of the token after each), in batches of like length."""
    rows = [answer_row(model, (prompt, None)) for prompt in prompts]
    for batch in row_batches(rows, batch_size, model.vocab_size):
        logits = batch_logits(model, batch)
        refuse_nan(logits, batch)
        yield [row.question[0] for row in batch], logits[:, -1].log_softmax(-1)
