"""Running sums Σ k kᵀ of the keys of linear maps over a corpus: read in blocks of documents, checkpointed, resumed.

One forward reads the keys of all wanted weights and stops after the last of them.

Only the lower triangle is computed, strip by strip: k kᵀ is symmetric, so that is half of the work. Products are
float32, their sum over forwards float64. Documents of like length share a forward; which ones is a matter of speed
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..._util.data import complete_file, load_arrays, save_arrays
from ..._util.progress import Progress, reused
from ...errors import BadFile, WorkFailed, warn_user
from ...facts.corpus import Corpus
from ...model.sites import Site
from ...model.tokens import encode_ids, pad_id, token_ids
from ...runs import parallel
from .kept_moments import Kept, stored

if TYPE_CHECKING:
    from ...model.model import TracedModel

TOKENS_PER_FORWARD = 4096
WASTE, LEAST_TOKENS = 1.15, 512
"""Padding up to this factor is borne, and any in a forward of fewer tokens: small ones multiply slowly."""

FORWARDS_PER_SORT = 8
"""Documents of so many forwards are sorted by length together: little padding, and little read ahead."""

FORWARDS_PER_CHECKPOINT = 50
LONGEST = 1024
STRIPS, LEAST_STRIP = 8, 256
"""A triangle of S strips takes (S + 1) / 2S of the whole product; thin strips multiply slowly."""

DIRECTIONS = 128
"""Random directions on which the change of C is measured: C itself need not be held twice."""

FIRST_MARK = 1000
"""Tokens of the first doubling whose change is measured."""


@dataclass
class Sums:
    """The running sums of a pass (lower triangles), how far it has come, and how C changed from doubling to doubling.

    `changes` has (tokens, {site: ‖C - C_half‖ / ‖C‖}) for every doubling, C_half the mean over half of the tokens.
    """

    totals: dict[Site, Float[Tensor, "d_key d_key"]]
    n_tokens: int = 0
    forwards: int = 0
    sketches: dict[Site, Float[Tensor, "d_key direction"]] = field(default_factory=dict)
    changes: list[tuple[int, dict[Site, float]]] = field(default_factory=list)
    routed: dict[Site, Float[Tensor, ""]] = field(default_factory=dict)
    """Of each expert, how many of the tokens were sent to it."""

    @classmethod
    def zero(cls, model: TracedModel, sites: Sequence[Site]) -> Sums:
        sizes = {s: model.key_size(s) for s in sites}
        totals = {s: torch.zeros(size, size, dtype=torch.float64) for s, size in sizes.items()}
        return cls(totals, routed={s: torch.zeros((), dtype=torch.float64) for s in sites if model.is_expert(s)})

    def save(self, path: Path) -> None:
        """A checkpoint."""
        arrays = {f"total {s}": t for s, t in self.totals.items()}
        arrays |= {f"sketch {s}": t for s, t in self.sketches.items()}
        arrays |= {f"routed {s}": t for s, t in self.routed.items()}
        changes = [[tokens, {str(s): c for s, c in by.items()}] for tokens, by in self.changes]
        save_arrays(path, arrays, {"n_tokens": self.n_tokens, "forwards": self.forwards, "changes": changes})

    @classmethod
    def of_kept(cls, kept: Mapping[Site, Kept]) -> Sums:
        """Those of second moments that are kept, all over the same tokens, up to the rounding of their float32."""
        (n_tokens,) = {each.n_tokens for each in kept.values()}
        totals = {s: stored(each.path, each.name).double() * n_tokens for s, each in kept.items()}
        counts = {s: torch.tensor(float(n)) for s, each in kept.items() if (n := each.routed) is not None}
        return cls(totals, n_tokens, routed={s: count.double() for s, count in counts.items()})

    @classmethod
    def resume(cls, path: Path, sizes: Mapping[Site, int], begin: Callable[[], Sums]) -> Sums:
        """The sums of the checkpoint; without one, or with one that does not read, those to begin with."""
        if not path.exists():
            return begin()
        try:
            with complete_file(path, "checkpoint", "its tokens are read again"):
                arrays, state = load_arrays(path, framework="pt")
                sums = cls(
                    {s: arrays[f"total {s}"] for s in sizes},
                    int(state["n_tokens"]),
                    int(state["forwards"]),
                    {s: arrays[f"sketch {s}"] for s in sizes if f"sketch {s}" in arrays},
                    [(int(tokens), {s: float(by[str(s)]) for s in sizes}) for tokens, by in state["changes"]],
                    {s: arrays[f"routed {s}"] for s in sizes if f"routed {s}" in arrays},
                )
                expected = all(
                    total.shape == (size, size) and total.dtype == torch.float64 and bool(total.isfinite().all())
                    for total, size in zip(sums.totals.values(), sizes.values(), strict=True)
                ) and all(
                    sketch.shape == (sizes[s], DIRECTIONS) and sketch.dtype == torch.float64
                    for s, sketch in sums.sketches.items()
                )
                if not expected or min(sums.n_tokens, sums.forwards) < 0:
                    raise ValueError("not running sums of these weights")
                return sums
        except BadFile as error:
            warn_user(f"a pass over a corpus begins anew ({error})")
            return begin()

    def mean(self, site: Site) -> Float[Tensor, "d_key d_key"]:
        """C as it is stored: whole, float32."""
        moment = torch.empty_like(self.totals[site], dtype=torch.float32)
        for rows, total in _strips(self.totals[site]):
            strip = (total / self.n_tokens).float()
            corner = strip[:, rows.start :].tril()
            moment[rows, : rows.start], moment[rows, rows] = strip[:, : rows.start], corner + corner.tril(-1).T
            moment[: rows.start, rows] = strip[:, : rows.start].T
        return moment

    def only_mains(self) -> None:
        """Keep the sums on rank 0; the other ranks start from zero and count only their own forwards."""
        if not parallel.is_main():
            for total in (*self.totals.values(), *self.routed.values()):
                total.zero_()

    def mark(self) -> None:
        """Note how C has changed since the last mark, on random directions."""
        now = {s: _sketch(t) / self.n_tokens for s, t in self.totals.items()}
        if self.sketches:
            by = {s: _share(now[s] - self.sketches[s], now[s]) for s in now}
            self.changes.append((self.n_tokens, by))
        self.sketches = now

    @property
    def change(self) -> float:
        """The largest relative change of any C over the last doubling; infinite before there was one."""
        return max(self.changes[-1][1].values()) if self.changes else float("inf")


def _share(part: Tensor, whole: Tensor) -> float:
    """‖part‖ / ‖whole‖; 0 where both are zero, as they are for a map that no token ever excites."""
    return float(part.norm() / size) if (size := whole.norm()) > 0 else 0.0


def take_sums(
    model: TracedModel,
    sites: Sequence[Site],
    corpus: Corpus,
    max_tokens: int,
    until: float | None,
    checkpoint: Path,
    progress: Progress | None,
    kept: Mapping[Site, Kept] | None = None,
) -> Sums:
    """The sums over the corpus' first `max_tokens` tokens, from the checkpoint or from `kept` ones on.

    With `until`, the pass ends at the first doubling that changed no C by more than that.

    Raises:
        WorkFailed: the corpus holds no tokens.
    """
    start = next(iter(kept.values())).n_tokens if kept else 0
    sizes = {site: model.key_size(site) for site in sites}
    sums = Sums.resume(checkpoint, sizes, lambda: Sums.of_kept(kept) if kept else Sums.zero(model, sites))
    if start in _marks(max_tokens) and sums.n_tokens == start:
        sums.mark()
    parallel.assert_equal_on_ranks({"second moments so far (tokens, forwards)": [sums.n_tokens, sums.forwards]})
    sums.only_mains()
    saved = sums.forwards
    if sums.n_tokens:
        reused()
    for block in blocks(model, corpus, max_tokens, start):
        if until is not None and sums.change <= until:
            break
        if block.stop <= sums.forwards:
            continue
        tick = _ticker(sums.n_tokens, block, max_tokens, progress)
        parallel.map_over_ranks("keys of a corpus", block.forwards, lambda rows: _add(model, sums, rows), tick)
        totals = parallel.summed("second moments", [*sums.totals.values(), *sums.routed.values()])
        sums.totals = dict(zip(sums.totals, totals, strict=False))
        sums.routed = dict(zip(sums.routed, totals[len(sums.totals) :], strict=True))
        sums.n_tokens += sum(_tokens(rows) for rows in block.forwards)
        sums.forwards = block.stop
        if block.marked:
            sums.mark()
        if parallel.is_main() and sums.forwards >= saved + FORWARDS_PER_CHECKPOINT:
            sums.save(checkpoint)
            saved = sums.forwards
        sums.only_mains()
    if sums.n_tokens == 0:
        raise WorkFailed(f"the corpus {corpus.name} holds no tokens; give one with text in it")
    return sums


class Document(NamedTuple):
    """A document's tokens, of which the first `seen` are in the sums already."""

    ids: list[int]
    seen: int = 0


