"""One weight's second moment, and what is computed from it once: its Cholesky factor, its null space.

Both cost O(d³) and belong to C alone, not to an edit: they are kept with it, for every batch and every method that asks
the same `Statistics` again, as long as they are small against the memory that is free, and (large ones) on disk, for
every later process.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..._util.data import complete_file, load_arrays, open_arrays, save_arrays
from ...errors import BadFile, KtError, WorkFailed, warn_user
from ...model.memory import free_memory, require_memory

# Factors and eigenvectors cost O(d³) and depend on the second moment alone: they are kept on disk for later processes.
#
# A file is named by the hash of its matrix, and used only if it reproduces that matrix on a random vector, in O(d²).
# A failure costs time, never an edit, and is a warning.

LEAST_SIZE = 2048
"""Below, a factor is computed again sooner than its matrix is hashed and the file read."""

SPARE = 4
"""A file is kept where the disk has room for this many of it."""

CLOSE = 1e-6
"""Largest relative error on a random vector with which a file is used; rounding stays below 1e-12."""


class Store(NamedTuple):
    """A folder of kept results; `of` names the file of the second moment that they come from."""

    folder: Path
    of: str = ""

    def path(self, what: str, sha256: str) -> Path:
        return self.folder / f"{what}-{sha256[:40]}.safetensors"

    def put(self, path: Path, arrays: dict[str, Tensor], about: dict[str, float]) -> None:
        """Write the arrays if the disk has enough room; a full disk does not end a run."""
        size = sum(array.numel() * array.element_size() for array in arrays.values())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < SPARE * size:
                warn_user(f"{path} is not kept: the disk is nearly full; it is computed again each time")
                return
            save_arrays(path, arrays, {**about, "of": self.of})
        except (OSError, KtError) as error:
            warn_user(f"{path} is not kept: {error}")


def discard(path: Path) -> None:
    """Delete a file whose contents do not match its name; a folder of that name moves aside."""
    warn_user(f"{path} is damaged; it is computed again")
    with suppress(OSError):
        path.rename(path.with_name(f"damaged-{path.name}")) if path.is_dir() else path.unlink()


def agrees(ours: Float[Tensor, " d"], theirs: Float[Tensor, " d"]) -> bool:
    """Whether two products with one random vector are the same up to rounding (a NaN is not)."""
    return bool((ours - theirs).norm() <= CLOSE * theirs.norm())


def check_vector(size: int) -> Float[Tensor, " d"]:
    """The random vector that files are checked with."""
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def times(matrix: Float[Tensor, "d d"], vector: Float[Tensor, " d"], rows: int = 1024) -> Float[Tensor, " d"]:
    """A stored matrix times a vector in float64, some rows at a time: no second copy of it in memory."""
    return torch.cat([part.double() @ vector for part in matrix.split(rows)])


RIDGES = (0.0, 1e-8, 1e-7, 1e-6)
"""Tried in turn, times the largest diagonal entry. C is stored in float32, so its null space is only known to about
1e-7 of its size; keys that no corpus token ever excites (GPT-J's layer 0 sees one key a token) live there."""

NULL_SHARE = 0.75
"""Of C's directions, the share that an automatic null space takes: AlphaEdit's threshold of 0.02 leaves 0.6 to 0.9 of
them in the lower layers of two small models (d_key 1,536 and 2,048), and is absolute where keys have any scale."""

FACTOR_COPIES, PROJECTOR_COPIES = 3, 6
"""Float64 matrices of C's size alive at the peak: C, a ridged copy and the factor; C, its eigenvectors, LAPACK's
workspace of two more, the kept ones and what is stored."""


class Factored(NamedTuple):
    """The lower Cholesky factor of a matrix plus the least ridge that makes it positive definite."""

    factor: Float[Tensor, "d d"]
    ridge: float

    def solve(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """(L Lᵀ)⁻¹ of the vectors. `torch.cholesky_solve` copies the whole factor at each call: ten times the work for
        one vector."""
        return torch.linalg.solve_triangular(self.factor.mT, self.whiten(vectors), upper=True)

    def whiten(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """L⁻¹ of the vectors."""
        return torch.linalg.solve_triangular(self.factor, vectors, upper=False)

    def times(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """L Lᵀ times the vectors."""
        return self.factor @ (self.factor.T @ vectors)


class FactoredBlocks(NamedTuple):
    """A `Factored` of a matrix that is zero outside blocks on its diagonal."""

    blocks: tuple[Factored, ...]

    @property
    def ridge(self) -> float:
        """The largest of the blocks'."""
        return max(block.ridge for block in self.blocks)

    def solve(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        return self._each(Factored.solve, vectors)

    def whiten(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        return self._each(Factored.whiten, vectors)

    def times(self, vectors: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        return self._each(Factored.times, vectors)

    def _each(self, apply: Callable[[Factored, Tensor], Tensor], vectors: Tensor) -> Tensor:
        parts = vectors.split([len(block.factor) for block in self.blocks])
        return torch.cat([apply(block, part) for block, part in zip(self.blocks, parts, strict=True)])


class Moment:
    """C of the weight called `name`, (size, size); `read` brings the matrix from where it is kept.

    With a `store`, the factor and the eigenvectors of a large C are also kept on disk.
    """

    def __init__(self, name: str, size: int, read: Callable[[], Tensor], store: Store | None = None) -> None:
        self.name, self.size = name, size
        self._read = read
        self._store = store if size >= LEAST_SIZE else None
        self._factor: Factored | None = None
        self._null: dict[float | str, Tensor] = {}
        self._sha256: str | None = None
        self._ridged: dict[float, Moment] = {}
        self.within: dict[Any, tuple[Tensor, Moment]] = {}
        """A subspace and C inside it, as a solver keeps its last one here."""

    @classmethod
    def of(cls, matrix: Float[Tensor, "d d"], name: str = "C") -> Moment:
        return cls(name, len(matrix), lambda: matrix)

    def matrix(self) -> Float[Tensor, "d d"]:
        """C, float64 on the CPU."""
        matrix = self._read().to("cpu", torch.float64)
        if not bool(torch.isfinite(matrix).all()):
            raise BadFile(f"the second moment of {self.name} is not finite; take the statistics again")
        return matrix

    def mean(self) -> float:
        """The mean of C's eigenvalues."""
        return float(self._read().diagonal().double().mean())

    def ridged(self, ridge: float, store: bool = True) -> Moment:
        """C + ridge · I; the last one that was asked for is kept, and with `store` its factor as C's own is."""

        def read() -> Tensor:
            matrix = self.matrix().clone()
            matrix.diagonal().add_(ridge)
            return matrix

        if ridge not in self._ridged:
            self._ridged = {ridge: Moment(self.name, self.size, read, self._store if store else None)}
        return self._ridged[ridge]

    def sha256(self) -> str:
        """SHA-256 of the matrix's stored bytes, row by row; read once."""
        if self._sha256 is None:
            stored = self._read().detach().cpu().contiguous()
            self._sha256 = hashlib.sha256(stored.view(-1).view(torch.uint8).numpy().data).hexdigest()
        return self._sha256

    def factor(self) -> Factored:
        """C = L Lᵀ, up to its ridge."""
        if self._factor is not None:
            return self._factor
        factored = self._kept_factor()
        if factored is None:
            factored = cholesky(self.matrix(), f"the second moment of {self.name}")
            if self._store is not None:
                # Column-major, as LAPACK gives and wants it: its transpose is written without a copy.
                path, arrays = self._store.path("factor", self.sha256()), {"transposed": factored.factor.mT}
                self._store.put(path, arrays, {"ridge": factored.ridge})
        if self._worth_keeping(factored.factor):
            self._factor = factored
        return factored

    def _kept_factor(self) -> Factored | None:
        if self._store is None or not (path := self._store.path("factor", self.sha256())).exists():
            return None
        with suppress(BadFile), complete_file(path, "factor", "it is computed again"):
            arrays, about = load_arrays(path, framework="pt")
            factor, ridge = arrays["transposed"].mT, float(about["ridge"])
            stored, vector = self._read().cpu(), check_vector(self.size)
            largest = float(stored.diagonal().max())
            if agrees(factor @ (factor.mT @ vector), times(stored, vector) + ridge * largest * vector):
                return Factored(factor, ridge)
        discard(path)
        return None

    def null_basis(self, threshold: float | Literal["auto"]) -> Float[Tensor, "d null"]:
        """The eigenvectors of C whose eigenvalue lies below the threshold (AlphaEdit's U₀); `auto`: the smallest
        `NULL_SHARE` of them, whatever the scale of the keys.

        Raises:
            WorkFailed: there are none, so that nothing could be written.
        """
        if threshold in self._null:
            return self._null[threshold]
        kept = self._kept_basis(threshold)
        if kept is None:
            values, vectors = torch.linalg.eigh(self.matrix())
            if self._store is not None:
                arrays = {"values": values, "rows": vectors.mT}
                self._store.put(self._store.path("eigen", self.sha256()), arrays, {})
            kept = vectors[:, self._null_range(values, threshold)].contiguous()
        if self._worth_keeping(kept):
            self._null[threshold] = kept
        return kept

    def _kept_basis(self, threshold: float | Literal["auto"]) -> Float[Tensor, "d null"] | None:
        """The null space from the file, of which only the wanted eigenvectors are read; None without a usable file."""
        if self._store is None or not (path := self._store.path("eigen", self.sha256())).exists():
            return None
        with (
            suppress(BadFile),
            complete_file(path, "list of eigenvectors", "it is computed again"),
            open_arrays(path) as file,
        ):
            values, stored = file.get_tensor("values"), self._read().cpu()
            if values.shape == (self.size,) and agrees(values.sum(), stored.diagonal().double().sum()):
                null_range = self._null_range(values, threshold)
                rows = file.get_slice("rows")[null_range.start : null_range.stop]
                mixed = check_vector(self.size)[null_range]
                product = rows.mT @ mixed  # as long as `mixed`, since the rows are orthonormal
                whole = agrees(product.norm(), mixed.norm())
                if whole and agrees(rows.mT @ (values[null_range] * mixed), times(stored, product)):
                    return rows.mT.contiguous()
        discard(path)
        return None

    def _null_range(self, values: Float[Tensor, " d"], threshold: float | Literal["auto"]) -> slice:
        """Which eigenvalues, in their ascending order, lie below the threshold."""
        if threshold == "auto":
            return slice(0, max(1, round(NULL_SHARE * len(values))))
        small = torch.nonzero(values.abs() < threshold)
        if not len(small):
            raise WorkFailed(
                f"no direction of the second moment of {self.name} lies below nullspace_threshold {threshold:g} "
                f"(smallest {float(values.abs().min()):.2g}); raise it"
            )
        return slice(int(small[0]), int(small[-1]) + 1)

    @staticmethod
    def _worth_keeping(result: Tensor) -> bool:
        return 4 * result.numel() * result.element_size() < free_memory()


class BlockMoment(Moment):
    """C of parts that stand side by side, none of which is seen with another: a block of it each (experts).

    An expert that few tokens were sent to has a C of few of its directions, and a solve would write into the others at
    no cost. So every expert is given as many tokens more as its key has numbers, of keys that are as long as those of
    the experts are on average and have no direction: C_j + (Σ_i tr C_i / Σ_i n_i) I, n_i the tokens of expert i. It
    changes little where an expert was sent many more tokens than its key has numbers, and is most of C where fewer.
    """

    def __init__(self, name: str, blocks: Sequence[Moment], ridges: Sequence[float] | None = None) -> None:
        super().__init__(name, sum(block.size for block in blocks), self._whole)
        self._bare = tuple(blocks)
        added = ridges or [0.0] * len(blocks)
        self.blocks = tuple(b.ridged(r) if r else b for b, r in zip(blocks, added, strict=True))

    def _whole(self) -> Tensor:
        require_room(f"the second moment of {self.name} as one matrix", self.size, FACTOR_COPIES)
        return torch.block_diag(*(block.matrix() for block in self.blocks))

    def mean(self) -> float:
        return sum(block.mean() * block.size for block in self.blocks) / self.size

    def ridged(self, ridge: float, store: bool = True) -> Moment:
        return BlockMoment(self.name, [block.ridged(ridge, store) for block in self.blocks])

    def sha256(self) -> str:
        return hashlib.sha256("".join(block.sha256() for block in self.blocks).encode()).hexdigest()

    def factor(self) -> FactoredBlocks:  # type: ignore[override]
        return FactoredBlocks(tuple(block.factor() for block in self.blocks))

    def null_basis(self, threshold: float | Literal["auto"]) -> Float[Tensor, "d null"]:
        """The null spaces of the parts side by side, of each C_j as it is: a part has its own projector (MoEEdit)."""
        if threshold not in self._null:
            bases: list[Tensor] = []
            for block in self._bare:
                try:
                    bases.append(block.null_basis(threshold))
                except WorkFailed:  # no direction of this part is free
                    bases.append(torch.zeros(block.size, 0, dtype=torch.float64))
            if not any(basis.shape[1] for basis in bases):
                raise WorkFailed(
                    f"no direction of the second moments of {self.name} lies below nullspace_threshold {threshold}; "
                    "raise it"
                )
            self._null[threshold] = torch.block_diag(*bases)
        return self._null[threshold]


def cholesky(matrix: Float[Tensor, "d d"], what: str) -> Factored:
    """The factor of the matrix with the least ridge that makes it positive definite.

    Raises:
        WorkFailed: none does.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise WorkFailed(f"{what} is not finite; check the model's weights and statistics")
    largest = float(matrix.diagonal().max())
    for ridge in RIDGES:
        ridged = matrix.clone() if ridge else matrix
        if ridge:
            ridged.diagonal().add_(ridge * largest)
        factor, bad = torch.linalg.cholesky_ex(ridged)
        if not int(bad) and largest > 0:
            return Factored(factor, ridge)
    raise WorkFailed(
        f"{what} (size {len(matrix)}) is singular: take the second moment over more tokens, or raise mom2_update_weight"
    )


def require_room(what: str, size: int, copies: int) -> None:
    """Refuse what would not fit, with the estimate, before any work."""
    require_memory(
        copies * 8 * size * size,
        f"{what} (d_key {size:,}, {copies} float64 matrices at the peak)",
        "edit fewer or smaller weights, free memory, or take a machine with more",
    )
