"""Batches: items of like length together, as many at a time as a budget allows.

The batches follow from the items and the budget alone, so every process of a run has the same ones, and a run that is
done again repeats them. No result depends on them beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from numbers import Integral
from typing import Any, TypeVar

from .._util.kinds import shown
from ..errors import BadFact
from ..runs import parallel

T = TypeVar("T")
R = TypeVar("R")

BatchSize = int | str
"""Items of a batch, or "auto": as many as the budget of the work allows."""
AUTO_TOKENS = 4096
"""Tokens of a batch under "auto", padding counted."""
AUTO_LOGITS = 2**26
"""Logits of a batch under "auto": 256 MB in float32."""


def checked_size(batch_size: Any) -> BatchSize:
    """The rows of a batch as a plain number, or "auto".

    Raises:
        BadFact: it is neither, or below 1.
    """
    if isinstance(batch_size, str) and batch_size == "auto":
        return batch_size
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
        raise BadFact(f"batch size {shown(batch_size)} is not understood; give a number from 1, or auto")
    return int(batch_size)


def fits_forward(batch_size: BatchSize, rows: int, width: int, keep: int, vocab: int) -> bool:
    """Whether one forward takes `rows` rows of `width` tokens whose last `keep` positions get logits.

    Args:
        batch_size: the most rows, or "auto" for `AUTO_TOKENS` tokens and `AUTO_LOGITS` logits.
    """
    if batch_size != "auto":
        return rows <= int(batch_size)
    return rows * width <= AUTO_TOKENS and rows * keep * vocab <= AUTO_LOGITS


def batches_by_length(
    items: Iterable[T], length: Callable[[T], Any], fits: int | Callable[[list[T]], bool]
) -> Iterator[list[T]]:
    """Items sorted by length (equal ones as they came), cut into batches as large as `fits` allows.

    Args:
        items: what to batch.
        length: the sort key of an item, its padded cost first.
        fits: the most items of a batch, or whether a batch, whose last item is its longest, is small enough. An item
            that does not even fit alone is a batch of its own.
    """
    small_enough = fits if callable(fits) else lambda batch: len(batch) <= fits
    batch: list[T] = []
    for item in sorted(items, key=length):
        batch.append(item)
        if len(batch) > 1 and not small_enough(batch):
            yield batch[:-1]
            batch = [item]
    if batch:
        yield batch


def map_batches(
    name: str,
    batches: Iterable[Sequence[T]],
    run: Callable[[Any], R],
    done: Callable[[int], None] = lambda n: None,
    size: Callable[[Any], int] = len,
) -> list[R]:
    """The result of every batch, in their order; the processes of a run share the batches.

    Args:
        name: of this work, the same in every process.
        batches: the same in every process.
        run: computes one batch.
        done: called after each batch with the number of items finished since the last call.
        size: how many items a batch counts for.
    """
    parts = list(batches)
    ends = [0, *accumulate(map(size, parts))]
    told = 0

    def tick(count: int) -> None:
        nonlocal told
        done(ends[count] - told)
        told = ends[count]

    return parallel.map_over_ranks(name, parts, run, tick)
