"""Second moments C = E[k kᵀ] of the keys of linear maps over a corpus, which an edit should preserve.

Uncentred, over all real tokens, first ones included (MEMIT's K0 K0ᵀ is λ C). One forward reads the keys of all wanted
weights and stops after the last of them.

Only the lower triangle is computed, strip by strip: k kᵀ is symmetric, so that is half of the work. Products are
float32, their sum over forwards float64. Documents of like length share a forward; which ones is a matter of speed
alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..._util.data import complete_file, load_arrays, open_arrays, read_metadata, save_arrays
from ..._util.files import clear_temporaries
from ..._util.lock import default_cache
from ..._util.notebook_bar import with_bar
from ..._util.progress import Progress
from ...errors import BadFact, BadFile, WorkFailed, warn_user
from ...facts.corpus import TOKENS, Corpus, tokens_for
from ...model.identity import identity
from ...model.memory import require_memory
from ...model.sites import Kind, Site
from ...model.tokens import encode_ids, pad_id, token_ids
from ...report import Column, Shown, Table
from ...runs import parallel
from .factor import BlockMoment, Moment, Store
from .kept_moments import Changes, Kept, look_up, stored

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
    positions = getattr(model.module.config.get_text_config(), "max_position_embeddings", None)
    limit, used = min(LONGEST, int(positions or LONGEST)), 0
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


@dataclass(frozen=True)
class Statistics(Shown):
    """Second moments by module name (`model.layers.0.mlp.down_proj`), read from their files when asked for.

    `cache` is where factors of large ones are kept; `changes` says how far each has converged, where that is known.
    `routed` has how many of the tokens were sent to each expert.
    """

    files: Mapping[str, Path]
    n_tokens: int | None = None
    corpus: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Changes] = field(default_factory=dict)
    cache: Path | None = None
    routed: Mapping[str, int] = field(default_factory=dict)
    _moments: dict[str, Moment] = field(default_factory=dict, repr=False, compare=False)

    kind = "statistics"

    @property
    def metadata(self) -> dict[str, Any]:
        """The corpus, and how much of it was read."""
        return {"corpus": self.corpus, "n_tokens": self.n_tokens}

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the files by module name, and how far each second moment has converged."""
        files = {name: str(path) for name, path in self.files.items()}
        routed = {"routed": dict(self.routed)} if self.routed else {}
        return {"files": files, **self.metadata, "changes": dict(self.changes), **routed}

    def tables(self) -> Sequence[Table]:
        """A row a module."""
        change = Column("change", lambda value: "–" if value is None else f"{value:.3f}")
        sent = [Column("tokens sent there", lambda value: "all" if value is None else f"{value:,}")]
        last = {name: changes[-1][1] if (changes := self.changes.get(name)) else None for name in self.files}
        shown = sent if self.routed else []
        rows = [
            [name, last[name], *[self.routed.get(name)] * len(shown), str(path)] for name, path in self.files.items()
        ]
        note = "change: of the moment's norm over the last doubling of the tokens"
        columns: list[str | Column] = ["module", change, *shown, "file"]
        return [Table(columns, rows, f"second moments over {self.n_tokens} tokens", note)]

    @classmethod
    def open(cls, path: str | Path) -> Statistics:
        """A safetensors file with one (d_key, d_key) tensor per module name."""
        path = Path(path)
        names, metadata = read_metadata(path)
        with complete_file(path, "file of second moments", "run kt cov again"):
            tokens = metadata.get("n_tokens")
            changes = tuple((int(tokens), float(change)) for tokens, change in metadata.get("changes", ()))
            return cls(
                dict.fromkeys(names, path),
                int(tokens) if tokens else None,
                str(metadata.get("corpus", "")),
                changes=dict.fromkeys(names, changes) if changes else {},
                cache=default_cache(),
                routed=dict.fromkeys(names, metadata["routed"]) if metadata.get("routed") is not None else {},
            )

    def moment_of(self, name: str) -> Moment:
        """C of a module with its factor and null space, which are computed once and shared."""
        if name not in self._moments:
            read, file = self._reader(name), self.files[name.removesuffix(".weight")]
            store = None if self.cache is None else Store(self.cache, file.stem)
            self._moments[name] = Moment(name, len(read()), read, store)
        return self._moments[name]

    def moment_of_parts(self, name: str, parts: Sequence[str]) -> Moment:
        """C of a mixture of experts, called `name`, from those of its parts: zero between them, and each expert's with
        what `BlockMoment` adds by the number of tokens that were sent there."""
        if name not in self._moments:
            blocks = [self.moment_of(part) for part in parts]
            sent = [self.routed.get(part.removesuffix(".weight")) for part in parts]
            experts = [(block, count) for block, count in zip(blocks, sent, strict=True) if count is not None]
            if not experts:
                warn_user(
                    f"the second moments of {name} do not say how many tokens each expert was sent, and rare experts "
                    "are held by nothing more; take them with kt cov"
                )
            pseudo = sum(block.mean() * block.size for block, _ in experts) / max(1, sum(n for _, n in experts))
            self._moments[name] = BlockMoment(name, blocks, [0.0 if count is None else pseudo for count in sent])
        return self._moments[name]

    def require(self, sizes: Mapping[str, int]) -> None:
        """Refuse second moments that lack a module of `sizes`, or have it for keys of another size.

        Raises:
            BadFile: they do.
        """
        for name, size in sizes.items():
            self._reader(name)
            with open_arrays(file := self.files[name.removesuffix(".weight")]) as arrays:
                shape = arrays.get_slice(name.removesuffix(".weight")).get_shape()
            if shape != [size, size]:
                raise BadFile(
                    f"{file}: the second moment of {name} is {'x'.join(map(str, shape))}, and its keys have {size} "
                    "numbers; take the statistics of this model (kt cov)"
                )

    def moment(self, name: str) -> Float[Tensor, "d_in d_in"]:
        """C of a module, as stored."""
        return self._reader(name)()

    def _reader(self, name: str) -> Callable[[], Float[Tensor, "d_in d_in"]]:
        """A function that reads C at each call, without a reference to this object, which would keep it alive."""
        name = name.removesuffix(".weight")
        if name not in self.files:
            have = ", ".join(sorted(self.files)[:4]) or "nothing"
            raise BadFile(f"no second moment of {name} (have {have}, ...); run kt cov for its layer and module")
        return partial(stored, self.files[name], name)


