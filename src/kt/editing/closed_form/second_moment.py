"""Second moments C = E[k kᵀ] of the keys of linear maps over a corpus, which an edit should preserve.

Uncentred, over all real tokens, first ones included (MEMIT's K0 K0ᵀ is λ C). Each is kept in a file and read from it
when asked for; key_sums.py takes the sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..._util.data import complete_file, open_arrays, read_metadata, save_arrays
from ..._util.files import clear_temporaries
from ..._util.kinds import takes
from ..._util.lock import default_cache
from ..._util.notebook_bar import with_bar
from ..._util.progress import Progress
from ...errors import BadFact, BadFile, WorkFailed, warn_user
from ...facts.corpus import TOKENS, Corpus, tokens_for
from ...model.identity import identity
from ...model.memory import require_memory
from ...model.sites import Kind, Site
from ...report import Column, Shown, Table
from ...runs import parallel
from .factor import BlockMoment, Moment, Store
from .kept_moments import Changes, Kept, look_up, stored
from .key_sums import LONGEST, Sums, take_sums

if TYPE_CHECKING:
    from ...model.model import TracedModel


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
            if not experts and not any(isinstance(moment, BlockMoment) for moment in self._moments.values()):
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


@takes()
@with_bar("second moments")
def key_statistics(
    model: TracedModel,
    sites: Sequence[Site],
    corpus: Corpus | str | Path = "auto",
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
