"""Second moments C = E[k kᵀ] of the keys of W_o and down_proj over a corpus: what an edit should leave alone.

Uncentred, over all real tokens, first ones included (MEMIT's K0 K0ᵀ is λ C). Keys are read in one forward for all
asked weights, which stops after the last of them; products are float32, their sum over forwards float64.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..artifacts import clear_temporaries, save_arrays, whole, writing
from ..corpus import Corpus
from ..errors import BadFile, WorkFailed
from ..progress import Progress
from ..prompts import encode_ids, pad_id, token_ids
from ..sites import Kind, Site
from .moments import Moment

if TYPE_CHECKING:
    from ..model import TracedModel

TOKENS_PER_FORWARD = 4096
FORWARDS_PER_CHECKPOINT = 50
LONGEST = 1024


@dataclass(frozen=True)
class Statistics:
    """Second moments by module name (`model.layers.0.mlp.down_proj`), read from their files when asked for."""

    files: Mapping[str, Path]
    n_tokens: int | None = None
    corpus: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
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
            return cls(dict.fromkeys(names, path), int(tokens) if tokens else None, str(metadata.get("corpus", "")))

    def moment_of(self, name: str) -> Moment:
        """C of a module with its factor and null space, which are computed once for all who ask."""
        if name not in self._moments:
            self._moments[name] = Moment(name, len(self.moment(name)), lambda: self.moment(name))
        return self._moments[name]

    def moment(self, name: str) -> Float[Tensor, "d_in d_in"]:
        """C of a module, as stored."""
        name = name.removesuffix(".weight")
        if name not in self.files:
            have = ", ".join(sorted(self.files)[:4]) or "nothing"
            raise BadFile(f"no second moment of {name} (have {have}, ...); run kt cov for its layer and module")
        with safe_open(self.files[name], "pt") as file:
            moment = file.get_tensor(name)
        if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
            raise BadFile(f"{self.files[name]}: {name} is {tuple(moment.shape)}, not a square second moment")
        return moment


def key_statistics(
    model: TracedModel,
    sites: Sequence[Site],
    corpus: Corpus | str = "demo",
    max_tokens: int = 100_000,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """C of every site, from the cache where it is there.

    One file a weight, named by the hash of the model's weights, the weight's name, the corpus and the token limit,
    never by the model's name. An interrupted run goes on from its last checkpoint with the same result. Of several
    processes that want the same, one computes and the others wait for its files.
    """
    corpus = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
    folder = Path(cache_dir) if cache_dir else default_cache()
    fingerprint = model.fingerprint()
    files = {
        s: folder / f"{_cache_key(model, fingerprint, s, corpus, max_tokens)}.safetensors" for s in sorted(set(sites))
    }
    if not all(file.exists() for file in files.values()):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, f"{fingerprint} {corpus.sha256} {max_tokens}"):
            missing = {s: f for s, f in files.items() if not f.exists()}  # another process may have just made some
            if missing:
                _compute(model, missing, corpus, max_tokens, progress)
    opened = {s: Statistics.open(f) for s, f in files.items()}
    names = {s: model.weight_name(s).removesuffix(".weight") for s in files}
    tokens = {st.n_tokens for st in opened.values()}
    return Statistics(
        {names[s]: f for s, f in files.items()},
        tokens.pop() if tokens else None,
        corpus.name,
        {names[s]: f.stem for s, f in files.items()},
    )


@contextmanager
def _alone(folder: Path, work: str) -> Iterator[None]:
    """Whoever does this work in this cache does it alone; the others wait."""
    from filelock import FileLock, Timeout

    name = f"cov-{hashlib.sha256(work.encode()).hexdigest()[:40]}.lock"
    lock = FileLock(folder / name)
    with writing(folder / name):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            warnings.warn("another process takes the same second moments; waiting for it", stacklevel=3)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def memory_needed(model: TracedModel, sites: Sequence[Site]) -> int:
    """Bytes that the running sums hold: float64, one d_key x d_key matrix a site."""
    return sum(8 * model.key_size(s) ** 2 for s in set(sites))


def default_cache() -> Path:
    """`$KT_CACHE`, else `kt` in the user's cache folder."""
    import os

    if os.environ.get("KT_CACHE"):
        return Path(os.environ["KT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "kt"


def _cache_key(model: TracedModel, fingerprint: str, site: Site, corpus: Corpus, max_tokens: int) -> str:
    parts = [fingerprint, model.weight_name(site), corpus.sha256, str(max_tokens), str(LONGEST)]
    return "cov-" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


@dataclass
class _Sums:
    """The running sums of a pass, and how far it has come."""

    totals: dict[Site, Tensor]
    n_tokens: int = 0
    forwards: int = 0

    def save(self, path: Path) -> None:
        arrays = {str(s): t for s, t in self.totals.items()}
        save_arrays(path, arrays, {"n_tokens": self.n_tokens, "forwards": self.forwards})

    @classmethod
    def resume(cls, path: Path, model: TracedModel, sites: Iterable[Site]) -> _Sums:
        fresh = cls({s: torch.zeros(model.key_size(s), model.key_size(s), dtype=torch.float64) for s in sites})
        if not path.exists():
            return fresh
        try:
            with safe_open(path, "pt") as file:
                state: dict[str, Any] = json.loads((file.metadata() or {}).get("kt", "{}"))
                return cls(
                    {s: file.get_tensor(str(s)) for s in fresh.totals},
                    int(state["n_tokens"]),
                    int(state["forwards"]),
                )
        except (OSError, SafetensorError, KeyError, ValueError):
            return fresh  # a checkpoint that cannot be read costs time, not correctness


@torch.no_grad()
def _compute(
    model: TracedModel,
    files: dict[Site, Path],
    corpus: Corpus,
    max_tokens: int,
    progress: Progress | None,
) -> None:
    pending = "+".join(f.stem for f in files.values())
    checkpoint = (
        next(iter(files.values())).parent / f"partial-{hashlib.sha256(pending.encode()).hexdigest()[:40]}.safetensors"
    )
    for file in (checkpoint, *files.values()):
        clear_temporaries(file.parent, file.name)
    sums = _Sums.resume(checkpoint, model, files)
    done = 0
    for done, rows in enumerate(_forwards(model, corpus, max_tokens), start=1):
        if done <= sums.forwards:
            continue
        _add(model, sums, rows)
        sums.forwards = done
        if progress:
            progress(min(sums.n_tokens, max_tokens), max_tokens)
        if done % FORWARDS_PER_CHECKPOINT == 0:
            sums.save(checkpoint)
    if sums.n_tokens == 0:
        raise WorkFailed(f"the corpus {corpus.name} holds no tokens; give one with text in it")
    for site, total in sums.totals.items():
        moment = (total / sums.n_tokens).float()
        if not bool(torch.isfinite(moment).all()):
            raise WorkFailed(f"the second moment of {site} is not finite; check the model's weights or use float32")
        name = model.weight_name(site).removesuffix(".weight")
        save_arrays(
            files[site],
            {name: moment},
            {"n_tokens": sums.n_tokens, "corpus": corpus.name, "corpus_sha256": corpus.sha256},
        )
    checkpoint.unlink(missing_ok=True)


def _forwards(model: TracedModel, corpus: Corpus, max_tokens: int) -> Iterator[list[list[int]]]:
    """Documents in their order, cut to the model's length, grouped into forwards of at most TOKENS_PER_FORWARD."""
    limit = min(
        LONGEST,
        int(getattr(model.module.config.get_text_config(), "max_position_embeddings", LONGEST) or LONGEST),
    )
    group: list[list[int]] = []
    used = 0
    for text in corpus.texts():
        ids = token_ids(model.tokenizer, text)[: min(limit, max_tokens - used)]
        if not ids:
            continue
        if group and (len(group) + 1) * max(len(ids), max(map(len, group))) > TOKENS_PER_FORWARD:
            yield group
            group = []
        group.append(ids)
        used += len(ids)
        if used >= max_tokens:
            break
    if group:
        yield group


def _add(model: TracedModel, sums: _Sums, rows: list[list[int]]) -> None:
    batch = encode_ids(rows, pad_id(model.tokenizer)).to(model.device)
    size, real = len(batch), batch.mask.bool()
    order = sorted(sums.totals, key=lambda s: (s.layer, s.kind is Kind.MLP))
    found: dict[Site, Tensor] = {}
    with model.nns.trace(**model.inputs(batch)) as tracer:
        for site in order:
            keys = model.key(site, size)[real].float()
            product: Any = einsum(keys, keys, "token i, token j -> i j")
            found[site] = product.save()
        tracer.stop()
    for site, product in found.items():
        sums.totals[site] += product.double().cpu()
    sums.n_tokens += int(real.sum())
