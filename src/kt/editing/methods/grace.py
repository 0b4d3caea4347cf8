"""GRACE (Hartvigsen et al. 2023, arXiv 2211.11031): a codebook of keys, values and radii at one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...errors import KtError
from ..config import AUTO, LATER, SQUARED, Config, method, one_of, setting

if TYPE_CHECKING:
    from ..adapter_edit import Codebook


@method("grace", "GRACE: values at one down_proj, set where a key is met; the weights stay", place=19)
@dataclass(frozen=True)
class GRACE(Config):
    """Keys are read at the prompt's last token. Of several layers the last is taken."""

    effect: ClassVar[str] = "adapter"
    writes_contexts = False
    depth = (27, 27, 31)

    layers_mlp: tuple[int, ...] = setting(LATER, source="EasyEdit's appendix, table 5: 27 of Llama-2-7B, by depth")
    eps: float = setting(
        0.3,
        symbol="ε",
        about="GRACE: radius of a new key",
        unit="as eps_unit says",
        source="GRACE's deferral radius; the number: kt's own",
    )
    eps_unit: str = setting(
        "distance",
        about="GRACE: distance (the mean between keys of unrelated text) or absolute, as in the code",
        source="kt's own; the code is absolute, 1",
    )
    v_lr: float | Literal["auto"] = setting(
        AUTO,
        about="Adam's learning rate in the search for δ",
        source="auto: kt's own, from the value's elements; GRACE's code has 1",
        own=True,
        most=SQUARED,
    )
    v_num_grad_steps: int = setting(
        100,
        about="forward passes in the search for δ, one more than updates",
        source="GRACE's config",
        least=1,
        own=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.eps_unit, ("distance", "absolute"), "eps_unit")
        if self.eps == 0:
            raise KtError("eps 0 is a radius that no prompt but the request's own falls into; give one above 0")

    def plan(self) -> Codebook:
        from ..adapter_edit import Codebook
        from ..closed_form.objective import NLL, Objective, StopBelow
        from ..side_memory import Rule

        objective = Objective((NLL(), StopBelow()), self.v_num_grad_steps, self.v_lr)
        return Codebook(self.layers_mlp[-1], self.eps, self.eps_unit == "distance", objective, Rule(**self.rule))

    @property
    def rule(self) -> dict[str, Any]:
        """Fields of the rule by which entries are read."""
        return {}
