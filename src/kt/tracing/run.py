"""`causal_trace`: which facts, which corruption, and what is written down about both (001, sections 3.1 and 4.1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Bool
from numpy import ndarray

from .. import ranks
from ..errors import BadFact, WorkFailed
from ..facts.fact import Fact
from ..journal import Journal
from ..model import TracedModel
from ..progress import Progress
from ..remote import REASON
from .cases import UNKNOWN, Case, LeftOut, prepare
from .corrupt import Corruption, embedding_spread, given_noise, swapped, with_noise
from .engine import Outcome, Plan, default_max_rows, run_all
from .patches import labels
from .probe import shortcuts
from .roles import token_roles
from .settings import FLAT, MIN_GAP, Settings
from .trace import METRICS, Trace, TracedFact


def causal_trace(
    model: TracedModel,
    facts: Fact | Sequence[Fact],
    kinds: Sequence[str] = ("mlp", "attn"),
    metrics: Sequence[str] = METRICS,
    samples: int = 10,
    window: int = 1,
    noise: Sequence[Any] | None = None,
    noise_scale: float = 3.0,
    corrupt: str = "noise",
    keep: str = "known",
    seed: int = 0,
    max_rows: int | None = None,
    progress: Progress | None = None,
    reuse_prefix: bool = True,
    direction: str = "denoise",
    method: str = "exact",
    only: Sequence[Mapping[str, Bool[ndarray, "layer token"]]] | None = None,
    journal: Journal | None = None,
) -> Trace:
    """Restore each kind's clean value at every layer and token of corrupted prompts, and see what comes back.

    Args:
        kinds: `mlp` (output of down_proj), `attn` (output of W_o), `hidden` (residual stream after a block);
            `hidden-no-mlp`, `hidden-no-attn` (the same with a module severed); `attn.h3` or `heads`: see patches.py.
        metrics: which of `prob` and `logit_diff` the tables show; both are always measured.
        samples: noise draws per fact.
        window: how many layers, centred, are restored together.
        noise: one (samples, subject tokens, d_model) tensor per fact, added instead of drawn noise.
        noise_scale: the noise's standard deviation in units of that of the subjects' embeddings.
        corrupt: `noise`, or `swap` for another fact's subject of the same number of tokens.
        keep: `known` leaves out (and counts) facts whose answer the model does not say, or whose clean and
            corrupted logit differences are less than `MIN_GAP` apart; `all` traces them with a warning.
        seed: source of every draw.
        max_rows: most rows in one forward pass; the default follows from the model's size. Results do not depend
            on it beyond rounding.
        progress: called with (facts done, facts in all).
        reuse_prefix: take earlier tokens' keys and values from the run patched ones start from, where the model allows.
        direction: `denoise` puts clean states into the corrupted run, `noise` corrupted ones into the clean run.
        method: `exact` patches every cell; `atp` estimates all from one backward (see attribution.py, screen.py).
        only: for each fact the cells to patch, by kind; the others come out NaN.
        journal: keeps what is measured, group of facts by group, so that the same call over it goes on from there.

    Raises:
        BadFact: an argument or a fact that cannot be traced as given.
        WorkFailed: no fact is left to trace, or a number is not finite.
    """
    if model.remote and method == "atp":
        raise BadFact(f"method atp takes gradients, which a remote model does not give ({REASON}); trace with exact")
    given = noise is not None
    how = Settings(
        kinds, metrics, samples, window, noise_scale, corrupt, keep, seed, max_rows, given, direction, method
    )
    named = labels(model, how.kinds)
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    if not facts:
        raise BadFact("there are no facts to trace; give at least one")
    # All processes have to have the same groups: the rows are those of the one with the least memory free, and rank 0
    # says which facts the model knows, since another machine might round a tie the other way.
    longest = max(len(model.tokenizer(f.prompt)["input_ids"]) for f in facts)
    rows = max_rows or min(ranks.gathered("rows of a forward", default_max_rows(model, longest)))
    cases, left_out = ranks.by_main("cases to trace", prepare, model, facts, rows)
    unknown = [c for c in cases if not c.known]
    if keep == "known":
        cases = [c for c in cases if c.known]
        left_out += [LeftOut(c.index, c.fact.id, UNKNOWN) for c in unknown]
    level = None if given or corrupt == "swap" else noise_scale * embedding_spread(model, facts)
    cases, made, lonely = _corruptions(model, cases, how, noise, level, len(facts))
    plan = Plan(named, window, rows, how.min_gap, shortcuts(model, reuse_prefix), direction, only, journal or Journal())
    outcomes = runner(method)(model, cases, made, plan, progress)
    left_out += lonely + [LeftOut(o.case.index, o.case.fact.id, how.flat) for o in outcomes if o.patched is None]
    traced = tuple(_traced(model, o, direction) for o in outcomes if o.patched is not None)
    metadata = how.described(model, level) | {
        "samples": sorted({m.samples for m in made}),
        "n_given": len(facts),
        "warnings": _warn(unknown, traced) if keep == "all" else [],
    }
    trace = Trace(traced, named, tuple(sorted(left_out)), metadata)
    if not traced:
        hint = " or keep='all'" if keep == "known" else ""
        raise WorkFailed(f"no fact is left to trace ({trace.why_left_out()}); give other facts{hint}")
    return trace


def runner(method: str) -> Callable[..., list[Outcome]]:
    """What measures all cases: patching them, or estimating that."""
    if method == "exact":
        return run_all
    from . import attribution

    return attribution.run_all


def _corruptions(
    model: TracedModel,
    cases: list[Case],
    how: Settings,
    noise: Sequence[Any] | None,
    level: float | None,
    n_facts: int,
) -> tuple[list[Case], list[Corruption], list[LeftOut]]:
    """The cases that can be corrupted, how each is, and the others."""
    if how.corrupt == "swap":
        return swapped(model, cases, how.seed)
    if noise is not None:
        return cases, given_noise(model, cases, noise, n_facts), []
    return cases, with_noise(model, cases, level or 0.0, how.samples, how.seed), []


def _traced(model: TracedModel, outcome: Outcome, direction: str) -> TracedFact:
    case, fact = outcome.case, outcome.case.fact
    patched = outcome.patched or {}
    return TracedFact(
        index=case.index,
        id=fact.id,
        relation=fact.relation,
        prompt=fact.prompt,
        subject=fact.subject,
        ids=case.ids,
        tokens=_token_texts(model.tokenizer, case.ids),
        span=case.span,
        roles=token_roles(case.span, len(case.ids)),
        answer=case.answer,
        answer_id=case.answer_id,
        answer_source=case.answer_source,
        foil=case.foil,
        foil_id=case.foil_id,
        foil_source=case.foil_source,
        known=case.known,
        swapped_for=outcome.corruption.partner,
        clean=dict(zip(METRICS, (float(v) for v in outcome.clean), strict=True)),
        corrupted=dict(zip(METRICS, outcome.corrupted, strict=True)),
        patched={k: dict(zip(METRICS, values, strict=True)) for k, values in patched.items()},
        direction=direction,
    )


def _token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token's own text; a SentencePiece word start keeps its space."""
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    texts = [tokenizer.decode([i]) for i in ids]
    return tuple(
        " " + t if isinstance(r, str) and r.startswith("▁") and not t.startswith(" ") else t
        for r, t in zip(raw, texts, strict=True)
    )


def _warn(unknown: Sequence[Case], traced: Sequence[TracedFact]) -> list[str]:
    """Warn of facts that `keep="known"` would leave out; the warnings also go into the trace's metadata."""
    flat = [fact for fact in traced if abs(fact.ld_clean - fact.ld_corrupt) < MIN_GAP]
    found = ((UNKNOWN, [c.fact.prompt for c in unknown]), (FLAT, [f.prompt for f in flat]))
    said = []
    for reason, prompts in found:
        if prompts:
            more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
            said.append(f"traced all the same: {prompts[0]!r}{more}: {reason}")
    for text in said:
        warnings.warn(text, stacklevel=3)
    return said
