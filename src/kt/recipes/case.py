"""Recipes of a case: one record's edited, equivalent and unrelated prompt under several editors (JEEP, Table 1).

All facts of the recipe are edited, in one batch a method; only the record is asked. Edits are not kept: an interrupted
run is begun again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import KtError
from ..report import Table
from ..runs.folder import FILES
from .base import How, Keys, Kind
from .claims import NOTHING, Claim, Finding, Verdict, read_claims, tables
from .edited import TABLES, EditedRecipe, editable, read_edited, read_rows
from .result import MISSING, RecipeRun
from .values import refuse, text, whole

if TYPE_CHECKING:
    from ..experiments.case_study import CaseStudy, Reply
    from ..facts.fact import Fact
    from ..model.model import TracedModel


ROLES = ("edited", "equivalent", "unrelated")
CHECKS = {"all-right": Keys(("roles",), ("roles",)), "only-right": Keys(("row", "roles"), ("row", "roles"))}
MARKS = {True: "✓ ", False: "✗ ", None: ""}


class Quoted(NamedTuple):
    """The paper's text for a prompt, and whether it marks it as right."""

    text: str
    right: bool | None = None

    @classmethod
    def of(cls, where: str, key: str, content: Any) -> Quoted:
        """From a text, or a list of the text and whether it is right.

        Raises:
            BadFile: it is neither.
        """
        if isinstance(content, str):
            return cls(content)
        if not isinstance(content, list) or [type(part) for part in content] != [str, bool]:
            refuse(where, key, content, 'a text, or ["text", true or false] for whether it is right')
        return cls(*content)


@dataclass(frozen=True, kw_only=True)
class CaseRecipe(EditedRecipe):
    """`subject`: of the record that is shown, the first where None; `tokens`: of each continuation."""

    kind = "case"
    takes = frozenset({"corpus", "statistics"})

    subject: str | None
    tokens: int
    claims: tuple[Claim, ...]

    def smoked(self) -> CaseRecipe:
        return replace(super().smoked(), subject=None)


@dataclass(frozen=True)
class CaseRun(RecipeRun):
    """The case study of each model."""

    recipe: CaseRecipe
    found: Mapping[str, CaseStudy]
    verdicts: tuple[Verdict, ...]

    @property
    def n_facts(self) -> int:
        return self.recipe.edits

    def tables(self) -> Sequence[Table]:
        """The paper's table, ours and the paper's text in each cell; then the claims, each of one record."""
        head = ["model", "", "prompt", "expected", "unedited", *(line.label for line in self.recipe.rows)]
        legend = "each cell: ours (✓ holds the expected answer) | the paper's; one record, no interval"
        claims = tables(self.verdicts, "what the paper says of it", "one record carries no interval")
        rows = [line for label, study in self.found.items() for line in self._lines(label, study)]
        return [Table(head, rows, self.title, legend), *claims]

    def save(self, folder: Path) -> None:
        """The case studies, under the name that `kt report` reads, one folder a model."""
        for label, study in self.found.items():
            (folder / label).mkdir(parents=True, exist_ok=True)
            study.save(folder / label / FILES["case"])

    def held(self) -> dict[str, Any]:
        """`cases` as `kt case --json` has them, and in `cells` ours and the paper's text side by side."""
        cells = [cell for label, study in self.found.items() for cell in self._cells(label, study)]
        cases = {label: study.as_dict() for label, study in self.found.items()}
        return {"cells": cells, "cases": cases, "claims": [verdict.as_dict() for verdict in self.verdicts]}

    def _cells(self, label: str, study: CaseStudy) -> list[dict[str, Any]]:
        cells: list[dict[str, Any]] = []
        for i, question in enumerate(study.questions):
            for line in self.recipe.rows:
                ours = study.replies[line.label][i] if line.label in study.replies else None
                paper = _quoted(line.cited.get(label), question.role)
                cells.append(
                    {
                        "model": label,
                        "role": question.role,
                        "row": line.label,
                        "ours": None if ours is None else ours._asdict(),
                        "paper": None if paper is None else paper._asdict(),
                        "agrees": None if self.smoke or ours is None or paper is None else ours.right == paper.right,
                    }
                )
        return cells

    def _lines(self, label: str, study: CaseStudy) -> list[list[str]]:
        from .._util.text import visible
        from ..experiments.case_study import UNEDITED

        lines = []
        name = f"demo, not {label}" if self.smoke else label
        for i, question in enumerate(study.questions):
            shown = [_ours(study.replies[UNEDITED][i])]
            for line in self.recipe.rows:
                ours = _ours(study.replies[line.label][i]) if line.label in study.replies else MISSING
                paper = _quoted(line.cited.get(label), question.role)
                shown.append(ours if paper is None else f"{ours} | {MARKS[paper.right]}{paper.text}")
            expected = question.answers[0] if question.answers else "as unedited"
            lines.append([name, question.role, *map(visible, (question.prompt, expected, *shown))])
        return lines


