"""The names of kt's methods as a type, so that editors complete `method=` and type checkers refuse a misspelt one.

`python tools/method_table.py --write` writes the list from the registry; a test compares them. A method of one's own is
given by its configuration, or by its name as `MethodName("mine")`.
"""

from __future__ import annotations

from typing import Literal, NewType, TypeAlias

from .config import Config

MethodName = NewType("MethodName", str)
"""A method's name that no list here knows: read from a file or typed by a user."""

Method = Literal[
    "intattn",
    "core",
    "eamet",
    "encore",
    "lyaplock",
    "memit",
    "memit-blue",
    "memit-fe",
    "nse",
    "rome",
    "r-rome",
    "intattn-rome",
    "pmet",
    "alphaedit",
    "betaedit",
    "evoedit",
    "alphaedit-are",
    "emmet",
    "memit-are",
    "jeep",
    "unke",
    "stableedit",
    "ultraedit",
    "ft",
    "ft-l",
    "ft-m",
    "crispedit",
    "ft-wd",
    "locft",
    "lora",
    "malmen",
    "mend",
    "grace",
    "melo",
    "memoir",
    "wise",
    "ice",
    "ike",
    "scr",
]

MethodLike: TypeAlias = Config | Method | MethodName
"""What `method=` takes."""
