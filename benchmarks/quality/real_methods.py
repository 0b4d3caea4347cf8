"""The rows of `kt run methods` on a real model, put together from runs that measured some of them each.

    kt run methods --only memit,ft -o RUN ...  # as docs/data/smollm2-methods.md says; again with others: --resume RUN
    python benchmarks/quality/real_methods.py --data counterfact RUN [RUN ...]  # takes their rows, writes the tables
    python benchmarks/quality/real_methods.py  # the tables of docs/data/smollm2-methods.md alone

A row that is there already is replaced. The JSON has what the tables need: metrics with intervals, and values by record
of those that are compared in pairs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kt._util.data import read_json
from kt._util.files import atomic_write
from kt.editing.methods import METHODS
from kt.errors import KtError
from kt.experiments.methods_table import PAIRED, SHOWN, MethodsTable
from kt.experiments.sweep_result import Row

ROOT = Path(__file__).parents[2]
OUT, PAGE = ROOT / "docs" / "data" / "smollm2-methods.json", ROOT / "docs" / "data" / "smollm2-methods.md"
AGAINST, MODEL, DATA = ("memit", "locft", "scr"), "SmolLM2-135M-Instruct", ("counterfact", "zsre")
MARK = re.compile(r"(<!-- real_methods.py writes (\w+) from here -->\n).*?(\n<!-- to here -->)", re.DOTALL)
ORDER = ("single", "batch", "steps")

Held = dict[str, dict[str, Any]]
"""By data set: `before`, the unedited model's metrics, and `rows`, by place and method."""


def slim(content: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what the tables show, to six digits."""
    metrics = {SHOWN[column]: content["metrics"].get(SHOWN[column]) for column in SHOWN}
    values = {SHOWN[column]: content["values"].get(SHOWN[column]) for column in PAIRED}
    return {
        **{name: content[name] for name in ("label", "series", "x", "edits", "settings", "seconds")},
        "metrics": {name: _short(metric) for name, metric in metrics.items() if metric},
        "values": {name: _short(by_record) for name, by_record in values.items() if by_record},
    }


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def kept(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a model's folder, also of a run that has not ended; those that failed are said and left out."""
    for path in sorted(folder.glob("*/points/*.json")):
        content = read_json(path)
        if why := content["settings"].get("failed"):
            sys.stderr.write(f"left out: {content['series']} at {content['label']}: {why}\n")
        else:
            yield content


def place_of(row: Mapping[str, Any]) -> str:
    return f"{row['settings']['mode']} {row['edits']}"


def taken(held: Held, data: str, run: Path) -> int:
    """Put a run's rows where they belong; how many.

    Raises:
        KtError: it is no run of one model, or it has no row.
    """
    folders = {path.parents[2] for path in run.glob("*/*/points/*.json")}
    if len(folders) != 1:
        raise KtError(f"{run} holds rows of {len(folders)} models; give the folder of `kt run` on one model")
    its = held.setdefault(data, {"before": {}, "rows": {}})
    if (run / "results.json").is_file():  # else the run has not ended, and the unedited model's row is another's
        (model,) = read_json(run / "results.json")["models"].values()
        its["before"][str(model["n_facts"])] = _short({c: model["before"].get(c) for c in SHOWN.values()})
    rows = list(kept(*folders))
    for row in rows:
        its["rows"].setdefault(place_of(row), {})[row["series"]] = slim(row)
    return len(rows)


def tables(its: Mapping[str, Any], mode: str) -> str:
    """The tables of the places of one mode, in the order of their numbers."""
    order = {name: number for number, name in enumerate(METHODS)}
    places = sorted((place for place in its["rows"] if place.startswith(f"{mode} ")), key=lambda p: int(p.split()[1]))
    rows = [
        Row.of(its["rows"][place][name])
        for place in places
        for name in sorted(its["rows"][place], key=lambda name: order.get(name, len(order)))
    ]
    if not rows:
        return "Not measured yet."
    most = max(row.edits for row in rows)
    known = min(its["before"], key=lambda n: abs(int(n) - most), default=None)
    before = {} if known is None else its["before"][known]
    found = MethodsTable({"model": MODEL, "n_facts": most}, tuple(rows), before, AGAINST)
    shown = []
    for number, table in enumerate(found.tables()):
        title = table.title if number else "Means"
        shown.append(f"**{title[0].upper()}{title[1:]}** ({table.caption}):\n\n{table.markdown()}")
    return "\n\n".join(shown)


def page(held: Held) -> str:
    """The page with its tables anew."""

    def written(match: re.Match[str]) -> str:
        data, _, mode = match[2].partition("_")
        text = tables(held[data], mode) if data in held else "Not measured yet."
        return f"{match[1]}\n{text}\n{match[3]}"

    return MARK.sub(written, PAGE.read_text(encoding="utf-8"))


def saved(held: Held) -> str:
    """JSON with a line a row."""
    parts = []
    for data, its in sorted(held.items()):
        places = sorted(its["rows"], key=lambda place: (ORDER.index(place.split()[0]), int(place.split()[1])))
        rows = ",\n".join(
            f"{json.dumps(place)}: {{\n"
            + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(its["rows"][place].items()))
            + "\n}"
            for place in places
        )
        parts.append(f'{json.dumps(data)}: {{"before": {json.dumps(its["before"])},\n"rows": {{\n{rows}\n}}}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--data", choices=DATA, default="counterfact")
    options = parser.parse_args()
    held: Held = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    try:
        for run in options.runs:
            sys.stderr.write(f"{run}: {taken(held, options.data, run)} rows\n")
        text = page(held)
    except KtError as error:
        sys.exit(str(error))
    if options.runs:
        atomic_write(OUT, saved(held))
    atomic_write(PAGE, text)


if __name__ == "__main__":
    main()