def _quoted(cited: Sequence[Quoted] | None, role: str) -> Quoted | None:
    return None if cited is None else cited[ROLES.index(role)]


def _ours(reply: Reply) -> str:
    return MARKS[reply.right] + reply.text.strip()


def read(path: Path, content: Mapping[str, Any], shared: Mapping[str, Any]) -> CaseRecipe:
    case, edited = content.get("case", {}), read_edited(path, content, one_seed="a case is of one edit a method")
    rows = read_rows(path, content, len(ROLES), Quoted.of, what=f"texts for the {{}} prompts {', '.join(ROLES)}")
    claims = read_claims(path, content, CHECKS, {"roles": ROLES, "row": [line.label for line in rows]})
    return CaseRecipe(
        **shared,
        **edited,
        rows=rows,
        subject=None if "subject" not in case else text(path, "[case] subject", case["subject"]),
        tokens=whole(path, "[case] tokens", case.get("tokens", 12), 1),
        claims=claims,
    )


def run(recipe: CaseRecipe, how: How) -> CaseRun:
    """One case study a model."""
    used = recipe.smoked() if how.smoke else recipe
    facts = _with_record(used, how)
    studies = {label: _study(used, how, label, how.load(name), facts) for label, name in how.models.items()}
    verdicts = tuple(
        Verdict(how.shown(label), claim, check(study, claim), how.smoke)
        for label, study in studies.items()
        for claim in used.claims
    )
    return CaseRun(used, how.smoke, studies, verdicts)


def _with_record(recipe: CaseRecipe, how: How) -> list[Fact]:
    """The record that is shown, then as many others as the recipe edits beside it."""
    facts = editable(recipe, how)
    wanted = (recipe.subject or facts[0].subject).casefold()
    record = next((fact for fact in facts if fact.subject.casefold() == wanted), None)
    if record is None:
        raise KtError(
            f"recipe {recipe.name} shows the record of {recipe.subject!r}, which none of {len(facts)} facts is about; "
            "give the whole data with --facts"
        )
    chosen = [record, *(fact for fact in facts if fact is not record)]
    if len(chosen) < recipe.edits:
        raise KtError(f"recipe {recipe.name} edits {recipe.edits} facts, and there are {len(chosen)}; give more facts")
    return chosen[: recipe.edits]


def _study(recipe: CaseRecipe, how: How, label: str, model: TracedModel, facts: list[Fact]) -> CaseStudy:
    """One method at a time: edits of many facts are large."""
    from ..experiments.case_study import case_study
    from ..experiments.sweep_solving import Solver

    lines = [line for line in recipe.rows if line.method is not None]
    options = [recipe.options_of(line, how.smoke) for line in lines]
    solver = Solver(model, options, how.statistics, how.corpus or recipe.corpus, recipe.max_tokens)
    study = case_study(model, facts[0], {}, recipe.tokens)
    for line, method_options in zip(lines, options, strict=True):
        with how.stage(f"{label}: {line.label}") as tick:
            edit = solver.edit(facts, method_options, recipe.seeds[0], tick)
        one = case_study(model, facts[0], {line.label: edit}, recipe.tokens)
        study = replace(study, replies={**study.replies, line.label: one.replies[line.label]})
    return study


def check(study: CaseStudy, claim: Claim) -> Finding:
    """Whether the claimed methods' replies are right; there is no number, so the claim fails or holds by itself."""
    from ..experiments.case_study import UNEDITED

    roles = [i for i, question in enumerate(study.questions) if question.role in claim.about["roles"]]
    edited = [name for name in study.methods if name != UNEDITED]
    right = [name for name in edited if all(study.replies[name][i].right for i in roles)]
    words = " and ".join(claim.about["roles"])
    ours = f"right: {', '.join(right) or 'none'} of {', '.join(edited)}"
    wanted = edited if claim.check == "all-right" else [claim.about["row"]]
    rule = f"{words}: right are {'all methods' if claim.check == 'all-right' else f'{wanted[0]} and no other'}"
    if not roles or not edited:
        return Finding(rule, NOTHING, reason="the record has no such prompt")
    return Finding(rule, NOTHING._replace(mean=float(right == wanted), n=1), 0.5, ours=ours)


CASE = Kind(
    {
        "": Keys(("case", "statistics", "rows", "claims"), ("rows",)),
        "case": Keys(("subject", "tokens")),
        **TABLES,
    },
    read,
    run,
)
