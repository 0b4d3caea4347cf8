"""Requests of one batch whose keys are equal, or nearly so, named before anything is searched for or solved.

A causal model's state at a token depends on the tokens up to it. Facts about one subject therefore have one key where
the text before the subject is the same ("{} was born in", "{} works as"), and all but one where it is not; a weight
gives one key one value. What tells two unit keys of cosine c apart has the length √(2(1 - c)), and to write different
values through it takes an update as many times longer. An exact constraint asks for that whatever it costs (keys that
differ by rounding alone: more than the weight by orders of magnitude); a ridge writes a mean of the values instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...errors import KtError, warn_user
from ...facts.fact import Fact
from .aims import Position
from .keys import fact_keys

if TYPE_CHECKING:
    from ..plan import SolveContext
    from .plan import Write


NEAR = 0.95
"""The least cosine that is named. 99 in 100 pairs of CounterFact's facts of different subjects stay below 0.1 (SmolLM2,
down_proj of layer 4) and 0.23 (Gemma 3); two wordings about one subject reach 0.47 to 0.98."""
TIE = 1e-9
"""Cosines nearer than this are equal, and the first pair is named."""
ROWS = 1024
"""Facts that are compared with all others at once."""


class NearKeys(NamedTuple):
    """Two requests, the cosine of their keys, and how many such pairs there are."""

    first: int
    second: int
    cosine: float
    pairs: int


def check_keys(context: SolveContext, facts: Sequence[Fact], paths: Sequence[Write], in_turn: bool = False) -> None:
    """Compare the requests' keys at the lowest layer that each path writes. `in_turn`: they are solved one by one.

    Raises:
        KtError: two are nearly equal, and the path's solver has (all but) an exact constraint. Others warn, once.
    """
    model = context.model
    for path in sorted(paths, key=lambda path: not path.solver.exact(model.key_size(path.sites[0]))):
        site = path.sites[0]
        near = nearest(context, facts, path)
        if near is None:
            continue
        names = " and ".join(f"{facts[i].prompt!r} -> {facts[i].target!r}" for i in (near.first, near.second))
        more = f" (and {near.pairs - 1} more such pair{'s' * (near.pairs > 2)})" if near.pairs > 1 else ""
        what = (
            f"{names}{more} have all but one key at {site} (cosine {near.cosine:.4f}), which one weight gives one value"
        )
        # (One after the other is no remedy: the later write takes the place of the earlier.)
        last = path.aim.position is Position.PROMPT_LAST
        remedy = (
            "keep one of the two" if last else "read them at the prompt's last token (fact_token=last), or keep one"
        )
        if path.solver.exact(model.key_size(site)):
            raise KtError(f"{what}; an exact constraint cannot hold for both: {remedy}")
        warn_user(f"{what}, {'the later' if in_turn else 'a mean of their two'}; {remedy}")
        return


def nearest(context: SolveContext, facts: Sequence[Fact], path: Write) -> NearKeys | None:
    """The two requests whose keys are nearest at a path's lowest layer, if their cosine reaches `NEAR`.

    Cosines are in the solve's own metric: what all keys of a layer have in common makes them look alike otherwise.
    """
    if len(facts) < 2:
        return None
    model, site, solver = context.model, path.sites[0], path.solver
    keys = fact_keys(model, facts, context.contexts, site, path.aim.position).cpu()
    moment = context.moment(model.weight_name(site), len(keys)) if solver.needs_moment else None
    unit = torch.nn.functional.normalize(solver.in_metric(moment, keys), dim=0)
    best, pairs = (0, 0, -1.0), 0
    for start in range(0, len(facts), ROWS):
        cosines = (unit[:, start : start + ROWS].T @ unit).triu(diagonal=start + 1)
        pairs += int((cosines >= NEAR).sum())
        row, column = (int(i) for i in (cosines >= cosines.max() - TIE).nonzero()[0])
        if float(cosines[row, column]) > best[2] + TIE:
            best = (start + row, column, float(cosines[row, column]))
    return NearKeys(*best, pairs) if pairs else None
