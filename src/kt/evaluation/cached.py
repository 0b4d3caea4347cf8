"""A cache of the unedited model's scores on disk: every edit is compared with the same ones.

A file's name is the hash of everything that determines the scores: weights, dtype, device, tokenizer, facts,
protocols, seed and the versions of the code. The batch size is not among them: it changes figures by rounding alone.
A file that cannot be read or written gives a warning, and the scores are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .._util.data import to_json
from .._util.files import clear_temporaries
from .._util.lock import exclusive
from .._util.text import words
from ..errors import KtError, warn_user
from ..facts.fact import Fact, facts_digest
from ..facts.load import FactsLike, distinct_facts, facts_from
from ..model.identity import identity
from ..model.model import TracedModel
from ..runs import parallel
from ..runs.provenance import versions
from . import run
from .perplexity import heldout_corpus
from .run import evaluate
from .scores import Scores
from .text import WILD_TOKENS

SCORING = 2
"""Increased whenever the same model gets other scores for the same facts than before."""


class Cached(NamedTuple):
    """Scores, and the file that they were read from; None if they were computed."""

    scores: Scores
    file: Path | None


def evaluate_cached(
    model: TracedModel,
    requests: FactsLike,
    cache_dir: Path,
    fingerprint: str | None = None,
    **options: Any,
) -> Cached:
    """`evaluate(model, requests, **options)` of an unedited model, from the cache if it is there.

    Of several processes that want the same scores, one computes them and the others wait.

    Args:
        model: unedited. (An edited one has another fingerprint, but its scores are not worth a file.)
        requests: facts, as for `evaluate`.
        cache_dir: the folder; it is made.
        fingerprint: the model's, if it is known already; computing it reads all weights.
        options: the other arguments of `evaluate`. With a judge, whose verdicts are not the model's, nothing is cached.

    Raises:
        BadFact, WorkFailed: as `evaluate`.
    """
    if model.effects or any(options.get(name) is not None for name in ("judge", "before", "reference")):
        return Cached(evaluate(model, requests, **options), None)
    facts = distinct_facts(facts_from(requests), whole=True)
    key = _key(model, facts, fingerprint or model.fingerprint(), options)
    file = Path(cache_dir) / f"scores-{key}.json"
    with ExitStack() as lock:
        cached = parallel.on_rank_zero("scores that are kept", _read_or_lock, lock, file)
        if cached is not None:
            return Cached(cached, file)
        scores = evaluate(model, facts, **options)
        parallel.on_rank_zero("keeping scores", _write, scores, file)
    return Cached(scores, None)


def _read_or_lock(lock: ExitStack, file: Path) -> Scores | None:
    """The scores in the file, read under a lock that other processes wait for until `lock` is closed."""
    with suppress(OSError):  # a folder that cannot be written: `save` reports it
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.enter_context(exclusive(file.with_suffix(".lock"), "scores the same unedited model"))
    return _read(file)


def _write(scores: Scores, file: Path) -> None:
    try:
        clear_temporaries(file.parent, file.name)
        scores.save(file)
    except (KtError, OSError) as error:
        warn_user(f"the unedited model's scores are not kept: {error}")


def _key(model: TracedModel, facts: Sequence[Fact], fingerprint: str, options: Mapping[str, Any]) -> str:
    protocols = options.get("protocols")
    heldout = options.get("heldout")
    inputs = {
        "scoring": SCORING,
        "versions": versions(),
        "model": [model.name, identity(model, fingerprint), model.device.type],
        "generation": model.module.generation_config.to_dict(),
        "chat": [getattr(model.tokenizer, "chat_template", None), model.tokenizer.special_tokens_map],
        "facts": facts_digest(facts),
        "protocols": None if protocols is None else sorted(set(words(protocols))),
        "generate": options.get("generate", True) if protocols is None else None,
        "seed": options.get("seed", 0),
        "tokens": [options.get("max_new_tokens", WILD_TOKENS), run.LONGER_TOKENS, run.TEXT_TOKENS, run.TEXT_TOP_K],
        "heldout": heldout_corpus(heldout, model.name).identity if "ppl" in words(protocols or ()) else None,
    }
    return hashlib.sha256(to_json(inputs).encode()).hexdigest()[:40]


def _read(file: Path) -> Scores | None:
    """The scores in a file; None if there is none, or it is incomplete."""
    if not file.is_file():
        return None
    try:
        return Scores.load(file)
    except KtError as error:
        warn_user(f"the cached scores of the unedited model are computed again: {error}")
        return None
