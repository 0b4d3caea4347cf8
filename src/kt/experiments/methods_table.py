"""Methods side by side: one fact at a time, in batches and in steps; with what they cost, and paired differences.

    single    each of the first `singles` facts edited by itself, on the unedited model
    batch     the first n facts in one solve
    steps     the first n facts in groups, each solved on the model as the groups before left it

Every row is kept when it is measured, in a folder of its method's own, and so are the values that were searched for: a
run that was cut goes on there, and so does one that asks for more methods.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.data import plain
from .._util.lock import default_cache
from .._util.notebook_bar import stage_or_bars
from .._util.progress import Stage
from .._util.text import slug, without_folders
from ..errors import BadFile, KtError
from ..evaluation import Scores, evaluate
from ..evaluation.cached import evaluate_cached
from ..evaluation.perplexity import heldout_corpus
from ..facts.fact import Fact
from ..report import Shown, Table
from ..runs.provenance import peaks_from_now
from ..stats import Interval, paired_bootstrap_difference
from . import sweep_result
from .grids import Point
from .shared_targets import SEARCHED, SharedTargets
from .sweep import identity_of
from .sweep_result import Kept, Row
from .sweep_solving import Solver

if TYPE_CHECKING:
    from ..editing import Edit
    from ..model.model import TracedModel

SHOWN = sweep_result.SHOWN | {"perplexity": sweep_result.ASKED["perplexity"]}
"""The columns, and the metric behind each: teacher-forced, every token right; fluency of generated text; perplexity of
held-out text, whose intervals are over documents."""
PAIRED = ("edit success", "paraphrase", "locality", "portability")
UNEDITED = "unedited"


class Place(NamedTuple):
    """A column of the experiment: a mode (see the module) and the number of edits."""

    mode: str
    edits: int

    @property
    def label(self) -> str:
        return f"{self.edits} in steps" if self.mode == "steps" else str(self.edits)


@dataclass(frozen=True)
class MethodsTable(Shown):
    """The rows of methods at places; `before` is the unedited model's metrics, `against` the methods that others are
    compared with. A method that could not be run has a row with its reason in `settings["failed"]`."""

    about: Mapping[str, Any]
    rows: tuple[Row, ...]
    before: Mapping[str, Mapping[str, Any]]
    against: tuple[str, ...] = ()

    kind = "methods"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The model, the facts, the places."""
        return self.about

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that could not be run."""
        return tuple(row for row in self.rows if _failed(row))

    def __repr__(self) -> str:
        methods = ", ".join(dict.fromkeys(row.series for row in self.rows))
        return f"MethodsTable({without_folders(self.about['model'])}: {methods}; {self.about['n_facts']} facts)"

    def difference(self, row: Row, other: str) -> dict[str, Interval]:
        """The row less that of another method at the same place, by column, over the records that both have; with a
        paired bootstrap interval. Empty where one of them has no scores."""
        mine = next((r for r in self.rows if (r.series, r.label) == (other, row.label)), None)
        if mine is None:
            return {}
        found = {}
        for column in PAIRED:
            one, two = (each.values.get(SHOWN[column], {}) for each in (row, mine))
            if shared := [record for record in one if record in two]:
                found[column] = paired_bootstrap_difference([one[r] for r in shared], [two[r] for r in shared])
        return found

    def tables(self) -> Sequence[Table]:
        """A row a method and place; then, for each method of `against`, what the others differ from it by."""
        shown = [c for c, m in SHOWN.items() if any(r.metrics.get(m, {}).get("n") for r in self.rows)]
        head = ["edits", "method", *shown, "n", "CPU s an edit", "peak MiB"]
        base = [None, UNEDITED, *(Interval.of(self.before.get(SHOWN[c])) for c in shown), None, None, None]
        lines = [base, *(self._line(row, shown) for row in self.rows if not _failed(row))]
        caption = (
            "edit success, paraphrase, portability: teacher-forced, all tokens right; locality: likeliest token kept"
        )
        tables = [Table(head, lines, f"{without_folders(self.about['model'])}: methods", caption)]
        for other in self.against:
            gaps = [(row, self.difference(row, other)) for row in self.rows if row.series != other]
            columns = [c for c in shown if any(c in found for _, found in gaps)]
            rows = [[r.label, r.series, *(told_apart(f.get(c)) for c in columns)] for r, f in gaps if f]
            if rows:
                note = "paired by record, 95% interval; = where it holds zero: the two are not told apart"
                tables.append(Table(["edits", "method", *columns], rows, f"less {other}", note))
        if self.failed:
            reasons = [[row.label, row.series, _failed(row)] for row in self.failed]
            tables.append(Table(["edits", "method", "why"], reasons, "not run"))
        return tables

    def _line(self, row: Row, shown: Sequence[str]) -> list[Any]:
        cells = [Interval.of(m) if (m := row.metrics.get(SHOWN[c])) and m.get("n") else None for c in shown]
        of = row.edits if row.settings["mode"] != "single" else row.settings["solves"]
        peak = row.settings.get("peak_mib")
        n = row.metrics[SHOWN["edit success"]]["n"]
        return [row.label, row.series, *cells, n, round(row.seconds["solve"] / max(of, 1), 2), peak]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: rows, the unedited model's metrics, the differences by method of `against`."""
        gaps = {other: [{"edits": r.label, "method": r.series, **self.difference(r, other)} for r in self.rows
                        if r.series != other and self.difference(r, other)] for other in self.against}  # fmt: skip
        rows = [row.as_dict() for row in self.rows]
        return dict(plain({**self.about, "rows": rows, "before": self.before, "differences": gaps}))


