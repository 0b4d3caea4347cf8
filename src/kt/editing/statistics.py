"""Second moments C = E[k kᵀ] of the keys of W_o and down_proj over a corpus: what an edit should leave alone.

Uncentred, over all real tokens, first ones included (MEMIT's K0 K0ᵀ is λ C). Keys are read in one forward for all
asked weights, which stops after the last of them: see second_moments.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import ranks
from ..artifacts import clear_temporaries, save_arrays, whole, writing
from ..cache import alone, default_cache
from ..corpus import Corpus
from ..errors import BadFact, BadFile, WorkFailed
from ..memory import require_memory
from ..progress import Progress
from ..sites import Site
from .kept import Store
from .moments import Moment
from .second_moments import LONGEST, Sums, take_sums

if TYPE_CHECKING:
    from ..model import TracedModel

Changes = tuple[tuple[int, float], ...]
"""(tokens, ‖C - C_half‖ / ‖C‖) for every doubling of the tokens, in Frobenius norms taken on random directions."""


@dataclass(frozen=True)
class Statistics:
    """Second moments by module name (`model.layers.0.mlp.down_proj`), read from their files when asked for.

    `cache` is where factors of large ones are kept; `changes` says how far each has converged, where that is known.
    """

    files: Mapping[str, Path]
    n_tokens: int | None = None
    corpus: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Changes] = field(default_factory=dict)
    cache: Path | None = None
    _moments: dict[str, Moment] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Statistics:
        """A safetensors file with one (d_key, d_key) tensor per module name."""
        path = Path(path)
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                header = (file.metadata() or {}).get("kt", "{}")
        except (OSError, SafetensorError, ValueError) as error:
            said = " ".join(str(error).split())
            raise BadFile(f"{path} is no readable safetensors file of second moments: {said}") from None
        with whole(path, "file of second moments", "run kt cov again"):
            metadata = json.loads(header)
            tokens = metadata.get("n_tokens")
            changes = tuple((int(tokens), float(change)) for tokens, change in metadata.get("changes", ()))
            return cls(
                dict.fromkeys(names, path),
                int(tokens) if tokens else None,
                str(metadata.get("corpus", "")),
                changes=dict.fromkeys(names, changes) if changes else {},
                cache=default_cache(),
            )

    def moment_of(self, name: str) -> Moment:
        """C of a module with its factor and null space, which are computed once for all who ask."""
        if name not in self._moments:
            store, read = None if self.cache is None else Store(self.cache), self._reader(name)
            self._moments[name] = Moment(name, len(read()), read, store)
        return self._moments[name]

    def moment(self, name: str) -> Float[Tensor, "d_in d_in"]:
        """C of a module, as stored."""
        return self._reader(name)()

    def _reader(self, name: str) -> Callable[[], Float[Tensor, "d_in d_in"]]:
        """Reads C again at each call; it knows nothing of this object, which would otherwise outlive its use."""
        name = name.removesuffix(".weight")
        if name not in self.files:
            have = ", ".join(sorted(self.files)[:4]) or "nothing"
            raise BadFile(f"no second moment of {name} (have {have}, ...); run kt cov for its layer and module")
        return partial(_stored, self.files[name], name)


def _stored(file: Path, name: str) -> Float[Tensor, "d_in d_in"]:
    with safe_open(file, "pt") as held:
        moment = held.get_tensor(name)
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise BadFile(f"{file}: {name} is {tuple(moment.shape)}, not a square second moment")
    return moment


def key_statistics(
    model: TracedModel,
    sites: Sequence[Site],
    corpus: Corpus | str = "demo",
    max_tokens: int = 100_000,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    until: float | None = None,
) -> Statistics:
    """C of every site, from the cache where it is there.

    One file a weight, named by the hash of the model's weights, the weight's name, the corpus and the token limit,
    never by the model's name. An interrupted run goes on from its last checkpoint with the same result. Of several
    processes that want the same, one computes and the others wait for its files.

    Args:
        until: stop before `max_tokens`, at the first doubling of the tokens that changed no C by more than this
            share of its norm.

    Raises:
        BadFact: `until` is not above zero.
        WorkFailed: the corpus holds no text, or a key is not finite.
    """
    if until is not None and not until > 0:
        raise BadFact(f"until {until:g} must be above zero; 0.05 stops when a doubling changes C by less than 5%")
    corpus = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
    folder = Path(cache_dir) if cache_dir else default_cache()
    fingerprint = model.fingerprint()
    files = {
        s: folder / f"{_cache_key(model, fingerprint, s, corpus, max_tokens, until)}.safetensors"
        for s in sorted(set(sites))
    }
    work = f"{fingerprint} {corpus.sha256} {max_tokens} {until}"
    with ExitStack() as held:
        missing = ranks.by_main("looking for second moments", _claimed, held, folder, files, work)
        if missing:
            _compute(model, {s: files[s] for s in missing}, corpus, max_tokens, until, progress)
    opened = {s: Statistics.open(f) for s, f in files.items()}
    names = {s: model.weight_name(s).removesuffix(".weight") for s in files}
    tokens = {st.n_tokens for st in opened.values()}
    return Statistics(
        {names[s]: f for s, f in files.items()},
        tokens.pop() if tokens else None,
        corpus.name,
        {names[s]: f.stem for s, f in files.items()},
        {name: changes for o in opened.values() for name, changes in o.changes.items()},
        folder,
    )


def _claimed(held: ExitStack, folder: Path, files: Mapping[Site, Path], work: str) -> list[Site]:
    """The sites whose files are not there; for as long as `held`, no other run makes them."""
    if all(file.exists() for file in files.values()):
        return []
    lock = folder / f"cov-{hashlib.sha256(work.encode()).hexdigest()[:40]}.lock"
    with writing(lock):
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(alone(lock, "takes the same second moments"))
    return [site for site, file in files.items() if not file.exists()]  # another may just have made some


def memory_needed(model: TracedModel, sites: Sequence[Site]) -> int:
    """Bytes that the running sums hold: float64, one d_key x d_key matrix a site."""
    return sum(8 * model.key_size(s) ** 2 for s in set(sites))


def _cache_key(
    model: TracedModel, fingerprint: str, site: Site, corpus: Corpus, max_tokens: int, until: float | None
) -> str:
    parts = [fingerprint, model.weight_name(site), corpus.sha256, str(max_tokens), str(LONGEST)]
    parts += [] if until is None else [f"until {until!r}"]
    return "cov-" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def _compute(
    model: TracedModel,
    files: dict[Site, Path],
    corpus: Corpus,
    max_tokens: int,
    until: float | None,
    progress: Progress | None,
) -> None:
    sites = list(files)
    require_memory(
        memory_needed(model, sites) + 8 * max(map(model.key_size, sites)) ** 2,
        f"the sum of {len(sites)} second moments and one of them whole",
        "take fewer layers at a time (--layers-mlp, --layers-attn); the cache keeps each",
    )
    pending = "+".join(f.stem for f in files.values())
    checkpoint = (
        next(iter(files.values())).parent / f"partial-{hashlib.sha256(pending.encode()).hexdigest()[:40]}.safetensors"
    )
    if ranks.is_main():
        for file in (checkpoint, *files.values()):
            clear_temporaries(file.parent, file.name)
    sums = take_sums(model, sites, corpus, max_tokens, until, checkpoint, progress)
    ranks.by_main("keeping second moments", _keep, model, files, sums, corpus, checkpoint)


def _keep(model: TracedModel, files: Mapping[Site, Path], sums: Sums, corpus: Corpus, checkpoint: Path) -> None:
    """One file a weight, and no checkpoint any more."""
    for site, file in files.items():
        moment = sums.mean(site)
        if not bool(torch.isfinite(moment).all()):
            raise WorkFailed(f"the second moment of {site} is not finite; check the model's weights or use float32")
        name = model.weight_name(site).removesuffix(".weight")
        about = {"n_tokens": sums.n_tokens, "corpus": corpus.name, "corpus_sha256": corpus.sha256}
        save_arrays(file, {name: moment}, about | {"changes": [[n, by[site]] for n, by in sums.changes]})
    checkpoint.unlink(missing_ok=True)
