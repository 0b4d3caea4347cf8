"""Presets: hyper-parameters as data, one TOML file a model family, found by the model's shape, each value sourced.

A file of `src/kt/presets/` holds only what differs from the one it `inherits`. Values are shared by all methods
(`[hyper_parameters]`) or for one method (`[methods.NAME]`); a variant (`[variants.NAME]`) is what the authors set for
one data set, and wins. Every key is checked against the methods' settings when the file is read, so that a misspelt one
is an error and not a value that is never used. docs/presets.md says how to write one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.data import read_toml
from .._util.kinds import require_kinds
from ..errors import BadFile, KtError, warn_user
from .closed_form.config import check_alpha
from .config import Config, check_value
from .methods import METHODS, all_settings, method_named, plain_name, setting_types, unused

if TYPE_CHECKING:
    from ..model.model import TracedModel

FOLDER = Path(__file__).parents[1] / "presets"
SUFFIX = ".toml"
TOP = ("summary", "source", "inherits", "match", "hyper_parameters", "methods", "variants")
VARIANT = ("summary", "source", "hyper_parameters", "methods")
ABOUT = ("source", "sources")  # keys of a table of values that are no values


class Entry(NamedTuple):
    """One value: for a method (None: for all), in a variant (None: in all)."""

    method: str | None
    variant: str | None
    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Contents:
    """A file's own part of a preset, and which presets come before it."""

    summary: str
    source: str
    inherits: str | None
    match: Mapping[str, Any]
    entries: tuple[Entry, ...]
    like: Mapping[str, str]
    variants: tuple[str, ...]


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
    """Hyper-parameters for editing one model; see `values` and `explain`."""

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

    def shared(self, method: str, variant: str | None = None) -> dict[str, Any]:
        """The values for all methods that this one takes; see `Config.depth` for the layers that it may not."""
        return {name: entry.value for name, entry in self._shared(method, variant).items()}

    def explain(self, method: str | None = None, variant: str | None = None) -> list[Value]:
        """Every value with symbol and source: the shared ones first, then each method's own.

        With `method`, only what this method uses: left out is a shared value that the method overrides, and so are
        shared layers of which it has its own.
        """
        if method is None:
            shared = self._entries(None, variant)
        else:
            overridden = self._entries(method, variant)
            shared = {n: entry for n, entry in self._shared(method, variant).items() if n not in overridden}
        values = [_value(None, entry) for entry in shared.values()]
        for each in METHODS if method is None else (method,):
            values += [_value(each, entry) for entry in self._entries(each, variant).values()]
        return values

    def matches(self, model: TracedModel) -> bool:
        """Whether the preset is for this model. A base preset, without `[match]`, matches none."""
        config = model.module.config.get_text_config()
        wanted = dict(self.match)
        if not wanted or wanted.pop("name", model.name) != model.name:
            return False
        return all(getattr(config, key, None) == value for key, value in wanted.items())

    def _shared(self, method: str, variant: str | None) -> dict[str, Entry]:
        """Without the MLP layers where the method has a depth of its own: those of a preset are MEMIT's, and a method
        that was made for one late layer would write several early ones."""
        skipped = {"layers_mlp"} if method_named(method).depth else set()
        return {name: entry for name, entry in self._entries(None, variant).items() if name not in skipped}

    def _entries(self, method: str | None, variant: str | None) -> dict[str, Entry]:
        if variant is not None and variant not in self.variants:
            has = f"it has {', '.join(self.variants)}" if self.variants else "it has none"
            raise BadFile(f"preset {self.name} has no variant {variant!r}; {has}")
        if method is not None and method not in METHODS:
            raise BadFile(f"no method {method!r}; there are {', '.join(METHODS)}")
        model = dict(self.like).get(method or "")
        entries = self._entries(model, variant) if model else {}
        for chosen in (None,) if variant is None else (None, variant):
            entries |= {e.name: e for e in self.entries if e.method == method and e.variant == chosen}
        return entries


