"""The methods, each a declaration over `recipe.Path`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import KtError
from ..sites import Kind, Site
from .keys import Position
from .recipe import Path, Recipe
from .values import Objective

if TYPE_CHECKING:
    from ..model import TracedModel


@dataclass(frozen=True)
class HyperParameters:
    """What users of MEMIT know by these names, and the joint edit's own. Defaults are EasyEdit's MEMIT for 7B models."""

    layers_mlp: tuple[int, ...] = ()
    layers_attn: tuple[int, ...] = ()
    alpha: float = 0.0
    v_lr: float = 0.5
    v_num_grad_steps: int = 25
    v_weight_decay: float = 1e-3
    kl_factor: float = 0.0625
    clamp_norm_factor: float = 4.0
    mom2_update_weight: float = 15000.0
    mom2_update_weight_attn: float | None = None  # None: the same λ for both modules
    fact_token: str = Position.SUBJECT_LAST.value
    attn_aim: str = (
        "attn"  # the value that attention is to produce: `attn` (output of W_o) or `hidden` (residual stream)
    )
    joint_targets: bool = False
    coupled: bool = False

    @property
    def objective(self) -> Objective:
        return Objective(self.v_num_grad_steps, self.v_lr, self.v_weight_decay, self.kl_factor, self.clamp_norm_factor)

    @property
    def position(self) -> Position:
        try:
            return Position(self.fact_token)
        except ValueError:
            known = ", ".join(p.value for p in Position)
            raise KtError(f"fact_token {self.fact_token!r} is unknown; choose one of {known}") from None


def memit(hp: HyperParameters) -> Recipe:
    """MEMIT (Meng et al. 2023): the residual stream after the last layer is aimed at, down_proj of all is written."""
    return intattn(replace(hp, layers_attn=(), alpha=0.0))


def intattn(hp: HyperParameters) -> Recipe:
    """IntAttn-Edit (arXiv 2510.27400, eq. 6-13): MEMIT on down_proj scaled by 1 - α, the same on W_o scaled by α.

    The paper leaves open which value the attention path aims at; the default is the output of W_o at the last
    critical attention layer (its v_attn, eq. 10), searched for on its own.
    """
    paths = []
    if hp.layers_attn and hp.alpha != 0:
        aim = Site(Kind.ATTN if hp.attn_aim == "attn" else Kind.RESID, hp.layers_attn[-1])
        weight = hp.mom2_update_weight if hp.mom2_update_weight_attn is None else hp.mom2_update_weight_attn
        paths.append(Path(Kind.ATTN, hp.layers_attn, aim, hp.alpha, weight, position=hp.position))
    if hp.layers_mlp and hp.alpha != 1:
        aim = Site(Kind.RESID, hp.layers_mlp[-1])
        paths.append(Path(Kind.MLP, hp.layers_mlp, aim, 1 - hp.alpha, hp.mom2_update_weight, position=hp.position))
    return Recipe(tuple(paths), hp.objective, hp.joint_targets, hp.coupled)


@dataclass(frozen=True)
class Method:
    """A name, what it is, and how its recipe follows from hyper-parameters."""

    recipe: Callable[[HyperParameters], Recipe]
    summary: str
    writes_attention: bool


METHODS: dict[str, Method] = {
    "intattn": Method(intattn, "IntAttn-Edit: down_proj and W_o together, scaled 1 - α and α", True),
    "memit": Method(memit, "MEMIT: down_proj over several layers, closed form", False),
}


def method_named(name: str) -> Method:
    if name not in METHODS:
        raise KtError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def default_layers(model: TracedModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(MLP layers, attention layers) by relative depth: those of the paper's Qwen2.5-7B (28 blocks) carried over.

    R_mlp = 4..8 and R_attn = 2..4 there; used only for a model with neither a preset nor layers of its own.
    """
    scale = (model.n_layers - 1) / 27
    spread = lambda low, high: tuple(range(round(low * scale), round(high * scale) + 1))  # noqa: E731
    return spread(4, 8), spread(2, 4)
