"""Hyper-parameters of all methods, under the names that users of ROME and MEMIT know."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields

from ..errors import KtError
from .closed_form.aims import SPREADS, Objective, Position, Spread
from .closed_form.plan import Share
from .closed_form.solvers import LeastSquares

_TYPES = {"float": float, "int": int, "bool": bool, "str": str, "tuple": tuple}


@dataclass(frozen=True)
class HyperParameters:
    """What users of ROME and MEMIT know by these names, and the joint edits' own.

    Defaults are EasyEdit's MEMIT for 7B models; a method may bring its own (`Method.defaults`).
    """

    layers_mlp: tuple[int, ...] = ()
    layers_attn: tuple[int, ...] = ()
    layers_high: tuple[int, ...] = ()
    alpha: Share = 0.0  # one number, or one a request
    v_lr: float = 0.5
    v_num_grad_steps: int = 25
    v_weight_decay: float = 1e-3
    kl_factor: float = 0.0625
    clamp_norm_factor: float = 4.0
    mom2_update_weight: float = 15000.0
    mom2_update_weight_attn: float | None = None  # None: the same λ for both modules
    mom2_update_weight_high: float | None = None
    mom2_adjustment: bool = True
    fact_token: str = Position.SUBJECT_LAST.value
    spread: str = "even"
    attn_aim: str = "hidden"  # what attention is to produce: residual stream, or `attn` (the output of W_o)
    joint_targets: bool = False
    coupled: bool = False
    modules: str = "mlp"  # `mlp`, `both` (W_o too: PMET, fine-tuning, LoRA), `block` (fine-tuning: every weight of it)
    nullspace_threshold: float = 2e-2
    L2: float = 10.0
    clamp_norm_factor_high: float = 0.25
    v_weight_decay_high: float = 0.5
    min_loss: float = 0.9  # JEEP: a probability, despite its name in the original
    region: str = "both"  # JEEP's ablations: `both`, `low`, `high`, `joint-low`, `joint-high`
    separate_targets: bool = False  # JEEP's ablation: each region's δ searched for alone
    high_module: str = "mlp"  # JEEP's ablation `w/ MHSA in Step3`: `attn`
    emmet_lambda: float = 0.1
    shared_normaliser: bool = True  # UltraEdit: one for all weights of a shape, as its code has it
    num_steps: int = 25  # fine-tuning and LoRA, from here on
    lr: float = 5e-4
    weight_decay: float = 0.0
    norm_constraint: float | None = None  # FT-L: how far any weight may move
    objective_optimization: str = "prompt_last"  # or `target_new`: usual teacher forcing (FT-M)
    batch_size: int = 8
    stop_loss: float = 1e-2
    rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0

    def checked(self) -> HyperParameters:
        """Itself, or KtError where a value is of the wrong type or sign."""
        for spec in fields(self):
            value = getattr(self, spec.name)
            wanted = next((t for word, t in _TYPES.items() if str(spec.type).startswith(word)), None)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if spec.name == "alpha" or (value is None and "None" in str(spec.type)):
                continue
            if wanted is not None and not (number if wanted is float else isinstance(value, wanted)):
                raise KtError(f"{spec.name} {value!r} is no {wanted.__name__}; see kt.editing.hyper_parameters")
            if number and not (math.isfinite(value) and value >= 0):
                raise KtError(f"{spec.name} {value!r} must be zero or more")
        for name in ("v_num_grad_steps", "num_steps", "batch_size", "rank"):
            if getattr(self, name) < 1:
                raise KtError(f"{name} must be at least 1")
        return self

    @property
    def mean_alpha(self) -> float:
        return sum(self.alpha) / len(self.alpha) if isinstance(self.alpha, tuple) else self.alpha

    @property
    def mlp_share(self) -> Share:
        """1 - α (eq. 13)."""
        return tuple(1 - a for a in self.alpha) if isinstance(self.alpha, tuple) else 1 - self.alpha

    @property
    def objective(self) -> Objective:
        return Objective(self.v_num_grad_steps, self.v_lr, self.v_weight_decay, self.kl_factor, self.clamp_norm_factor)

    @property
    def position(self) -> Position:
        return Position(one_of(self.fact_token, [p.value for p in Position], "fact_token"))

    @property
    def spread_rule(self) -> Spread:
        return SPREADS[one_of(self.spread, SPREADS, "spread")]

    @property
    def held(self) -> LeastSquares:
        return LeastSquares(self.mom2_update_weight)


def one_of(value: str, known: Collection[str], name: str) -> str:
    """The value, or KtError that lists what is known."""
    if value not in known:
        raise KtError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
    return value
