"""The methods, each a declaration over `recipe.Path`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from ..errors import KtError
from ..sites import Kind, Site
from .aims import Aim, Objective, Position
from .recipe import Path, Recipe
from .solvers import LeastSquares, NullSpace, RankOne
from .spreads import SPREADS, Spread

if TYPE_CHECKING:
    from ..model import TracedModel


_TYPES = {"float": float, "int": int, "bool": bool, "str": str, "tuple": tuple}


@dataclass(frozen=True)
class HyperParameters:
    """What users of ROME and MEMIT know by these names, and the joint edits' own.

    Defaults are EasyEdit's MEMIT for 7B models; a method may bring its own (`Method.defaults`).
    """

    layers_mlp: tuple[int, ...] = ()
    layers_attn: tuple[int, ...] = ()
    layers_high: tuple[int, ...] = ()
    alpha: float = 0.0
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
    modules: str = "mlp"  # PMET: `mlp`, or `both` as its code can
    nullspace_threshold: float = 2e-2
    L2: float = 10.0
    clamp_norm_factor_high: float = 0.25
    v_weight_decay_high: float = 0.5
    min_loss: float = 0.9  # JEEP: a probability, despite its name in the original
    region: str = "both"  # JEEP's ablations: `both`, `low`, `high`
    separate_targets: bool = False  # JEEP's ablation: each region's δ searched for alone
    high_module: str = "mlp"  # JEEP's ablation `w/ MHSA in Step3`: `attn`

    def checked(self) -> HyperParameters:
        """Itself, or KtError where a value is of the wrong type or sign."""
        for spec in fields(self):
            value = getattr(self, spec.name)
            wanted = next((t for word, t in _TYPES.items() if str(spec.type).startswith(word)), None)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is None and "None" in str(spec.type):
                continue
            if wanted is not None and not (number if wanted is float else isinstance(value, wanted)):
                raise KtError(f"{spec.name} {value!r} is no {wanted.__name__}; see kt.editing.methods.HyperParameters")
            if number and not (math.isfinite(value) and value >= 0):
                raise KtError(f"{spec.name} {value!r} must be zero or more")
        if self.v_num_grad_steps < 1:
            raise KtError("v_num_grad_steps must be at least 1")
        return self

    @property
    def objective(self) -> Objective:
        return Objective(self.v_num_grad_steps, self.v_lr, self.v_weight_decay, self.kl_factor, self.clamp_norm_factor)

    @property
    def position(self) -> Position:
        return _choice(Position, self.fact_token, "fact_token")

    @property
    def spread_rule(self) -> Spread:
        if self.spread not in SPREADS:
            raise KtError(f"spread {self.spread!r} is unknown; choose one of {', '.join(SPREADS)}")
        return SPREADS[self.spread]

    @property
    def held(self) -> LeastSquares:
        return LeastSquares(self.mom2_update_weight)


def memit(hp: HyperParameters) -> Recipe:
    """MEMIT (Meng et al. 2023, eq. 14-20): aims at the residual stream after the last layer, writes every down_proj."""
    aim = Aim(Site(Kind.RESID, hp.layers_mlp[-1]), hp.position)
    return Recipe((Path(Kind.MLP, hp.layers_mlp, aim, hp.held, spread=hp.spread_rule),), hp.objective)


def intattn(hp: HyperParameters) -> Recipe:
    """IntAttn-Edit (arXiv 2510.27400, eq. 6-13): MEMIT on down_proj scaled by 1 - α, the same on W_o scaled by α.

    The paper leaves open which value the attention path aims at. The default is the residual stream after the last
    critical attention layer, searched for on its own, as MEMIT does for the MLP: every W_o below writes into it, so the
    spread of eq. 7 adds up. `attn_aim="attn"` takes the output of the last layer's W_o (v_attn of eq. 10), which W_o of
    lower layers can only reach through the attention between; docs/demo-edits.md measures both.
    """
    paths = []
    if hp.layers_attn and hp.alpha != 0:
        kind = Kind(_one_of(hp.attn_aim, (Kind.ATTN.value, Kind.RESID.value), "attn_aim"))
        site = Site(kind, hp.layers_attn[-1])
        weight = hp.mom2_update_weight if hp.mom2_update_weight_attn is None else hp.mom2_update_weight_attn
        aim = Aim(site, hp.position)
        paths.append(Path(Kind.ATTN, hp.layers_attn, aim, LeastSquares(weight), hp.alpha, hp.spread_rule))
    if hp.layers_mlp and hp.alpha != 1:
        mlp = memit(hp).paths[0]
        paths.append(replace(mlp, scale=1 - hp.alpha))
    return Recipe(tuple(paths), hp.objective, joint=hp.joint_targets, coupled=hp.coupled)


def rome(hp: HyperParameters) -> Recipe:
    """ROME (Meng et al. 2022, eq. 2): one layer, rank one, fact by fact.

    The direction takes the mean key over contexts, the denominator the bare prompt's, as the original code does.
    """
    return _rank_one(hp, RankOne(hp.mom2_adjustment), mean_value=False)


def r_rome(hp: HyperParameters) -> Recipe:
    """R-ROME (Gupta et al. 2024): ROME with the mean key (and mean value) in both places."""
    return _rank_one(hp, RankOne(hp.mom2_adjustment, same_key=True), mean_value=True)


def intattn_rome(hp: HyperParameters) -> Recipe:
    """IntAttn-Edit for ROME (supplement B.3): rank one on down_proj and on W_o, one layer each, scaled 1 - α and α."""
    solver = RankOne(hp.mom2_adjustment)
    paths = []
    if hp.layers_attn and hp.alpha != 0:
        layer = hp.layers_attn[-1]
        paths.append(Path(Kind.ATTN, (layer,), Aim(Site(Kind.ATTN, layer), hp.position), solver, hp.alpha))
    if hp.alpha != 1:
        paths.append(replace(rome(hp).paths[0], scale=1 - hp.alpha))
    return Recipe(tuple(paths), hp.objective, joint=hp.joint_targets, coupled=hp.coupled, one_by_one=True)


def _rank_one(hp: HyperParameters, solver: RankOne, mean_value: bool) -> Recipe:
    layer = hp.layers_mlp[-1]
    path = Path(Kind.MLP, (layer,), Aim(Site(Kind.MLP, layer), hp.position), solver, mean_value=mean_value)
    return Recipe((path,), hp.objective, one_by_one=True)


def pmet(hp: HyperParameters) -> Recipe:
    """PMET (Li et al. 2024): δ at the outputs of attention and MLP of the last layer, searched together.

    Only the MLP is written; `modules="both"` writes both, as the original code can.
    """
    layer = hp.layers_mlp[-1]
    mlp, attn = Aim(Site(Kind.MLP, layer), hp.position), Aim(Site(Kind.ATTN, layer), hp.position)
    both = _one_of(hp.modules, ("mlp", "both"), "modules") == "both"
    written = [(Kind.MLP, mlp)] + [(Kind.ATTN, attn)] * both
    paths = tuple(Path(kind, hp.layers_mlp, aim, hp.held, spread=hp.spread_rule) for kind, aim in written)
    return Recipe(paths, replace(hp.objective, argmax_discount=True), joint=True, also=() if both else (attn,))


def alphaedit(hp: HyperParameters) -> Recipe:
    """AlphaEdit (Fang et al. 2025): MEMIT's targets, written into the null space of the second moment."""
    path = memit(hp).paths[0]
    return Recipe((replace(path, solver=NullSpace(hp.nullspace_threshold, hp.L2)),), hp.objective)


