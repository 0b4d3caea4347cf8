"""Public names of a package that are imported on first use (PEP 562), so that importing the package stays fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names live in other modules.

    Args:
        package: the package's `__name__`.
        homes: for each public name the module that defines it, relative to the package (`.model.load`).

    Returns:
        The two functions, to be assigned at the package's top level. A name is kept in the package once it is loaded.
        `dir` shows the public names, the modules of the package that are loaded, and Python's own names.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        held = vars(sys.modules[package])
        own = {name for name, value in held.items() if getattr(value, "__name__", "").startswith(f"{package}.")}
        return sorted({*own, *homes, *(name for name in held if name.startswith("__"))})

    return load, names
