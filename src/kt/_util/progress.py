"""Types of the callbacks that report progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Progress = Callable[[int, int], None]
"""Called with (units done, units in all)."""

Stage = Callable[[str], AbstractContextManager[Any]]
"""Opens a stage by name; the context's value is the stage's `Progress`."""
