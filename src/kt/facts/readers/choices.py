"""What a user may choose about how a data set is read."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from ...errors import BadFact

ZsreTarget = Literal["answer", "alt"]


class Choices(NamedTuple):
    """`zsre_target`: the side of a zsRE record that is edited in; `known_to`: only what this model answers."""

    zsre_target: str = "answer"
    known_to: str | None = None

    def checked(self) -> Choices:
        if self.zsre_target not in get_args(ZsreTarget):
            known = " or ".join(get_args(ZsreTarget))
            raise BadFact(f"zsRE target {self.zsre_target!r} is not understood; choose {known}")
        return self