def jeep(hp: HyperParameters) -> Recipe:
    """JEEP (eq. 8-12): MLP outputs at the low region's subject and at the high region's last prompt token, searched
    together; low is written first, with its residual spread by square roots, then high, evenly.

    The original code hooks the high δ at the attention's output but takes the residual at the MLP's; both are the MLP's
    here. Its stop rule is a probability.
    """
    high_kind = Kind.ATTN if _one_of(hp.high_module, ("mlp", "attn"), "high_module") == "attn" else Kind.MLP
    low = Aim(Site(Kind.MLP, hp.layers_mlp[-1]), Position.SUBJECT_LAST)
    high = Aim(
        Site(high_kind, hp.layers_high[-1]), Position.PROMPT_LAST, hp.clamp_norm_factor_high, hp.v_weight_decay_high
    )
    weight = hp.mom2_update_weight if hp.mom2_update_weight_high is None else hp.mom2_update_weight_high
    paths = {
        "low": Path(Kind.MLP, hp.layers_mlp, low, hp.held, spread=hp.spread_rule),
        "high": Path(high_kind, hp.layers_high, high, LeastSquares(weight)),
    }
    region = _one_of(hp.region, ("both", "low", "high"), "region")
    chosen = tuple(paths.values()) if region == "both" else (paths[region],)
    return Recipe(chosen, replace(hp.objective, stop_prob=hp.min_loss), joint=not hp.separate_targets, coupled=True)