class Block(NamedTuple):
    """The first documents that are left: those of each forward.

    `stop` counts the forwards up to here, `marked` says that C is compared with what it was.
    """

    forwards: list[list[Document]]
    stop: int
    marked: bool


def blocks(model: TracedModel, corpus: Corpus, max_tokens: int, start: int = 0) -> Iterator[Block]:
    """The corpus behind its first `start` tokens in blocks of documents, each sorted by length.

    A block ends at a mark or at FORWARDS_PER_SORT forwards.

    So the sums at the end of a block are those over the first documents, whatever their length.
    """
    marks, block = _marks(max_tokens), Block([], 0, False)
    window: list[Document] = []
    used = start
    for document in _documents(model, corpus, max_tokens, start):
        window.append(document)
        before, used = used, used + _tokens([document])
        marked = any(before < mark <= used for mark in marks)
        if marked or _tokens(window) >= FORWARDS_PER_SORT * TOKENS_PER_FORWARD:
            groups = list(_grouped(window))
            yield (block := Block(groups, block.stop + len(groups), marked))
            window = []
    if window:
        groups = list(_grouped(window))
        yield Block(groups, block.stop + len(groups), False)


def _tokens(documents: Iterable[Document]) -> int:
    """How many are not in the sums yet."""
    return sum(len(each.ids) - each.seen for each in documents)


