"""`kt.edit`: requests and a method become an `Edit`; the model is left as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..facts.fact import Fact
from ..progress import Progress
from .edit import Edit
from .session import EditSession, History
from .statistics import Statistics

if TYPE_CHECKING:
    from ..model import TracedModel


def edit(
    model: TracedModel,
    requests: Sequence[Fact | Mapping[str, Any]],
    method: str = "intattn",
    alpha: float | str | None = None,
    statistics: Statistics | str | Path | None = None,
    context_templates: Sequence[str] | Sequence[Sequence[str]] | None = None,
    preset: str | None = None,
    variant: str | None = None,
    seed: int = 0,
    corpus: str = "demo",
    max_tokens: int = 100_000,
    progress: Progress | None = None,
    history: History | None = None,
    alpha_facts: Sequence[Fact] | None = None,
    norm_guard: bool = False,
    **hyper_parameters: Any,
) -> Edit:
    """Solve an edit for all requests in one batch. `EditSession` edits in steps.

    Args:
        requests: facts with a target (or a foil, which then is the target), or dicts as ROME and MEMIT write them.
        method: see `kt ls methods`.
        alpha: attention's share (eq. 13): a number, `auto` (traced), `per-fact` (each request's own, its column of ΔW
            scaled by it), or None for the preset's, and `auto` where there is no preset.
        statistics: second moments by module name; None takes them over `corpus` and caches them. The factors of a
            `Statistics` object are computed once for every edit that it is given to.
        context_templates: flat list or list of groups; None lets the model write MEMIT's five prefixes from `seed`.
        preset: hyper-parameters by name, or a TOML file; None finds the one that matches the model.
        variant: the preset's values for one data set (`zsre`, `mcf`).
        history: earlier edits whose keys this one is to leave alone, or by weight name the sum of their k kᵀ.
        alpha_facts: facts that `alpha="auto"` is traced on; None: the requests themselves.
        norm_guard: rescale every wanted value to the norm that the site has now.
        hyper_parameters: `layers` (or `layers_mlp`), `layers_attn`, `v_lr`, `v_num_grad_steps`, `v_weight_decay`,
            `kl_factor`, `clamp_norm_factor`, `mom2_update_weight`, `mom2_update_weight_attn`, `fact_token`, ...

    Raises:
        BadFact: a request without a subject in its prompt, with an empty or unchanged target, or two that contradict
            each other.
        UnknownSite: a layer that the model does not have.
        NotEnoughMemory: the solve's matrices would not fit.
        WorkFailed: the update is zero or not finite.
    """
    session = EditSession(
        model, method, alpha, statistics, context_templates, preset, variant, seed, corpus, max_tokens, progress,
        history, alpha_facts, norm_guard=norm_guard, **hyper_parameters,
    )  # fmt: skip
    return session.solve(requests)
