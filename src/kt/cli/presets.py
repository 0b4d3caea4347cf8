"""`kt presets`: the values of a preset, each with the papers' symbol and its source."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._util.text import runs_of
from . import checks
from .app import ListOptions, ls
from .command import BadOption, Options
from .options import Opt
from .session import screen_for, write_result

if TYPE_CHECKING:
    from ..presets import Preset, Value


ORDER = (
    "a later one counts: what holds for all, the method's own defaults (kt.editing.methods), what is here for the "
    "method, what you give with --set"
)
WIDEST = {"for": 14, "what it is": 30}
"""Wrapped here, where words break; left to the table, the names of hyper-parameters would break, too."""


@dataclass(frozen=True)
class PresetOptions(Options):
    action: Annotated[str, typer.Argument(metavar="[ls|show]")] = "ls"
    name: Annotated[str, typer.Argument(metavar="NAME", help="A preset, or a TOML file of your own.")] = ""
    method: Annotated[str | None, Opt("--method", help="Only what this method uses.")] = None
    variant: Annotated[str | None, Opt("--variant", help="As the authors set it for a data set: mcf, zsre.")] = None


def presets(options: PresetOptions) -> None:
    """List the presets, or explain one: every value with the papers' symbol and its source."""
    if options.action == "ls":
        if options.name:
            raise BadOption(f"kt presets ls takes no name; write kt presets show {options.name}")
        checks.idle(options)
        return ls(ListOptions(**{**_common(options), "what": "presets"}))
    if options.action != "show":
        raise BadOption(f"kt presets {options.action!r}: unknown; write kt presets show NAME, or kt presets ls")
    from ..presets import named
    from ..presets import presets as known
    from ..report import Table
    from ..report.table import pairs

    if not options.name:
        raise BadOption(f"kt presets show needs a name: {', '.join(known())}, or a TOML file of your own")
    preset = named(options.name)
    values = preset.explain(options.method, options.variant)
    # A source is longer than all the rest of a row, and holds for many rows: it stands below, by number.
    sources = list(dict.fromkeys(value.source for value in values))
    title = f"{preset.summary or preset.name}{f', {options.variant}' if options.variant else ''}"
    columns = ["for", "name", "value", "symbol", "what it is", "source"]
    numbered = list(enumerate(sources, 1))
    screen_for(options).tables(Table(columns, rows(values, sources), title, ORDER), pairs(numbered, "sources"))
    write_result(options, as_json(preset, values, options))
    return None


def rows(values: list[Value], sources: list[str]) -> list[list[Any]]:
    """A row a value; methods that take a value from the same place share the row."""
    from ..editing.methods import all_settings

    settings = all_settings()
    methods_of: dict[tuple[Any, ...], list[str]] = {}
    for value in values:
        about = fill(settings[value.name].text, WIDEST["what it is"])
        key = (value.name, written(value.value), value.symbol, about, sources.index(value.source) + 1)
        methods_of.setdefault((value.method is None, *key), []).append(value.method or "all")
    return [[fill(", ".join(methods), WIDEST["for"]), *key[1:]] for key, methods in methods_of.items()]


def written(value: Any) -> str:
    """A value as a user types it: 4-8, 0.0625, false."""
    if isinstance(value, tuple):
        return runs_of(value, ",") or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_json(preset: Preset, values: list[Value], options: PresetOptions) -> dict[str, Any]:
    from ..editing.methods import all_settings

    settings = all_settings()
    return {
        "preset": preset.name,
        "summary": preset.summary,
        "source": preset.source,
        "variants": list(preset.variants),
        "method": options.method,
        "variant": options.variant,
        "values": [asdict(value) | {"about": settings[value.name].text} for value in values],
    }


def _common(options: Options) -> dict[str, Any]:
    """The values of the options that every command has."""
    return {spec.name: getattr(options, spec.name) for spec in fields(Options)}
