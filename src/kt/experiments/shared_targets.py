"""Values that several methods search for alike (the same fact, place, objective and prefixes), searched once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._util.progress import reused
from ..errors import BadFile, warn_user
from ..facts.fact import facts_digest
from ..runs.journal import Journal
from ..runs.provenance import peak_memory

SEARCH = ("model", "facts", "aims", "contexts", "objective")
"""The arguments of a search that depends on nothing else."""
SEARCHED = "-searched"
"""The folder of searched values beside those of rows, none of which begins with a dash."""


class Found(NamedTuple):
    """What a search found for one fact, the CPU seconds that it took, and the process's peak memory then, in bytes."""

    values: dict[str, Any]
    seconds: float
    peak: int


class SharedTargets(Journal):
    """A journal for edits of one model: it keeps the searched values fact by fact, and no other phase.

    A value belongs to the bytes of the model that it was found in. So that what a method costs can be said as if it had
    searched alone, `seconds` counts the CPU seconds that the values took which were found before, and `peak` is the
    most memory (bytes) in which one of them was found; `count_from` lets both begin anew.

    Args:
        folder: where values are kept for other processes; None: in memory.

    Attributes:
        before_keeping: called before a value is kept in the folder: what goes on there must find its settings.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__(folder)
        self._held: dict[str, Found] = {}
        self.before_keeping: Callable[[], None] = lambda: None
        self.count_from(lambda: peak_memory().get("host", 0))

    def count_from(self, memory: Callable[[], int]) -> None:
        """Count from here; `memory` gives the peak in bytes that a search has reached."""
        self.memory, self.seconds, self.peak = memory, 0.0, 0

    def within(self, part: str) -> SharedTargets:
        return self

    def take(self, name: str, compute: Callable[..., Any], *arguments: Any) -> Any:
        return compute(*arguments)

    def take_each(
        self,
        name: str,
        compute: Callable[..., Any],
        phases: Mapping[str, Sequence[Any]],
        progress: Callable[[int], Any] | None = None,
    ) -> list[Any]:
        searched = name.startswith("targets-")
        found = []
        for done, arguments in enumerate(phases.values(), start=1):
            # The parts of a long answer are searched for with those before in place, and a term that holds tensors
            # (EAMET's) is of one search: nothing to share.
            shared = searched and len(arguments) == len(SEARCH) and not _holds_tensors(arguments[-1])
            found.append(self._searched(compute, *arguments) if shared else compute(*arguments))
            if progress is not None:
                progress(done)
        return found

    def _searched(
        self,
        compute: Callable[..., dict[str, Any]],
        model: Any,
        facts: Sequence[Any],
        aims: Any,
        contexts: Any,
        objective: Any,
    ) -> dict[str, Any]:
        about = repr((model.fingerprint(), [str(aim) for aim in aims], contexts, objective))
        names = [
            f"target-{hashlib.sha256(f'{about} {facts_digest([fact])}'.encode()).hexdigest()[:24]}" for fact in facts
        ]
        before = [self._known(name) for name in names]
        missing = [i for i, value in enumerate(before) if value is None]
        if not missing:
            reused()
        else:
            start = time.process_time()
            found = compute(model, [facts[i] for i in missing], aims, contexts, objective)
            cost = (time.process_time() - start) / len(missing), self.memory()
            self.before_keeping()
            for row, i in enumerate(missing):
                self._held[names[i]] = own = Found({key: _row(value, row) for key, value in found.items()}, *cost)
                self.replace(names[i], own._asdict())
        known = [each for each in before if each is not None]
        self.seconds += sum(each.seconds for each in known)
        self.peak = max([self.peak, *(each.peak for each in known)])
        values = [self._held[name].values for name in names]
        return {key: _joined([value[key] for value in values]) for key in values[0]}

    def _known(self, name: str) -> Found | None:
        if name not in self._held:
            try:
                kept = self.checkpoint(name)
            except BadFile as error:
                warn_user(f"{str(error).partition('; ')[0]}: this value is searched for again")
                kept = None
            if kept is not None:
                self._held[name] = Found(**kept[0])
        return self._held.get(name)


def _holds_tensors(objective: Any) -> bool:
    return any(isinstance(value, Tensor) for term in objective.terms for value in vars(term).values())


def _row(value: Any, index: int) -> Any:
    """One fact's row of a tensor, or of each in a list."""
    return [_row(each, index) for each in value] if isinstance(value, list) else value[index : index + 1].clone()


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [torch.cat(each) for each in zip(*values, strict=True)]
    return torch.cat(values)
