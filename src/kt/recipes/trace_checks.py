"""Checks of a causal trace against what IntAttn-Edit says of its figures (section 4.1; supplement, A)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from ..stats import bootstrap_mean, bootstrap_of_means
from .base import Keys
from .claims import NOTHING, Finding, layers_of, peak_layer, peak_words, shown

if TYPE_CHECKING:
    from ..tracing import Trace


_WHERE = ("metrics", "layers", "either_count", "part")
CHECKS = {
    "peak": Keys(("kind", "at", *_WHERE), ("kind",)),
    "role": Keys(("kind", "roles", *_WHERE), ("kind", "roles")),
    "falls": Keys(("kind", "at", "metrics", "after", "below"), ("kind", "after")),
    "above": Keys(("kind", "than", "at", *_WHERE), ("kind", "than")),
    "alpha": Keys(("near", "by"), ("near",)),
}
AT = "subject_last"
_MODULES = ("mlp", "attn", "hidden")
_ROLES = ("subject_first", "subject_middle", "subject_last", "after_first", "after_middle", "last")
VALUES = {"kind": _MODULES, "than": _MODULES, "metrics": ("logit_diff", "prob"), "at": _ROLES, "roles": _ROLES}
"""Values of these keys: names of `kt.tracing`, repeated here because that loads torch and reading must not."""


def check(trace: Trace, name: str, about: Mapping[str, Any]) -> Finding:
    """One claim's number and range."""
    return _CHECKS[name](trace, about)


def effects(trace: Trace, about: Mapping[str, Any], kind: str | None = None) -> Float[ndarray, "fact layer"]:
    """Each fact's effect by layer at the role `at`, the last subject token unless said."""
    from ..tracing.means import role_effects
    from ..tracing.prompts import ROLES

    kind = trace.checked(kind or about["kind"], about.get("metric", "logit_diff"))
    values = role_effects(trace, kind, about.get("metric", "logit_diff"))
    return values[:, ROLES.index(about.get("at", AT))]


def _words(about: Mapping[str, Any]) -> str:
    return str(about.get("metric", "logit_diff")).replace("_", " ")


def _peak(trace: Trace, about: Mapping[str, Any]) -> Finding:
    """The peak of the mean curve lies in these layers."""
    where = layers_of(about, trace.n_layers)
    peak = peak_layer(effects(trace, about))
    rule = f"{about['kind']}, {_words(about)}: peak in {where.words}"
    return Finding(rule, peak, where.start - 0.5, where.stop - 0.5, peak_words(peak))


def _role(trace: Trace, about: Mapping[str, Any]) -> Finding:
    """Over these layers, the strongest of the named roles is above the strongest of the others."""
    from ..tracing.means import role_effects
    from ..tracing.prompts import ROLES

    where = layers_of(about, trace.n_layers)
    metric = about.get("metric", "logit_diff")
    values = role_effects(trace, trace.checked(about["kind"], metric), metric)[:, :, where.start : where.stop].mean(2)
    present = [r for r in range(len(ROLES)) if not np.isnan(values[:, r]).all()]
    named = [i for i, r in enumerate(present) if ROLES[r] in about["roles"]]
    others = [i for i in range(len(present)) if i not in named]
    rule = (
        f"{about['kind']}, {_words(about)}, mean of {where.words}: {' or '.join(about['roles'])} above every other role"
    )
    if not named or not others:
        return Finding(rule, NOTHING, reason="the facts have no such tokens")
    lead = bootstrap_of_means(values[:, present], lambda means: means[:, named].max(1) - means[:, others].max(1))
    means = np.nanmean(values[:, present], axis=0)
    strongest = ROLES[present[int(means.argmax())]]
    return Finding(rule, lead, 0.0, ours=f"strongest: {strongest}; lead {shown(lead)}")


def _falls(trace: Trace, about: Mapping[str, Any]) -> Finding:
    """After these layers the mean effect is below a share of the peak's."""
    after, share = int(about["after"]), float(about.get("below", 0.5))
    rule = f"{about['kind']}, {_words(about)}: mean after the first {after} layers below {share:g} of the peak"
    share_left = bootstrap_of_means(effects(trace, about), lambda means: _tail_share(means, after))
    return Finding(rule, share_left, high=share)


def _tail_share(means: Float[ndarray, "draw layer"], after: int) -> Float[ndarray, " draw"]:
    peak, tail = means.max(1), means[:, after:].mean(1)
    return np.divide(tail, peak, out=np.full(len(means), np.nan), where=peak > 0)


def _above(trace: Trace, about: Mapping[str, Any]) -> Finding:
    """Over these layers one module's mean effect is above the other's."""
    where = layers_of(about, trace.n_layers)
    values, other = (
        effects(trace, about, kind)[:, where.start : where.stop].mean(1) for kind in (about["kind"], about["than"])
    )
    rule = f"{_words(about)}, mean of {where.words}: {about['kind']} above {about['than']}"
    return Finding(rule, bootstrap_mean(values - other), 0.0)


def _alpha(trace: Trace, about: Mapping[str, Any]) -> Finding:
    """α of eq. 12 rounds to the paper's."""
    from ..tracing import balance_factor

    near, by = float(about["near"]), float(about.get("by", 0.05))
    rule = f"α of eq. 12 less than {by:g} from {near:g}"
    return Finding(rule, balance_factor(trace).interval, near - by, near + by)


_CHECKS: dict[str, Callable[[Trace, Mapping[str, Any]], Finding]] = {
    "peak": _peak,
    "role": _role,
    "falls": _falls,
    "above": _above,
    "alpha": _alpha,
}