def _value(method: str | None, entry: Entry) -> Value:
    return Value(method, entry.name, entry.value, all_settings()[entry.name].symbol, entry.source)


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
    last = family[-1]
    like = {method: model for contents in family for method, model in contents.like.items()}
    if stray := [model for model in like.values() if model not in METHODS or model in like]:
        raise BadFile(f"{path}: like = {stray[0]!r} must name a method that is not itself like another")
    return Preset(
        path.stem,
        last.summary,
        last.source,
        last.match,
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


def preset_for(model: TracedModel, name: str | os.PathLike[str] | None = None) -> Preset | None:
    """The named preset, or the first that matches the model; None where none does. A named one that is for another
    model is taken as it is, with a warning."""
    if name is not None:
        require_kinds({"preset": name}, {"preset": ((str, os.PathLike), "its name, or a TOML file")})
        chosen = named(os.fspath(name))
        if chosen.match and not chosen.matches(model):
            wanted = ", ".join(f"{key} {value}" for key, value in chosen.match.items())
            warn_user(
                f"preset {chosen.name} is for another model ({wanted}): its layers and numbers are used all the same"
            )
        return chosen
    return next((preset for preset in presets().values() if preset.matches(model)), None)


OPTIONS = (
    "alpha", "preset", "variant", "method", "statistics", "context_templates", "seed", "journal", "progress", "history",
    "keep_history", "norm_guard", "norm_facts", "update_guard", "alpha_facts", "requests", "corpus", "max_tokens",
    "check", "strict", "hold",
)  # fmt: skip
"""What `kt.edit` takes beside a method's settings."""


def configured(
    known: Preset | None,
    /,
    method: str = "intattn",
    alpha: float | str | None = None,
    variant: str | None = None,
    **given: Any,
) -> Config:
    """`resolve.configure` for a preset that is known; needs no model."""
    chosen, given = method_named(method), checked_settings(method, alpha, **given)
    shared = {} if known is None else known.shared(method, variant)
    method_values = {} if known is None else known.values(method, variant)
    values = shared | chosen.own_defaults() | method_values | given
    for name in [name for name in values if name.startswith("layers")]:
        if not values[name] and name not in given:
            del values[name]
        else:
            _require_layers(name, values[name])
            values[name] = tuple(int(layer) for layer in values[name])
    values["alpha"] = check_alpha(values.get("alpha", "auto") if alpha is None else alpha)
    if not chosen.writes_attention:
        del values["alpha"]
    config = chosen.of(values)
    config.refuse_idle({name: value for name, value in given.items() if value is not None})
    return config


def _require_layers(name: str, layers: Sequence[int]) -> None:
    """Refuse no layers, but of attention, which an edit may leave alone.

    Raises:
        KtError: there are none.
    """
    if not layers and name != "layers_attn":
        raise KtError(f"{name} is empty; give at least one layer")


def checked_settings(method: str, alpha: float | str | None = None, /, **given: Any) -> dict[str, Any]:
    """The settings under their own names, where the method has each and its value is of the right type and range.

    Args:
        alpha: attention's share, which is no setting; only methods that write attention take one above 0.

    Raises:
        KtError: it has not, or it is not.
    """
    if alpha is not None and check_alpha(alpha) != 0 and not method_named(method).writes_attention:
        raise KtError(f"alpha {alpha!r} was given to a method that leaves attention alone; use intattn, or no alpha")
    if why := unused((name for name, value in given.items() if value is not None), [method], OPTIONS):
        raise KtError(why)
    given, types, own = _renamed(given), setting_types(), method_named(method).settings()
    for name, value in given.items():
        about = own[plain_name(name)]
        value = tuple(value) if isinstance(value, list | range | set) else value
        check_value(name, types[name], value, about.least, about.most)
    return given


def _renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Other spellings of names and values: `layers`, JEEP's `_low` for its low region, EasyEdit's false for none.

    Raises:
        KtError: a setting is given under two of its names.
    """
    named: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for name, value in given.items():
        if value is None:
            continue
        plain = plain_name(name)
        if plain in spelt:
            raise KtError(
                f"{spelt[plain]} {named[plain]!r} and {name} {value!r} are two names of one setting; give {plain} alone"
            )
        named[plain], spelt[plain] = value, name
    named |= {name: os.fspath(value) for name, value in named.items() if isinstance(value, os.PathLike)}
    if named.get("norm_constraint") is False:
        named["norm_constraint"] = None
    return named


# From a TOML file to its entries.


def names() -> list[str]:
    """The presets that are shipped."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def path_of(name: str, beside: Path = Path()) -> Path:
    """The file of a preset: a shipped name, or the path of a TOML file (from the file that inherits it)."""
    if name.endswith(SUFFIX):
        return beside / name
    if name not in names():
        near = get_close_matches(name.lower(), names(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadFile(f"no preset {name!r}; there are {', '.join(names())}, or name a file that ends in {SUFFIX}{hint}")
    return FOLDER / f"{name}{SUFFIX}"


def lineage(path: Path) -> list[Contents]:
    """The file's contents after those of every preset that it builds on."""
    seen: list[Path] = []
    contents: list[Contents] = []
    while True:
        if path.resolve() in seen:
            raise BadFile(
                f"{path}: inherits itself ({' -> '.join(p.stem for p in [*seen, path])}); take one `inherits` out"
            )
        seen.append(path.resolve())
        contents.append(read(path))
        above = contents[-1].inherits
        if above is None:
            return contents[::-1]
        path = _above(path, above)


def _above(path: Path, name: str) -> Path:
    try:
        above = path_of(name, path.parent)
    except BadFile as error:
        raise BadFile(f"{path}: inherits: {error}") from None
    if not above.is_file():
        raise BadFile(
            f"{path}: inherits {name!r}, and there is no file {above}; "
            "name a preset of kt presets ls, or a file beside this one"
        )
    return above


def read(path: Path) -> Contents:
    """One file, checked."""
    table = read_toml(path)
    _only(path, "", table, TOP)
    source = _text(path, table, "source") or path.name
    inherits = _text(path, table, "inherits")
    variants = _table(path, "", table, "variants")
    entries = list(_entries(path, "", table, None, source))
    for name in variants:
        where = f"variants.{name}"
        variant = _table(path, "variants", variants, name)
        _only(path, where, variant, VARIANT)
        entries += _entries(path, where, variant, name, _text(path, variant, "source") or source)
    methods = _table(path, "", table, "methods")
    like = {method: model for method, values in methods.items() if (model := _text(path, values, "like"))}
    match = _table(path, "", table, "match")
    summary = _text(path, table, "summary") or ""
    return Contents(summary, source, inherits, match, tuple(entries), like, tuple(variants))


def _entries(path: Path, where: str, table: Mapping[str, Any], variant: str | None, source: str) -> Iterator[Entry]:
    """The values of a file, or of one of its variants."""
    dot = f"{where}." if where else ""
    shared = _table(path, where, table, "hyper_parameters")
    yield from _values(path, f"{dot}hyper_parameters", shared, None, variant, source, ABOUT)
    methods = _table(path, where, table, "methods")
    for method in methods:
        if method not in METHODS:
            raise BadFile(f"{path}: [{dot}methods.{method}] is no method of kt; known are {', '.join(METHODS)}")
        values = _table(path, f"{dot}methods", methods, method)
        about = ABOUT if variant else (*ABOUT, "like")
        yield from _values(path, f"{dot}methods.{method}", values, method, variant, source, about)


def _values(
    path: Path,
    where: str,
    table: Mapping[str, Any],
    method: str | None,
    variant: str | None,
    source: str,
    about: tuple[str, ...],
) -> Iterator[Entry]:
    _only(path, where, table, (*about, *all_settings()))
    source = _text(path, table, "source") or source
    sources = _table(path, where, table, "sources")
    _only(path, f"{where}.sources", sources, tuple(name for name in table if name not in about))
    types = setting_types()
    for name, value in table.items():
        if name not in about:
            value = tuple(value) if isinstance(value, list) else value
            try:
                _check(name, types[name], value)
            except KtError as error:
                raise BadFile(f"{path}: [{where}]: {error}") from None
            yield Entry(method, variant, name, value, _text(path, sources, name) or source)


def _check(name: str, annotation: str, value: Any) -> None:
    """Refuse a value that the setting cannot have.

    Raises:
        KtError: it is of the wrong type, outside its range, or layers that are none or name one twice.
    """
    if name == "alpha":
        check_alpha(value)
        return
    check_value(name, annotation, value)
    if name.startswith("layers"):
        _require_layers(name, value)


def _only(path: Path, where: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise BadFile(f"{path}: unknown key {key!r}{f' in [{where}]' if where else ''}; {hint}")


def _table(path: Path, where: str, table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise BadFile(f"{path}: {f'{where}.' if where else ''}{key} must be a table, see docs/presets.md")
    return value


def _text(path: Path, table: Mapping[str, Any], key: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise BadFile(f"{path}: {key} {value!r} must be a text, in quotes")
    return value
