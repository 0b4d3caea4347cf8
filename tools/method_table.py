"""What follows from the registry: the tables of docs/methods.md (every method's plan, every setting with its source),
and the names in editing/method_names.py, which editors complete and type checkers check.

python tools/method_table.py            # print the tables
python tools/method_table.py --write    # put them into docs/methods.md, between its two marks, and write the names
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import MISSING
from pathlib import Path

from kt._util.files import atomic_write
from kt.editing.config import Config, setting_fields
from kt.editing.methods import METHODS

ROOT = Path(__file__).parent.parent
NAMES = ROOT / "src" / "kt" / "editing" / "method_names.py"
PAGE, MEASURED = ROOT / "docs" / "methods.md", ROOT / "docs" / "data" / "demo-methods.json"
BEGIN, END = "<!-- tools/method_table.py writes from here -->", "<!-- to here -->"
EXAMPLE = {"layers_mlp": (3, 4, 5), "layers_attn": (1, 2), "layers_high": (7, 8), "alpha": 0.3}
"""Layers and α of the plans in the table."""


def methods_table() -> str:
    """A row a method: what it does, its plan, and what was measured."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))
    measured = {(row["method"], row["edits"]): row for row in rows}
    lines = [
        "| method | what it does | searches δ at | writes | solver | order | success at 1, 10, 100 edits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, config in METHODS.items():
        plan = config.of(EXAMPLE).plan().describe()
        numbers = [measured.get((name, edits), {}).get("success") for edits in (1, 10, 100)]
        shown = ", ".join("–" if each is None else f"{each['mean']:.2f}" for each in numbers)
        about = config.summary.partition(": ")[2]
        cells = [f"`{name}`", about, *plan, shown if any(numbers) else "not measured"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def settings_table() -> str:
    """A row a setting; methods that share its default and source share the row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, config in METHODS.items():
        for spec in setting_fields(config):
            about = spec.metadata["setting"]
            key = (spec.name, default_of(config, spec.name), about.symbol, about.text, about.source)
            rows.setdefault(key, []).append(name)
    lines = ["| setting | default | symbol | what it is | source | methods |", "| --- | --- | --- | --- | --- | --- |"]
    order = list(dict.fromkeys(key[0] for key in rows))
    for key in sorted(rows, key=lambda key: order.index(key[0])):
        cells = [f"`{key[0]}`", *key[1:], ", ".join(rows[key])]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def default_of(config: type[Config], name: str) -> str:
    """A default as a user types it; – where the preset, a trace or the model's depth gives it."""
    default = next(spec.default for spec in setting_fields(config) if spec.name == name)
    assert default is not MISSING
    if default in (None, (), ""):
        return "–"
    return f"{default:g}" if isinstance(default, float) else str(default).lower()


def tables() -> str:
    return f"{methods_table()}\n\n{settings_table()}"


def names() -> str:
    """The source of editing/method_names.py."""
    listed = "".join(f'    "{name}",\n' for name in METHODS)
    kept = NAMES.read_text(encoding="utf-8")
    return re.sub(r"(?<=Method = Literal\[\n).*?(?=\])", lambda _: listed, kept, flags=re.DOTALL)


def main() -> None:
    if "--write" not in sys.argv[1:]:
        sys.stdout.write(tables() + "\n")
        return
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    atomic_write(NAMES, names())
    atomic_write(PAGE, f"{before}{BEGIN}\n{tables()}\n{END}{after}")


if __name__ == "__main__":
    main()
