"""The explorer as a page: data as JSON and the modules of assets/ in one file that opens without a server."""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .._util.data import complete_file
from .._util.files import write_named
from .._util.kinds import A_RUN, takes
from .._util.text import visible, without_folders
from ..editing import Edit
from ..errors import BadFile
from ..experiments import Sweep
from ..experiments.sweep_result import AXES, NAMED
from ..experiments.sweep_result import columns as sweep_columns
from ..model.effects import site_of
from ..probing import Probe
from ..report import App, Section, build, render
from ..residual import Residual
from ..runs.provenance import versions
from ..runs.report import Run
from ..stats import Interval
from ..tracing import Trace
from .lens import lens
from .maps import trace_map
from .missing import commands, missing
from .numbers import short
from .rows import Rows, columns, summary
from .seen import Seen
from .verdict import verdict

ASSETS = Path(__file__).parent / "assets"
ENTRY = "page"
IMPORT = re.compile(r'^import \{ ([^}]+) \} from "\./(\w+)\.js";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class) (\w+))", re.MULTILINE)


@dataclass(frozen=True)
class Explorer:
    """The fact explorer of some runs: in a notebook it shows itself, `save` writes it as a page."""

    html: str = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all.

        Raises:
            NotWritable: it cannot be written.
        """
        return write_named(path, self.html)

    def _repr_html_(self) -> str:
        """In a frame of its own: its style, keys and policy are those of the page."""
        frame = 'style="width: 100%; height: 900px; border: 0" title="kt: fact explorer"'
        return f'<iframe {frame} srcdoc="{html.escape(self.html)}"></iframe>'


@takes(runs=A_RUN)
def explore(runs: str | Path | Sequence[str | Path], title: str = "") -> Explorer:
    """The facts of runs as one page to explore: docs/explore.md.

        kt.explore(["runs/edit", "runs/eval"]).save("explore.html")

    Args:
        runs: a run folder or several, of any commands; facts are joined by their prompts.
        title: of the page.

    Returns:
        The page; the last value of a notebook's cell shows it there.

    Raises:
        BadFile: a file is not the result that its name says, or no run has facts.
    """
    given = [Run.of(folder) for folder in ([runs] if isinstance(runs, str | Path) else runs)]
    title, chapters, more = _parts(given, title or "kt explore", []) if given else ("", [], {"app": None})
    if more["app"] is None:
        named = ", ".join(str(run.folder) for run in given) or "nothing given"
        raise BadFile(f"{named}: no facts to explore; name run folders of heatmap, apply-edit, eval, probe or sweep")
    return Explorer(render(title, chapters, **more))


def write_report(runs: Sequence[str | Path | Run], out: str | Path, title: str = "") -> Path:
    """Write every result of the runs as one offline page: the verdict, the explorer, then each result, folded.

    Args:
        runs: run folders, or runs that are being written.
        out: the page to write.
        title: of the page.

    Returns:
        The page's path.

    Raises:
        BadFile: a file is not the result that its name says.
        NotWritable: the page cannot be written.
    """
    given = [run if isinstance(run, Run) else Run.of(run) for run in runs]
    chapters = []
    for run, name in zip(given, _names(given), strict=True):
        for path, result in run.results:
            with complete_file(path, "result of kt", "run its command again"):
                section = result.section()
            chapters.append(Section((f"{name}: " if len(given) > 1 else "") + section.title, section.blocks))
    title, sections, more = _parts(given, title or "kt report", chapters)
    return build(title, sections, out, **more)


def _parts(runs: Sequence[Run], title: str, chapters: list[Section]) -> tuple[str, list[Section], dict[str, Any]]:
    """The arguments of `render`: a title that says what is seen, the verdict, the explorer, the commands."""
    with complete_file(runs[0].files, "run of results that kt can show", "run its command again"):
        found = verdict([result for run in runs for _, result in run.results])
        data, about = page_data(runs), _about(runs)
    meta = {name: run.command for run, name in zip(runs, _names(runs), strict=True) if run.command}
    meta["versions"] = ", ".join(f"{name} {version}" for name, version in versions().items())
    more = {
        "meta": meta,
        "summary": found.cards,
        "lead": found.words,
        "tone": found.tone,
        "warnings": found.warnings,
        "app": App(_style(), bundle(), packed(data)) if data["facts"] or data["sweeps"] else None,
        "fold": True,
    }
    return f"{title}: {found.title} · {about}", chapters, more


def _about(runs: Sequence[Run]) -> str:
    """The models, as the runs name them."""
    models = dict.fromkeys(str(run.manifest["model"]["id"]) for run in runs if "model" in run.manifest)
    return ", ".join(map(without_folders, models)) or ", ".join(run.folder.name for run in runs)


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with their parents' where two are alike."""
    names = [run.folder.name for run in runs]
    return [n if names.count(n) == 1 else str(run.folder) for n, run in zip(names, runs, strict=True)]


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the page shows, as JSON has it: docs/explore.md lists the fields."""
    return data_of(named_results(runs)) | {"missing": missing(runs), "commands": commands(runs)}


def named_results(runs: Sequence[Run]) -> list[tuple[str, Any]]:
    """Every result of the runs, with the name of its run."""
    return [(name, result) for name, run in zip(_names(runs), runs, strict=True) for _, result in run.results]


def data_of(named: Sequence[tuple[str, Any]], seen: Sequence[Seen] = ()) -> dict[str, Any]:
    """What results give for the page; `seen` is what a model at hand was asked beside them."""
    table = Rows([result for _, result in named], seen)
    edits = [(name, result) for name, result in named if isinstance(result, Edit)]
    traces = [(name, result) for name, result in named if isinstance(result, Trace) and result.facts]
    probes = [(name, result) for name, result in named if isinstance(result, Residual | Probe)]
    alone = sum(isinstance(result, Probe) for _, result in probes) == 1
    probes.sort(key=lambda each: isinstance(each[1], Probe))  # readings of an edit first: they have both states
    readings = [("before" if alone and isinstance(r, Probe) else name, r) for name, r in probes]
    rows = table.rows
    edited = [i for i, row in enumerate(rows) if "edited" in row.was]
    several = len(rows) > 1
    return {
        "facts": [row.as_dict() for row in rows],
        "columns": columns(rows),
        "about": summary(rows),
        "first": 0 if edited or not several else -1,
        "traces": [trace_map(trace, name, table) for name, trace in traces],
        "lens": lens(readings, table, seen),
        "edited": _edited_layers([edit for _, edit in edits]),
        "edits": [_weights(edit, name if len(edits) > 1 else "") for name, edit in edits],
        "sweeps": [_sweep(result) for _, result in named if isinstance(result, Sweep)],
    }


def _edited_layers(edits: Sequence[Edit]) -> dict[str, list[int]]:
    """The layers whose weights the edits write, or whose values they set, by kind of module."""
    layers: dict[str, set[int]] = {}
    for edit in edits:
        if (site := site_of(edit.effect)) is not None:
            layers.setdefault(str(site.kind), set()).add(site.layer)
        for name in edit.names:
            kind, layer = _site(edit, name)
            if layer is not None:
                layers.setdefault(kind, set()).add(layer)
    return {kind: sorted(found) for kind, found in layers.items()}


def _site(edit: Edit, name: str) -> tuple[str, int | None]:
    """Kind and layer of a weight, by its name."""
    attention = name in edit.manifest.get("attention_weights", ()) or re.search(r"attn|attention", name)
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    return "attn" if attention else "mlp", int(numbers[0]) if numbers else None


def _weights(edit: Edit, name: str) -> dict[str, Any]:
    """The size of each update, and the method."""
    rows = []
    for weight, delta in edit.deltas().items():
        kind, layer = _site(edit, weight)
        label = {"attn": "attention", "mlp": "MLP"}[kind] + ("" if layer is None else f", layer {layer}")
        rows.append(
            {
                "name": visible(weight),
                "short": label,
                "kind": kind,
                "shape": "x".join(map(str, delta["shape"])),
                "rank": delta["rank"],
                "norm": short(delta["norm"]),
                "relative": short(delta["relative_norm"]),
                "ratio": short(delta["norm_ratio"]),
            }
        )
    labels = [row["short"] for row in rows]
    for row in rows:
        if labels.count(row["short"]) > 1:
            row["short"] = ".".join(row["name"].split(".")[-4:]).removesuffix(".weight")
    about = ": ".join(filter(None, (visible(name), visible(str(edit.manifest.get("method"))))))
    return {"name": about, "alpha": short(edit.alpha) if edit.alpha is not None else None, "weights": rows}


def _sweep(sweep: Sweep) -> dict[str, Any]:
    """Points by series; a metric is [mean, low, high, n]. `open` metrics have no upper end."""
    panels = sweep_columns(sweep)
    series = []
    for name in dict.fromkeys(row.series for row in sweep.rows):
        rows = sorted((row for row in sweep.rows if row.series == name), key=lambda row: row.x)
        points = []
        for row in rows:
            found = {
                panel: Interval.of(row.metrics[metric]) for panel, metric in panels.items() if metric in row.metrics
            }
            values = {panel: [*short([v.mean, v.low, v.high]), v.n] for panel, v in found.items()}
            points.append({"x": short(row.x), "label": visible(row.label), "metrics": values})
        series.append({"name": visible(name), "points": points})
    traced = None
    if sweep.balance is not None and sweep.kind == "alpha":
        ci95 = sweep.balance.get("ci95")
        traced = short([sweep.balance["alpha"], *(ci95 or ())])
    unbounded = ("fluency (bits)", "perplexity")
    return {
        "x": AXES.get(sweep.kind, sweep.kind),
        "named": sweep.kind in NAMED or sweep.kind not in AXES,
        "facts": sweep.about["n_facts"],
        "panels": [{"name": panel, "open": panel in unbounded} for panel in panels],
        "series": series,
        "traced": traced,
    }


# The file.


@cache
def _style() -> str:
    return (ASSETS / "explorer.css").read_text(encoding="utf-8")


def packed(data: Mapping[str, Any]) -> str:
    """JSON, deflated, as base64: a third of the size, and letters that nothing on a page can act on."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


@cache
def bundle(entry: str = ENTRY) -> str:
    """The modules of assets/ that one of them needs as one script, each in a function of its own, in the order in which
    they import.

    A page opens from a file, where browsers refuse to import modules from beside it.
    """
    parts: dict[str, str] = {}

    def add(name: str) -> None:
        if name in parts:
            return
        parts[name] = ""
        source = (ASSETS / f"{name}.js").read_text(encoding="utf-8")
        for _, imported in IMPORT.findall(source):
            add(imported)
        exported = ", ".join(EXPORT.findall(source))
        body = EXPORT.sub("", IMPORT.sub(r"const { \1 } = kt_\2;\n", source))
        del parts[name]  # behind what it imports
        parts[name] = f"const kt_{name} = (() => {{\n{body}\nreturn {{ {exported} }};\n}})();\n"

    add(entry)
    return '"use strict";\n' + "".join(parts.values())
