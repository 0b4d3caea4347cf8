"""One run in several processes, started by torchrun: each process does a share, and all get all the results.

Every process runs the same program and does the same work, except in three calls:

    on_rank_zero(name, do)             rank 0 does the work; the others get its result
    map_over_ranks(name, parts, do)    of N processes, rank r does the parts r, r + N, ...; all get all results in order
    summed(name, tensors)              sums over the processes

Each call begins with a synchronisation in which every process reports the call's name and its error, if any. So all
processes raise the error of one, and processes that took different branches stop instead of mixing their results.
Inside `do` a process works alone, and the calls there share nothing. Before `join` there is one process, and these are
plain function calls.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from ..errors import KtError, WorkFailed, said_by

if TYPE_CHECKING:
    from torch import Tensor


P = TypeVar("P")
T = TypeVar("T")

_group: ProcessGroup | None = None
_alone_depth = 0


def on_rank_zero(name: str, do: Callable[..., T], *arguments: Any) -> T:
    """Call `do(*arguments)` in rank 0 only; the others get its result, with tensors on the CPU.

    Raises:
        Exception: what `do` raised, in every process; the others raise WorkFailed for an error that is not kt's.
    """
    group = _shared_group()
    if group is None:
        return do(*arguments)
    value: Any = None
    failure: Failure | None = None
    if group.rank == 0:
        try:
            with alone():
                value = do(*arguments)
        except Exception as error:
            failure = group.failure(0, error)
    return group.from_rank_zero(name, value, failure)


def map_over_ranks(
    name: str, parts: Sequence[P], do: Callable[[P], T], progress: Callable[[int], Any] | None = None
) -> list[T]:
    """Call `do` for every part, shared out among the processes; results of other processes are on the CPU.

    Args:
        name: a name for this work, the same in every process.
        parts: the same in every process; a part's result must not depend on the process.
        progress: called with the number of parts done, assuming that the other processes are equally far.

    Returns:
        The results of all parts, in the order of the parts.

    Raises:
        Exception: what `do` raised for the first part that failed, in every process; see `on_rank_zero`.
    """
    group = _shared_group()
    results: list[T] = []
    if group is None:
        for n_done, part in enumerate(parts, start=1):
            results.append(do(part))
            if progress is not None:
                progress(n_done)
        return results
    failure: Failure | None = None
    for index in range(group.rank, len(parts), group.count):
        failed = group.announced_failure()
        if failed is not None and failed < index:
            break
        try:
            with alone():
                results.append(do(parts[index]))
        except Exception as error:
            failure = group.failure(index, error)
            group.announce_failure(index)
            break
        if progress is not None:
            progress(min(index - group.rank + group.count, len(parts)))
    by_rank = group.exchange(name, results, failure)
    return [by_rank[index % group.count][index // group.count] for index in range(len(parts))]


def summed(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all processes, on the CPU and with the same bytes in each; CPU tensors are overwritten."""
    group = _shared_group()
    if group is None:
        return list(tensors)
    sums = [tensor.detach().cpu().contiguous() for tensor in tensors]
    group.sum(name, sums)
    return sums


def all_gather(name: str, value: T) -> list[T]:
    """Every process's value, in the order of ranks."""
    group = _shared_group()
    return [value] if group is None else group.exchange(name, value)


def assert_equal_on_ranks(values: Mapping[str, Any]) -> None:
    """Refuse a run whose processes have different values, since their parts would not fit together.

    Raises:
        KtError: in every process.
    """
    by_rank = all_gather("agreeing", dict(values))
    for rank, theirs in enumerate(by_rank):
        for name, value in by_rank[0].items():
            if theirs.get(name) != value:
                raise KtError(
                    f"process {rank} has another {name} than process 0 ({_short(theirs.get(name))}, not "
                    f"{_short(value)}); start all with the same options, files and versions"
                )


def join() -> None:
    """Connect to the other processes that the launcher started, if any. Further calls do nothing.

    Raises:
        WorkFailed: they cannot be reached.
    """
    global _group
    if _group is None and started() > 1:
        _group = ProcessGroup.connect()


