"""What costs O(d³) and follows from a second moment alone, kept on disk for the next process that edits the model.

A file is named by the hash of the matrix that it belongs to, and is believed only if it reproduces that matrix on a
drawn vector, which costs O(d²). Whatever goes wrong here costs time, never an edit: it is said in a warning.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..artifacts import save_arrays
from ..errors import KtError

LEAST_SIZE = 2048
"""Below, a factor is computed again sooner than its matrix is hashed and the file read."""

SPARE = 4
"""A file is kept where the disk has room for this many of it."""

CLOSE = 1e-6
"""Relative error on a drawn vector up to which a file is believed; rounding stays below 1e-12."""


class Store(NamedTuple):
    """A folder of kept results."""

    folder: Path

    def path(self, what: str, sha256: str) -> Path:
        return self.folder / f"{what}-{sha256[:40]}.safetensors"

    def put(self, path: Path, arrays: dict[str, Tensor], about: dict[str, float]) -> None:
        """Keep the arrays, if the disk has room to spare; a run does not end because it has not."""
        size = sum(array.numel() * array.element_size() for array in arrays.values())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < SPARE * size:
                warnings.warn(
                    f"{path} is not kept: the disk is nearly full; it is computed again each time", stacklevel=2
                )
                return
            save_arrays(path, arrays, about)
        except (OSError, KtError) as error:
            warnings.warn(f"{path} is not kept: {error}", stacklevel=2)


def opened(path: Path) -> bool:
    """Whether a whole safetensors file stands there; one that is not is taken away with a warning."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError, ValueError):
        discard(path)
        return False


def discard(path: Path) -> None:
    """Take away a file that does not hold what its name says."""
    warnings.warn(f"{path} is damaged; it is computed again", stacklevel=2)
    path.unlink(missing_ok=True)


def agrees(ours: Float[Tensor, " d"], theirs: Float[Tensor, " d"]) -> bool:
    """Whether two products with one drawn vector are the same up to rounding (a NaN is not)."""
    return bool((ours - theirs).norm() <= CLOSE * theirs.norm())


def drawn(size: int) -> Float[Tensor, " d"]:
    """The vector that files are tried on."""
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def times(matrix: Float[Tensor, "d d"], vector: Float[Tensor, " d"], rows: int = 1024) -> Float[Tensor, " d"]:
    """A stored matrix times a vector in float64, some rows at a time: no second copy of it in memory."""
    return torch.cat([part.double() @ vector for part in matrix.split(rows)])
