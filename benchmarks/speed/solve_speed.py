"""A hundred further edits of one weight, after its second moment was factored once: seconds and peak memory.

    python benchmarks/speed/solve_speed.py  # d_key 4,864, 11,008 and 18,944: Qwen2.5-0.5B's, -3B's, -7B's down_proj
    python benchmarks/speed/solve_speed.py --small  # d_key 2,048: seconds

C is synthetic: a falling diagonal plus 256 common directions. Ten batches of ten facts, each holding the keys of those
before, go through `kt`'s solver with a new `Statistics` each, as ten runs of `kt apply-edit` would: the factor comes
from the disk. The reference solves the whole matrix for every batch, as the original implementations do; it is timed
on the last batch and counted ten times.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from measure import Cost, Row, command, measured, product_rate

from kt._util.data import save_arrays
from kt.editing import Statistics
from kt.editing.closed_form.solvers import LeastSquares, Solution, System

SIZES = (4864, 11_008, 18_944)
BATCHES, FACTS, OUT, WEIGHT, NAME = 10, 10, 896, 15_000.0, "mlp.down_proj"


def rows(small: bool) -> Iterator[Row]:
    """Two rows a size: the factorisation, and the edits after it."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*is not kept.*")
    rate = product_rate(torch.float64)
    for size in (2048,) if small else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            yield from _rows(size, Path(folder), rate, None if small else 3.0)


def _rows(size: int, folder: Path, rate: float, goal: float | None) -> Iterator[Row]:
    file = folder / "moments.safetensors"
    save_arrays(file, {NAME: synthetic(size)})
    draw = torch.Generator().manual_seed(1)
    keys = torch.randn(size, BATCHES * FACTS, generator=draw, dtype=torch.float64)
    residuals = torch.randn(OUT, BATCHES * FACTS, generator=draw, dtype=torch.float64)
    first, once = measured(lambda: batch(file, folder, keys, residuals, 0))
    solutions, further = measured(lambda: [batch(file, folder, keys, residuals, b) for b in range(BATCHES)])
    whole, direct = measured(lambda: plain_solve(file, keys, residuals, BATCHES - 1))
    ours, theirs = solutions[-1].update.dense(), whole
    difference = float((ours - theirs).norm() / theirs.norm())
    seen = FACTS * BATCHES * (BATCHES + 1) // 2  # columns solved for: every batch holds the keys before it
    yield Row(
        part="solve",
        work=f"first batch of {FACTS} edits, d_key {size:,}: C factored and kept",
        reference="a solve of the whole matrix",
        ours=once,
        theirs=direct,
        counted=size**3 // 3 + 2 * size**2 * FACTS,
        rate=rate,
        difference=float((first.update.dense() - solutions[0].update.dense()).norm() / first.update.dense().norm()),
        bound=1e-9,
        note="difference: against the same batch from the kept factor",
    )
    yield Row(
        part="solve",
        work=f"{BATCHES * FACTS} further edits in {BATCHES} batches, d_key {size:,}",
        reference="a solve of the whole matrix a batch (one timed)",
        ours=further,
        theirs=Cost(BATCHES * direct.cpu_s, BATCHES * direct.wall_s, direct.peak_mib),
        counted=2 * size**2 * seen,
        rate=rate,
        difference=difference,
        bound=1e-6,
        goal=goal,
        note="counted: the two triangular solves; each batch also reads and checks the factor, and estimates the "
        "condition number",
    )


def synthetic(size: int) -> torch.Tensor:
    """A positive definite matrix with a falling spectrum and some common directions, float32."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(size, 256, generator=draw) / 16
    matrix = common @ common.T
    matrix.diagonal().add_(torch.logspace(0, -4, size))
    return matrix


def batch(file: Path, cache: Path, keys: torch.Tensor, residuals: torch.Tensor, number: int) -> Solution:
    """One batch after those before, as a process of its own would solve it."""
    past, here = slice(0, number * FACTS), slice(number * FACTS, (number + 1) * FACTS)
    moment = replace(Statistics.open(file), cache=cache / "cache").moment_of(NAME)
    return LeastSquares(WEIGHT)(System(residuals[:, here], keys[:, here], None, moment, keys[:, past]))


def plain_solve(file: Path, keys: torch.Tensor, residuals: torch.Tensor, number: int) -> torch.Tensor:
    """R Kᵀ (λC + all keys' K Kᵀ)⁻¹ by one call, float64."""
    here, so_far = slice(number * FACTS, (number + 1) * FACTS), keys[:, : (number + 1) * FACTS]
    matrix = WEIGHT * Statistics.open(file).moment(NAME).double() + so_far @ so_far.T
    return residuals[:, here] @ torch.linalg.solve(matrix, keys[:, here]).T


if __name__ == "__main__":
    raise SystemExit(command(rows, __doc__))
