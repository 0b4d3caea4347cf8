"""Edits in one of three modes, scored as they go (EasyEdit's appendix, eq. 1-3).

With θ the unedited weights, Δ(θ; S) the update that a method solves for requests S on weights θ:

    batch        θ' = θ + Δ(θ; {1..N})                                 scored under θ'                     (eq. 2)
    single       θ'_e = θ + Δ(θ; {e}) for every request e              e scored under its own θ'_e         (eq. 1)
    sequential   θ_t = θ_{t-1} + Δ(θ_{t-1}; S_t), S_t the t-th group   all so far scored under θ_t,
                 of `step_size` requests                               or all under the last θ_T           (eq. 3)

The model holds its own bytes again when the run is over, also after an exception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .edit_steps import EVALUATE, MODES, Step, Steps
from .editing import Edit, EditSession
from .editing.history import SessionOnEdits
from .editing.hyper_parameters import one_of
from .editing.prepare import read_requests, refuse_contradictions
from .editing.stack import EditStack
from .errors import KtError
from .evaluation import Scores, distributions, evaluate
from .evaluation.distributions import Distributions
from .facts.fact import Fact
from .model import TracedModel
from .progress import Stage
from .run_folder import FILES


@dataclass
class EditRun:
    """What `run_edits` returns: the course, the edits (one a step), and the scores where they were asked for.

    `edit` is all of it as one edit of the unedited weights; None in single mode, where there is no such thing.
    `control` scores the MLP part alone of a joint edit, scaled as in it.
    """

    steps: Steps
    edits: list[Edit]
    edit: Edit | None = None
    before: Scores | None = None
    after: Scores | None = None
    control: Scores | None = None
    requests: list[Fact] = field(default_factory=list)

    def save(self, folder: str | Path, shown: str | Path | None = None) -> Path:
        """Files that their own classes read: the edit (in single mode a folder of them), the course, the scores.

        Returns where the edit is, as if the folder were called `shown`.
        """
        folder = Path(folder)
        name = Path(FILES["edit"]) if self.edit is not None else Path("edits")
        if self.edit is not None:
            self.edit.save(folder / name)
        else:
            (folder / name).mkdir(exist_ok=True)
            for number, edit in enumerate(self.edits, start=1):
                edit.save(folder / name / f"{number:04d}.safetensors")
        if self.steps.mode == "sequential":
            self.steps.save(folder / FILES["steps"])
        for part in ("before", "after", "control"):
            if (scores := getattr(self, part)) is not None:
                scores.save(folder / FILES[part])
        return Path(shown or folder) / name


def run_edits(
    model: TracedModel,
    requests: Sequence[Fact | Mapping[str, Any]],
    mode: str = "batch",
    step_size: int = 1,
    evaluate: str = "end",
    generate: bool = False,
    label: str | None = None,
    stage: Stage | None = None,
    *,
    kl: bool = False,
    below: EditStack | None = None,
    **session: Any,
) -> EditRun:
    """Edit in a mode, and score.

    Args:
        mode: batch, single or sequential (see the module).
        step_size: requests a step, in sequential mode.
        evaluate: none; end; or step, which in sequential mode also scores all requests so far after every step.
        generate: whether the scores at the end also rest on generated text.
        label: the run's name in figures.
        stage: opens a stage by name and gives what to report its progress to.
        kl: also neighbourhood_kl, nats: KL(unedited || edited) of the next token after the neighbourhood prompts. With
            `below`, "unedited" is the model with those edits in it, as it is for every score before and after.
        below: earlier edits that stand in the model while it is edited and scored, with their keys held.
        session: the arguments of `kt.edit` and `kt.EditSession` (method, alpha, keep_history, norm_guard, ...).

    Raises:
        KtError: what `kt.edit` raises, an unknown mode, a step size below 1, or `kl` where nothing is scored.
        BadFact: `kl`, and no request has a neighbourhood prompt.
        NotEnoughMemory: `kl`, and the unedited model's distributions would not fit.
    """
    one_of(mode, MODES, "mode")
    one_of(evaluate, EVALUATE, "evaluate")
    if step_size < 1:
        raise KtError(f"step_size {step_size} must be at least 1")
    if kl and evaluate == "none":
        raise KtError("kl is a score, and evaluate is none; give evaluate end or step")
    stage = stage or (lambda what: nullcontext())
    facts = read_requests(model, requests)
    if mode == "batch":
        refuse_contradictions(facts)
    size = {"batch": len(facts), "single": 1, "sequential": step_size}[mode]
    groups = [facts[i : i + size] for i in range(0, len(facts), size)]
    session["alpha_facts"] = session.get("alpha_facts") or facts
    judge = _Judge(model, facts, session.get("seed", 0), generate, stage)
    run = _one_by_one if mode == "single" else _in_sequence
    with EditSession(model, **session) if below is None else SessionOnEdits(model, below, facts, **session) as editor:
        if evaluate != "none":
            judge.score_before(kl)
        found = run(editor, groups, judge, evaluate, stage)
        about = {
            "label": label or editor.asked.name,
            "method": editor.asked.name,
            "step_size": size,
            "keep_history": editor.keeps_history,
            "norm_guard": editor.norm_guard,
            "seed": editor.seed,
        }
    return EditRun(Steps(mode, about, tuple(found.steps)), found.edits, found.edit, judge.before, *found.scores, facts)


class _Found(NamedTuple):
    """What a mode gives: steps, edits, the whole as one edit, and the scores under it and under its control."""

    steps: list[Step]
    edits: list[Edit]
    edit: Edit | None
    scores: tuple[Scores | None, Scores | None]


class _Judge:
    """Scores requests under the weights as they stand, against the unedited model's."""

    def __init__(self, model: TracedModel, facts: Sequence[Fact], seed: int, generate: bool, stage: Stage) -> None:
        self.model, self.facts, self.seed, self.generate, self.stage = model, facts, seed, generate, stage
        self.before: Scores | None = None
        self.reference: Distributions | None = None

    def score_before(self, kl: bool) -> None:
        """Scores of the unedited model and, for KL, its distributions: these first, since they may not fit."""
        reference = None
        if kl:
            with self.stage("the unedited model's distributions") as tick:
                reference = distributions(self.model, self.facts, progress=tick)
        self.before = self.score(self.facts, "before", self.generate)
        self.reference = reference

    def score(self, facts: Sequence[Fact], name: str, generate: bool) -> Scores:
        asked: dict[str, Any] = {"before": self.before, "reference": self.reference, "seed": self.seed}
        with self.stage(name) as tick:
            return evaluate(self.model, facts, generate=generate, progress=tick, **asked)

    def control(self, edit: Edit, facts: Sequence[Fact]) -> Scores | None:
        """Scores with the edit's control in the place of the edit, on unedited weights."""
        control = edit.control()
        if control is None:
            return None
        with control.applied(self.model):
            return self.score(facts, "control", self.generate)


