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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.data import complete_file, read_json, write_json
from .._util.kinds import takes
from .._util.notebook_bar import stage_or_bars
from .._util.progress import Stage
from ..errors import BadFile, KtError, NothingToWrite, warn_user
from ..report import Figure, Shown, Table
from ..runs.folder import FILES
from ..stats import Interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ..editing import Edit, EditSession
    from ..editing.method_names import MethodLike
    from ..editing.stack import EditStack
    from ..editing.verdict import Verdict
    from ..evaluation import Scores
    from ..evaluation.distributions import Distributions
    from ..facts.fact import Fact
    from ..facts.load import FactsLike
    from ..model.model import TracedModel


# The course of edits in steps: scores and weight norms by number of edits, as plain numbers, apart from any model.

MODES = ("batch", "single", "sequential")
EVALUATE = ("none", "end", "step")
KIND = "edit steps"
SHOWN = {
    "edit_success_tf_exact": "edit success",
    "paraphrase_tf_exact": "paraphrase",
    "neighbourhood_same_argmax": "locality",
    "portability_tf_exact": "portability",
}
"""The metrics of the figure, all between 0 and 1, and their panels."""
ASKED = {"neighbourhood_kl": "KL of neighbours (nats)"}
"""Metrics that are measured on request; they have no upper end."""


@dataclass(frozen=True)
class Step:
    """One solve: its requests, how many were edited by then, and each weight's norm over its norm before the first.

    `metrics` are of all requests so far (in single mode: of this one), where the step was scored.
    """

    number: int
    edits: int
    requests: tuple[str, ...]
    norm_ratios: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Steps(Shown):
    """The course of a run: plain numbers, apart from any model."""

    mode: str
    about: Mapping[str, Any]
    steps: tuple[Step, ...]

    kind = KIND

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Method, step size, seed."""
        return self.about

    @property
    def heading(self) -> str:
        """The title of its section."""
        return f"Edits in steps: {self.mode}"

    def tables(self) -> Sequence[Table]:
        """A row a step: the metrics of the figure, and the largest norm ratio over the weights."""
        names = SHOWN | ASKED
        measured = {name for step in self.steps for name in step.metrics or {}}
        shown = {name: title for name, title in names.items() if name in measured}
        rows = [
            [step.number, step.edits, *(Interval.of((step.metrics or {}).get(name)) for name in shown), _largest(step)]
            for step in self.steps
        ]
        return [Table(["step", "edits", *shown.values(), "largest norm ratio"], rows, only="page")]

    def figures(self) -> Sequence[Figure]:
        """Metrics and weight norms by number of edits."""
        says = "Requests so far under each step's weights; the largest weight norm, over that before the first edit."
        return [Figure(self.figure(), says, name="steps")]

    def figure(self) -> go.Figure:
        """Metrics and weight norms by number of edits."""
        name = str(self.about.get("label", self.about.get("method", "edit")))
        title = f"{self.steps[-1].edits} edits, {self.mode}"
        return steps_figure({name: self}, title, "all requests so far, teacher-forced")

    def to_dataframe(self) -> pd.DataFrame:
        """One row a step and metric; the weight norms as metrics named after their weight."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for step in self.steps:
            common = {"step": step.number, "edits": step.edits}
            for name, value in (step.metrics or {}).items():
                low, high = value["ci95"] or (None, None)
                rows.append(common | {"metric": name, "mean": value["mean"], "low": low, "high": high, "n": value["n"]})
            for name, ratio in step.norm_ratios.items():
                rows.append(common | {"metric": f"norm ratio of {name}", "mean": ratio})
        return pd.DataFrame(rows, columns=["step", "edits", "metric", "mean", "low", "high", "n"])

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"mode": self.mode, "about": dict(self.about), "steps": [asdict(step) for step in self.steps]}

    def save(self, path: str | Path) -> Path:
        """Write JSON."""
        return write_json(path, {"kind": KIND} | self.as_dict())

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Steps:
        """From what `as_dict` gave."""
        steps = (Step(**(step | {"requests": tuple(step["requests"])})) for step in content["steps"])
        return cls(content["mode"], content["about"], tuple(steps))

    @classmethod
    def load(cls, path: str | Path) -> Steps:
        """Read what `save` wrote.

        Raises:
            BadFile: it is something else.
        """
        content = read_json(path)
        if content.get("kind") != KIND:
            kind = content.get("kind") or "other JSON"
            raise BadFile(f"{path}: holds {kind}, expected {KIND}; give what a sequential kt apply-edit wrote")
        with complete_file(path, "course of edits", "run the edit again"):
            return cls.of(content)


