"""What a residual says of its run: model, edit and settings, and what a reader of the score must know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ..editing.stack import AnyEdit
from ..errors import UnknownSite
from ..model import TracedModel
from .controls import Control
from .questions import ProbedFact
from .questions import described as described_model

NO_CONTROLS = "no other answer of its relation to hold it against"


def described(
    model: TracedModel,
    edit: AnyEdit,
    final_norm: bool,
    seed: int,
    n_boot: int,
    prefixes: Sequence[str],
    neutral: Sequence[str],
) -> dict[str, Any]:
    edited: dict[str, list[int]] = defaultdict(list)
    for name in edit.names:
        try:
            site = model.site_of(name)
        except UnknownSite:  # fine-tuning changes other weights, too
            continue
        edited[str(site.kind)].append(site.layer)
    return described_model(model, final_norm) | {
        "method": edit.manifest.get("method"),
        "alpha": edit.alpha,
        "control": edit.manifest.get("control"),
        "edited": dict(edited),
        "seed": seed,
        "n_boot": n_boot,
        "prefixes": list(prefixes),
        "neutral": list(neutral),
    }


def remarks(facts: Sequence[ProbedFact], controls: Sequence[Sequence[Control]], edit: AnyEdit) -> list[str]:
    """One line for each thing that a reader of the score must know."""
    said, n = [], len(facts)
    same = [fact for fact in facts if fact.same_first_token]
    if same:
        said.append(
            f"{len(same)} of {n} facts have an old and a new answer that begin with the same token "
            f"({same[0].prompt!r}: {same[0].original!r} and {same[0].target!r}); score and attacks leave them out"
        )
    alone = sum(not some for some in controls)
    if alone:
        said.append(
            f"{alone} of {n} facts have {NO_CONTROLS}; the score leaves them out "
            "(with pool=, give more facts of their relations)"
        )
    if sum(bool(some) and not fact.same_first_token for fact, some in zip(facts, controls, strict=True)) == 1:
        said.append("the score rests on a single fact: it has no interval, and its cells were chosen without one")
    requests = {_request(stored) for stored in edit.requests}
    other = [fact for fact in facts if (fact.prompt, fact.target) not in requests]
    if requests and other:
        said.append(
            f"{len(other)} of {n} facts are no requests of the edit ({other[0].prompt!r}); it need not touch them"
        )
    return said


def _request(stored: dict[str, Any]) -> tuple[str, str]:
    target = stored.get("target_new")
    text = target.get("str", "") if isinstance(target, dict) else str(target or "")
    return str(stored.get("prompt", "")).replace("{}", str(stored.get("subject", "")), 1), text
