"""KnowEdit's WikiBio: the sentence that should follow a biography's beginning, in place of an invented one."""

from __future__ import annotations

from dataclasses import replace

from ..fact import Fact
from ..record import Choices, Record
from .easyedit import read_easyedit

KEYS = {"text": "prompt", "concept": "subject", "labels": "target_new"}
"""WikiBio's names for the keys of an EasyEdit request; `locality` has the same form in both."""


def read_wikibio(record: Record, choices: Choices) -> list[Fact]:
    """The target is a sentence; the old answer is unknown, since the invented sentence is not in the file."""
    for key in KEYS:
        replace(record, notes=[]).filled(key)  # an error names the file's own key
    return read_easyedit(replace(record, data={KEYS.get(key, key): v for key, v in record.data.items()}), choices)
