"""What a sweep needs before it begins: requests that can stand in one batch, and the traced α to mark on its curve."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import KtError
from ..facts.fact import Fact
from ..progress import Progress

if TYPE_CHECKING:
    from ..model import TracedModel
    from ..tracing import Balance


def distinct(facts: Sequence[Fact]) -> list[Fact]:
    """The facts that can be edited together: those with a new target, and of two with one prompt the first.

    Data sets hold such pairs; a batch refuses them. A warning says how many were left out.
    """
    kept: dict[str, Fact] = {}
    nothing = twice = 0
    for fact in facts:
        try:
            request = fact.as_request()
        except KtError:
            nothing += 1
            continue
        asked = " ".join(fact.prompt.split()).casefold()
        twice += asked in kept
        kept.setdefault(asked, request)
    if nothing or twice:
        warnings.warn(
            f"{nothing + twice} of {len(facts)} records are left out: {nothing} without a new target, {twice} with the "
            "prompt of an earlier one",
            stacklevel=2,
        )
    if not kept:
        raise KtError(
            "no record can be edited: none has a target that is not its old answer; give facts with a target or a foil"
        )
    return list(kept.values())


def traced_balance(
    model: TracedModel, facts: Sequence[Fact], seed: int = 0, progress: Progress | None = None
) -> Balance:
    """α (eq. 12) over at most 100 of the facts, evenly, as `alpha="auto"` traces it.

    Raises:
        KtError: they cannot be traced: the model does not know them, or they have no second answer.
    """
    from ..editing.prepare import MOST_TRACED
    from ..tracing import balance_factor, causal_trace

    if len(facts) > MOST_TRACED:
        facts = [facts[i * len(facts) // MOST_TRACED] for i in range(MOST_TRACED)]
    trace = causal_trace(model, facts, kinds=("mlp", "attn"), seed=seed, progress=progress)
    return balance_factor(trace, seed=seed)
