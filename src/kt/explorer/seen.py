"""What a model at hand is asked beside a trace and a probe: its text, and the top tokens at every token of a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from numpy import ndarray


@dataclass(frozen=True)
class Seen:
    """One prompt in one state of the model (`before` the edits that are applied, or `after`).

    Args:
        text: how the model goes on, greedily.
        top: ids of the most probable tokens at every token of the prompt.
        top_prob: their probabilities.
        texts: the tokens' texts by id.
    """

    state: str
    prompt: str
    text: str
    top: Int[ndarray, "token kind layer top"]
    top_prob: Float[ndarray, "token kind layer top"]
    texts: Mapping[str, str]
