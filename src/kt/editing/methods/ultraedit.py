"""UltraEdit (Gu et al. 2025, arXiv 2505.14679): one backward pass and a ridge solve, normalised over the session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..config import AUTO, SQUARED, WRITTEN, Config, linear_maps, method, setting

if TYPE_CHECKING:
    from ..ultraedit import UltraEdit


@method("ultraedit", "UltraEdit: no search; one backward pass and a ridge solve, normalised over the session", place=10)
@dataclass(frozen=True)
class UltraEditConfig(Config):
    """See kt.editing.ultraedit for the formulas.

    The pairs stand where an answer is predicted, and there only the later layers' inputs tell subjects apart: `depth`
    is that of EasyEdit's file for GPT-J.
    """

    revision = 1  # layers beside a preset's shared ones

    depth = (18, 26, 27)

    lr: float | Literal["auto"] = setting(
        "auto",
        about="UltraEdit: step of the gradient",
        source="kt's own, ultraedit.automatic_rate",
        own=True,
        most=SQUARED,
    )
    L2: float | Literal["auto"] = setting(
        "auto",
        symbol="I",
        about="AlphaEdit, UltraEdit: factor of I in the solve",
        source="UltraEdit's code; the number: kt's own, closed_form.auto_ridge",
        own=True,
    )
    modules: str = setting(
        "auto",
        about=f"{WRITTEN}; auto: gate_proj and up_proj where the model has both, else mlp",
        source="UltraEdit's run.sh: gate and up in Llama-3, Qwen2.5, Gemma 3; down in GPT-J, Mistral, Phi-4",
    )
    shared_normaliser: bool = setting(
        True, about="UltraEdit: normalise all weights of a shape together", source="UltraEdit's code"
    )

    by_name = ("maps",)

    @property
    def maps(self) -> tuple[str, ...]:
        return () if self.modules == AUTO else linear_maps(self.modules, (AUTO,))

    def plan(self) -> UltraEdit:
        from ..ultraedit import UltraEdit

        return UltraEdit(self.layers_mlp, self.maps, lr=self.lr, ridge=self.L2, shared=self.shared_normaliser)
