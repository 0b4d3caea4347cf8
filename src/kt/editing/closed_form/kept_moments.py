"""Kept second moments: a file a weight and number of tokens, named by what the model, the weight and the corpus are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..._util.data import complete_file, open_arrays, read_metadata
from ..._util.files import writing
from ..._util.lock import exclusive
from ...errors import BadFile, tell_user
from ...model.sites import Site
from ..edit_io import DTYPES
from .factor import discard

Changes = tuple[tuple[int, float], ...]
"""(tokens, ‖C - C_half‖ / ‖C‖) for every doubling of the tokens, in Frobenius norms taken on random directions."""


def stored(file: Path, name: str) -> Float[Tensor, "d_in d_in"]:
    """A second moment as its file holds it.

    Raises:
        BadFile: the file cannot be read, or holds no square matrix of floating point under that name.
    """
    with open_arrays(file) as tensors:
        moment = tensors.get_tensor(name)
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1] or moment.dtype not in DTYPES:
        dtype = str(moment.dtype).removeprefix("torch.")
        raise BadFile(
            f"{file}: {name} is {tuple(moment.shape)} of {dtype}, not a square second moment; take it again with kt cov"
        )
    return moment


class Kept(NamedTuple):
    """A second moment in the cache, or none (0 tokens).

    `whole`: its corpus has no more tokens. `until`: the share of change that ended its pass, and its most tokens.
    `routed`: of an expert, how many of the tokens were sent to it.
    """

    path: Path
    name: str
    n_tokens: int = 0
    whole: bool = False
    until: tuple[float, int] | None = None
    routed: int | None = None

    def answers(self, max_tokens: int, until: float | None) -> bool:
        """Whether a pass over so many tokens would give this."""
        if until is not None:
            return self.until == (until, max_tokens)
        return self.n_tokens == max_tokens or (self.whole and self.n_tokens < max_tokens)


def kept_of(folder: Path, key: str, name: str, size: int) -> list[Kept]:
    """What is kept of a weight whose keys have `size` elements, fewest tokens first.

    A file that does not read, or holds another thing, is deleted: it counts as absent. One of another kt, whose entries
    are others, is left.
    """
    found = []
    for path in folder.glob(f"{key}-*.safetensors"):
        try:
            _, about = read_metadata(path)
            if not {"n_tokens", "whole", "until", "changes"} <= {*about}:
                continue
            with complete_file(path, "second moment", "it is taken again"):
                moment = stored(path, name)
                finite = math.isfinite(moment.sum(dtype=torch.float64)) and all(
                    isinstance(change, float) for _, change in about["changes"]
                )
                until = tuple(about["until"]) if about["until"] else None
                if len(moment) != size or not finite or about["n_tokens"] < 1:
                    raise ValueError("of another size, or not finite")
                whole = bool(about["whole"] and about.get("windows"))  # an older kt cut long documents short
                found.append(Kept(path, name, int(about["n_tokens"]), whole, until, about.get("routed")))
        except BadFile:
            discard(path)
    return sorted(found, key=lambda kept: kept.n_tokens)


def look_up(
    locks: ExitStack,
    folder: Path,
    wanted: Mapping[Site, tuple[str, str, int]],
    max_tokens: int,
    until: float | None,
    work: str,
) -> tuple[dict[Site, Path], dict[Site, Kept]]:
    """The files that answer, and for every other site what its pass begins from.

    Where some are missing no other run computes them until `locks` is closed.
    """

    def look() -> tuple[dict[Site, Path], dict[Site, Kept]]:
        have = {site: kept_of(folder, *of) for site, of in wanted.items()}
        files = {s: k.path for s, kept in have.items() for k in kept if k.answers(max_tokens, until)}
        most = 0 if until is not None else max_tokens  # where such a pass ends hangs on where it began
        fewer = {s: [k for k in kept if k.n_tokens < most] for s, kept in have.items() if s not in files}
        return files, {s: kept[-1] if kept else Kept(folder, "") for s, kept in fewer.items()}

    files, missing = look()
    if missing:
        lock = folder / f"cov-{hashlib.sha256(work.encode()).hexdigest()[:40]}.lock"
        with writing(lock):
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(exclusive(lock, "takes the same second moments"))
        files, missing = look()  # another may just have made some
    if begun := {kept.n_tokens for kept in missing.values()} - {0}:
        have = " and ".join(f"{tokens:,}" for tokens in sorted(begun))
        tell_user(f"second moments over {have} tokens are kept; the rest of {max_tokens:,} is added")
    return files, missing
