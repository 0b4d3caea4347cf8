"""The editing methods, one file each: its configuration, its plan, its `@method` line. Found by listing this folder."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..config import REGISTERED, Config, Setting, one_of, setting_fields, type_of

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

METHODS: dict[str, type[Config]] = dict(sorted(REGISTERED.items(), key=lambda item: (item[1].place, item[0])))


def method_named(name: str) -> type[Config]:
    """The configuration class of a method.

    Raises:
        KtError: no such method; the message lists those that are known.
    """
    return METHODS[one_of(name, METHODS, "method")]


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
