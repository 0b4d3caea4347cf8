"""The methods: each a declaration of what plan follows from its hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import KtError, install_hint
from ..model.sites import Kind, Site
from .adapter import Adapter
from .closed_form.aims import Position, TargetSite
from .closed_form.contexts import Contexts, memit_contexts, rome_contexts
from .closed_form.plan import LocateThenEdit, Write
from .closed_form.solvers import Equality, LeastSquares, NullSpace, RankOne
from .config import HyperParameters, one_of
from .fine_tune import FineTune
from .plan import Plan
from .ultraedit import UltraEdit

if TYPE_CHECKING:
    from ..model.model import TracedModel


REGIONS = ("both", "low", "high", "joint-low", "joint-high")
"""JEEP's regions and its ablations: one region alone, or both searched together and one of them written."""


def memit(hp: HyperParameters) -> LocateThenEdit:
    """MEMIT (Meng et al. 2023, eq. 14-20): aims at the residual stream after the last layer, writes every down_proj."""
    aim = TargetSite(Site(Kind.RESID, hp.layers_mlp[-1]), hp.position)
    return LocateThenEdit((Write(Kind.MLP, hp.layers_mlp, aim, hp.held, spread=hp.spread_rule),), hp.objective)


def intattn(hp: HyperParameters) -> LocateThenEdit:
    """IntAttn-Edit (arXiv 2510.27400, eq. 6-13): MEMIT on down_proj scaled by 1 - α, the same on W_o scaled by α.

    The paper leaves open which value the attention path aims at. The default is the residual stream after the last
    critical attention layer, searched for on its own, as MEMIT does for the MLP: every W_o below writes into it, so the
    spread of eq. 7 adds up. `attn_aim="attn"` takes the output of the last layer's W_o (v_attn of eq. 10), which W_o of
    lower layers can only reach through the attention between; docs/demo-edits.md measures both.
    """
    paths = []
    if hp.layers_attn and hp.alpha != 0:
        kind = Kind(one_of(hp.attn_aim, (Kind.ATTN.value, Kind.RESID.value), "attn_aim"))
        site = Site(kind, hp.layers_attn[-1])
        weight = hp.mom2_update_weight if hp.mom2_update_weight_attn is None else hp.mom2_update_weight_attn
        aim = TargetSite(site, hp.position)
        paths.append(Write(Kind.ATTN, hp.layers_attn, aim, LeastSquares(weight), hp.alpha, hp.spread_rule))
    if hp.layers_mlp and hp.alpha != 1:
        mlp = memit(hp).paths[0]
        paths.append(replace(mlp, scale=hp.mlp_share))
    return LocateThenEdit(tuple(paths), hp.objective, joint=hp.joint_targets, coupled=hp.coupled)


def rome(hp: HyperParameters) -> LocateThenEdit:
    """ROME (Meng et al. 2022, eq. 2): one layer, rank one, fact by fact.

    The direction takes the mean key over contexts, the denominator the bare prompt's, as the original code does.
    """
    return _rank_one(hp, RankOne(hp.mom2_adjustment), mean_value=False)


def r_rome(hp: HyperParameters) -> LocateThenEdit:
    """R-ROME (Gupta et al. 2024): ROME with the mean key (and mean value) in both places."""
    return _rank_one(hp, RankOne(hp.mom2_adjustment, same_key=True), mean_value=True)


def intattn_rome(hp: HyperParameters) -> LocateThenEdit:
    """IntAttn-Edit for ROME (supplement B.3): rank one on down_proj and on W_o, one layer each, scaled 1 - α and α."""
    solver = RankOne(hp.mom2_adjustment)
    paths = []
    if hp.layers_attn and hp.alpha != 0:
        layer = hp.layers_attn[-1]
        paths.append(Write(Kind.ATTN, (layer,), TargetSite(Site(Kind.ATTN, layer), hp.position), solver, hp.alpha))
    if hp.alpha != 1:
        paths.append(replace(rome(hp).paths[0], scale=hp.mlp_share))
    return LocateThenEdit(tuple(paths), hp.objective, joint=hp.joint_targets, coupled=hp.coupled, one_by_one=True)


def _rank_one(hp: HyperParameters, solver: RankOne, mean_value: bool) -> LocateThenEdit:
    layer = hp.layers_mlp[-1]
    path = Write(Kind.MLP, (layer,), TargetSite(Site(Kind.MLP, layer), hp.position), solver, mean_value=mean_value)
    return LocateThenEdit((path,), hp.objective, one_by_one=True)


