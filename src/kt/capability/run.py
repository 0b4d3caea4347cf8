"""`abilities`: any task of lm-eval on the model and on the edited model, with paired differences.

>>> found = abilities(model, "gsm8k,hellaswag", edit=edit, num_fewshot=2, limit=200)
>>> found.rows[0].difference                              # Interval: after - before on the same documents
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.data import complete_file, plain, read_json, write_json
from .._util.kinds import require_kinds, require_options, takes
from .._util.text import without_folders
from ..errors import BadFile
from ..report import Column, Shown, Table
from ..stats import Interval
from .compare import Aggregate, difference, interval, values_of
from .lm_eval import Settings, run_harness
from .tasks import Chosen, Spec, choose, lm_eval_module

if TYPE_CHECKING:
    import pandas as pd

    from ..editing.stack import AnyEdit
    from ..model.model import TracedModel


KIND = "abilities"
_NO_METRIC = ("name", "alias", "sample_len", "sample_count")
Runs = dict[str, dict[str, Any]]
"""`before`, and with an edit `after`: lm-eval's results."""


class Ability(NamedTuple):
    """One metric of one task (or group of tasks).

    `metric` is lm-eval's `name,filter`; `higher_is_better` is None where the task does not say.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    before: Interval
    after: Interval | None
    difference: Interval | None


@dataclass(frozen=True)
class Abilities(Shown):
    """The result of `abilities`.

    Args:
        model: the model's name.
        rows: every metric with n and interval; with an edit also the paired difference.
        runs: lm-eval's own results, `before` and `after`: results, groups, configs, versions, n-shot, n-samples.
        samples: by run and task, lm-eval's record of every document: what was asked, what came, what it scored.
        config: the settings, under lm-eval's names.
        versions: of lm-eval, and of each task.
    """

    model: str
    rows: tuple[Ability, ...]
    runs: Runs
    samples: Mapping[str, Mapping[str, list[dict[str, Any]]]]
    config: Mapping[str, Any]
    versions: Mapping[str, Any]

    kind = KIND
    heading = "General abilities"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The settings, under lm-eval's names."""
        return self.config

    def to_dataframe(self) -> pd.DataFrame:
        """One row per task and metric; columns mean, low, high, n for before, after and difference."""
        import pandas as pd

        rows = []
        for row in self.rows:
            cells: dict[str, Any] = {"task": row.task, "metric": row.metric, "higher_is_better": row.higher_is_better}
            for name in ("before", "after", "difference"):
                value: Interval | None = getattr(row, name)
                cells |= {f"{name}_{part}": v for part, v in ({} if value is None else value._asdict()).items()}
            rows.append(cells)
        return pd.DataFrame(rows)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: `results.<task>.<metric>` = {before, after, difference}, each {mean, ci95, n}."""
        results: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            parts = {name: getattr(row, name) for name in ("before", "after", "difference")}
            means = {name: value.as_dict() for name, value in parts.items() if value is not None}
            results.setdefault(row.task, {})[row.metric] = means | {"higher_is_better": row.higher_is_better}
        first = self.runs["before"]
        return {
            "model": self.model,
            "results": results,
            "n-samples": first["n-samples"],
            "n-shot": first["n-shot"],
            "config": dict(self.config),
            "versions": dict(self.versions),
        }

    def notes(self) -> Sequence[str]:
        """The kind of interval."""
        return ["95% bootstrap intervals over documents, differences paired."]

    def tables(self) -> Sequence[Table]:
        """A row a metric (↑ more is better, ↓ less); with an edit also after it, and the paired difference."""
        parts = ["before", "after", "difference"] if "after" in self.runs else ["before"]
        heads = {"difference": "after - before"}
        arrow = Column("", lambda better: {True: "↑", False: "↓", None: ""}[better])
        columns: list[str | Column] = [
            "task",
            "metric",
            arrow,
            *(Column(heads.get(part, part), _cell) for part in parts),
            Column("n", str),
        ]
        rows = [
            [row.task, row.metric, row.higher_is_better, *(getattr(row, part) for part in parts), row.before.n]
            for row in self.rows
        ]
        return [Table(columns, rows, f"{without_folders(self.model)}: lm-eval {self.versions['lm_eval']}")]

    def save(self, path: str | Path) -> Path:
        """Write the result to `path`, one JSON file, whole or not at all; without the samples (see `sample_files`)."""
        content = {"kind": KIND, **self.as_dict(), "rows": [_as_dict(row) for row in self.rows], "runs": self.runs}
        return write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Abilities:
        """Read the result that `save` wrote to `path`.

        Raises:
            BadFile: it is not there, or not such a file.
        """
        data = read_json(path)
        if data.get("kind") != KIND or data.get("schema_version") != 1:
            raise BadFile(f"{path}: no abilities of schema version 1; give a file written by `kt abilities`")
        with complete_file(path, "set of abilities", "measure them again"):
            rows = tuple(_row(row) for row in data["rows"])
            return cls(data["model"], rows, data["runs"], {}, data["config"], data["versions"])

    def sample_files(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(name, records) of the files of `--log-samples`: `samples_before_<task>`, laid out as by lm-eval."""
        for run, tasks in self.samples.items():
            for task, rows in tasks.items():
                safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in task)
                yield f"samples_{run}_{safe}", rows

    def __repr__(self) -> str:
        return f"Abilities({self.model}: {', '.join(dict.fromkeys(row.task for row in self.rows))})"


