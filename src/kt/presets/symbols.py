"""What each hyper-parameter is called in the papers, and what it is; the one list of names that a preset may hold.

Symbols are those of the paper named, and IntAttn-Edit's (arXiv 2510.27400) where none is. JEEP (arXiv 2412.17872) marks
its high region with * and its low one with ′, which is left out here where other methods have the same value.
"""

from __future__ import annotations

from typing import NamedTuple


class Symbol(NamedTuple):
    """A hyper-parameter's symbol in the papers (– for none), what it is, and what it is counted in."""

    symbol: str
    about: str
    unit: str = ""

    @property
    def text(self) -> str:
        return f"{self.about} ({self.unit})" if self.unit else self.about


SYMBOLS: dict[str, Symbol] = {
    "layers_mlp": Symbol("R_mlp; l′..L′", "layers whose MLP output projection is written", "from 0"),
    "layers_attn": Symbol("R_attn", "layers whose attention output projection is written", "from 0"),
    "layers_high": Symbol("l*..L*", "JEEP's high region", "from 0"),
    "alpha": Symbol("α (eq. 12)", "IntAttn-Edit: attention's share of the update; the MLP's is 1 - α"),
    "v_lr": Symbol("–", "Adam's learning rate in the search for δ"),
    "v_num_grad_steps": Symbol("–", "forward passes in the search for δ, one more than updates"),
    "v_weight_decay": Symbol("β (JEEP eq. 11)", "weight of ‖δ‖ in the search", "of ‖δ‖/‖v‖², as the code has it"),
    "v_weight_decay_high": Symbol("β* (JEEP eq. 11)", "JEEP: the same in the high region", "of ‖δ‖/‖v‖²"),
    "kl_factor": Symbol("α′ (JEEP eq. 11)", "weight of the KL divergence at the subject's last token"),
    "clamp_norm_factor": Symbol("γ (JEEP eq. 12)", "largest ‖δ‖", "times ‖v‖"),
    "clamp_norm_factor_high": Symbol("γ* (JEEP eq. 12)", "JEEP: largest ‖δ‖ in the high region", "times ‖v‖"),
    "mom2_update_weight": Symbol("λ", "weight of what the layer already knows, C₀ = λ E[kkᵀ]", "keys"),
    "mom2_update_weight_attn": Symbol("λ of W_o", "IntAttn-Edit: λ of the attention path, where not the MLP's", "keys"),
    "mom2_update_weight_high": Symbol("λ*", "JEEP: λ in the high region", "keys"),
    "mom2_adjustment": Symbol("C⁻¹ (ROME eq. 2)", "ROME: whether the second moment enters the direction u = C⁻¹k"),
    "fact_token": Symbol("i′", "token whose keys and values are edited"),
    "spread": Symbol("1/(L-l+1)", "how the residual is divided among layers"),
    "attn_aim": Symbol("v_attn (eq. 10)", "IntAttn-Edit: what the attention path aims at"),
    "joint_targets": Symbol("–", "IntAttn-Edit: search for both paths' values together"),
    "coupled": Symbol("–", "IntAttn-Edit: let the MLP path see the attention's write"),
    "modules": Symbol("–", "weights of a layer that are written: mlp, both, block"),
    "nullspace_threshold": Symbol("P", "AlphaEdit: singular values of C below it span what P leaves free"),
    "L2": Symbol("I", "AlphaEdit, UltraEdit: factor of I in the solve"),
    "min_loss": Symbol("–", "JEEP: the search stops at this probability, despite the name"),
    "region": Symbol("–", "JEEP's ablation: both, low, high, joint-low, joint-high"),
    "separate_targets": Symbol("–", "JEEP's ablation: each region's δ searched for alone"),
    "high_module": Symbol("–", "JEEP's ablation: mlp or attn in the high region"),
    "emmet_lambda": Symbol("λ", "EMMET: added to the diagonal of KᵀC⁻¹K; the paper has none"),
    "num_steps": Symbol("–", "fine-tuning: passes over the requests"),
    "lr": Symbol("–", "fine-tuning: Adam's learning rate; UltraEdit: step of the gradient"),
    "weight_decay": Symbol("–", "fine-tuning: Adam's weight decay"),
    "norm_constraint": Symbol("ε", "FT-L: how far each weight may move, ‖ΔW‖∞ ≤ ε"),
    "objective_optimization": Symbol(
        "–", "fine-tuning: prompt_last (all target tokens at the prompt's end), target_new"
    ),
    "batch_size": Symbol("–", "fine-tuning: requests per gradient step"),
    "stop_loss": Symbol("–", "fine-tuning: a mean loss below it ends the training", "nats"),
    "shared_normaliser": Symbol("–", "UltraEdit: normalise all weights of a shape together"),
    "rank": Symbol("r", "LoRA: rank of the update"),
    "lora_alpha": Symbol("α", "LoRA: the update is scaled by α / r"),
    "lora_dropout": Symbol("–", "LoRA: share of its input that is dropped while training"),
}

METHOD_NAMES = (
    "intattn",
    "memit",
    "rome",
    "r-rome",
    "intattn-rome",
    "pmet",
    "alphaedit",
    "jeep",
    "emmet",
    "ultraedit",
    "ft",
    "ft-l",
    "ft-wd",
    "lora",
)
"""Listed here, too, so that reading a preset does not import the methods, and torch with them (a test compares)."""
