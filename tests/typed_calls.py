"""Calls that type checkers accept, and such that they refuse. mypy reads this file with the sources (pyproject.toml),
and an `ignore` without an error is an error there. It is never run.
"""

from __future__ import annotations

import kt
from kt.editing.method_names import MethodName
from kt.editing.methods.memit import MEMIT


def accepted(model: kt.TracedModel, facts: list[kt.Fact], typed: str) -> None:
    kt.edit(model, facts)
    kt.edit(model, facts, "ft-l")
    kt.edit(model, facts, method="memit")
    kt.edit(model, facts, MEMIT(layers_mlp=(1,)))
    kt.edit(model, facts, MethodName("a method of one's own"))
    kt.edit(model, facts, MethodName(typed))
    kt.EditSession(model, "alphaedit")
    kt.EditSession(model, method="alphaedit", keep_history=True)
    kt.run_edits(model, facts, method="rome", alpha=0.3)
    kt.find_layers(model, facts, method="memit")
    kt.train_editor(model, facts, method="mend")


def refused(model: kt.TracedModel, facts: list[kt.Fact], typed: str) -> None:
    kt.edit(model, facts, "memti")  # type: ignore[arg-type]
    kt.edit(model, facts, method="memti")  # type: ignore[arg-type]
    kt.edit(model, facts, method="MEMIT")  # type: ignore[arg-type]
    kt.edit(model, facts, method=typed)  # type: ignore[arg-type]
    kt.EditSession(model, "memti")  # type: ignore[arg-type]
    kt.EditSession(model, method="memti")  # type: ignore[arg-type]
    kt.run_edits(model, facts, method="memti")  # type: ignore[arg-type]
    kt.find_layers(model, facts, method="memti")  # type: ignore[arg-type]
    kt.train_editor(model, facts, method="memit")  # type: ignore[arg-type]