@takes()
def abilities(
    model: TracedModel,
    tasks: str | Sequence[Spec] | Chosen,
    edit: AnyEdit | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Abilities:
    """Run tasks of lm-eval on the model, and with `edit` on the edited model too.

    Args:
        model: the unedited model; its weights are the same bytes afterwards.
        tasks: names, patterns (`mmlu_*`) or YAML files, as a list or with commas; {"task": name, "num_fewshot": n}
            gives a task its own number of examples; `PRESETS` holds some. Or what `choose` found.
        edit: written into the model for the second run.
        num_fewshot: number of solved examples in front of each question; None takes the task's own.
        limit: documents per task; below 1, a share of them.
        include_path: a folder with tasks of your own (their code is run).
        seed: of lm-eval's draws (0 gives lm-eval's own default seeds) and of the bootstrap.
        progress: show lm-eval's bars on stderr.
        options: `apply_chat_template`, `fewshot_as_multiturn`, `system_instruction`, `gen_kwargs`, `batch_size`,
            `confirm_run_unsafe_code`, as in lm-eval.

    Returns:
        Each task's metrics with n and 95% interval over documents; with `edit` the paired differences too.

    Raises:
        BadTask: an unknown task, data that is not at hand, or settings that do not fit.
        WorkFailed: lm-eval stopped, or the model answers with NaN.
        KtError: lm-eval is not installed, or an edit is applied to the model that puts text before prompts.
    """
    from ..editing.stack import ANY_EDIT
    from ..model.effects import refuse_text

    require_options(options, [field.name for field in fields(Settings)], "abilities")
    if edit is not None:
        require_kinds({"edit": edit}, {"edit": ANY_EDIT})
        edit.require_updates("lm-eval, which reads its own prompts,", ("context",))
    refuse_text(model, "lm-eval")
    settings = Settings(num_fewshot, limit, seed=seed, **options)
    chosen = tasks if isinstance(tasks, Chosen) else choose(tasks, include_path)
    runs: Runs = {"before": run_harness(model, chosen, settings, progress)}
    if edit is not None:
        with edit.applied(model):
            runs["after"] = run_harness(model, chosen, settings, progress)
    samples = {name: run.pop("samples") for name, run in runs.items()}
    harness = {run.pop("lm_eval_version") for run in runs.values()}.pop()
    rows = tuple(_rows(runs, samples, chosen, seed))
    config = asdict(settings) | {"tasks": chosen.specs, "include_path": chosen.include_path}
    versions = {"lm_eval": harness, **runs["before"]["versions"]}
    return Abilities(model.name, rows, plain(runs), samples, plain(config), plain(versions))


def _rows(runs: Runs, samples: Mapping[str, Any], chosen: Chosen, seed: int) -> Iterator[Ability]:
    """Tasks, then groups of tasks, whose figure is the mean over all their documents or goes without interval."""
    first = runs["before"]
    for task, metrics in {**first["results"], **first["groups"]}.items():
        leaves = _leaves(task, first["group_subtasks"])
        for metric, value in metrics.items():
            if metric in _NO_METRIC or not isinstance(value, int | float):
                continue
            aggregate = _aggregation(chosen, leaves, metric)
            old = values_of(samples["before"], leaves, metric)
            before = interval(float(value), old, aggregate, seed)
            better = first["higher_is_better"].get(task, {}).get(metric.rpartition(",")[0])
            if "after" not in runs:
                yield Ability(task, metric, better, before, None, None)
                continue
            again = float({**runs["after"]["results"], **runs["after"]["groups"]}[task][metric])
            new = values_of(samples["after"], leaves, metric)
            gain = difference((float(value), again), old, new, aggregate, seed)
            yield Ability(task, metric, better, before, interval(again, new, aggregate, seed), gain)


def _leaves(task: str, subtasks: Mapping[str, list[str]]) -> list[str]:
    """The tasks below a group, or the task itself."""
    below = subtasks.get(task, [])
    return [leaf for child in below for leaf in _leaves(child, subtasks)] if below else [task]


def _aggregation(chosen: Chosen, leaves: Sequence[str], metric: str) -> Aggregate | None:
    """The task's own aggregation where it is not the mean."""
    mean = lm_eval_module("lm_eval.api.registry").get_aggregation("mean")
    if leaves[0] not in chosen.loaded:
        return None
    aggregate = chosen.loaded[leaves[0]].aggregation().get(metric.rpartition(",")[0], mean)
    return None if aggregate is mean else aggregate


def _cell(value: Interval | None) -> str:
    if value is None:
        return "–"
    spread = "" if value.ci95 is None else f" [{value.low:.3f}, {value.high:.3f}]"
    return f"{value.mean:.3f}{spread}"


def _as_dict(row: Ability) -> dict[str, Any]:
    return {name: getattr(part, "_asdict", lambda part=part: part)() for name, part in row._asdict().items()}


def _row(data: Mapping[str, Any]) -> Ability:
    parts = {name: _interval(data[name]) for name in ("before", "after", "difference")}
    return Ability(data["task"], data["metric"], data["higher_is_better"], **parts)  # type: ignore[arg-type]


def _interval(data: Mapping[str, Any] | None) -> Interval | None:
    """JSON has no NaN: null stands for it."""
    if data is None:
        return None
    mean, low, high = (float("nan") if data[name] is None else float(data[name]) for name in Interval._fields[:3])
    return Interval(mean, low, high, int(data["n"]))
