"""The editing methods, one file each: its configuration, its plan, its `@method` line. Found by listing this folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ...errors import KtError
from ..config import REGISTERED, Config, Setting, one_of, setting_fields, type_of

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

METHODS = REGISTERED
"""By name, in the order of lists; a method of one's own joins them when its class is made."""
_in_order = sorted(REGISTERED.items(), key=lambda item: (item[1].place, item[0]))
REGISTERED.clear()
REGISTERED.update(_in_order)


def method_named(name: str) -> type[Config]:
    """The configuration class of a method.

    Raises:
        KtError: no such method; the message lists those that are known.
    """
    return METHODS[one_of(name, METHODS, "method")]


def layered(name: str) -> type[Config]:
    """The configuration class of a method whose layers can be chosen.

    Raises:
        KtError: no such method, or one that writes no layer or knows its own.
    """
    chosen = method_named(name)
    if "layers_mlp" not in chosen.settings():
        raise KtError(f"{name} writes no layer; choose a method that does")
    if "editor" in chosen.settings():
        raise KtError(f"{name} writes the layers that its editor was trained for; choose another method")
    return chosen


def plain_name(name: str) -> str:
    """A setting's own name: `layers` stands for `layers_mlp`, and JEEP's `_low` for the setting of its low region."""
    name = name.removesuffix("_low")
    return "layers_mlp" if name == "layers" else name


def used_by(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings that several methods share, those that one has."""
    return {name: value for name, value in values.items() if plain_name(name) in METHODS[method].settings()}


def unused(names: Iterable[str], methods: Iterable[str], others: Iterable[str] = ()) -> str | None:
    """Why none of the methods uses one of these settings, in a line; None where each has a user.

    Args:
        others: arguments beside the settings, for the guess at what was meant.
    """
    chosen = list(methods)
    own = list(dict.fromkeys(name for method in chosen for name in METHODS[method].settings()))
    for name in names:
        if plain_name(name) in own:
            continue
        users = [method for method, config in METHODS.items() if plain_name(name) in config.settings()]
        near = get_close_matches(name, [*own, *others] if users else [*own, *others, *all_settings()], n=1)
        meant = f"; did you mean {near[0]}?" if near and not (users and name.startswith("layers")) else ""
        why = f"{', '.join(chosen)} does not use it ({', '.join(users)})" if users else "unknown hyper-parameter"
        return f"{name}: {why}{meant or ';'} {', '.join(chosen)} has {', '.join(own)}"
    return None


def all_settings() -> dict[str, Setting]:
    """The settings of all methods by name; one that methods describe differently has all its descriptions."""
    merged: dict[str, Setting] = {}
    for config in METHODS.values():
        for name, each in config.settings().items():
            known = merged.setdefault(name, each)
            if each.about not in known.about:
                merged[name] = known._replace(about=f"{known.about}; {each.about}")
    return merged


def setting_types() -> dict[str, str]:
    """The type of every setting, as it is written in the first configuration that has it."""
    types: dict[str, str] = {}
    for config in METHODS.values():
        for spec in setting_fields(config):
            types.setdefault(spec.name, type_of(spec))
    return types