FEWEST, TOKENS_A_DIRECTION = 25_000, 5
"""Of our English text: on SmolLM2 (d_key 1,536) ten edits come out the same with C over 25,000 tokens, 50,000 and
100,000 (docs/data.md), and a pass over the text takes as long as the number says."""


def default_tokens(model: TracedModel, corpus: str) -> int:
    """Tokens that are counted where no number was given: TOKENS.

    Of our English text TOKENS_A_DIRECTION for each element of down_proj's widest key, which C needs to have full rank
    several times over, but from FEWEST to TOKENS.
    """
    kind = Kind.MLP if model.layers_with(Kind.MLP) else Kind.ATTN
    mlps = [Site(kind, layer) for layer in model.layers_with(kind)]
    widest = max(model.key_size(part) for site in mlps for part in model.parts(site))
    return tokens_for(corpus, None) or min(TOKENS, max(FEWEST, TOKENS_A_DIRECTION * widest))


@with_bar("second moments")
def key_statistics(
    model: TracedModel,
    sites: Sequence[Site],
    corpus: Corpus | str = "auto",
    max_tokens: int | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    until: float | None = None,
) -> Statistics:
    """C of every site, from the cache where it is there.

    One file a weight and number of tokens, named by what the model is (weights, config, tokenizer), the weight's name
    and the corpus, never by the model's name. The same number of tokens is read from the cache; of a longer pass than
    any kept one only the rest is taken, and a warning says so. So C hangs on the arguments alone, up to rounding. An
    interrupted run goes on from its last checkpoint with the same result. Of several processes that want the same, one
    computes and the others wait for its files.

    Args:
        model: the loaded model, as `kt.load` returns it.
        sites: the linear maps whose inputs are the keys.
        corpus: `auto`, a text file, or another name that `--corpus` takes.
        max_tokens: None counts `default_tokens`.
        cache_dir: where C is kept; None takes `KT_CACHE`.
        until: stop before `max_tokens`, at the first doubling of the tokens that changed no C by more than this
            share of its norm.

    Returns:
        C by module name, (d_key, d_key) float32, read from its file when it is asked for; and the number of tokens.

    Raises:
        BadFact: `until` is not above zero.
        WorkFailed: the corpus holds no text, or a key is not finite.

    Examples:
        >>> statistics = kt.key_statistics(model, [kt.Site("mlp", 1)], max_tokens=500)
        >>> list(statistics.files)
        ['model.layers.1.mlp.down_proj']
    """
    if until is not None and not until > 0:
        raise BadFact(f"until {until:g} must be above zero; 0.05 stops when a doubling changes C by less than 5%")
    sites = [part for site in sites for part in model.parts(site)]
    corpus = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus, model.name)
    if max_tokens is None:
        max_tokens = TOKENS if until is not None else default_tokens(model, corpus.name)
    folder = Path(cache_dir) if cache_dir else default_cache()
    model_is = identity(model)
    keys = {s: _cache_key(model, model_is, s, corpus) for s in sorted(set(sites))}
    names = {s: model.weight_name(s).removesuffix(".weight") for s in keys}
    work = f"{model_is} {corpus.identity} {max_tokens} {until}"
    with ExitStack() as locks:
        wanted = {s: (keys[s], names[s], model.key_size(s)) for s in keys}
        looking = partial(look_up, locks, folder, wanted, max_tokens, until)
        files, missing = parallel.on_rank_zero("looking for second moments", looking, work)
        for _, group in groupby(sorted(missing, key=lambda s: missing[s].n_tokens), lambda s: missing[s].n_tokens):
            begin = {s: missing[s] for s in sorted(group)}
            files |= _compute(model, folder, {s: keys[s] for s in begin}, begin, corpus, max_tokens, until, progress)
    opened = {s: Statistics.open(files[s]) for s in keys}
    return Statistics(
        {names[s]: files[s] for s in keys},
        max((st.n_tokens or 0 for st in opened.values()), default=None),
        corpus.name,
        {names[s]: files[s].stem for s in keys},
        {name: changes for o in opened.values() for name, changes in o.changes.items()},
        folder,
        {name: count for o in opened.values() for name, count in o.routed.items()},
    )


