"""Edits: solved in closed form or by gradient steps, kept as files, written and taken back.

Names are imported on first use, so that the methods' configurations are read without torch. (`kt.edit` is not among
them: a submodule has its name.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._util.lazy import attach

if TYPE_CHECKING:
    from .closed_form.second_moment import Statistics, key_statistics, memory_needed
    from .config import Config
    from .edit import Edit
    from .methods import METHODS
    from .resolve import configure
    from .session import EditSession

__all__ = [
    "METHODS",
    "Config",
    "Edit",
    "EditSession",
    "Statistics",
    "configure",
    "key_statistics",
    "memory_needed",
]

_HOMES = {
    "METHODS": ".methods",
    "Config": ".config",
    "Edit": ".edit",
    "EditSession": ".session",
    "Statistics": ".closed_form.second_moment",
    "configure": ".resolve",
    "key_statistics": ".closed_form.second_moment",
    "memory_needed": ".closed_form.second_moment",
}

__getattr__, __dir__ = attach(__name__, _HOMES)
