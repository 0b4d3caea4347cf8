"""Closed forms: from keys, residuals and a second moment to a low-rank update.

A solver is a small value with one method. Everything is float64 and Cholesky; no matrix is inverted explicitly. Where
the keys are fewer than d_key, λC + U Uᵀ is solved through the factor of C, which stays the same from batch to batch,
and a system of the keys' number (Woodbury).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse.linalg import LinearOperator, onenormest
from torch import Tensor

from ...errors import KtError
from ...model.update import LowRank, Update
from .auto_ridge import LEAST, WANTED, AutoRidge, Spectrum, auto_ridge, single_key_ridge
from .config import require_below_one
from .factor import FACTOR_COPIES, PROJECTOR_COPIES, Factored, FactoredBlocks, Moment, cholesky, require_room

Given = TypeVar("Given")


class Solution(NamedTuple):
    """An update, the condition number of the system that gave it, the ridge that C's factor needed, the λ (or L2, or ρ)
    that the solver chose, where its own is `auto`, keys beside the system's that the update was made to meet, and which
    requests it leaves alone, since earlier edits hold their keys."""

    update: Update
    condition: float
    ridge: float = 0.0
    chosen: AutoRidge | None = None
    also_met: Float[Tensor, "d_in met"] | None = None
    held: tuple[int, ...] = ()


ROUNDING = 1e-5
"""The share of a key that may be its rounding, at least: a key read in float32 is met again to about 1e-7."""


class System(NamedTuple):
    """The input of a solver: all float64 on the CPU.

    `keys` are means over contexts, `bare` those of the bare prompts; `past` holds the keys that earlier edits of the
    session wrote, or None. `share` is what an automatic ridge lets through of the residuals.

    Of a solver that `restores`: `change` is what the session's edits have added to the weight so far, `past_residuals`
    how far the values of the past keys are now from those that they were given, `queue` how much C weighs. `requests`
    are the facts' prompts, for messages. `rounding` is the share of a key that may be its rounding: the same text's key
    in another batch differs by as much.
    """

    residuals: Float[Tensor, "d_out fact"]
    keys: Float[Tensor, "d_in fact"]
    bare: Float[Tensor, "d_in fact"] | None = None
    moment: Moment | None = None
    past: Float[Tensor, "d_in past"] | None = None
    share: float = WANTED
    change: Update | None = None
    past_residuals: Float[Tensor, "d_out past"] | None = None
    queue: float = 1.0
    requests: tuple[str, ...] = ()
    rounding: float = ROUNDING


class Solver(Protocol):
    """From a system to an update. `needs_moment` and `needs_bare` say what must be filled in, `keeps_keys` whether
    `past` counts, `automatic` whether the solution says what was chosen, `exact` whether every key is to take its value
    whatever that costs; `formula` is for people."""

    formula: ClassVar[str]

    @property
    def needs_moment(self) -> bool: ...

    @property
    def needs_bare(self) -> bool: ...

    @property
    def keeps_keys(self) -> bool: ...

    @property
    def automatic(self) -> bool: ...

    @property
    def restores(self) -> bool:
        """Whether the update also takes back what earlier edits changed (`System.change`)."""

    @property
    def holds_batch(self) -> bool:
        """Whether, fact by fact, a fact's update leaves the keys of the batch's facts before it alone."""

    def in_metric(self, moment: Moment | None, keys: Float[Tensor, "d_in n"]) -> Float[Tensor, "d n"]: ...

    def exact(self, d_key: int) -> bool: ...

    def require_room(self, name: str, d_keys: Sequence[int]) -> None:
        """Refuse a second moment that does not fit; of a mixture of experts `d_keys` has the sizes of its blocks."""

    def __call__(self, system: System) -> Solution: ...


class RegularisedGram:
    """H = λC + U Uᵀ: how much each direction of key space is held, ready to be solved with."""

    def __init__(self, moment: Moment, weight: float, extra: Float[Tensor, "d_in extra"]) -> None:
        self.moment, self.weight, self.extra = moment, weight, extra

    @property
    def small(self) -> bool:
        """Whether the system of the keys' number is the smaller one."""
        return self.weight > 0 and self.extra.shape[1] < self.moment.size

    @cached_property
    def ridge(self) -> float:
        return self._moment.ridge if self.small else self._whole.ridge

    @cached_property
    def _moment(self) -> Factored | FactoredBlocks:
        """C's factor, asked for once: where memory is short, the moment itself does not hold it."""
        return self.moment.factor()

    @cached_property
    def _whole(self) -> Factored:
        return cholesky(self.weight * self.moment.matrix() + self.extra @ self.extra.T, "λC + KKᵀ")

    @cached_property
    def _spread(self) -> tuple[Tensor, Factored]:
        """(λC)⁻¹U, and the factor of I + Uᵀ(λC)⁻¹U."""
        spread = self._through_moment(self.extra)
        inner = torch.eye(self.extra.shape[1], dtype=torch.float64) + self.extra.T @ spread
        return spread, cholesky(inner, "I + Kᵀ(λC)⁻¹K")

    def _through_moment(self, vectors: Tensor) -> Tensor:
        return self._moment.solve(vectors) / self.weight

    def solve_own(self, count: int) -> Float[Tensor, "d_in count"]:
        """H⁻¹ of U's first columns: (λC)⁻¹U (I + Uᵀ(λC)⁻¹U)⁻¹, without the subtraction that Woodbury has elsewhere."""
        if not self.small:
            return self._whole.solve(self.extra[:, :count])
        spread, inner = self._spread
        return inner.solve(spread.T).T[:, :count]

    def solve(self, vectors: Float[Tensor, "d_in n"]) -> Float[Tensor, "d_in n"]:
        """H⁻¹ of any vectors."""
        if not self.small:
            return self._whole.solve(vectors)
        through = self._through_moment(vectors)
        if not self.extra.shape[1]:
            return through
        spread, inner = self._spread
        return through - spread @ inner.solve(self.extra.T @ through)

    def times(self, vectors: Float[Tensor, "d_in n"]) -> Float[Tensor, "d_in n"]:
        if not self.small:
            return self._whole.times(vectors)
        return self.weight * self._moment.times(vectors) + self.extra @ (self.extra.T @ vectors)

    def condition(self) -> float:
        """An estimate from below of ‖H‖₁ ‖H⁻¹‖₁ (Higham and Tisseur's), at O(d²) a step."""
        return _one_norm(self.moment.size, self.times) * _one_norm(self.moment.size, self.solve)


