"""Several processes at one run, as torchrun starts them: each does its share, and all have all the results.

Every process runs the same program, and does the same in it, but for three things:

    by_main(name, do)        rank 0 does it; the others get what it gave
    each(name, parts, do)    rank r does the parts r, r + N, r + 2N, ...; all get all results, in the order of the parts
    summed(name, tensors)    sums over the processes

Each begins with a meeting: everyone says where it is and what went wrong. So an error of one is raised by all, and
processes that went different ways end instead of taking each other's results. Inside `do` a process is alone: what it
calls there shares nothing. Without `join` there is one process, and all of this is a plain call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import KtError

if TYPE_CHECKING:
    from torch import Tensor

    from .exchange import Failure, Peers

P = TypeVar("P")
T = TypeVar("T")

_peers: Peers | None = None
_alone = [0]


def started() -> int:
    """How many processes the launcher started; 1 without one. Nothing is imported to say so."""
    value = os.environ.get("WORLD_SIZE", "")
    return max(1, int(value)) if value.isdigit() else 1


def started_as() -> int:
    """Which of them this one is, also before `join`."""
    value = os.environ.get("RANK", "")
    return int(value) if started() > 1 and value.isdigit() else 0


def join() -> None:
    """Meet the other processes that the launcher started; without one, nothing. Once is enough.

    Raises:
        WorkFailed: they cannot be reached.
    """
    global _peers
    if _peers is None and started() > 1:
        from .exchange import Peers

        _peers = Peers.met()


def leave() -> None:
    """Part from the others, at the end of a run that went well."""
    global _peers
    if _peers is not None:
        _peers.part()
    _peers = None


def joined() -> bool:
    """Whether there are others, also while this process is at a part of its own."""
    return _peers is not None


def count() -> int:
    """How many processes share the work; 1 before `join`, and within a part."""
    return 1 if _peers is None or _alone[0] else _peers.count


def is_main() -> bool:
    """Whether this process is the one that speaks and writes."""
    return _peers is None or _peers.rank == 0


def local() -> int:
    """Which of the processes on its own machine this one is, hence which GPU it takes; 0 before `join`."""
    value = os.environ.get("LOCAL_RANK", "")
    return int(value) if joined() and value.isdigit() else 0


def beside() -> int:
    """How many processes share this machine, hence its memory; 1 while this one is alone at its part."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(value)) if count() > 1 and value.isdigit() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process shares nothing."""
    _alone[0] += 1
    try:
        yield
    finally:
        _alone[0] -= 1


def by_main(name: str, do: Callable[..., T], *arguments: Any) -> T:
    """`do(*arguments)`, done by rank 0 alone; the others get its result, with tensors on the CPU.

    Raises:
        Exception: what `do` raised, in every process; an error that is not kt's is a WorkFailed in the others.
    """
    peers = _shared()
    if peers is None:
        return do(*arguments)
    value: Any = None
    failure: Failure | None = None
    if peers.rank == 0:
        try:
            with alone():
                value = do(*arguments)
        except Exception as error:
            failure = peers.failure(0, error)
    return peers.from_main(name, value, failure)


def each(name: str, parts: Sequence[P], do: Callable[[P], T], progress: Callable[[int], Any] | None = None) -> list[T]:
    """`do` of every part, shared out; the results of all in the order of the parts, those of others on the CPU.

    Args:
        name: of this work, the same in every process.
        parts: the same in every process. What a part gives must not depend on who does it.
        progress: called with how many parts are done; the others are taken to be as far as this process.

    Raises:
        Exception: what `do` raised for the first part that failed, in every process; see `by_main`.
    """
    peers = _shared()
    own: list[T] = []
    if peers is None:
        for at, part in enumerate(parts, start=1):
            own.append(do(part))
            if progress is not None:
                progress(at)
        return own
    failure: Failure | None = None
    for at in range(peers.rank, len(parts), peers.count):
        failed = peers.told_failure()
        if failed is not None and failed < at:
            break
        try:
            with alone():
                own.append(do(parts[at]))
        except Exception as error:
            failure = peers.failure(at, error)
            peers.tell_failure(at)
            break
        if progress is not None:
            progress(min(at - peers.rank + peers.count, len(parts)))
    hands = peers.exchange(name, own, failure)
    return [hands[at % peers.count][at // peers.count] for at in range(len(parts))]


def gathered(name: str, value: T) -> list[T]:
    """Every process's value, in the order of ranks."""
    peers = _shared()
    return [value] if peers is None else peers.exchange(name, value)


def agree(values: Mapping[str, Any]) -> None:
    """Refuse a run whose processes do not have the same value of everything named: their parts would not go together.

    Raises:
        KtError: in every process.
    """
    found = gathered("agreeing", dict(values))
    for rank, theirs in enumerate(found):
        for name, value in found[0].items():
            if theirs.get(name) != value:
                raise KtError(
                    f"process {rank} has another {name} than process 0 ({_short(theirs.get(name))}, not "
                    f"{_short(value)}); start all with the same options, files and versions"
                )


def summed(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all processes, on the CPU and the same bytes in each; tensors that are there are overwritten."""
    peers = _shared()
    if peers is None:
        return list(tensors)
    sums = [tensor.detach().cpu().contiguous() for tensor in tensors]
    peers.sum(name, sums)
    return sums


def _shared() -> Peers | None:
    return None if count() == 1 else _peers


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