def told_apart(gap: Interval | None) -> str | None:
    """A difference as text; `=` before one whose interval holds zero."""
    if gap is None or gap.ci95 is None:
        return None
    low, high = gap.ci95
    return f"{'= ' if low <= 0 <= high else ''}{gap.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _failed(row: Row) -> str:
    return str(row.settings.get("failed", ""))


def methods_table(
    model: TracedModel,
    facts: Sequence[Fact],
    methods: Mapping[str, Mapping[str, Any]],
    places: Sequence[Place],
    *,
    against: Sequence[str] = (),
    singles: int = 20,
    step: int = 10,
    fluency: int = 10,
    heldout: str | Path | None = None,
    only: Sequence[str] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    statistics: str | Path | None = None,
    corpus: str = "auto",
    max_tokens: int | None = None,
    batch_size: int | str = "auto",
    stage: Stage | None = None,
) -> MethodsTable:
    """Every method at every place, scored on the facts that it edits against the unedited model.

    Args:
        model: unedited; it is so again afterwards.
        facts: at least as many as the largest place edits.
        methods: arguments of `kt.edit` by the row's name.
        places: how many edits, and how; all methods at the first, then at the second, ...
        against: names of rows that the others are compared with.
        singles: how many facts, at most, are edited alone, each by itself, where a place is `single`.
        step: requests a group, where a place is `steps`.
        fluency: of how many of the facts text is generated.
        heldout: the text of the perplexity, as in `kt.evaluate`.
        only: the rows that are measured; of the others those are shown that `folder` holds. None: all.
        folder, resume: keeps each row when it is done, in a folder of its method, and each searched value; `resume`
            goes on there.
        statistics, corpus, max_tokens: second moments, as in `kt.edit`.
        stage: opens a stage by name and gives the callback for its progress.

    Raises:
        KtError: fewer facts than a place edits, or a folder that holds rows with other settings.
    """
    stage = stage_or_bars(stage)
    if not places:
        raise KtError("places is empty; name at least one number of edits")
    most = max(min(singles, len(facts)) if place.mode == "single" else place.edits for place in places)
    if most > len(facts):
        raise KtError(f"the table edits {most} facts, and there are {len(facts)}; give more facts, or fewer edits")
    facts = facts[:most]
    kept, points = {}, {name: [_point(name, o, place) for place in places] for name, o in methods.items()}
    text_of = heldout_corpus(heldout, model.name).identity
    own = {"kind": "methods", "singles": singles, "step": step, "fluency": fluency, "heldout": text_of}
    shared = identity_of(model, facts, [seed], statistics, corpus, max_tokens) | own
    for name in methods:
        at = None if folder is None else Path(folder) / slug(name)
        goes_on = resume and at is not None and (at / "settings.json").exists()
        if only is None or name in only or goes_on:
            kept[name] = Kept(at, shared | {"points": points[name]}, goes_on)
    known = [options for name, options in methods.items() if name in kept and _plans(model, name, options)]
    with stage("unedited model") as tick:
        arguments: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": tick}
        cache, told = default_cache(), facts[:fluency]
        asked = evaluate_cached(model, facts, cache, protocols=("tf", "ppl"), heldout=heldout, **arguments).scores
        text = evaluate_cached(model, told, cache, protocols=("gen",), **arguments).scores if told else None
    kept_in = None if folder is None else Path(folder)
    measure = _Measure(model, facts, asked, text, singles, step, seed, batch_size, heldout, kept_in)
    solver = Solver(model, known, statistics, corpus, max_tokens, measure.targets)
    rows = []
    for number, place in enumerate(places):
        for name, keeping in kept.items():
            point = points[name][number]
            row = keeping.row(number, point, partial(_require_whole, name=name, place=place))
            asked_for = only is None or name in only
            if row is None and not asked_for:
                continue
            if row is None or (_failed(row) and asked_for):  # what it failed for may be mended
                measure.targets.before_keeping = keeping.begin
                with stage(f"{name}: {place.label}") as tick:
                    row = measure.row(solver, name, methods[name], place, tick)
                keeping.add(number, point, row)
            rows.append(row)
    about = {"model": model.name, "n_facts": len(facts), "singles": singles, "step": step, "seed": seed}
    return MethodsTable(about, tuple(rows), plain(_metrics(asked, text)), tuple(against))