class Ridged:
    """A solver whose ridge (or, of one key, whose single column) gives nearly equal keys a mean of their values."""

    restores: ClassVar[bool] = False

    @property
    def holds_batch(self) -> bool:
        return False

    def in_metric(self, moment: Moment | None, keys: Float[Tensor, "d_in n"]) -> Float[Tensor, "d n"]:
        """K̃ = L⁻¹K, C = L Lᵀ: keys whose inner products are those that the solve sees; K itself without C."""
        return keys if moment is None else moment.factor().whiten(keys)

    def exact(self, d_key: int) -> bool:
        return False


class ThroughFactor(Ridged):
    """A solver that factors C, where it takes C at all."""

    needs_moment: bool

    def require_room(self, name: str, d_keys: Sequence[int]) -> None:
        if self.needs_moment:
            whole = isqrt(sum(size * size for size in d_keys))  # of one matrix with as many numbers
            require_room(f"the factor of {name}'s second moment", whole, FACTOR_COPIES)


@dataclass(frozen=True)
class LeastSquares(ThroughFactor):
    """R Kᵀ (λC + H + K Kᵀ)⁻¹ (IntAttn-Edit eq. 6; MEMIT eq. 14, with K0 K0ᵀ = λC), H the earlier edits' keys.

    λ is `weight`, or chosen by `auto_ridge` for the keys at hand.
    """

    formula: ClassVar[str] = "R Kᵀ(λC + H + KKᵀ)⁻¹"

    weight: float | Literal["auto"] = "auto"
    needs_moment: bool = True
    needs_bare: bool = False
    keeps_keys: bool = True

    @property
    def automatic(self) -> bool:
        return self.weight == "auto"

    def __call__(self, system: System) -> Solution:
        return self.solved(system, *self.chosen_weight(system))

    def chosen_weight(self, system: System) -> tuple[float, AutoRidge | None]:
        """λ, and how it was chosen."""
        if self.weight != "auto":
            return self.weight, None
        moment, keys = given(system.moment), joined(system.keys, system.past)
        spectrum = Spectrum.of_keys(self.in_metric(moment, keys), system.keys.shape[1])
        chosen = auto_ridge(spectrum, system.share, moment.size)
        return chosen.ridge, chosen

    def solved(self, system: System, weight: float, chosen: AutoRidge | None) -> Solution:
        """The update with λ = `weight`."""
        held = RegularisedGram(given(system.moment), weight, joined(system.keys, system.past))
        update = LowRank(system.residuals, held.solve_own(system.keys.shape[1]).T.contiguous())
        return Solution(update, held.condition(), held.ridge, chosen)