def leave() -> None:
    """Disconnect from the other processes, at the end of a successful run."""
    global _group
    if _group is not None:
        _group.close()
    _group = None


@contextmanager
def alone() -> Iterator[None]:
    """Inside this context the process shares no work."""
    global _alone_depth
    _alone_depth += 1
    try:
        yield
    finally:
        _alone_depth -= 1


def started() -> int:
    """The number of processes that the launcher started; 1 without a launcher."""
    return max(1, _environment_number("WORLD_SIZE", 1))


def started_as() -> int:
    """The rank of this process, also before `join`."""
    return _environment_number("RANK", 0) if started() > 1 else 0


def joined() -> bool:
    """Whether this process is connected to others, also inside `alone`."""
    return _group is not None


def heir() -> bool:
    """Whether this process speaks for the run, since rank 0, of the same machine, was killed (by a lack of memory)."""
    if _group is None or _group.rank != 1 or os.name != "posix":
        return False
    pid, _, host = _group.main.partition(" ")
    try:
        os.kill(int(pid), 0)
    except OSError as error:  # of another user's process: it lives
        return isinstance(error, ProcessLookupError) and host == socket.gethostname()
    return False


def count() -> int:
    """The number of processes that share the work; 1 before `join` and inside `alone`."""
    return 1 if _group is None or _alone_depth else _group.count


def is_main() -> bool:
    """Whether this process is rank 0, which alone prints and writes."""
    return _group is None or _group.rank == 0


def local() -> int:
    """The rank among the processes of this machine, which selects the GPU; 0 before `join`."""
    return _environment_number("LOCAL_RANK", 0) if joined() else 0


def beside() -> int:
    """The number of processes that share this machine's memory; 1 inside `alone`."""
    return max(1, _environment_number("LOCAL_WORLD_SIZE", 1)) if count() > 1 else 1


def _environment_number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default


def _shared_group() -> ProcessGroup | None:
    return None if count() == 1 else _group


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Communication between the processes. All of it is on the CPU and through gloo, also if the models are on GPUs: results
# and float64 sums are there already, and gloo notices at once that a process has ended, while NCCL waits for minutes.

PATIENCE = 4 * 3600
"""Seconds that one process waits for another that runs but does not answer; the variable KT_PATIENCE replaces it."""

_PIECE = 1 << 27  # bytes of one message


class Failure(NamedTuple):
    """An error in a part. `kind` is the class of kt's error, which all processes raise; None for any other error."""

    part: int
    rank: int
    kind: type[KtError] | None
    message: str
    error: Exception | None  # only in the process where it happened

    def reraise(self) -> NoReturn:
        """Raise the error, in any process."""
        if self.error is not None:
            raise self.error
        if self.kind is None:
            raise WorkFailed(f"process {self.rank} of this run failed: {self.message}; its own output says more")
        error = self.kind.__new__(self.kind)
        error.args = (self.message,)
        raise error


