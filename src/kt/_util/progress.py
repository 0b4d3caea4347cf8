"""How long work reports how far it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Progress = Callable[[int, int], None]
"""Called with what is done and how much there is."""

Stage = Callable[[str], AbstractContextManager[Any]]
"""Opens a stage by name and gives what to report its progress to."""
