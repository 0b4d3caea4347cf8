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
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from ..errors import KtError, WorkFailed

if TYPE_CHECKING:
    from torch import Tensor


P = TypeVar("P")
T = TypeVar("T")

_peers: ProcessGroup | None = None
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
        _peers = ProcessGroup.met()


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


def on_rank_zero(name: str, do: Callable[..., T], *arguments: Any) -> T:
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


def map_over_ranks(
    name: str, parts: Sequence[P], do: Callable[[P], T], progress: Callable[[int], Any] | None = None
) -> list[T]:
    """`do` of every part, shared out; the results of all in the order of the parts, those of others on the CPU.

    Args:
        name: of this work, the same in every process.
        parts: the same in every process. What a part gives must not depend on who does it.
        progress: called with how many parts are done; the others are taken to be as far as this process.

    Raises:
        Exception: what `do` raised for the first part that failed, in every process; see `on_rank_zero`.
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


def all_gather(name: str, value: T) -> list[T]:
    """Every process's value, in the order of ranks."""
    peers = _shared()
    return [value] if peers is None else peers.exchange(name, value)


def assert_equal_on_ranks(values: Mapping[str, Any]) -> None:
    """Refuse a run whose processes do not have the same value of everything named: their parts would not go together.

    Raises:
        KtError: in every process.
    """
    found = all_gather("agreeing", dict(values))
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


def _shared() -> ProcessGroup | None:
    return None if count() == 1 else _peers


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# What passes between the processes of one run: `ranks.py` says when, this module how.
#
# All of it lies on the CPU and goes through gloo, also where the models are on GPUs: results and float64 sums are
# there
# already, and gloo notices at once that a process has gone, for which NCCL waits minutes.

PATIENCE = 4 * 3600
"""Seconds that one process waits for another that lives but does not come; KT_PATIENCE replaces it."""

_PIECE = 1 << 27  # bytes of one message


class Failure(NamedTuple):
    """What went wrong in a part. `kind` is kt's error, which all raise; None for any other."""

    part: int
    rank: int
    kind: type[KtError] | None
    message: str
    error: Exception | None  # in the process where it happened

    def reraise(self) -> NoReturn:
        """Raise it, in whatever process."""
        if self.error is not None:
            raise self.error
        if self.kind is None:
            raise WorkFailed(f"process {self.rank} of this run failed: {self.message}")
        error = self.kind.__new__(self.kind)
        error.args = (self.message,)
        raise error


class _Said(NamedTuple):
    where: str
    failure: Failure | None