def _ticker(before: int, block: Block, max_tokens: int, progress: Progress | None) -> Callable[[int], None] | None:
    """Forwards of a block as tokens of the whole."""
    if progress is None:
        return None
    counts = list(accumulate(map(_tokens, block.forwards), initial=before))
    return lambda done: progress(min(counts[done], max_tokens), max_tokens)


def _marks(max_tokens: int) -> list[int]:
    """The token counts at which C is compared with what it was: each half of the next, the last the limit."""
    marks = [max_tokens]
    while marks[-1] >= 2 * FIRST_MARK:
        marks.append(marks[-1] // 2)
    return marks


def _documents(model: TracedModel, corpus: Corpus, max_tokens: int, start: int) -> Iterator[Document]:
    limit, used = min(LONGEST, model.most_positions or LONGEST), 0
    for window in _windows(model, corpus, limit, max_tokens):
        ids = window[: max_tokens - used]
        used += len(ids)
        if ids and used > start:
            yield Document(ids, max(0, start - used + len(ids)))
        if used >= max_tokens:
            return


def _windows(model: TracedModel, corpus: Corpus, limit: int, max_tokens: int) -> Iterator[list[int]]:
    """The first `limit` tokens of every document; then, where more are wanted, the rests, in windows as long.

    Of a model that is asked in its chat template each window is a user's turn.
    """
    before, behind = ([], []) if model.chat is None else model.chat.around
    limit = max(1, limit - len(before) - len(behind))
    rests: list[list[int]] = []
    waiting = 0
    for text in corpus.texts():
        ids = token_ids(model.tokenizer, text) if model.chat is None else model.chat.bare(text)
        yield [*before, *ids[:limit], *behind]
        if len(ids) > limit and waiting < max_tokens:
            rests.append(ids[limit : limit + max_tokens])
            waiting += len(rests[-1])
    for rest in rests:
        yield from ([*before, *rest[at : at + limit], *behind] for at in range(0, len(rest), limit))


def _grouped(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in sorted(documents, key=lambda each: len(each.ids)):
        columns = (len(group) + 1) * len(document.ids)
        wasteful = columns > WASTE * (_tokens(group) + len(document.ids)) and _tokens(group) >= LEAST_TOKENS
        if group and (wasteful or columns > TOKENS_PER_FORWARD):
            yield group
            group = []
        group.append(document)
    if group:
        yield group


@torch.no_grad()
def _add(model: TracedModel, sums: Sums, documents: list[Document]) -> None:
    batch = encode_ids([each.ids for each in documents], pad_id(model.tokenizer)).to(model.device)
    size, new = len(batch), batch.mask.bool()
    for row, (ids, seen) in zip(new, documents, strict=True):
        row[len(row) - len(ids) :][:seen] = False
    with model.nnsight.trace(**model.inputs(batch)) as tracer:
        for site in model.in_order(sums.totals):
            full: Any = model.key(site, size)
            keys = full[new.to(full.device)]
            if site in sums.routed:  # the others are zero
                keys = keys[keys.any(-1)]
                sums.routed[site] += len(keys)
            add_products(sums.totals[site], keys.float())
        tracer.stop()


def add_products(total: Float[Tensor, "d d"], keys: Float[Tensor, "token d"]) -> None:
    """Add Σ k kᵀ to the lower triangle."""
    for rows, part in _strips(total):
        part += (keys[:, rows].T @ keys[:, : rows.stop]).to(total.device, total.dtype)


def _strips(total: Float[Tensor, "d d"]) -> Iterator[tuple[slice, Float[Tensor, "strip upto"]]]:
    """Strips of rows of the lower triangle, each up to and with its whole block on the diagonal."""
    size = total.shape[0]
    step = max(LEAST_STRIP, -(-size // STRIPS))
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        yield rows, total[rows, : rows.stop]


def _sketch(total: Float[Tensor, "d d"]) -> Float[Tensor, "d direction"]:
    """The symmetric matrix of these strips times random directions, the same ones at each call."""
    drawn = torch.Generator().manual_seed(0)
    directions = torch.randn(len(total), DIRECTIONS, dtype=total.dtype, generator=drawn).to(total.device)
    product = torch.zeros_like(directions)
    for rows, part in _strips(total):
        product[rows] += part @ directions[: rows.stop]
        product[: rows.start] += part[:, : rows.start].T @ directions[rows]
    return product
