"""`kt case`: one record under several edits, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from . import checks
from .command import BadOption
from .options import ChatOptions, FactOptions, ForceOptions, ModelOptions, Opt, RunOptions
from .session import open_edits, session

if TYPE_CHECKING:
    from ..facts.fact import Fact


@dataclass(frozen=True)
class CaseOptions(RunOptions, ForceOptions, FactOptions, ChatOptions, ModelOptions):
    edits: Annotated[
        str, Opt("--edits", metavar="NAME=FILE,...", help="Edits of kt apply-edit, each with the name to show.")
    ] = ""
    record: Annotated[str | None, Opt("--record", help="The record's id [default: the first].")] = None
    each: Annotated[int, Opt("--each", min=1, help="Paraphrases and neighbours to show, at most.")] = 1
    tokens: Annotated[int, Opt("--tokens", min=1, help="Tokens of each continuation.")] = 12


def case(options: CaseOptions) -> None:
    """Show what a model says about one record before and after each of several edits."""
    named = edit_files(options.edits)
    with session(options) as s:
        from ..experiments.case_study import case_study

        fact = chosen(s.load_facts(), options.record)
        edits, model = open_edits(s, named), s.load_model()
        study = case_study(model, fact, edits, options.tokens, options.each)
        study.save(s.run.file("case.json"))
        s.keep(study)
        s.screen.tables(*study.tables())


def chosen(facts: list[Fact], record: str | None) -> Fact:
    """The record of that id, or the first."""
    choice = facts[0] if record is None else next((fact for fact in facts if fact.id == record), None)
    if choice is None:
        raise BadOption(
            f"--record {record!r}: none of the {len(facts)} facts has that id; the first is {facts[0].id!r}"
        )
    return choice


def edit_files(text: str) -> dict[str, Path]:
    """`memit=a.safetensors,intattn=b.safetensors`; a file alone is shown by its name."""
    files: dict[str, Path] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, file = part.partition("=")
        path = Path(file if equals else name)
        name = name.strip() if equals else path.stem
        if not name or not path.name:
            raise BadOption(f"--edits {part!r}: write NAME=FILE, as memit=edit.safetensors")
        if name in files:
            raise BadOption(f"--edits: two edits are called {name!r}; give each its own name, as {name}2={path}")
        files[name] = path
    checks.edit_files(*files.values())
    return files
