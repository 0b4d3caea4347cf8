"""What the runs do not hold, each in a line with the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..editing import Edit
from ..evaluation.scores import Comparison
from ..experiments import Sweep
from ..figures.theme import head_of
from ..probing import Probe
from ..residual import Residual
from ..runs.folder import FILES
from ..runs.report import Run
from ..tracing import Trace

MODEL = {"model": "demo", "dtype": "auto", "layout": None, "trust_remote_code": False}
FACTS = ("facts", "limit", "format", "zsre_target", "known_to", "join", "prompt", "subject", "answer", "foil", "target")
MOST = 50
"""Facts that a command is given at most, where the run's own limited them in another way: more would take hours."""
DEFAULTS: Mapping[str, Any] = {"facts": "demo", "zsre_target": "answer"}


def missing(runs: Sequence[Run]) -> list[dict[str, str]]:
    """`what` the page lacks and the `command` that makes it; the commands can be pasted into a shell."""
    results = [(run, result) for run in runs for _, result in run.results]
    has = lambda kind: any(isinstance(result, kind) for _, result in results)  # noqa: E731
    traces = [result for _, result in results if isinstance(result, Trace)]
    edited = next((run for run, result in results if isinstance(result, Edit)), None)
    edit = None if edited is None else str(edited.folder / FILES["edit"])
    manifest = next((run.manifest for run in runs if run.manifest.get("config")), {})
    config = dict(manifest.get("config") or {})
    if config.get("limit") is None and config.get("prompt") is None and manifest.get("data", {}).get("n", 0) > MOST:
        config["limit"] = MOST
    facts = [*_model(config), *_flags(config, FACTS, DEFAULTS)]
    elsewhere = config.get("edit")
    there = edit or str(elsewhere or "runs/edit/" + FILES["edit"])
    found: list[tuple[str, list[str]]] = []
    if not traces:
        found.append(("Maps of tokens and layers", ["heatmap", *facts]))
    elif not any(head_of(kind) is not None for trace in traces for kind in trace.kinds):
        found.append(("Maps of single attention heads", ["heatmap", *facts, "--heads"]))
    if edit is None and elsewhere:
        folders = [str(Path(elsewhere).parent), *(str(run.folder) for run in runs)]
        found.append(("The edit, its weights and its requests", ["explore", *folders]))
    elif edit is None and not has(Sweep):
        found.append(("An edit, its weights and its requests", ["apply-edit", *facts, "-o", "runs/edit"]))
    if not has(Comparison):
        found.append(("Success, locality and texts before and after", ["eval", *facts, "--edit", there]))
    if not has(Residual):
        what = "Old and new answer through the layers" + (", before and after" if has(Probe) else "")
        found.append((what, ["probe", *facts, "--edit", there]))
    if len(traces) == 1 and edit is not None:
        merge = ["export", edit, *_model(config), "--to", "merged"]
        traced = [part for part in facts if part not in _model(config)]
        again = ["heatmap", "-m", "merged", *traced, "--keep", "all"]
        found.append(("Maps of the edited model", [*merge, "&&", "kt", *again]))
    if not has(Sweep):
        found.append(("Success by α", ["sweep", "alpha", *facts]))
    return [{"what": what, "command": _joined(["kt", *parts])} for what, parts in found]


def commands(runs: Sequence[Run], named: str | None = None) -> dict[str, Any]:
    """`kt heatmap` and `kt probe` with the runs' model and edit, for a fact whose prompt the page adds; and the line of
    Python that shows the runs with the model behind them. `named` is the model where no run names one."""
    config = next((run.manifest["config"] for run in runs if run.manifest.get("config")), {"model": named})
    model = _model(config)
    edited = next((run for run in runs for _, result in run.results if isinstance(result, Edit)), None)
    edit = [] if edited is None else ["--edit", str(edited.folder / FILES["edit"])]
    folders = [str(run.folder) for run in runs]
    widget = f"kt.widget(kt.load({model[1]!r}), {folders!r})"
    return {"trace": ["kt", "heatmap", *model], "probe": ["kt", "probe", *model, *edit], "widget": widget}


def _joined(parts: Sequence[str]) -> str:
    return " ".join(part if part == "&&" else shlex.quote(part) for part in parts)


def _model(config: Mapping[str, Any]) -> list[str]:
    return ["-m", str(config.get("model") or MODEL["model"]), *_flags(config, tuple(MODEL)[1:], MODEL)]


def _flags(config: Mapping[str, Any], names: Sequence[str], defaults: Mapping[str, Any]) -> list[str]:
    """The options of a manifest that are not at their defaults, as they are typed."""
    parts: list[str] = []
    for name in names:
        value = config.get(name)
        if value not in (None, False, "") and value != defaults.get(name):
            flag = "-f" if name == "facts" else "--" + name.replace("_", "-")
            parts += [flag] if value is True else [flag, str(value)]
    return parts