def memory_needed(model: TracedModel, sites: Sequence[Site]) -> int:
    """Bytes that the running sums hold: float64, one d_key x d_key matrix a site."""
    return sum(8 * model.key_size(part) ** 2 for s in set(sites) for part in model.parts(s))


def _cache_key(model: TracedModel, model_is: str, site: Site, corpus: Corpus) -> str:
    parts = [model_is, model.weight_name(site), corpus.identity, str(LONGEST)]
    return "cov-" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def _compute(
    model: TracedModel,
    folder: Path,
    keys: Mapping[Site, str],
    begin: Mapping[Site, Kept],
    corpus: Corpus,
    max_tokens: int,
    until: float | None,
    progress: Progress | None,
) -> dict[Site, Path]:
    """Take and keep the second moments of these sites, whose passes begin from the same number of tokens."""
    sites = list(keys)
    require_memory(
        memory_needed(model, sites) + 8 * max(map(model.key_size, sites)) ** 2,
        f"the sum of {len(sites)} second moments and one of them whole",
        "take fewer layers at a time (--layers-mlp, --layers-attn); the cache keeps each",
    )
    start = next(iter(begin.values())).n_tokens
    pending = "+".join([*keys.values(), str(max_tokens), str(until), str(start)])
    checkpoint = folder / f"partial-{hashlib.sha256(pending.encode()).hexdigest()[:40]}.safetensors"
    if parallel.is_main():
        for name in (checkpoint.name, *(f"{key}-{max_tokens}.safetensors" for key in keys.values())):
            clear_temporaries(folder, name)
    sums = take_sums(model, sites, corpus, max_tokens, until, checkpoint, progress, begin if start else None)
    stopped = until is not None and sums.change <= until
    about = {
        "n_tokens": sums.n_tokens,
        "whole": sums.n_tokens < max_tokens and not stopped,
        "windows": True,  # an older kt read the first of each document alone
        "taken_from": start,
        "until": None if until is None else [until, max_tokens],
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "model": Path(model.name).name if Path(model.name).is_absolute() else model.name,
    }
    files = {site: folder / f"{key}-{sums.n_tokens}.safetensors" for site, key in keys.items()}
    parallel.on_rank_zero("keeping second moments", _keep, model, files, sums, about)
    if parallel.is_main():
        checkpoint.unlink(missing_ok=True)
    return files


def _keep(model: TracedModel, files: Mapping[Site, Path], sums: Sums, about: Mapping[str, Any]) -> None:
    """Write one file a weight."""
    for site, file in files.items():
        moment = sums.mean(site)
        if not bool(torch.isfinite(moment).all()):
            raise WorkFailed(f"the second moment of {site} is not finite; check the model's weights or use float32")
        name = model.weight_name(site).removesuffix(".weight")
        sent = {"routed": int(sums.routed[site])} if site in sums.routed else {}
        save_arrays(file, {name: moment}, {**about, **sent, "changes": [[n, by[site]] for n, by in sums.changes]})
