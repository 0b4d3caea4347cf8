"""What two processes of one run must see; started by test_parallel.py under torchrun. Exits with an error otherwise."""

from typing import Any, NamedTuple

import torch

from kt.errors import BadFact, KtError, WorkFailed
from kt.runs import parallel


class Pair(NamedTuple):
    first: int
    second: list[Any]


def refuse(part: int) -> int:
    if part >= 1:
        raise BadFact(f"part {part}")
    return part


def divide() -> None:
    raise ZeroDivisionError("zero")


def raised(kind: type[Exception], do: Any, *arguments: Any) -> str:
    try:
        do(*arguments)
    except kind as error:
        return str(error)
    raise AssertionError(f"{do} raised no {kind.__name__}")


parallel.join()
rank = parallel.started_as()
assert parallel.count() == parallel.beside() == 2
assert parallel.is_main() == (rank == 0)

value = parallel.on_rank_zero("nested", lambda: {"t": torch.ones(2, 3).bfloat16(), "n": Pair(1, [torch.zeros(0)])})
assert value["t"].dtype == torch.bfloat16 and value["t"].shape == (2, 3)
assert type(value["n"]).__name__ == "Pair" and value["n"].second[0].shape == (0,)

assert parallel.map_over_ranks("squares", range(5), lambda part: part**2) == [0, 1, 4, 9, 16]
assert parallel.map_over_ranks("alone", range(2), lambda _: parallel.count()) == [1, 1]
assert parallel.all_gather("ranks", rank) == [0, 1]
assert parallel.summed("sums", [torch.full((3,), rank + 1.0)])[0].tolist() == [3.0, 3.0, 3.0]

parallel.assert_equal_on_ranks({"version": 1})
assert "process 1 has another version" in raised(KtError, parallel.assert_equal_on_ranks, {"version": rank})
assert raised(BadFact, parallel.map_over_ranks, "refused", range(6), refuse) == "part 1"
assert "zero" in raised(ZeroDivisionError if rank == 0 else WorkFailed, parallel.on_rank_zero, "divide", divide)
assert "different ways" in raised(WorkFailed, parallel.all_gather, f"branch {rank}", 0)

parallel.leave()
assert not parallel.joined() and parallel.count() == 1
