"""Hyper-parameters as data: one TOML file a model (family), found by the model's shape and name."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from ..model import TracedModel

FOLDER = Path(__file__).parent


@cache
def presets() -> dict[str, dict[str, Any]]:
    """All presets by name: `match` (what model it is for), `source`, and hyper-parameters."""
    return {p.stem: tomllib.loads(p.read_text(encoding="utf-8")) for p in sorted(FOLDER.glob("*.toml"))}


def preset_for(model: TracedModel, name: str | None = None) -> dict[str, Any]:
    """The named preset's hyper-parameters, or those of the first preset that matches the model; empty for none."""
    if name is not None:
        if name not in presets():
            raise BadFile(f"no preset {name!r}; there are {', '.join(presets())}")
        return dict(presets()[name]["hyper_parameters"])
    for preset in presets().values():
        wanted = preset["match"]
        config = model.module.config.get_text_config()
        if "name" in wanted and model.name != wanted["name"]:
            continue
        if all(getattr(config, key, None) == value for key, value in wanted.items() if key != "name"):
            return dict(preset["hyper_parameters"])
    return {}
