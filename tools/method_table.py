"""What follows from the registry: the tables of docs/methods.md (every method's plan, every setting with its source),
and the names in editing/method_names.py, which editors complete and type checkers check.

python tools/method_table.py            # print the tables
python tools/method_table.py --write    # put them into docs/methods.md, each between its marks, and write the names
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from kt._util.files import atomic_write
from kt.editing.closed_form.config import Spreading, TargetSearch
from kt.editing.config import Config, setting_fields
from kt.editing.methods import METHODS

ROOT = Path(__file__).parent.parent
NAMES = ROOT / "src" / "kt" / "editing" / "method_names.py"
PAGE, MEASURED = ROOT / "docs" / "methods.md", ROOT / "docs" / "data" / "demo-methods.json"
REAL, SIZES = ROOT / "docs" / "data" / "smollm2-methods.json", (1, 10, 100)
MARK = re.compile(
    r"(<!-- tools/method_table.py writes the (methods|settings) from here -->\n).*?(\n<!-- to here -->)", re.DOTALL
)
EXAMPLE = {"layers_mlp": (3, 4, 5), "layers_attn": (1, 2), "layers_high": (7, 8), "alpha": 0.3}
"""Layers and α of the plans in the table."""


GROUPS = {
    label: [name for name, config in METHODS.items() if issubclass(config, base)]
    for label, base in {
        "search": TargetSearch,
        "several layers": Spreading,
        "MEMIT family": METHODS["memit"],
        "fine-tuning": METHODS["ft"],
        "AlphaEdit family": METHODS["alphaedit"],
        "ROME family": METHODS["rome"],
    }.items()
}
"""Methods that share a class of settings, largest group first: the settings table names the group in their place."""


def methods_table() -> str:
    """A row a method: what it does, its plan, and what was measured."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))
    measured = {(row["method"], row["edits"]): row.get("success") for row in rows}
    places = json.loads(REAL.read_text(encoding="utf-8"))["counterfact"]["rows"]
    real = {
        (name, row["edits"]): row["metrics"]["edit_success_tf_exact"]
        for place, its in places.items()
        if not place.startswith("steps")
        for name, row in its.items()
    }
    lines = [
        "| method | what it does | searches δ at | writes | solver; order | success at 1, 10, 100 edits | on SmolLM2 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, config in METHODS.items():
        *sites, solver, order = config.of(EXAMPLE).plan().describe()
        about = config.summary.partition(": ")[2]
        solved = f"{solver}; {order}" if order != "–" else solver
        cells = [f"`{name}`", about, *sites, solved, successes(name, measured), successes(name, real)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def successes(method: str, measured: Mapping[tuple[str, int], Any]) -> str:
    """The mean at each number of edits."""
    numbers = [measured.get((method, edits)) for edits in SIZES]
    shown = ", ".join("–" if each is None else f"{each['mean']:.2f}" for each in numbers)
    return shown if any(numbers) else "not measured"


def settings_table() -> str:
    """The groups of methods, and a row a setting: what most methods have, then what others have in its place."""
    held: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for name, config in METHODS.items():
        for spec in setting_fields(config):
            about = spec.metadata["setting"]
            symbol = "" if about.symbol == "–" else f", {about.symbol}".replace("*", r"\*")
            row = held.setdefault((f"`{spec.name}`{symbol}", about.text), [])
            row.append((name, default_of(config, spec.name), about.source))
    smaller = {group: [label for label in GROUPS if len(GROUPS[label]) < len(GROUPS[group])] for group in GROUPS}
    lines = [f"- **{group}**: {grouped(GROUPS[group], smaller[group])}" for group in GROUPS]
    lines += ["", "| setting, symbol | default | what it is | source | methods |", "| --- | --- | --- | --- | --- |"]
    order = list(dict.fromkeys(setting for setting, _ in held))
    for (setting, text), rows in sorted(held.items(), key=lambda item: order.index(item[0][0])):
        methods, defaults, sources = zip(*rows, strict=True)
        cells = [setting, most(methods, defaults), text, most(methods, sources), grouped(methods)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def most(methods: Sequence[str], values: Sequence[str]) -> str:
    """The value of most methods, then the others' in lines of their own, each behind the names of its methods."""
    having: dict[str, list[str]] = {}
    for method, value in zip(methods, values, strict=True):
        having.setdefault(value, []).append(method)
    first, *others = sorted(having, key=lambda value: -len(having[value]))
    return "<br>".join([first, *(f"{grouped(having[value])}: {value}" for value in others)])


def grouped(methods: Sequence[str], labels: Collection[str] = tuple(GROUPS)) -> str:
    """Names of methods in the registry's order, with a group's name in the place of all its members'."""
    left, groups = list(methods), []
    for group in labels:
        if set(GROUPS[group]) <= set(left):
            groups.append(f"**{group}**")
            left = [name for name in left if name not in GROUPS[group]]
    return ", ".join([*groups, *left])


def default_of(config: type[Config], name: str) -> str:
    """A default as a user types it; – where the preset, a trace or the model's depth gives it."""
    default = next(spec.default for spec in setting_fields(config) if spec.name == name)
    assert default is not MISSING
    if default in (None, (), ""):
        return "–"
    return f"{default:g}" if isinstance(default, float) else str(default).lower()


def tables() -> dict[str, str]:
    return {"methods": methods_table(), "settings": settings_table()}


def names() -> str:
    """The source of editing/method_names.py."""
    listed = "".join(f'    "{name}",\n' for name in METHODS)
    kept = NAMES.read_text(encoding="utf-8")
    return re.sub(r"(?<=Method = Literal\[\n).*?(?=\])", lambda _: listed, kept, flags=re.DOTALL)


def main() -> None:
    if "--write" not in sys.argv[1:]:
        sys.stdout.write("\n\n".join(tables().values()) + "\n")
        return
    written = tables()
    atomic_write(NAMES, names())
    atomic_write(PAGE, MARK.sub(lambda mark: mark[1] + written[mark[2]] + mark[3], PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
