"""Layers and α that nobody gave: kept results of the same model, a trace of facts that it knows, a probe.

Kept results stand in the cache, in a folder by the model's identity: `balance.json` (of `kt alpha`, or of the one
trace that a default α takes) and METHOD.toml (of `kt layers`), a preset.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .._util.data import read_json
from .._util.files import atomic_write
from .._util.lock import default_cache
from .._util.progress import Progress
from ..errors import BadFact, KtError, SubjectNotFound, tell_user, warn_user
from ..facts.fact import Fact
from ..facts.load import load_facts
from ..model.effects import without_text
from ..model.identity import identity
from ..model.tokens import token_ids
from ..runs import parallel
from ..runs.journal import Journal
from .closed_form.config import check_alpha
from .presets import SUFFIX, read_preset

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from ..probing import Stages
    from ..tracing import Balance


MOST_TRACED = 100
"""Facts that are named for α and traced, at most, evenly: its interval shrinks with their root, its time grows with
them."""
FEW_TRACED = 16
"""Facts of the one trace that a default α takes: more than `tracing.alpha.FEW`, as some turn out flat."""
BLOCK, GIVE_UP = 48, 4
"""Facts that are asked together for those that the model knows, and blocks without a single one that are asked."""
ALPHA = 0.3
"""α where none is determined: IntAttn-Edit's for Qwen2.5-7B (section 5.1; 0.1 for Mistral-7B)."""


@dataclass(frozen=True)
class Evidence:
    """What a configuration was completed from.

    Attributes:
        balance: of facts on the unedited model.
        stages: of recall, of facts on the unedited model.
        chosen: the settings that nobody gave, by name.
        sources: where each of them comes from, in words, for the edit's manifest.
    """

    balance: Balance | None = None
    stages: Stages | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


NOTHING = Evidence()

# Kept results.


def kept_folder(model: TracedModel) -> Path:
    """Where results that belong to this model (weights, config, tokenizer) are kept."""
    return default_cache() / "layers" / identity(model)[:40]


def _any_kept(model: TracedModel) -> bool:
    """Whether it pays to hash the weights."""
    return not model.remote and any((default_cache() / "layers").glob("*/*"))


def kept_settings(model: TracedModel, method: str) -> dict[str, tuple[Any, str]]:
    """What `kt layers` found for a method on this model: values with their sources, by name."""

    def read(path: Path) -> dict[str, tuple[Any, str]]:
        found = {value.name: (value.value, value.source) for value in read_preset(path).explain(method)}
        for name, (value, _) in found.items():
            if name == "alpha":
                check_alpha(value, words=())
            elif name.startswith("layers"):
                for layer in value:
                    model.checked(layer)
        return found

    return _read_kept(model, f"{method}{SUFFIX}", read) or {}


Read = TypeVar("Read")


def _read_kept(model: TracedModel, name: str, read: Callable[[Path], Read]) -> Read | None:
    """A kept file of this model; one that is damaged counts as absent, so that it is written anew."""
    if not _any_kept(model) or not (path := kept_folder(model) / name).is_file():
        return None
    try:
        return read(path)
    except KtError as error:
        warn_user(f"a kept result is damaged and is not used ({error})")
        return None


def kept_balance(model: TracedModel, journal: Journal | None = None) -> Balance | None:
    """The balance that is kept for this model; a run that goes on has the one it began with."""
    from ..tracing import Balance

    fields = (journal or Journal()).take("kept-balance", _kept_fields, model)
    return None if fields is None else Balance.of(fields)


def _kept_fields(model: TracedModel) -> dict[str, Any] | None:
    from ..tracing import Balance

    def read(path: Path) -> dict[str, Any]:
        Balance.load(path)  # refused here, where the file is known
        return read_json(path)

    return _read_kept(model, "balance.json", read)


def keep_balance(model: TracedModel, balance: Balance) -> None:
    """Keep a balance for later edits of this model, unless one of more facts is kept already."""
    if model.remote or not parallel.is_main():
        return
    kept = _kept_fields(model)
    if kept is None or kept["n_facts"] <= balance.n_facts:
        _keep(kept_folder(model) / "balance.json", balance.save)


def keep_preset(model: TracedModel, method: str, text: str) -> None:
    """Keep a method's layers for later edits of this model, in place of those that were kept before."""
    if parallel.is_main():
        _keep(kept_folder(model) / f"{method}{SUFFIX}", lambda path: atomic_write(path, text))