def _plans(model: TracedModel, name: str, options: Mapping[str, Any]) -> bool:
    """Whether the model can be edited so; a method that cannot edit it has rows that say why.

    Raises:
        KtError: the method can, and the row's own settings do not fit the model.
    """
    method = {"method": options.get("method", "intattn")}
    try:
        Solver(model, [options])
    except KtError as error:
        # A file that cannot be read (an editor) is the row's own fault, also where its method needs one.
        if options != method and (isinstance(error, BadFile) or _plans(model, name, method)):
            error.args = (f"row {name!r}: {error}; or name the other rows with --only",)
            raise
        return False
    return True


def _require_whole(row: Row, name: str, place: Place) -> None:
    """What this table reads of a row that was kept.

    Raises:
        ValueError: the row is another's, or a part is missing.
    """
    if (row.series, row.label, row.settings.get("mode")) != (name, place.label, place.mode):
        raise ValueError(
            f"it is of {row.series}, {row.settings.get('mode')} {row.label}, not of {name}, {place.mode} {place.label}"
        )
    parts = {"settings solves": row.settings.get("solves"), "seconds solve": row.seconds.get("solve")}
    parts |= {"metrics edit success": row.metrics.get(SHOWN["edit success"])}
    if not _failed(row) and (missing := [part for part, value in parts.items() if value is None]):
        raise ValueError(f"{missing[0]} is missing")


def _point(name: str, options: Mapping[str, Any], place: Place) -> Point:
    return Point(f"{place.mode} {place.edits}", float(place.edits), dict(options), name, place.edits)


def _metrics(asked: Scores, text: Scores | None) -> dict[str, Any]:
    """The table's metrics: those of asking, and the fluency of generated text."""
    fluency = SHOWN["fluency (bits)"]
    found = {name: value for name, value in asked.as_dict()["metrics"].items() if name != fluency}
    generated = {} if text is None else text.as_dict()["metrics"]
    return found | ({fluency: generated[fluency]} if fluency in generated else {})


@dataclass
class _Measure:
    """Rows of one model; values that methods search for alike are searched once, in all runs that keep to `folder`."""

    model: TracedModel
    facts: Sequence[Fact]
    asked: Scores
    text: Scores | None
    singles: int
    step: int
    seed: int
    batch_size: int | str
    heldout: str | Path | None
    folder: Path | None

    def __post_init__(self) -> None:
        device = self.model.device
        self.place = f"cuda:{device.index or 0}" if device.type == "cuda" else "host"
        self.targets = SharedTargets(None if self.folder is None else self.folder / SEARCHED)

    def row(self, solver: Solver, name: str, options: Mapping[str, Any], place: Place, tick: Any) -> Row:
        """One method at one place; a method that cannot do it has a row that says why."""
        held: dict[str, Any] = {**options, "mode": place.mode}
        try:
            solver.arguments(options, self.seed, tick)  # what all rows share is no row's cost
            start, peaks = time.process_time(), peaks_from_now()
            self.targets.count_from(lambda: peaks().get(self.place, 0))
            edits = self._edits(solver, options, place, tick)
        except KtError as error:
            return Row(place.label, name, place.edits, 0, plain(held | {"failed": str(error)}), {}, {}, {})
        solved, peak = time.process_time(), peaks().get(self.place)
        seconds = {"solve": round(solved - start + self.targets.seconds, 3)}
        scores = []
        for edit, group in edits:
            with edit.applied(self.model, force=True):
                scores.append(self._scores(group, alone=place.mode == "single", tick=tick))
        asked = Scores.joined([each[0] for each in scores]) if len(scores) > 1 else scores[0][0]
        seconds["score"] = round(time.process_time() - solved, 3)
        values = {metric: dict(by_record) for metric, by_record in asked.values.items()}
        metrics = plain(_metrics(asked, scores[0][1]))
        held |= {"solves": len(edits)}
        if peak is not None:
            held["peak_mib"] = round(max(peak, self.targets.peak) / 2**20)
        return Row(place.label, name, place.edits, place.edits, plain(held), metrics, values, seconds)

    def _edits(
        self, solver: Solver, options: Mapping[str, Any], place: Place, tick: Any
    ) -> list[tuple[Edit, list[Fact]]]:
        facts = list(self.facts[: place.edits])
        if place.mode == "single":
            return [(solver.solve([f], options, self.seed, tick), [f]) for f in self.facts[: self.singles]]
        if place.mode == "batch":
            return [(solver.solve(facts, options, self.seed, tick), facts)]
        from .sequence import run_edits

        given = solver.arguments(options, self.seed, tick) | dict(options)
        del given["check"]
        run = run_edits(self.model, facts, "sequential", self.step, "none", **given)
        assert run.edit is not None
        return [(run.edit, facts)]

    def _scores(self, group: list[Fact], alone: bool, tick: Any) -> tuple[Scores, Scores | None]:
        """Of edits of one fact `alone` only the answers: a mean of several models' perplexities is no perplexity."""
        arguments: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "progress": tick}
        text = {"protocols": ("tf",)} if alone else {"protocols": ("tf", "ppl"), "heldout": self.heldout}
        asked = evaluate(self.model, group, self.asked, **text, **arguments)
        if alone or self.text is None:
            return asked, None
        told = [fact for fact in group if fact.id in self.text.records]
        return asked, evaluate(self.model, told, self.text, protocols=("gen",), **arguments)