@dataclass
class ProcessGroup:
    """The processes of a run, from one of them. What is set in the launcher's `store` all see without a meeting."""

    rank: int
    count: int
    group: Any
    store: Any
    meetings: int = 0
    lost: bool = False

    @classmethod
    def met(cls) -> ProcessGroup:
        """All that the launcher started, through accelerate's `PartialState`.

        Raises:
            WorkFailed: they cannot be reached.
        """
        import torch.distributed as dist
        from accelerate import PartialState

        wait = timedelta(seconds=float(os.environ.get("KT_PATIENCE") or PATIENCE))
        try:
            state = PartialState(cpu=True, backend="gloo", timeout=wait)
            group = dist.new_group(backend="gloo", timeout=wait)  # our own: a program may have one of another kind
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        except (RuntimeError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())[:200]
            raise WorkFailed(f"the processes of this run cannot meet ({said}); start them by torchrun") from None
        return cls(state.process_index, state.num_processes, group, store)

    def part(self) -> None:
        """The end of a run that went well; one that failed needs no farewell, its process just ends."""
        if not self.lost:
            import torch.distributed as dist

            dist.destroy_process_group()

    def meet(self, name: str, failure: Failure | None = None) -> None:
        """Wait for all. The failure of the first part that failed is raised by everyone."""
        import torch.distributed as dist

        heard: list[Any] = [None] * self.count
        told = None if failure is None else failure._replace(error=None)
        self._wait(dist.all_gather_object, heard, _Said(name, told), group=self.group)
        self.meetings += 1
        places = list(dict.fromkeys(said.where for said in heard))
        if len(places) > 1:
            raise WorkFailed(
                f"the processes of this run went different ways ({places[0]!r}, {places[1]!r}); start all with the "
                "same command, files and versions"
            )
        failures = [said.failure for said in heard if said.failure is not None]
        if failures:
            first = min(failures, key=lambda found: found.part)
            (failure if failure is not None and failure.part == first.part else first).reraise()

    def failure(self, part: int, error: Exception) -> Failure:
        """An error of ours, to be told to the others."""
        said = " ".join(str(error).split())
        if isinstance(error, KtError):
            return Failure(part, self.rank, type(error), said, error)
        return Failure(part, self.rank, None, f"{type(error).__name__}: {said[:300]}", error)

    def tell_failure(self, part: int) -> None:
        """Before the next meeting: others need not do the parts behind this one."""
        self._wait(self.store.set, f"kt/failed/{self.meetings}", str(part))

    def told_failure(self) -> int | None:
        """The part that failed in another process. What comes before it is to be done: it may fail too, and first."""
        key = f"kt/failed/{self.meetings}"
        return int(self._wait(self.store.get, key)) if self._wait(self.store.check, [key]) else None

    def exchange(self, name: str, value: T, failure: Failure | None = None) -> list[T]:
        """Everyone's value, in the order of ranks."""
        self.meet(name, failure)
        return [self._sent(rank, value) for rank in range(self.count)]

    def from_main(self, name: str, value: T, failure: Failure | None = None) -> T:
        """Rank 0's value."""
        self.meet(name, failure)
        return self._sent(0, value)

    def sum(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous tensors on the CPU by their sums over all processes: the same bytes in each."""
        import torch.distributed as dist

        self.meet(name)
        for tensor in tensors:
            for piece in tensor.view(-1).split(max(1, _PIECE // tensor.element_size())):
                self._wait(dist.all_reduce, piece, group=self.group)

    def _sent(self, rank: int, value: T) -> T:
        """What one process sends to all; its own value comes back to it as it is."""
        import torch.distributed as dist

        mine = rank == self.rank
        held: list[Any] = [_as_arrays(value) if mine else None]
        self._wait(dist.broadcast_object_list, held, src=rank, group=self.group)
        return value if mine else _as_tensors(held[0])

    def _wait(self, do: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """`do` in a thread: a signal must reach this process also while it waits for another.

        Raises:
            WorkFailed: another process has gone, or does not come.
        """
        result: list[T] = []
        errors: list[BaseException] = []

        def call() -> None:
            try:
                result.append(do(*arguments, **named))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(1.0)
        except BaseException:
            self.lost = True
            raise
        if not errors:
            return result[0]
        self.lost = True
        if not isinstance(errors[0], RuntimeError):
            raise errors[0]
        raise WorkFailed("another process of this run has ended or does not answer") from errors[0]


class _Array(NamedTuple):
    """A tensor on its way: one that lies on the sender's GPU must not come out on the receiver's."""

    data: Any  # its bytes, as a numpy array
    dtype: str
    shape: tuple[int, ...]


def _as_arrays(value: Any) -> Any:
    """The value with the tensors in its lists, tuples and dicts as arrays."""
    import torch

    if isinstance(value, torch.Tensor):
        held = value.detach().cpu().contiguous()
        return _Array(held.view(-1).view(torch.uint8).numpy(), str(held.dtype).partition(".")[2], tuple(held.shape))
    return _walked(value, _as_arrays)


def _as_tensors(value: Any) -> Any:
    import torch

    if isinstance(value, _Array):
        return torch.from_numpy(value.data).view(getattr(torch, value.dtype)).view(value.shape)
    return _walked(value, _as_tensors)


def _walked(value: Any, each: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: each(item) for key, item in value.items()}
    if isinstance(value, list):
        return [each(item) for item in value]
    if isinstance(value, tuple):
        items = [each(item) for item in value]
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    return value
