"""Settings that the locate-then-edit methods share: the search for targets, the spread of the residual, α."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...errors import KtError, warn_user
from ..config import AUTO, LATER, SQUARED, Config, one_of, setting
from .aims import OLD_SPREADS, SPREADS, Position, Share, Spread

if TYPE_CHECKING:
    from ...model.model import TracedModel
    from .objective import Objective, Term
    from .plan import Write

EASYEDIT = "EasyEdit hparams/MEMIT, 7B models"
ANYEDIT = "AnyEdit's code and hparams"
WORDS = ("auto", "per-fact")
"""α that a trace is to give: one of all requests, or each request its own."""


@dataclass(frozen=True)
class TargetSearch(Config):
    """Settings of the search for δ, under the names that users of ROME and MEMIT know."""

    v_lr: float | Literal["auto"] = setting(
        AUTO,
        about="Adam's learning rate in the search for δ",
        source=f"ROME section 3.1, step 2; {EASYEDIT}; auto: kt's own, from the value's elements",
        most=SQUARED,
    )
    v_num_grad_steps: int = setting(
        25,
        about="forward passes in the search for δ, one more than updates",
        source=f"ROME section 3.1, step 2; {EASYEDIT}",
        least=1,
    )
    v_weight_decay: float = setting(
        1e-3,
        symbol="β (JEEP eq. 11)",
        about="weight of ‖δ‖ in the search",
        unit="of ‖δ‖/‖v‖², as the code has it",
        source=f"JEEP eq. 11; {EASYEDIT}",
        most=SQUARED,
    )
    kl_factor: float = setting(
        0.0625,
        symbol="α′ (JEEP eq. 11)",
        about="weight of the KL divergence at the subject's last token",
        source="ROME eq. 4; JEEP eq. 11",
        most=SQUARED,
    )
    clamp_norm_factor: float = setting(
        4.0, symbol="γ (JEEP eq. 12)", about="largest ‖δ‖", unit="times ‖v‖", source=f"JEEP eq. 12; {EASYEDIT}"
    )

    attention_drift: float = setting(
        0.0,
        about="SADR: weight of the drift of attention weights in the search; above 0, attention runs eagerly",
        unit="of 1e-4",
        source="SADR's scripts: ROME 100 in 80 steps, MEMIT 50 in 20, PMET 800 in 40; its configurations, and kt, 0",
        most=SQUARED,
    )

    def as_dict(self) -> dict[str, Any]:
        """As every method's; `attention_drift` only where it is not 0, so that files compare equal with older ones."""
        return {name: value for name, value in super().as_dict().items() if name != "attention_drift" or value}

    @property
    def objective(self) -> Objective:
        """The search's terms: likelihood, KL and decay, a bound on ‖δ‖, and the loss at which a request stops."""
        from .objective import NLL, StopBelow

        return self.searching(NLL(), StopBelow())

    def searching(self, *own: Term) -> Objective:
        """The search's objective from a method's own terms (a likelihood first) and those that all methods share."""
        from .objective import KL, AttentionDrift, ClampNorm, Objective, WeightDecay

        likelihood, *rest = own
        shared: tuple[Term, ...] = (
            KL(self.kl_factor),
            WeightDecay(self.v_weight_decay),
            ClampNorm(self.clamp_norm_factor),
        )
        if self.attention_drift:
            shared = (*shared, AttentionDrift(self.attention_drift))
        return Objective((likelihood, *shared, *rest), self.v_num_grad_steps, self.v_lr)


@dataclass(frozen=True)
class AtToken(TargetSearch):
    """The token at which facts are read and written."""

    fact_token: str = setting(
        Position.SUBJECT_LAST.value,
        symbol="i′",
        about="token whose keys and values are edited",
        source="ROME section 3.1, step 1; MEMIT eq. 19",
    )

    by_name: ClassVar[tuple[str, ...]] = ("position",)

    @property
    def position(self) -> Position:
        return Position(one_of(self.fact_token, [p.value for p in Position], "fact_token"))

    def require(self, model: TracedModel) -> None:
        """A warning where `kl_factor` is without effect: presets give it to all methods, so it is no error."""
        super().require(model)
        if self.position is Position.PROMPT_LAST and self.kl_factor not in (0, type(self).kl_factor):
            warn_user(
                f"{self.name}: kl_factor {self.kl_factor:g} is without effect at fact_token=last, since the KL "
                "divergence is read at the subject's last token; leave it out"
            )


def require_below_one(**settings: float) -> None:
    """Refuse what must lie in [0, 1) of ROME's own additions.

    Raises:
        KtError: one does not.
    """
    for name, value in settings.items():
        if not 0 <= value < 1:
            raise KtError(f"{name} {value:g} must lie from 0 to below 1; 0 is ROME's own formula")