def steps_figure(runs: Mapping[str, Steps], title: str, subtitle: str = "") -> go.Figure:
    """One line a run: metrics with 95% intervals, and the largest norm ratio over its weights, by number of edits."""
    from ..figures import steps_figure as draw

    return draw({name: _panels(run) for name, run in runs.items()}, title=title, subtitle=subtitle)


def _panels(run: Steps) -> dict[str, Any]:
    import numpy as np

    from ..figures import Series
    from ..figures.curves import NORM_RATIO

    panels = {}
    for name, panel in (SHOWN | ASKED).items():
        scored = [(step.edits, step.metrics[name]) for step in run.steps if step.metrics and name in step.metrics]
        if scored:
            mean, low, high, n = map(np.array, zip(*(Interval.of(metric) for _, metric in scored), strict=True))
            panels[panel] = Series(panel, [edits for edits, _ in scored], mean, low, high, n)
    largest = np.array([_largest(step) for step in run.steps])
    panels[NORM_RATIO] = Series(NORM_RATIO, [step.edits for step in run.steps], largest)
    return panels


def _largest(step: Step) -> float:
    """The largest norm ratio over the weights."""
    return max(step.norm_ratios.values(), default=1.0)


@dataclass
class EditRun(Shown):
    """The result of `run_edits`: the course, the edits (one a step that wrote), and the scores where asked for.

    `edit` is all of it as one edit of the unedited weights; None in single mode, where there is no such thing.
    `control` scores the MLP part alone of a joint edit, scaled as in it. `unwritten` are requests for which nothing was
    written (a warning says why); they are scored with the others.
    """

    steps: Steps
    edits: list[Edit]
    edit: Edit | None = None
    before: Scores | None = None
    after: Scores | None = None
    control: Scores | None = None
    requests: list[Fact] = field(default_factory=list)
    unwritten: list[Fact] = field(default_factory=list)

    kind = "edit run"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Method, step size, seed."""
        return self.steps.about

    @property
    def verdict(self) -> Verdict | None:
        """Of the model with all of it; in single mode of the edits side by side, with the worst perplexity."""
        from ..editing.verdict import Verdict

        if self.edit is not None:
            return self.edit.verdict
        whole = Verdict.joined([each.verdict for each in self.edits])
        return whole and whole.lacking([fact.subject for fact in self.unwritten])

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the edit (in single mode its weights' means over the edits), the course, the scores."""
        content = (self.edit or self.edits[0]).as_dict()
        if self.edit is None:
            content["deltas"] = _mean_deltas([edit.deltas() for edit in self.edits])
            content["requests"] = [request for edit in self.edits for request in edit.as_dict()["requests"]]
            content["verdict"] = self.verdict and self.verdict.as_dict()
        content["mode"] = self.steps.mode
        if len(self.steps.steps) > 1:
            content["steps"] = self.steps.as_dict()["steps"]
        for name in ("before", "after", "control"):
            if (scores := getattr(self, name)) is not None:
                content[name], content["protocol"] = scores.as_dict()["metrics"], scores.protocol
        return content

    def tables(self) -> Sequence[Table]:
        """The edit's tables (in single mode the requests alone); the scores where they were asked for."""
        from ..editing.edit import requests_table, verdict_tables
        from ..evaluation.scores import Comparison

        shown = [requests_table(self.edits), *verdict_tables(self.verdict)]
        if self.edit is not None:
            shown = list(self.edit.tables())
        if self.after is None:
            return shown
        scores = self.after if self.before is None else Comparison(self.before, self.after, self.control)
        return [*shown, *scores.tables()]

    def figures(self) -> Sequence[Figure]:
        """The course, in sequential mode."""
        return self.steps.figures() if self.steps.mode == "sequential" else ()

    @takes()
    def save(self, folder: str | Path, shown: str | Path | None = None) -> Path:
        """Write files for the classes' own `load`: the edit (in single mode a folder of them), the course, the scores.

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


def _mean_deltas(edits: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each weight's norms as means over the edits that write it, with how many those are."""
    means_of: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for deltas in edits for name in deltas):
        written = [deltas[name] for deltas in edits if name in deltas]
        means = {k: sum(d[k] for d in written) / len(written) for k in ("norm", "relative_norm", "norm_ratio")}
        rank, shape = max(d["rank"] for d in written), written[0]["shape"]
        means_of[name] = {"shape": shape, "rank": rank, **means, "n": len(written)}
    return means_of


