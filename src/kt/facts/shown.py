"""Facts as a notebook shows them: a table, where a plain list would be a column of cut texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from .._util.text import count, visible
from .fact import Fact

if TYPE_CHECKING:
    from ..report import Table

MOST = 50
"""Rows of facts in a notebook."""


class Facts(list[Fact]):
    """A list of facts, which a notebook shows as a table; a slice of it is one too."""

    @overload
    def __getitem__(self, place: SupportsIndex) -> Fact: ...
    @overload
    def __getitem__(self, place: slice) -> Facts: ...
    def __getitem__(self, place: SupportsIndex | slice) -> Fact | Facts:
        found = super().__getitem__(place)
        return found if isinstance(found, Fact) else Facts(found)

    def _repr_html_(self) -> str:
        first = f", the first {MOST}" if len(self) > MOST else ""
        return facts_table(self[:MOST], count(len(self), "fact") + first)._repr_html_()


def facts_table(facts: Sequence[Fact], title: str = "") -> Table:
    """A row a fact: prompt, subject and answers, and how many prompts stand beside it; columns that some fact fills."""
    from ..report import Table

    texts = [name for name in ("answer", "foil", "target") if any(getattr(fact, name) for fact in facts)]
    beside = {"rephrasings": "paraphrases", "neighbours": "neighbours", "hops": "hops"}
    counted = [name for name in beside if any(getattr(fact, name) for fact in facts)]

    def row(fact: Fact) -> list[Any]:
        said = [getattr(fact, name) for name in texts]
        asked = [fact.prompt, fact.subject, *said]
        return [*(None if text is None else visible(text) for text in asked), *(len(getattr(fact, n)) for n in counted)]

    return Table(["prompt", "subject", *texts, *(beside[name] for name in counted)], list(map(row, facts)), title)