@dataclass(frozen=True)
class Method:
    """A name, what it is, how its recipe follows from hyper-parameters, and which of these it sets itself."""

    recipe: Callable[[HyperParameters], Recipe]
    summary: str
    writes_attention: bool = False
    defaults: tuple[tuple[str, object], ...] = ()
    needs: tuple[str, ...] = ("layers_mlp",)


METHODS: dict[str, Method] = {
    "intattn": Method(
        intattn,
        "IntAttn-Edit: down_proj and W_o together, scaled 1 - α and α",
        True,
        needs=("layers_mlp", "layers_attn"),
    ),
    "memit": Method(memit, "MEMIT: down_proj over several layers, closed form"),
    "rome": Method(rome, "ROME: rank one on one down_proj, fact by fact"),
    "r-rome": Method(r_rome, "R-ROME: ROME with one key on both sides of the update"),
    "intattn-rome": Method(
        intattn_rome,
        "IntAttn-Edit for ROME: rank one on one down_proj and one W_o",
        True,
        needs=("layers_mlp", "layers_attn"),
    ),
    "pmet": Method(
        pmet,
        "PMET: attention and MLP targets together, down_proj written",
        defaults=(("spread", "sqrt"), ("v_weight_decay", 0.5)),
    ),
    "alphaedit": Method(alphaedit, "AlphaEdit: MEMIT inside the null space of the second moment"),
    "jeep": Method(
        jeep,
        "JEEP: low and high MLP regions, targets together",
        defaults=(("spread", "sqrt"), ("v_weight_decay", 0.5), ("v_num_grad_steps", 30)),
        needs=("layers_mlp", "layers_high"),
    ),
}


def method_named(name: str) -> Method:
    if name not in METHODS:
        raise KtError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def default_layers(model: TracedModel) -> dict[str, tuple[int, ...]]:
    """Layers by relative depth: those of the papers' models carried over.

    R_mlp = 4..8 and R_attn = 2..4 of 28 (Qwen2.5-7B, IntAttn-Edit); high 22..24 of 32 (LLaMA-7B, JEEP). Used only for a
    model with neither a preset nor layers of its own.
    """
    last = model.n_layers - 1
    spread = lambda low, high, of: tuple(range(round(low * last / of), round(high * last / of) + 1))  # noqa: E731
    return {"layers_mlp": spread(4, 8, 27), "layers_attn": spread(2, 4, 27), "layers_high": spread(22, 24, 31)}


def _choice(kind: type[Position], value: str, name: str) -> Position:
    try:
        return kind(value)
    except ValueError:
        raise KtError(f"{name} {value!r} is unknown; choose one of {', '.join(p.value for p in kind)}") from None


def _one_of(value: str, known: tuple[str, ...], name: str) -> str:
    if value not in known:
        raise KtError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
    return value