@takes()
def run_edits(
    model: TracedModel,
    requests: FactsLike,
    mode: str = "batch",
    step_size: int = 1,
    evaluate: str = "end",
    generate: bool = False,
    label: str | None = None,
    stage: Stage | None = None,
    *,
    kl: bool = False,
    below: EditStack | None = None,
    method: MethodLike | None = None,
    **session: Any,
) -> EditRun:
    """Edit in a mode, and score.

    Args:
        model: the model to edit.
        requests: facts with a target, in the order in which they are edited.
        mode: batch, single or sequential (see the module).
        step_size: requests a step, in sequential mode.
        evaluate: none; end; or step, which in sequential mode also scores all requests so far after every step.
        generate: whether the scores at the end also rest on generated text.
        label: the run's name in figures.
        stage: opens a stage by name and gives the callback for its progress.
        kl: also neighbourhood_kl, nats: KL(unedited || edited) of the next token after the neighbourhood prompts. With
            `below`, "unedited" is the model with those edits in it, as it is for every score before and after.
        below: earlier edits that stand in the model while it is edited and scored, with their keys held.
        method: a method's name (see `kt ls methods`), or its configuration; `intattn` by default.
        session: the other arguments of `kt.edit` and `kt.EditSession` (alpha, keep_history, norm_guard, ...). With
            neither keep_history nor norm_guard, steps hold both where the method can, as 200 edits in sequence need
            (docs/methods-measured.md); `norm_guard=False` leaves them to the method.

    Returns:
        The edits, their course and their scores; the model holds its own bytes again.

    Raises:
        KtError: what `kt.edit` raises, an unknown mode, a step size below 1, or `kl` where nothing is scored.
        BadFact: `kl`, and no request has a neighbourhood prompt.
        NotEnoughMemory: `kl`, and the unedited model's distributions would not fit.

    Examples:
        >>> run = kt.run_edits(model, facts[:2], "single", method="ft", num_steps=2)
        >>> len(run.edits), run.after.metrics["edit_success_tf_exact"].n
        (2, 2)
    """
    from ..editing import EditSession
    from ..editing.config import one_of
    from ..editing.resolve import read_requests, without_contradictions
    from ..editing.session_on_edits import SessionOnEdits

    if method is not None:
        session["method"] = method
    one_of(mode, MODES, "mode")
    one_of(evaluate, EVALUATE, "evaluate")
    if step_size < 1:
        raise KtError(f"step_size {step_size} must be at least 1")
    if kl and evaluate == "none":
        raise KtError("kl is a score, and evaluate is none; give evaluate end or step")
    stage = stage_or_bars(stage)
    facts = read_requests(model, requests)
    size = {"batch": len(facts), "single": 1, "sequential": step_size}[mode]
    strict = session.get("strict", False)
    groups = [without_contradictions(facts[i : i + size], strict) for i in range(0, len(facts), size)]
    facts = [fact for group in groups for fact in group]  # copies are solved once, and each is scored
    if mode == "sequential" and all(session.get(name) is None for name in ("keep_history", "norm_guard")):
        session["hold"] = len(groups) > 1
    session["requests"] = facts
    session["check"] = len(groups) == 1 or mode == "single"  # in steps, the total is checked
    judge = _Judge(model, facts, session.get("seed", 0), generate, stage)
    run = _one_by_one if mode == "single" else _in_sequence
    with EditSession(model, **session) if below is None else SessionOnEdits(model, below, **session) as editor:
        if evaluate != "none":
            judge.score_before(kl)
        result = run(editor, groups, judge, evaluate, stage)
        about = {
            "label": label or editor.config.name,
            "method": editor.config.name,
            "step_size": size,
            "keep_history": editor.keeps_history,
            "norm_guard": editor.options.norm_guard or False,
            "seed": editor.seed,
        }
    steps = Steps(mode, about, tuple(result.steps))
    return EditRun(steps, result.edits, result.edit, judge.before, *result.scores, facts, result.unwritten)


