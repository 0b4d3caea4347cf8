"""Values that several methods search for alike (the same fact, place, objective and prefixes), searched once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..facts.fact import facts_digest
from ..runs.journal import Journal

SEARCH = ("model", "facts", "aims", "contexts", "objective")
"""The arguments of a search that depends on nothing else."""


class SharedTargets(Journal):
    """A journal for edits of one model: it keeps the searched values fact by fact, and no other phase.

    A value belongs to the bytes of the model that it was found in. `seconds` counts the CPU seconds that finding the
    values took that were found before, so that what a method costs can be said as if it had searched alone.

    Args:
        folder: where values are kept for other processes; None: in memory.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__(folder)
        self.seconds = 0.0
        self._held: dict[str, tuple[dict[str, Any], float]] = {}

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
            # The parts of a long answer are searched for with those before in place: nothing to share.
            shared = searched and len(arguments) == len(SEARCH)
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
        if missing:
            start = time.process_time()
            found = compute(model, [facts[i] for i in missing], aims, contexts, objective)
            seconds = (time.process_time() - start) / len(missing)
            for row, i in enumerate(missing):
                self._hold(names[i], {key: _row(value, row) for key, value in found.items()}, seconds)
        self.seconds += sum(value[1] for value in before if value is not None)
        parts = [self._known(name) for name in names]
        values = [part[0] for part in parts if part is not None]
        return {key: _joined([value[key] for value in values]) for key in values[0]}

    def _known(self, name: str) -> tuple[dict[str, Any], float] | None:
        if name not in self._held and (kept := self.checkpoint(name)) is not None:
            self._held[name] = (kept[0]["found"], kept[0]["seconds"])
        return self._held.get(name)

    def _hold(self, name: str, found: dict[str, Any], seconds: float) -> None:
        self._held[name] = (found, seconds)
        self.replace(name, {"found": found, "seconds": seconds})


def _row(value: Any, index: int) -> Any:
    """One fact's row of a tensor, or of each in a list."""
    return [_row(each, index) for each in value] if isinstance(value, list) else value[index : index + 1].clone()


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [torch.cat(each) for each in zip(*values, strict=True)]
    return torch.cat(values)
