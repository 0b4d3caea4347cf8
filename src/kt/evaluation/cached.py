"""Scores of the unedited model, kept on disk: every edit is compared with the same ones.

A file is named by the hash of all that the scores follow from: weights, dtype, device, tokenizer, facts, protocols,
seed and the versions of the code. The batch size is not among them: it moves figures by no more than rounding.
Whatever goes wrong with a file costs time, never a run: it is said in a warning, and the scores are computed.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .._util.data import to_json
from .._util.files import clear_temporaries
from .._util.lock import exclusive
from ..errors import KtError
from ..facts.fact import Fact, facts_digest
from ..facts.load import facts_from
from ..model.model import TracedModel
from ..runs import parallel as ranks
from ..runs.provenance import versions
from . import run as work
from .perplexity import heldout_corpus
from .run import evaluate
from .scores import Scores
from .text import WILD_TOKENS

SCORING = 1
"""Raised whenever the same model gets other scores for the same facts than before."""


class Cached(NamedTuple):
    """Scores, and the file that they were read from; None where they were computed."""

    scores: Scores
    file: Path | None


def evaluate_cached(
    model: TracedModel,
    requests: Sequence[Fact | Mapping[str, Any]],
    cache_dir: Path,
    fingerprint: str | None = None,
    **asked: Any,
) -> Cached:
    """`evaluate(model, requests, **asked)` of an unedited model, from the cache where it is there.

    Of several processes that want the same scores, one computes them and the others wait.

    Args:
        model: unedited. (An edited one is told apart by its weights, but its scores are not worth a file.)
        requests: facts, as for `evaluate`.
        cache_dir: the folder; it is made.
        fingerprint: the model's, if it is known already: gigabytes are hashed for it.
        asked: the other arguments of `evaluate`. With a judge, whose verdicts are not the model's, nothing is kept.

    Raises:
        BadFact, WorkFailed: what `evaluate` raises.
    """
    if any(asked.get(name) is not None for name in ("judge", "before", "reference")):
        return Cached(evaluate(model, requests, **asked), None)
    facts = facts_from(requests)
    key = _key(model, facts, fingerprint or model.fingerprint(), asked)
    file = Path(cache_dir) / f"scores-{key}.json"
    with ExitStack() as held:
        found = ranks.on_rank_zero("scores that are kept", _claimed, held, file)
        if found is not None:
            return Cached(found, file)
        scores = evaluate(model, facts, **asked)
        ranks.on_rank_zero("keeping scores", _keep, scores, file)
    return Cached(scores, None)


def _claimed(held: ExitStack, file: Path) -> Scores | None:
    """The scores in the file; where there are none, for as long as `held`, nobody else makes them."""
    with suppress(OSError):  # a folder that cannot be written: `save` says so
        file.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(exclusive(file.with_suffix(".lock"), "scores the same unedited model"))
    return _read(file)


def _keep(scores: Scores, file: Path) -> None:
    try:
        clear_temporaries(file.parent, file.name)
        scores.save(file)
    except (KtError, OSError) as error:
        warnings.warn(f"the unedited model's scores are not kept: {error}", stacklevel=2)


def _key(model: TracedModel, facts: Sequence[Fact], fingerprint: str, asked: Mapping[str, Any]) -> str:
    protocols = asked.get("protocols")
    heldout = asked.get("heldout")
    follows_from = {
        "scoring": SCORING,
        "versions": versions(),
        "model": [model.name, fingerprint, str(model.dtype), model.device.type],
        "config": model.module.config.to_dict(),
        "generation": model.module.generation_config.to_dict(),
        "tokenizer": _tokenizer(model.tokenizer),
        "facts": facts_digest(facts),
        "protocols": None if protocols is None else sorted(set(protocols)),
        "generate": asked.get("generate", True) if protocols is None else None,
        "seed": asked.get("seed", 0),
        "tokens": [asked.get("max_new_tokens", WILD_TOKENS), work.LONGER_TOKENS, work.TEXT_TOKENS, work.TEXT_TOP_K],
        "heldout": heldout_corpus(heldout, model.name).sha256 if "ppl" in (protocols or ()) else None,
    }
    return hashlib.sha256(to_json(follows_from).encode()).hexdigest()[:40]


def _tokenizer(tokenizer: Any) -> list[str]:
    """All that decides how a tokenizer reads and writes."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = core.to_str() if core is not None else to_json(tokenizer.get_vocab())
    special = to_json(tokenizer.special_tokens_map)
    return [type(tokenizer).__name__, rules, special, str(getattr(tokenizer, "chat_template", None))]


def _read(file: Path) -> Scores | None:
    """The scores in a file; None where there are none, or not whole ones."""
    if not file.is_file():
        return None
    try:
        return Scores.load(file)
    except KtError as error:
        warnings.warn(f"the cached scores of the unedited model are computed again: {error}", stacklevel=3)
        return None