def pmet(hp: HyperParameters) -> LocateThenEdit:
    """PMET (Li et al. 2024): δ at the outputs of attention and MLP of the last layer, searched together.

    Only the MLP is written; `modules="both"` writes both, as the original code can.
    """
    layer = hp.layers_mlp[-1]
    mlp, attn = TargetSite(Site(Kind.MLP, layer), hp.position), TargetSite(Site(Kind.ATTN, layer), hp.position)
    both = one_of(hp.modules, ("mlp", "both"), "modules") == "both"
    written = [(Kind.MLP, mlp)] + [(Kind.ATTN, attn)] * both
    paths = tuple(Write(kind, hp.layers_mlp, aim, hp.held, spread=hp.spread_rule) for kind, aim in written)
    return LocateThenEdit(paths, replace(hp.objective, argmax_discount=True), joint=True, also=() if both else (attn,))


def alphaedit(hp: HyperParameters) -> LocateThenEdit:
    """AlphaEdit (Fang et al. 2025): MEMIT's targets, written into the null space of the second moment."""
    path = memit(hp).paths[0]
    return LocateThenEdit((replace(path, solver=NullSpace(hp.nullspace_threshold, hp.L2)),), hp.objective)


def emmet(hp: HyperParameters) -> LocateThenEdit:
    """EMMET (Gupta et al. 2024, "A Unified Framework for Model Editing"): MEMIT's targets, memorised exactly.

    Of all updates that give every key its value, the one that moves what C holds least (`emmet_lambda=0`, the paper's).
    For more than one fact the code adds `emmet_lambda` to the diagonal of KᵀC⁻¹K: that is MEMIT's update with
    λ = emmet_lambda · mom2_update_weight.
    """
    path = memit(hp).paths[0]
    return LocateThenEdit((replace(path, solver=Equality(hp.mom2_update_weight, hp.emmet_lambda)),), hp.objective)


def jeep(hp: HyperParameters) -> LocateThenEdit:
    """JEEP (eq. 8-12): MLP outputs at the low region's subject and at the high region's last prompt token, searched
    together; low is written first, with its residual spread by square roots, then high, evenly.

    The original code hooks the high δ at the attention's output but takes the residual at the MLP's; both are the MLP's
    here. Its stop rule is a probability.

    Of Table 4's ablations, `region` has four: `low` and `high` search for one value and write it (w/o δ* & Step3, w/o
    δ' & Step2); `joint-low` and `joint-high` search for both together and write one (w/o Step3, w/o Step2).

    Raises:
        KtError: an unknown region or high module, or a joint region with `separate_targets`.
    """
    high_kind = Kind.ATTN if one_of(hp.high_module, ("mlp", "attn"), "high_module") == "attn" else Kind.MLP
    low = TargetSite(Site(Kind.MLP, hp.layers_mlp[-1]), Position.SUBJECT_LAST)
    high = TargetSite(
        Site(high_kind, hp.layers_high[-1]), Position.PROMPT_LAST, hp.clamp_norm_factor_high, hp.v_weight_decay_high
    )
    weight = hp.mom2_update_weight if hp.mom2_update_weight_high is None else hp.mom2_update_weight_high
    paths = {
        "low": Write(Kind.MLP, hp.layers_mlp, low, hp.held, spread=hp.spread_rule),
        "high": Write(high_kind, hp.layers_high, high, LeastSquares(weight)),
    }
    region = one_of(hp.region, REGIONS, "region")
    written = region.removeprefix("joint-")
    if written != region and hp.separate_targets:
        raise KtError(f"region {region} searches for both together; leave separate_targets out, or use {written}")
    chosen = tuple(path for name, path in paths.items() if written in ("both", name))
    also = tuple(path.aim for name, path in paths.items() if written != region and name != written)
    objective = replace(hp.objective, stop_prob=hp.min_loss)
    return LocateThenEdit(chosen, objective, joint=not hp.separate_targets, also=also, coupled=True)


def ultraedit(hp: HyperParameters) -> UltraEdit:
    """UltraEdit (Gu et al. 2025): one backward pass, keys and gradients normalised over the session, a ridge solve."""
    return UltraEdit(hp.layers_mlp, _kinds(hp), lr=hp.lr, ridge=hp.L2, shared=hp.shared_normaliser)