@dataclass(frozen=True)
class Equality(ThroughFactor):
    """R (Kᵀ H⁻¹ K + ρI)⁻¹ Kᵀ H⁻¹, H = λC + earlier keys (EMMET): keys are to take their values exactly.

    Of all updates that do, the one that moves the held directions least. `ridge` ρ, which the code adds for more than
    one fact, keeps near-equal keys from demanding the impossible; 0 is the paper's formula. With it, the constraint is
    no longer exact: by the push-through identity the update is R Kᵀ(ρH + K Kᵀ)⁻¹, `LeastSquares` with ρλ for its λ.

    An automatic ρ is chosen by `auto_ridge` from KᵀH⁻¹K, and 0 for one fact. An automatic λ is the one whose product
    with ρ is `LeastSquares`' automatic λ; where ρ is 0, λ weighs C against earlier keys only and follows d_key; where ρ
    is automatic too, it is 1.
    """

    formula: ClassVar[str] = "R(KᵀD⁻¹K + ρI)⁻¹KᵀD⁻¹, D = λC + H"

    weight: float | Literal["auto"] = 1.0
    ridge: float | Literal["auto"] = 0.0
    needs_moment: bool = True
    needs_bare: bool = False
    keeps_keys: bool = True

    @property
    def automatic(self) -> bool:
        return "auto" in (self.weight, self.ridge)

    def exact(self, d_key: int) -> bool:
        """A ridge below every automatic one, of keys of the mean x, is as good as none."""
        if self.ridge == "auto":
            return False
        weight = 1.0 if self.weight == "auto" else self.weight
        return self.ridge * weight < LEAST * single_key_ridge(d_key, WANTED)

    def __call__(self, system: System) -> Solution:
        moment, none = given(system.moment), system.keys[:, :0]
        weight, chosen = self._weight(system)
        held = RegularisedGram(moment, weight, none if system.past is None else system.past)
        through = held.solve(system.keys)
        gram = system.keys.T @ through
        ridge = self.ridge
        if ridge == "auto":
            chosen = AutoRidge(0.0, float(gram[0, 0]), 1.0)
            if gram.shape[0] > 1:
                chosen = auto_ridge(Spectrum.of_gram(gram), system.share, moment.size / weight)
            ridge = chosen.ridge
        if gram.shape[0] > 1:
            gram.diagonal().add_(ridge)
        inner = cholesky(gram, "KᵀC⁻¹K (requests whose keys are the same?)")
        spread = inner.solve(through.T)
        return Solution(
            LowRank(system.residuals, spread), float(torch.linalg.cond(gram, 2)), max(held.ridge, inner.ridge), chosen
        )

    def _weight(self, system: System) -> tuple[float, AutoRidge | None]:
        """λ, and how it was chosen."""
        if self.weight != "auto" or self.ridge == "auto":
            return (1.0 if self.weight == "auto" else self.weight), None
        moment, count = given(system.moment), system.keys.shape[1]
        if self.ridge == 0:
            weight = single_key_ridge(moment.size, system.share)
            x = self.in_metric(moment, system.keys).square().sum(0)
            return weight, AutoRidge(weight, float(x.median()), 1.0)
        past = None if system.past is None else system.past * self.ridge**0.5
        keys = self.in_metric(moment, joined(system.keys, past))
        chosen = auto_ridge(Spectrum.of_keys(keys, count), system.share, moment.size)
        chosen = chosen._replace(ridge=chosen.ridge / self.ridge)
        return chosen.ridge, chosen