class _Found(NamedTuple):
    """Result of a mode: steps, edits, the sum as one edit, and the scores under it and under its control."""

    steps: list[Step]
    edits: list[Edit]
    edit: Edit | None
    scores: tuple[Scores | None, Scores | None]
    unwritten: list[Fact]


class _Judge:
    """Scores requests under the weights as they stand, against the unedited model's."""

    def __init__(self, model: TracedModel, facts: Sequence[Fact], seed: int, generate: bool, stage: Stage) -> None:
        self.model, self.facts, self.seed, self.generate, self.stage = model, facts, seed, generate, stage
        self.before: Scores | None = None
        self.reference: Distributions | None = None

    def score_before(self, kl: bool) -> None:
        """Scores of the unedited model and, for KL, its distributions: these first, since they may not fit."""
        from ..evaluation import distributions

        reference = None
        if kl:
            with self.stage("the unedited model's distributions") as tick:
                reference = distributions(self.model, self.facts, progress=tick)
        self.before = self.score(self.facts, "before", self.generate)
        self.reference = reference

    def score(self, facts: Sequence[Fact], name: str, generate: bool) -> Scores:
        from ..evaluation import evaluate

        arguments: dict[str, Any] = {"before": self.before, "reference": self.reference, "seed": self.seed}
        with self.stage(name) as tick:
            return evaluate(self.model, facts, generate=generate, progress=tick, **arguments)

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
    edited, after = 0, None
    for number, group in enumerate(groups, start=1):
        last = number == len(groups)
        with stage(f"step {number} of {len(groups)}" if len(groups) > 1 else "solving") as tick:
            editor.progress = tick
            try:
                editor.edit(group)
                edited += len(editor.steps[-1].requests)
            except NothingToWrite as why:  # an edit of all steps but this one is still what was asked for
                if last and not editor.steps:
                    raise
                warn_user(f"step {number} writes nothing: {why}")
                editor.unwritten += group
        done += group
        metrics = None
        if when == "step" or (when == "end" and last):
            scores = judge.score(done, "after", judge.generate and last)
            metrics, after = scores.as_dict()["metrics"], scores if last else None
        steps.append(Step(number, edited, tuple(f.id for f in group), editor.norm_ratios(), metrics))
    whole = editor.steps[0] if len(groups) == 1 else editor.total()
    control = None
    if when != "none":
        with editor.unedited():
            control = judge.control(whole, done)
    return _Found(steps, list(editor.steps), whole, (after, control), editor.unwritten)


def _one_by_one(editor: EditSession, groups: list[list[Fact]], judge: _Judge, when: str, stage: Stage) -> _Found:
    from ..evaluation import Scores

    steps: list[Step] = []
    edits: list[Edit] = []
    unwritten: list[Fact] = []
    scores: list[Scores] = []
    controls: list[Scores] = []
    for number, group in enumerate(groups, start=1):
        with stage(f"edit {number} of {len(groups)}") as tick:
            editor.progress = tick
            edit = None
            try:
                edit = editor.edit(group)
                edits.append(edit)
            except NothingToWrite as why:  # scored all the same: the request was asked for, and did not take
                if number == len(groups) and not edits:
                    raise
                warn_user(f"edit {number} writes nothing: {why}")
                unwritten += group
        ratios, metrics = editor.norm_ratios(), None
        if when != "none":
            scores.append(judge.score(group, "after", judge.generate))
            metrics = scores[-1].as_dict()["metrics"]
        editor.revert()
        if edit is not None and when != "none" and (control := judge.control(edit, group)) is not None:
            controls.append(control)
        steps.append(Step(number, len(edits), (group[0].id,), ratios, metrics))
    joined = [Scores.joined(parts) if parts else None for parts in (scores, controls)]
    return _Found(steps, edits, None, (joined[0], joined[1]), unwritten)