def _keep(path: Path, write: Callable[[Path], object]) -> None:
    """Write into the cache; a cache that cannot be written does not end a run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except (OSError, KtError) as error:
        warn_user(f"{path} is not kept: {error}")


# Facts that a model knows, and a trace of them.


class Known(NamedTuple):
    """Facts that a model knows, the seconds of a forward a token, and how many facts it was asked."""

    facts: list[Fact]
    seconds_a_token: float
    asked: int


def known_facts(model: TracedModel, facts: Sequence[Fact], n: int) -> Known:
    """The first `n` of the facts whose answer is the model's first choice; fewer where it knows fewer.

    Without a single one among the first BLOCK * GIVE_UP it knows none.
    """
    from ..tracing.engine import default_max_rows
    from ..tracing.prompts import prepare

    known: list[Fact] = []
    asked, tokens, start = 0, 0, time.perf_counter()
    for at in range(0, len(facts), BLOCK):
        block = list(facts[at : at + BLOCK])
        asked += len(block)
        prompts = parallel.on_rank_zero("known facts", prepare, model, block, default_max_rows(model, 64))[0]
        tokens += sum(len(prompt.ids) for prompt in prompts)
        known += [prompt.fact for prompt in prompts if prompt.known]
        if len(known) >= n or (not known and at >= BLOCK * (GIVE_UP - 1)):
            break
    return Known(known[:n], (time.perf_counter() - start) / max(tokens, 1), asked)


def facts_beside(model: TracedModel, requests: Sequence[Fact]) -> list[Fact]:
    """The shipped facts (the demo model's own, LRE's for others) about other subjects, in a fixed random order."""
    subjects = {fact.subject.casefold() for fact in requests}
    facts = [f for f in load_facts("demo" if model.name == "demo" else "lre") if f.subject.casefold() not in subjects]
    random.Random(0).shuffle(facts)
    return facts


class Alpha(NamedTuple):
    """An α to edit with, where it comes from, and the balance behind it."""

    value: float
    source: str
    balance: Balance | None


def default_alpha(model: TracedModel, requests: Sequence[Fact], journal: Journal | None = None) -> Alpha:
    """α where nobody gave one: the kept one of this model, else traced once on FEW_TRACED facts and kept.

    A warning says what it is about to do. An α that is not determined, or a model that knows too few of the facts,
    gives ALPHA.
    """
    balance, how = kept_balance(model, journal), "kept"
    if balance is None:
        from ..tracing.alpha import FEW

        with warnings.catch_warnings():  # how shipped facts are joined is not the user's to mend
            warnings.filterwarnings("ignore", r".* may be joined to their prompts")
            try:
                facts, seconds, _ = known_facts(model, facts_beside(model, requests), FEW_TRACED)
            except (BadFact, SubjectNotFound):  # a tokenizer that reads nothing of a name in them
                facts, seconds = [], 0.0
        if len(facts) < FEW:
            return Alpha(ALPHA, f"not traced: of the shipped facts the model knows {len(facts)}; the papers' 0.3", None)
        balance, how = _traced_once(model, facts, seconds, journal), "traced"
        if balance is None:
            return Alpha(ALPHA, "the shipped facts cannot be traced; the papers' 0.3", None)
    return alpha_of(balance, how)


def alpha_of(balance: Balance, how: str) -> Alpha:
    """The setting that a balance gives (see `Balance.setting`), else ALPHA."""
    if (setting := balance.setting) is None:
        return Alpha(ALPHA, f"{how} {_of(balance)} is undetermined; the papers' 0.3", balance)
    low, high = setting.ci95
    return Alpha(setting.alpha, f"{how}, {setting.way} [{low:.2f}, {high:.2f}] of {balance.n_facts} facts", balance)


def _of(balance: Balance) -> str:
    span = "" if balance.ci95 is None else f" [{balance.ci95[0]:.2f}, {balance.ci95[1]:.2f}]"
    return f"{balance.alpha:.2f}{span} of {balance.n_facts} facts"


def _traced_once(
    model: TracedModel, facts: Sequence[Fact], seconds_a_token: float, journal: Journal | None
) -> Balance | None:
    """Always from seed 0: it is kept for edits of every seed."""
    from ..tracing.run import SAMPLES

    # Rows enter at their layer, so they cross half the model, with the tokens behind the subject's end.
    tokens = sum(len(token_ids(model.reader, fact.prompt)) for fact in facts)
    seconds = seconds_a_token * tokens * SAMPLES * (1 + model.n_layers / 2)
    tell_user(
        f"no alpha given for {model.name}: tracing it once on {len(facts)} facts that it knows, about "
        f"{_rough(seconds)}; the result is kept. kt alpha traces your own facts; a number for alpha needs no trace"
    )
    try:
        balance = traced_balance(model, facts, journal=journal)
    except KtError:  # all of them flat: said by the caller's line
        return None
    keep_balance(model, balance)
    return balance


def _rough(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def trace_balance(model: TracedModel, facts: Sequence[Fact], per_fact: bool, seed: int, journal: Journal) -> Balance:
    """The balance of the facts that were named for α, or of the requests where each has its own.

    Raises:
        KtError: they cannot be traced.
    """
    try:
        return traced_balance(model, facts, seed, journal=journal, most=None if per_fact else MOST_TRACED)
    except KtError as error:
        raise type(error)(
            f"alpha cannot be traced on these facts ({error}); give it as a number, such as 0.3, or facts that the "
            "model knows (--alpha-facts)"
        ) from None


def traced_balance(
    model: TracedModel,
    facts: Sequence[Fact],
    seed: int = 0,
    progress: Progress | None = None,
    *,
    journal: Journal | None = None,
    most: int | None = MOST_TRACED,
) -> Balance:
    """Trace α (eq. 12) over at most `most` of the facts, evenly spaced; over all of them if it is None.

    Raises:
        KtError: the facts cannot be traced: the model does not know them, or they have no second answer.
    """
    from ..tracing import balance_factor, causal_trace

    if most is not None and len(facts) > most:
        facts = [facts[i * len(facts) // most] for i in range(most)]
    given: dict[str, Any] = {"kinds": ("mlp", "attn"), "tokens": "subject_last"}
    with without_text(model):
        trace = causal_trace(model, facts, seed=seed, progress=progress, journal=journal, **given)
    return balance_factor(trace, seed=seed)


def probe_stages(model: TracedModel, facts: Sequence[Fact]) -> Stages | None:
    """The stages of recall of these facts; None where they cannot be probed."""
    from ..probing import contrast_probe

    try:
        with warnings.catch_warnings(), without_text(model):
            warnings.simplefilter("ignore")  # of facts whose answers begin alike: the stages leave them out
            return contrast_probe(model, facts).stages
    except BadFact:  # not one request can be probed
        return None
