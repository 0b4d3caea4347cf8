"""`kt.edit`: requests and a method become an `Edit`; the model is left as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..facts.fact import Fact
from .edit import Edit
from .session import EditSession

if TYPE_CHECKING:
    from ..model import TracedModel


def edit(
    model: TracedModel,
    requests: Sequence[Fact | Mapping[str, Any]],
    method: str = "intattn",
    alpha: float | str | None = None,
    **options: Any,
) -> Edit:
    """Solve an edit for all requests in one batch. `EditSession` edits in steps, `run_edits` in a mode and with scores.

    Args:
        requests: facts with a target (or a foil, which then is the target), or dicts as ROME and MEMIT write them.
        method: see `kt ls methods`.
        alpha: attention's share (eq. 13); see `EditSession`.
        options: all other arguments of `EditSession`: statistics, context_templates, preset, variant, seed, corpus,
            history, norm_guard, ..., and hyper-parameters by name.

    Raises:
        BadFact: a request without a subject in its prompt, with an empty or unchanged target, or two that contradict
            each other.
        UnknownSite: a layer that the model does not have.
        NotEnoughMemory: the solve's matrices would not fit.
        WorkFailed: the update is zero or not finite.
    """
    return EditSession(model, method, alpha, **options).solve(requests)