def _in_sequence(editor: EditSession, groups: list[list[Fact]], judge: _Judge, when: str, stage: Stage) -> _Found:
    """Batch mode is a sequence of one."""
    steps: list[Step] = []
    done: list[Fact] = []
    after = None
    for number, group in enumerate(groups, start=1):
        last = number == len(groups)
        with stage(f"step {number} of {len(groups)}" if len(groups) > 1 else "solving") as tick:
            editor.progress = tick
            editor.edit(group)
        done += group
        metrics = None
        if when == "step" or (when == "end" and last):
            scores = judge.score(done, "after", judge.generate and last)
            metrics, after = scores.as_dict()["metrics"], scores if last else None
        steps.append(Step(number, len(done), tuple(f.id for f in group), editor.norm_ratios(), metrics))
    whole = editor.steps[0] if len(groups) == 1 else editor.total()
    control = None
    if when != "none":
        with editor.unedited():
            control = judge.control(whole, done)
    return _Found(steps, list(editor.steps), whole, (after, control))


def _one_by_one(editor: EditSession, groups: list[list[Fact]], judge: _Judge, when: str, stage: Stage) -> _Found:
    steps, edits = [], []
    scores: list[Scores] = []
    controls: list[Scores] = []
    for number, group in enumerate(groups, start=1):
        with stage(f"edit {number} of {len(groups)}") as tick:
            editor.progress = tick
            edit = editor.edit(group)
        ratios, metrics = editor.norm_ratios(), None
        if when != "none":
            scores.append(judge.score(group, "after", judge.generate))
            metrics = scores[-1].as_dict()["metrics"]
        editor.revert()
        if when != "none" and (control := judge.control(edit, group)) is not None:
            controls.append(control)
        edits.append(edit)
        steps.append(Step(number, number, (group[0].id,), ratios, metrics))
    joined = [Scores.joined(parts) if parts else None for parts in (scores, controls)]
    return _Found(steps, edits, None, (joined[0], joined[1]))