@dataclass(frozen=True)
class NullSpace(Ridged):
    """R Kᵀ P ((K Kᵀ + H) P + L2 · I)⁻¹ (AlphaEdit), P the projector onto directions of C below `threshold`.

    Its result lies in P's range, where the matrix is the symmetric L2 · I + P(K Kᵀ + H)P: solved as such. The
    threshold is absolute, as in the original code: it depends on the scale of the keys, where `auto` does not.
    `auto_ridge` may choose L2.
    """

    formula: ClassVar[str] = "R KᵀP((KKᵀ + H)P + L2·I)⁻¹"

    threshold: float | Literal["auto"] = "auto"
    l2: float | Literal["auto"] = "auto"
    needs_moment: bool = True
    needs_bare: bool = False
    keeps_keys: bool = True

    def __post_init__(self) -> None:
        if self.l2 != "auto" and self.l2 <= 0:
            raise KtError(f"L2 {self.l2:g} must be above zero")

    @property
    def automatic(self) -> bool:
        return self.l2 == "auto"

    def in_metric(self, moment: Moment | None, keys: Float[Tensor, "d_in n"]) -> Float[Tensor, "d n"]:
        """K̃ in P's own coordinates."""
        return given(moment).null_basis(self.threshold).T @ keys

    def require_room(self, name: str, d_keys: Sequence[int]) -> None:
        require_room(f"AlphaEdit's projector for {name}", sum(d_keys), PROJECTOR_COPIES)

    def __call__(self, system: System) -> Solution:
        basis = given(system.moment).null_basis(self.threshold)
        return self.solved(system, basis, basis.T @ joined(system.keys, system.past))

    def solved(
        self, system: System, basis: Float[Tensor, "d_in null"], inside: Float[Tensor, "null n"], least: float = 0.0
    ) -> Solution:
        """The update from keys in the coordinates of P's range, the facts' first; `least` bounds an automatic L2."""
        count = system.keys.shape[1]
        l2, chosen = self.l2, None
        if l2 == "auto":
            chosen = auto_ridge(Spectrum.of_keys(inside, count), system.share, 1.0, least)
            l2 = chosen.ridge
        if inside.shape[1] < inside.shape[0]:
            small = cholesky(inside.T @ inside + l2 * torch.eye(inside.shape[1], dtype=inside.dtype), "KᵀPK + L2")
            spread = small.solve(inside.T).T[:, :count]
        else:
            large = cholesky(inside @ inside.T + l2 * torch.eye(inside.shape[0], dtype=inside.dtype), "PKKᵀP + L2")
            spread = large.solve(inside[:, :count])
        condition = 1 + float(torch.linalg.matrix_norm(inside, 2)) ** 2 / l2
        return Solution(LowRank(system.residuals, (basis @ spread).T.contiguous()), condition, chosen=chosen)


