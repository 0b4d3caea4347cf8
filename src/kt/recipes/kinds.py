"""The kinds of recipes, by the name that `kind` has in the TOML."""

from __future__ import annotations

from .abilities import ABILITIES
from .base import Kind
from .case import CASE
from .edits import EDITS
from .methods import METHODS_KIND
from .probe import PROBE
from .trace import TRACE

KINDS: dict[str, Kind] = {
    "edits": EDITS,
    "trace": TRACE,
    "probe": PROBE,
    "abilities": ABILITIES,
    "case": CASE,
    "methods": METHODS_KIND,
}
DEFAULT = "edits"
