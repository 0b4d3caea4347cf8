"""The shipped presets, one TOML file each; kt.editing.presets reads them. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._util.lazy import attach

if TYPE_CHECKING:
    from ..editing.presets import Preset, Value, named, preset_for, presets, read_preset

__all__ = ["Preset", "Value", "named", "preset_for", "presets", "read_preset"]

__getattr__, __dir__ = attach(__name__, dict.fromkeys(__all__, "..editing.presets"))
