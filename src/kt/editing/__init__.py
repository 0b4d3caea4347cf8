"""Edits: solved in closed form or by gradient steps, kept as files, written and taken back."""

from .edit import Edit
from .methods import METHODS
from .session import EditSession
from .solve import edit
from .statistics import Statistics, key_statistics, memory_needed

__all__ = ["METHODS", "Edit", "EditSession", "Statistics", "edit", "key_statistics", "memory_needed"]
