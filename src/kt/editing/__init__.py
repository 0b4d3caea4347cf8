"""Edits: solved in closed form or by gradient steps, kept as files, written and taken back."""

from .closed_form.second_moment import Statistics, key_statistics, memory_needed
from .edit import Edit
from .methods import METHODS
from .session import EditSession, edit

__all__ = ["METHODS", "Edit", "EditSession", "Statistics", "edit", "key_statistics", "memory_needed"]
