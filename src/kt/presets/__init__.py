"""Hyper-parameters as data: one TOML file a model family, found by the model's shape, each value with its source.

A file holds only what differs from the one it `inherits`. Values are shared by all methods (`[hyper_parameters]`) or
for one method (`[methods.NAME]`); a variant (`[variants.NAME]`) is what the authors set for one data set, and wins.
docs/presets.md says how to write one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFile
from .reading import METHOD_NAMES, SUFFIX, SYMBOLS, Entry, Symbol, lineage, names, path_of

if TYPE_CHECKING:
    from ..model.model import TracedModel

__all__ = ["METHOD_NAMES", "SYMBOLS", "Preset", "Symbol", "Value", "preset_for", "presets", "read_preset"]


@dataclass(frozen=True)
class Value:
    """One hyper-parameter of a preset: for which method (None: for all), its symbol in the papers, its source."""

    method: str | None
    name: str
    value: Any
    symbol: str
    source: str


@dataclass(frozen=True)
class Preset:
    """What is known about editing one model: see `values` and `explain`."""

    name: str
    summary: str
    source: str
    match: Mapping[str, Any]
    variants: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()
    like: tuple[tuple[str, str], ...] = ()

    def values(self, method: str | None = None, variant: str | None = None) -> dict[str, Any]:
        """The values that all methods share, or with `method` only those of this method's own, as they stand in a
        variant.

        Raises:
            BadFile: no such variant.
        """
        return {name: entry.value for name, entry in self._entries(method, variant).items()}

    def explain(self, method: str | None = None, variant: str | None = None) -> list[Value]:
        """Every value with symbol and source: the shared ones first, then each method's own.

        With `method`, only what this method uses: a shared value that the method overrides is left out.
        """
        shared = self._entries(None, variant)
        if method is not None:
            own = self._entries(method, variant)
            shared = {name: entry for name, entry in shared.items() if name not in own}
        found = [_value(None, entry) for entry in shared.values()]
        for each in METHOD_NAMES if method is None else (method,):
            found += [_value(each, entry) for entry in self._entries(each, variant).values()]
        return found

    def matches(self, model: TracedModel) -> bool:
        """Whether it is for this model. One without `[match]`, which others build on, is for none."""
        config = model.module.config.get_text_config()
        wanted = dict(self.match)
        if not wanted or wanted.pop("name", model.name) != model.name:
            return False
        return all(getattr(config, key, None) == value for key, value in wanted.items())

    def _entries(self, method: str | None, variant: str | None) -> dict[str, Entry]:
        if variant is not None and variant not in self.variants:
            has = f"it has {', '.join(self.variants)}" if self.variants else "it has none"
            raise BadFile(f"preset {self.name} has no variant {variant!r}; {has}")
        if method is not None and method not in METHOD_NAMES:
            raise BadFile(f"no method {method!r}; there are {', '.join(METHOD_NAMES)}")
        model = dict(self.like).get(method or "")
        found = self._entries(model, variant) if model else {}
        for chosen in (None,) if variant is None else (None, variant):
            found |= {e.name: e for e in self.entries if e.method == method and e.variant == chosen}
        return found


def _value(method: str | None, entry: Entry) -> Value:
    return Value(method, entry.name, entry.value, SYMBOLS[entry.name].symbol, entry.source)


@cache
def presets() -> dict[str, Preset]:
    """The presets that are shipped, by name."""
    return {name: read_preset(path_of(name)) for name in names()}


def read_preset(path: Path) -> Preset:
    """A preset from its file, with all that it inherits.

    Raises:
        BadFile: not TOML, an unknown key or method, or a preset that is not there or inherits itself.
    """
    family = lineage(path)
    own = family[-1]
    like = {method: model for contents in family for method, model in contents.like.items()}
    if stray := [model for model in like.values() if model not in METHOD_NAMES or model in like]:
        raise BadFile(f"{path}: like = {stray[0]!r} must name a method that is not itself like another")
    return Preset(
        path.stem,
        own.summary,
        own.source,
        own.match,
        tuple(dict.fromkeys(variant for contents in family for variant in contents.variants)),
        tuple(entry for contents in family for entry in contents.entries),
        tuple(like.items()),
    )


def named(name: str) -> Preset:
    """A shipped preset by its name, or one from a file that ends in .toml.

    Raises:
        BadFile: neither.
    """
    path = path_of(name)
    return read_preset(path) if name.endswith(SUFFIX) else presets()[name]


def preset_for(model: TracedModel, name: str | None = None) -> Preset | None:
    """The named preset, or the first that matches the model; None where none does."""
    if name is not None:
        return named(name)
    return next((preset for preset in presets().values() if preset.matches(model)), None)
