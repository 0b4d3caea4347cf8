"""The pass that takes second moments: forwards up to the last key that is asked for, and sums of their products.

Only the lower triangle is computed, strip by strip: k kᵀ is symmetric, so that is half of the work. Products are
float32, their sum over forwards float64. Documents of like length share a forward; which ones is a matter of speed
alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import ranks
from ..artifacts import save_arrays
from ..corpus import Corpus
from ..errors import WorkFailed
from ..progress import Progress
from ..prompts import encode_ids, pad_id, token_ids
from ..sites import Kind, Site

if TYPE_CHECKING:
    from ..model import TracedModel

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

    @classmethod
    def zero(cls, model: TracedModel, sites: Iterable[Site]) -> Sums:
        return cls({s: torch.zeros(model.key_size(s), model.key_size(s), dtype=torch.float64) for s in sites})

    def save(self, path: Path) -> None:
        """A checkpoint."""
        arrays = {f"total {s}": t for s, t in self.totals.items()}
        arrays |= {f"sketch {s}": t for s, t in self.sketches.items()}
        changes = [[tokens, {str(s): c for s, c in by.items()}] for tokens, by in self.changes]
        save_arrays(path, arrays, {"n_tokens": self.n_tokens, "forwards": self.forwards, "changes": changes})

    @classmethod
    def resume(cls, path: Path, model: TracedModel, sites: Sequence[Site]) -> Sums:
        """From a checkpoint, if there is one."""
        if not path.exists():
            return cls.zero(model, sites)
        try:
            with safe_open(path, "pt") as file:
                state: dict[str, Any] = json.loads((file.metadata() or {}).get("kt", "{}"))
                held = set(file.keys())
                return cls(
                    {s: file.get_tensor(f"total {s}") for s in sites},
                    int(state["n_tokens"]),
                    int(state["forwards"]),
                    {s: file.get_tensor(f"sketch {s}") for s in sites if f"sketch {s}" in held},
                    [(int(tokens), {s: float(by[str(s)]) for s in sites}) for tokens, by in state["changes"]],
                )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return cls.zero(model, sites)  # a checkpoint that cannot be read costs time, not correctness

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
        """Of several processes, rank 0 goes on from the sums; the others count what they add."""
        if not ranks.is_main():
            for total in self.totals.values():
                total.zero_()

    def mark(self) -> None:
        """Note how C has changed since the last mark, on random directions."""
        now = {s: _sketch(t) / self.n_tokens for s, t in self.totals.items()}
        if self.sketches:
            by = {s: float((now[s] - self.sketches[s]).norm() / now[s].norm()) for s in now}
            self.changes.append((self.n_tokens, by))
        self.sketches = now

    @property
    def change(self) -> float:
        """The largest relative change of any C over the last doubling; infinite before there was one."""
        return max(self.changes[-1][1].values()) if self.changes else float("inf")


def take_sums(
    model: TracedModel,
    sites: Sequence[Site],
    corpus: Corpus,
    max_tokens: int,
    until: float | None,
    checkpoint: Path,
    progress: Progress | None,
) -> Sums:
    """The sums over the corpus' first `max_tokens` tokens, from the checkpoint on.

    With `until`, the pass ends at the first doubling that changed no C by more than that.

    Raises:
        WorkFailed: the corpus holds no tokens.
    """
    sums = Sums.resume(checkpoint, model, sites)
    ranks.agree({"second moments so far (tokens, forwards)": [sums.n_tokens, sums.forwards]})
    sums.only_mains()
    kept = sums.forwards
    for block in blocks(model, corpus, max_tokens):
        if until is not None and sums.change <= until:
            break
        if block.stop <= sums.forwards:
            continue
        tick = _ticker(sums.n_tokens, block, max_tokens, progress)
        ranks.each("keys of a corpus", block.forwards, lambda rows: _add(model, sums, rows), tick)
        totals = ranks.summed("second moments", list(sums.totals.values()))
        sums.totals = dict(zip(sums.totals, totals, strict=True))
        sums.n_tokens += sum(_tokens(rows) for rows in block.forwards)
        sums.forwards = block.stop
        if block.marked:
            sums.mark()
        if ranks.is_main() and sums.forwards >= kept + FORWARDS_PER_CHECKPOINT:
            sums.save(checkpoint)
            kept = sums.forwards
        sums.only_mains()
    if sums.n_tokens == 0:
        raise WorkFailed(f"the corpus {corpus.name} holds no tokens; give one with text in it")
    return sums


class Block(NamedTuple):
    """The first documents that are left, as tokens: those of each forward.

    `stop` counts the forwards up to here, `marked` says that C is compared with what it was.
    """

    forwards: list[list[list[int]]]
    stop: int
    marked: bool


def blocks(model: TracedModel, corpus: Corpus, max_tokens: int) -> Iterator[Block]:
    """The corpus in blocks of documents that end at a mark or at FORWARDS_PER_SORT forwards, each sorted by length.

    So the sums at the end of a block are those over the first documents, whatever their length.
    """
    marks, block = _marks(max_tokens), Block([], 0, False)
    window: list[list[int]] = []
    used = 0
    for ids in _documents(model, corpus, max_tokens):
        window.append(ids)
        before, used = used, used + len(ids)
        marked = any(before < mark <= used for mark in marks)
        if marked or _tokens(window) >= FORWARDS_PER_SORT * TOKENS_PER_FORWARD:
            groups = list(_grouped(window))
            yield (block := Block(groups, block.stop + len(groups), marked))
            window = []
    if window:
        groups = list(_grouped(window))
        yield Block(groups, block.stop + len(groups), False)


def _tokens(rows: Iterable[list[int]]) -> int:
    return sum(map(len, rows))


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


def _documents(model: TracedModel, corpus: Corpus, max_tokens: int) -> Iterator[list[int]]:
    positions = getattr(model.module.config.get_text_config(), "max_position_embeddings", None)
    limit, used = min(LONGEST, int(positions or LONGEST)), 0
    for text in corpus.texts():
        ids = list(token_ids(model.tokenizer, text)[: min(limit, max_tokens - used)])
        if ids:
            yield ids
        used += len(ids)
        if used >= max_tokens:
            return


def _grouped(documents: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    group: list[list[int]] = []
    for ids in sorted(documents, key=len):
        columns = (len(group) + 1) * len(ids)
        wasteful = columns > WASTE * (_tokens(group) + len(ids)) and _tokens(group) >= LEAST_TOKENS
        if group and (wasteful or columns > TOKENS_PER_FORWARD):
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


@torch.no_grad()
def _add(model: TracedModel, sums: Sums, rows: list[list[int]]) -> None:
    batch = encode_ids(rows, pad_id(model.tokenizer)).to(model.device)
    size, real = len(batch), batch.mask.bool()
    order = sorted(sums.totals, key=lambda s: (s.layer, s.kind is Kind.MLP))
    with model.nns.trace(**model.inputs(batch)) as tracer:
        for site in order:
            full: Any = model.key(site, size)
            keys = full[real.to(full.device)]
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