@dataclass
class ProcessGroup:
    """The processes of a run, seen from one of them. Values set in `store` are visible to all without synchronising.

    `main`: rank 0's process number and machine.
    """

    rank: int
    count: int
    group: Any
    store: Any
    main: str = ""
    n_synchronised: int = 0
    lost: bool = False

    @classmethod
    def connect(cls) -> ProcessGroup:
        """Connect to all processes that the launcher started, through accelerate's `PartialState`.

        Raises:
            WorkFailed: they cannot be reached.
        """
        import torch.distributed as dist
        from accelerate import PartialState

        wait = timedelta(seconds=float(os.environ.get("KT_PATIENCE") or PATIENCE))
        try:
            state = PartialState(cpu=True, backend="gloo", timeout=wait)
            group = dist.new_group(backend="gloo", timeout=wait)  # the program's own group may have another backend
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        except (RuntimeError, ValueError, KeyError) as error:
            reason = said_by(error, 200)
            raise WorkFailed(f"the processes of this run cannot meet ({reason}); start them by torchrun") from None
        if state.process_index == 0:
            store.set("kt/main", f"{os.getpid()} {socket.gethostname()}")
        return cls(state.process_index, state.num_processes, group, store, store.get("kt/main").decode())

    def close(self) -> None:
        """Disconnect after a successful run; the process of a failed run just ends."""
        if not self.lost:
            import torch.distributed as dist

            dist.destroy_process_group()

    def synchronise(self, name: str, failure: Failure | None = None) -> None:
        """Wait for all processes; all raise the failure of the first part that failed, if any."""
        import torch.distributed as dist

        reports: list[Any] = [None] * self.count
        report = (name, None if failure is None else failure._replace(error=None))
        self._wait(dist.all_gather_object, reports, report, group=self.group)
        self.n_synchronised += 1
        names = list(dict.fromkeys(name for name, _ in reports))
        if len(names) > 1:
            raise WorkFailed(
                f"the processes of this run went different ways ({names[0]!r}, {names[1]!r}); start all with the "
                "same command, files and versions"
            )
        failures = [reported for _, reported in reports if reported is not None]
        if failures:
            first = min(failures, key=lambda reported: reported.part)
            (failure if failure is not None and failure.part == first.part else first).reraise()

    def failure(self, part: int, error: Exception) -> Failure:
        """The report of an error in this process."""
        message = " ".join(str(error).split())
        if isinstance(error, KtError):
            return Failure(part, self.rank, type(error), message, error)
        return Failure(part, self.rank, None, f"{type(error).__name__}: {message[:300]}", error)

    def announce_failure(self, part: int) -> None:
        """Tell the others, before they synchronise, that they can skip the parts after this one."""
        self._wait(self.store.set, f"kt/failed/{self.n_synchronised}", str(part))

    def announced_failure(self) -> int | None:
        """The part that failed in another process, if any. Earlier parts must still run, since one may fail first."""
        key = f"kt/failed/{self.n_synchronised}"
        return int(self._wait(self.store.get, key)) if self._wait(self.store.check, [key]) else None

    def exchange(self, name: str, value: T, failure: Failure | None = None) -> list[T]:
        """Every process's value, in the order of ranks."""
        self.synchronise(name, failure)
        return [self._broadcast(rank, value) for rank in range(self.count)]

    def from_rank_zero(self, name: str, value: T, failure: Failure | None = None) -> T:
        """Rank 0's value."""
        self.synchronise(name, failure)
        return self._broadcast(0, value)

    def sum(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous CPU tensors by their sums over all processes, with the same bytes in each."""
        import torch.distributed as dist

        self.synchronise(name)
        for tensor in tensors:
            for piece in tensor.view(-1).split(max(1, _PIECE // tensor.element_size())):
                self._wait(dist.all_reduce, piece, group=self.group)

    def _broadcast(self, rank: int, value: T) -> T:
        """The value of process `rank`; that process keeps its value unchanged."""
        import torch.distributed as dist

        is_sender = rank == self.rank
        message: list[Any] = [_as_arrays(value) if is_sender else None]
        self._wait(dist.broadcast_object_list, message, src=rank, group=self.group)
        return value if is_sender else _as_tensors(message[0])

    def _wait(self, do: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call `do` in a thread, so that signals reach this process while it waits for another.

        Raises:
            WorkFailed: another process has ended or does not answer.
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
        raise WorkFailed("another process of this run has ended or does not answer; see its output") from errors[0]


class _Array(NamedTuple):
    """A tensor in a message, as bytes: a tensor of the sender's GPU must not arrive on the receiver's GPU."""

    data: Any  # a numpy array of uint8
    dtype: str
    shape: tuple[int, ...]


def _as_arrays(value: Any) -> Any:
    """Replace the tensors in nested lists, tuples and dicts by arrays."""
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        data = tensor.view(-1).view(torch.uint8).numpy()
        return _Array(data, str(tensor.dtype).partition(".")[2], tuple(tensor.shape))
    return _map_items(value, _as_arrays)


def _as_tensors(value: Any) -> Any:
    import torch

    if isinstance(value, _Array):
        return torch.from_numpy(value.data).view(getattr(torch, value.dtype)).view(value.shape)
    return _map_items(value, _as_tensors)


def _map_items(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, list):
        return [function(item) for item in value]
    if isinstance(value, tuple):
        items = [function(item) for item in value]
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    return value