def ft(hp: HyperParameters) -> FineTune:
    """FT: Adam on the chosen layers' weights, as EasyEdit does it."""
    return FineTune(
        hp.layers_mlp,
        hp.modules,
        hp.objective_optimization,
        num_steps=hp.num_steps,
        lr=hp.lr,
        weight_decay=hp.weight_decay,
        norm_constraint=hp.norm_constraint,
        batch_size=hp.batch_size,
        stop_loss=hp.stop_loss,
    )


def lora(hp: HyperParameters) -> FineTune:
    """LoRA (Hu et al. 2022) through peft, on the weights that the other methods write, with teacher forcing."""
    return replace(ft(hp), norm_constraint=None, adapter=Adapter(hp.rank, hp.lora_alpha, hp.lora_dropout))


def _kinds(hp: HyperParameters) -> tuple[Kind, ...]:
    both = one_of(hp.modules, ("mlp", "both"), "modules") == "both"
    return (Kind.ATTN, Kind.MLP) if both else (Kind.MLP,)


@dataclass(frozen=True)
class Method:
    """What it is, how its plan follows from hyper-parameters, and which of these it sets itself."""

    recipe: Callable[[HyperParameters], Plan]
    summary: str
    writes_attention: bool = False
    keeps_history: bool = False  # by default, between the edits of a session
    contexts: Callable[[TracedModel, int], Contexts] = memit_contexts
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
    "rome": Method(rome, "ROME: rank one on one down_proj, fact by fact", contexts=rome_contexts),
    "r-rome": Method(r_rome, "R-ROME: ROME with one key on both sides of the update", contexts=rome_contexts),
    "intattn-rome": Method(
        intattn_rome,
        "IntAttn-Edit for ROME: rank one on one down_proj and one W_o",
        True,
        needs=("layers_mlp", "layers_attn"),
        contexts=rome_contexts,
    ),
    "pmet": Method(
        pmet,
        "PMET: attention and MLP targets together, down_proj written",
        defaults=(("spread", "sqrt"), ("v_weight_decay", 0.5)),
    ),
    "alphaedit": Method(alphaedit, "AlphaEdit: MEMIT inside the null space of the second moment", keeps_history=True),
    "emmet": Method(
        emmet,
        "EMMET: MEMIT with equality constraints: every key takes its value exactly",
        defaults=(("mom2_update_weight", 1.0),),
    ),
    "jeep": Method(
        jeep,
        "JEEP: low and high MLP regions, targets together",
        defaults=(("spread", "sqrt"), ("v_weight_decay", 0.5), ("v_num_grad_steps", 30)),
        needs=("layers_mlp", "layers_high"),
    ),
    "ultraedit": Method(
        ultraedit,
        "UltraEdit: no search; one backward pass and a ridge solve, normalised over the session",
        defaults=(("lr", 1e-6), ("L2", 1.0)),
    ),
    "ft": Method(ft, "FT: Adam on the weights of chosen layers"),
    "ft-l": Method(
        ft,
        "FT-L: FT that keeps every weight within norm_constraint of where it was",
        defaults=(("norm_constraint", 5e-4),),
    ),
    "ft-wd": Method(
        ft,
        "FT-WD: FT of every weight of a block, with weight decay",
        defaults=(("modules", "block"), ("lr", 5e-5), ("weight_decay", 1e-3), ("objective_optimization", "target_new")),
    ),
    "lora": Method(
        lora,
        f"LoRA: a low-rank adapter trained through peft ({install_hint('lora')})",
        defaults=(("lr", 5e-3), ("num_steps", 30), ("stop_loss", 0.0), ("objective_optimization", "target_new")),
    ),
}


def method_named(name: str) -> Method:
    return METHODS[one_of(name, METHODS, "method")]


def default_layers(model: TracedModel) -> dict[str, tuple[int, ...]]:
    """Layers by relative depth: those of the papers' models carried over.

    R_mlp = 4..8 and R_attn = 2..4 of 28 (Qwen2.5-7B, IntAttn-Edit); high 22..24 of 32 (LLaMA-7B, JEEP). Used only for a
    model with neither a preset nor layers of its own.
    """
    last = model.n_layers - 1
    spread = lambda low, high, of: tuple(range(round(low * last / of), round(high * last / of) + 1))  # noqa: E731
    return {"layers_mlp": spread(4, 8, 27), "layers_attn": spread(2, 4, 27), "layers_high": spread(22, 24, 31)}