@dataclass(frozen=True)
class RankOne(ThroughFactor):
    """r uᵀ / (uᵀ k), u = C⁻¹ k̄ (ROME eq. 2). ROME's code takes k of the bare prompt and k̄ over contexts;
    R-ROME takes k̄ in both places. Without `mom2_adjustment`, C = I (all of EasyEdit's ROME files).

    With `held_share` s above 0, u = (λC + H)⁻¹ k̄ behind the first of several facts: H is of the keys that were written
    before, and λ = d_key (1 - s)/s lets 1 - s of what C⁻¹k̄ would do at one of them happen (see `auto_ridge`).

    Where k and k̄ are less alike than `key_cosine`, uᵀk is small, and at the other contexts' keys the update is too
    large by as much. With M = C, or λC + H, u is there the least uᵀMu that has uᵀk = uᵀk̄ = 1: M⁻¹K (KᵀM⁻¹K)⁻¹ 1,
    K = [k̄ k], unless that is more than ROME's (nearly opposite keys). Such are the keys of a subject that stands first
    in its prompt where the tokenizer puts no token before it: a first token's activations are unlike all others' (Yang
    et al. 2024, arXiv 2406.11263)."""

    formula: ClassVar[str] = "r uᵀ/(uᵀk), u = (λC + H)⁻¹k̄"

    mom2_adjustment: bool = True
    same_key: bool = False
    held_share: float = 0.0
    key_cosine: float = 0.0
    keeps_keys: bool = False
    automatic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_below_one(held_share=self.held_share, key_cosine=self.key_cosine)

    @property
    def needs_moment(self) -> bool:  # type: ignore[override]
        return self.mom2_adjustment

    @property
    def needs_bare(self) -> bool:
        return not self.same_key or self.key_cosine > 0

    @property
    def holds_batch(self) -> bool:
        return self.mom2_adjustment and self.held_share > 0

    def __call__(self, system: System) -> Solution:
        keys = system.keys if system.bare is None else torch.cat([system.keys, system.bare], 1)
        through, condition, ridge = keys, 1.0, 0.0
        if self.mom2_adjustment:
            moment = given(system.moment)
            held = RegularisedGram(moment, 1.0, system.keys[:, :0])
            if system.past is not None:
                held = RegularisedGram(moment, single_key_ridge(moment.size, self.held_share), system.past)
            through, condition, ridge = held.solve(keys), held.condition(), held.ridge
        direction, also_met = through[:, : system.keys.shape[1]], None
        if self.key_cosine:
            bare = given(system.bare)
            direction, both = self._meeting_both(system.keys, bare, direction, through[:, system.keys.shape[1] :])
            also_met = bare[:, both] if bool(both.any()) else None
        direction = direction / direction.norm(dim=0)
        met = system.keys if self.same_key else given(system.bare)
        left = system.residuals / (direction * met).sum(0)
        return Solution(LowRank(left, direction.T.contiguous()), condition, ridge, also_met=also_met)

    def _meeting_both(
        self,
        mean: Float[Tensor, "d_in fact"],
        bare: Float[Tensor, "d_in fact"],
        through_mean: Float[Tensor, "d_in fact"],
        through_bare: Float[Tensor, "d_in fact"],
    ) -> tuple[Float[Tensor, "d_in fact"], Bool[Tensor, " fact"]]:
        """u's direction from k̄, k, M⁻¹k̄ and M⁻¹k, and of which facts it meets both keys."""
        own, across, other = (mean * through_mean).sum(0), (mean * through_bare).sum(0), (bare * through_bare).sum(0)
        unlike = across < self.key_cosine * (own * other).sqrt()
        rest = own * other - across.square()  # the determinant of KᵀM⁻¹K
        both = unlike & ((own + other - 2 * across) * across.square() <= own * rest)
        return torch.where(both, (other - across) * through_mean + (own - across) * through_bare, through_mean), both


def joined(keys: Float[Tensor, "d_in fact"], past: Float[Tensor, "d_in past"] | None) -> Float[Tensor, "d_in all"]:
    return keys if past is None else torch.cat([keys, past], 1)


def given(value: Given | None) -> Given:
    assert value is not None, "the recipe fills in what a solver needs"
    return value


def _one_norm(size: int, apply: Callable[[Tensor], Tensor]) -> float:
    def times(vector: np.ndarray) -> np.ndarray:
        return apply(torch.from_numpy(np.ascontiguousarray(vector)).reshape(size, -1)).numpy().reshape(vector.shape)

    # Symmetric, so its own adjoint.
    operator = LinearOperator((size, size), matvec=times, rmatvec=times, matmat=times, rmatmat=times, dtype=np.float64)
    return float(onenormest(operator, t=1))  # one column: more would be drawn at random