@dataclass(frozen=True)
class InParts(AtToken):
    """Long answers in parts, each at the last token before it (AnyEdit's ARE; see closed_form.parts)."""

    revision = (
        2  # layers without a preset; the loss at which the search stops, where answers are cut in a chat template
    )
    writes_contexts = False
    # The prompt's last token knows its subject from the middle layers on: of ten KnowEdit facts SmolLM2 takes 7 in
    # MEMIT's layers and 10 in these, Gemma 3 takes 7 in both, at 1.02 and 1.01 of the perplexity.
    depth = (15, 20, 29)

    # No setting: the KL divergence is read at the subject's last token, which no aim is at.
    kl_factor: ClassVar[float] = 0.0  # type: ignore[misc]
    fact_token: str = setting(Position.PROMPT_LAST.value, source=ANYEDIT)
    window: int = setting(
        50,
        about="ARE: longer answers are cut into parts of at most so many tokens, an aim each",
        unit="tokens",
        source=f"{ANYEDIT}: 50 for Qwen2.5-7B, 40 for Llama-3-8B",
        least=1,
    )

    @property
    def objective(self) -> Objective:
        """A request stops at a loss of 0.01, as in ARE's code: it is a mean over the tokens of a part, and at ROME's
        0.05 a part of fifty has a probability of 0.08."""
        from .objective import NLL, StopBelow

        return self.searching(NLL(), StopBelow(1e-2))

    @property
    def position(self) -> Position:
        if self.fact_token != Position.PROMPT_LAST.value:
            raise KtError(
                f"fact_token {self.fact_token!r}: parts of an answer are edited at the token before them; give last"
            )
        return Position.PROMPT_LAST


@dataclass(frozen=True)
class Spreading(Config):
    """How a residual is divided among several layers."""

    spread: str = setting(
        "even",
        symbol="1/(L-l+1)",
        about="how the wanted change comes to the layers: even, sqrt, ends, rest, blue (BLUE), replay (Forward Replay)",
        source="MEMIT eq. 20; IntAttn-Edit eq. 7",
    )

    by_name: ClassVar[tuple[str, ...]] = ("spread_rule",)

    @property
    def spread_rule(self) -> Spread:
        name = OLD_SPREADS[self.spread][0].name if self.spread in OLD_SPREADS else self.spread
        return SPREADS[one_of(name, SPREADS, "spread")]

    def refuse_old_names(self) -> None:
        if self.spread in OLD_SPREADS:
            was, recalled = OLD_SPREADS[self.spread]
            raise KtError(
                f"spread {self.spread!r} is no longer a name; did you mean {was.name}, which it was ({was.about}), "
                f"or {recalled.name} ({recalled.about})?"
            )


@dataclass(frozen=True)
class OwnOutputs(Config):
    """A residual of one module's own output that several layers write: PMET's and JEEP's."""

    searched: str = setting(
        "written",
        about="PMET, JEEP: where the search adds δ: written (wherever the write does, by its shares) or published (in "
        "the last layer alone; PMET's to attention as well)",
        source="PMET section 3 and JEEP eq. 8-12 have published; written: kt's own",
    )

    by_name: ClassVar[tuple[str, ...]] = ("searches_written",)

    @property
    def searches_written(self) -> bool:
        return one_of(self.searched, ("written", "published"), "searched") == "written"

    def searched_writes(self, writes: Iterable[Write]) -> tuple[Write, ...]:
        """The writes, with target sites as the setting has them."""
        return tuple(write.as_searched if self.searches_written else write for write in writes)


@dataclass(frozen=True)
class AttentionShare(Config):
    """An edit of W_o beside the MLP's, the two scaled α and 1 - α (IntAttn-Edit eq. 13)."""

    writes_attention = True

    layers_attn: tuple[int, ...] = setting(
        LATER,
        symbol="R_attn",
        about="layers whose attention output projection is written",
        unit="from 0",
        source="IntAttn-Edit section 5.1",
    )
    alpha: float | str | tuple[float, ...] = setting(
        "auto",
        symbol="α (eq. 12)",
        about="IntAttn-Edit: attention's share of the update; the MLP's is 1 - α",
        source="IntAttn-Edit eq. 12, 13",
        least=None,
    )
    joint_targets: bool = setting(
        False, about="IntAttn-Edit: search for both paths' values together", source="IntAttn-Edit leaves it open"
    )
    coupled: bool = setting(
        False, about="IntAttn-Edit: let the MLP path see the attention's write", source="IntAttn-Edit leaves it open"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for share in self.alpha if isinstance(self.alpha, tuple) else (self.alpha,):
            check_alpha(share)

    @property
    def traces_alpha(self) -> bool:
        return self.alpha in WORDS

    @property
    def fixed_alpha(self) -> float | None:
        return None if self.traces_alpha or isinstance(self.alpha, tuple) else float(self.alpha)

    @property
    def mean_alpha(self) -> float:
        return sum(self.share) / len(self.share) if isinstance(self.share, tuple) else self.share

    @property
    def share(self) -> Share:
        """α, which `resolve` has made a number."""
        if self.alpha in WORDS:
            raise KtError(f"alpha is still {self.alpha!r}; resolve the configuration first")
        return float(self.alpha) if isinstance(self.alpha, str) else self.alpha

    @property
    def mlp_share(self) -> Share:
        """1 - α (eq. 13)."""
        return tuple(1 - a for a in self.share) if isinstance(self.share, tuple) else 1 - self.share


def check_alpha(alpha: Any, name: str = "alpha", words: tuple[str, ...] = WORDS) -> float | str:
    """α as a number, or as one of `words`.

    Raises:
        KtError: it is neither (True and False are no numbers), or lies outside [0, 1].
    """
    if alpha in words:
        return str(alpha)
    try:
        value = float("nan") if isinstance(alpha, bool) else float(alpha)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if not 0 <= value <= 1:
        others = f"be {', '.join(words)}, or " if words else ""
        raise KtError(f"{name} {alpha!r} must {others}lie between 0 (MLP only) and 1 (attention only)")
    return value
