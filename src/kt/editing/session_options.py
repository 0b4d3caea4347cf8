"""What an `EditSession` is given: its options, the kinds of all its values, and the keys of earlier edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from types import NoneType

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.kinds import COUNT, Wanted, require_kinds, shown
from ..errors import KtError, warn_user
from ..facts.corpus import Corpus
from ..facts.fact import Fact
from ..model.model import A_MODEL
from ..runs.journal import Journal
from .closed_form.norm_guards import GUARDS, OLDER
from .closed_form.second_moment import Statistics
from .config import Config
from .edit import Edit
from .plan import EditHistory, EffectPlan
from .update_guards import UPDATE_GUARDS

History = Mapping[str, Float[Tensor, "d_in d_in"]] | Sequence[Edit]
"""Keys that earlier edits wrote: those edits themselves, or by weight name the sum of k kᵀ over their keys."""


@dataclass(frozen=True)
class SessionOptions:
    """How a session treats the edits before and beside the one that it solves.

    Attributes:
        history: earlier edits whose keys are to be left alone, or by weight name the sum of their k kᵀ.
        keep_history: whether later edits leave the keys of earlier ones alone; None asks the method (AlphaEdit does).
        norm_guard: rescale every wanted value (closed_form.norm_guards): `kt`, or true, to the norm that its site has
            before the session's first edit; `nas` to NAS's anchor. None: none.
        hold: keep_history and norm_guard=`kt`, where the method has a place for each: what a long run in steps needs.
        update_guard: what is done to solved updates before they are written (update_guards): `rect`, `prune`, `sphere`
            or `simie`.
        norm_facts: facts with targets that NAS's anchor is a mean over; None takes `requests`, or the first edit's.
        alpha_facts: facts that α is traced on; None takes a kept α, or traces it once (`evidence.default_alpha`).
        requests: all requests to come, for a probe of the stages of recall; None: the first that are edited.
        corpus, max_tokens: the text that second moments are taken over, where none are given: `auto` (english, and for
            the demo model demo), or what `kt cov --corpus` takes.
        check: also read neighbours and perplexity before and after each edit, and warn of what its verdict found. A run
            in steps, whose total is checked, and a sweep, which measures bad settings on purpose, leave it out.
        strict: refuse requests that contradict each other; else the later ones are left out, with a warning.
    """

    history: History | None = None
    keep_history: bool | None = None
    norm_guard: bool | str | None = None
    hold: bool = False
    norm_facts: Sequence[Fact] | None = None
    update_guard: str | None = None
    alpha_facts: Sequence[Fact] | None = None
    requests: Sequence[Fact] | None = None
    corpus: str = "auto"
    max_tokens: int | None = None
    check: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        require_kinds(vars(self), OPTION_KINDS)
        object.__setattr__(self, "norm_guard", OLDER.get(str(self.norm_guard), self.norm_guard))
        if self.max_tokens is not None and self.max_tokens < 1:
            raise KtError(f"max_tokens is {self.max_tokens}; give a whole number of at least 1")
        given = () if self.history is None else self.history
        if isinstance(given, Mapping):
            if wrong := [name for name, gram in given.items() if not isinstance(gram, Tensor)]:
                raise KtError(f"history of {wrong[0]} is {shown(given[wrong[0]])}; give a tensor, the sum of k kᵀ")
        elif wrong_edits := [each for each in given if not isinstance(each, Edit)]:
            raise KtError(f"history holds {shown(wrong_edits[0])}; give edits, as kt.edit or Edit.load returns them")

    def refuse_unfit(self, config: Config) -> None:
        """Refuse what a method has no place for, whichever the model is.

        Raises:
            KtError: `config` is of a method that cannot take one of the options, or gives no plan.
        """
        if self.alpha_facts and not config.needs_evidence:
            raise KtError(
                "alpha_facts are traced for alpha, and nothing is traced here; leave them out, or set alpha to auto"
            )
        plan, name, guard = config.outline(), config.name, self.update_guard
        if guard and isinstance(plan, EffectPlan):
            raise KtError(f"update_guard {guard} restrains updates of weights, and {name} writes none; leave it out")
        if guard == "simie" and plan.whole_blocks:
            others = ", ".join(each for each in UPDATE_GUARDS if each != guard)
            choice = "modules=mlp, or another" if "modules" in config.settings() else "another"
            raise KtError(
                f"simie needs linear maps, and {name} writes whole blocks, gains and biases among them; choose "
                f"{choice} update guard: {others}"
            )
        if self.norm_guard and not plan.has_targets:
            raise KtError(f"norm_guard rescales the values that are aimed at, and {name} has none; leave it out")
        past = isinstance(self.history, Mapping) or any(edit.keys for edit in self.history or ())
        if (self.keep_history or past) and not plan.keeps_keys:
            raise KtError(f"{name} has no place for earlier edits' keys; leave keep_history and history out")


FLAG, FLAG_OR_NONE = (bool,), (bool, NoneType)
OPTION_KINDS: dict[str, Wanted] = {
    "history": ((Mapping, Sequence, NoneType), "a list of earlier edits, or sums of k kᵀ by weight name"),
    "keep_history": (FLAG_OR_NONE, "True, False, or None for what the method does"),
    "norm_guard": ((bool, str, NoneType), f"True, or one of {', '.join(GUARDS)}"),
    "hold": (FLAG, "True or False"),
    "update_guard": ((str, NoneType), f"one of {', '.join(UPDATE_GUARDS)}"),
    "corpus": ((str, PathLike, Corpus), "a corpus's name or file, as kt cov --corpus takes it"),
    "max_tokens": ((Integral, NoneType), "a whole number of at least 1"),
    "check": (FLAG, "True or False"),
    "strict": (FLAG, "True or False"),
}
"""By field of `SessionOptions`: the types of its values, and what to give instead of others."""
TEXTS = "a list of texts, or a list of such lists, each with one {} where the prompt stands"
ARGUMENT_KINDS: dict[str, Wanted] = {
    "model": A_MODEL,
    "method": ((Config, str), "a method's name (kt ls methods) or its configuration, such as MEMIT()"),
    "statistics": ((Statistics, str, PathLike, NoneType), "a Statistics object, or the file of one"),
    "context_templates": ((Sequence, NoneType), TEXTS),
    "seed": COUNT,
    "progress": ((Callable, NoneType), "a function of what is done and of how many, or None"),  # type: ignore[dict-item]
    "journal": ((Journal, NoneType), "a Journal, as Journal.begin makes it of a folder"),
}
"""The same of the arguments of `EditSession`."""


def keys_of(history: History | None) -> dict[str, Float[Tensor, "d_in past"]]:
    """Keys as columns. A sum of k kᵀ gives back columns with the same sum: all that a solve makes of them."""
    state = EditHistory()
    if isinstance(history, Mapping):
        return {name: _columns(name, gram) for name, gram in history.items()}
    if keyless := [str(edit.manifest.get("method")) for edit in history or () if not edit.keys]:
        more = f" (and {len(keyless) - 1} more)" if len(keyless) > 1 else ""
        warn_user(f"history: a {keyless[0]} edit{more} keeps no keys, and nothing makes the new edit leave it alone")
    for edit in history or ():
        for name, keys in edit.keys.items():
            state.add_keys(name, keys.T)
    return state.keys


def _columns(name: str, gram: Tensor) -> Float[Tensor, "d_in past"]:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise KtError(f"history of {name} is {tuple(gram.shape)}; give the square sum of k kᵀ, or earlier edits")
    rounding = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(gram.dtype, 1e-4)  # relative, of a long sum
    # Eigenvalues below what the number's own digits leave are none: as keys they would hold directions of no edit. The
    # rounding of single numbers averages out in 16 bits, where a bound by their whole eps would take keys for it.
    noise = 1e-13
    if gram.dtype.is_floating_point:
        eps = torch.finfo(gram.dtype).eps
        noise = max(noise, 8 * eps if gram.dtype in (torch.float32, torch.float64) else 2 * eps / len(gram) ** 0.5)
    gram, instead = gram.detach().double().cpu(), "give the sum of k kᵀ, or earlier edits"
    if not gram.isfinite().all():
        raise KtError(f"history of {name} has numbers that are not finite; {instead}")
    if (gram - gram.T).abs().max() > rounding * gram.abs().max():
        raise KtError(f"history of {name} is not symmetric; {instead}")
    values, vectors = torch.linalg.eigh(gram)
    if values.min() < -rounding * values.abs().max():
        raise KtError(
            f"history of {name} has the eigenvalue {float(values.min()):.3g}, and no sum of k kᵀ has one below zero; "
            f"{instead}"
        )
    kept = values > noise * values.max().clamp(min=1e-300)
    return vectors[:, kept] * values[kept].sqrt()
