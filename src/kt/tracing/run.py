"""`causal_trace`: choose facts and corruption, trace, and record the settings (IntAttn-Edit, sections 3.1 and 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from .._util.kinds import NAMES, takes
from .._util.limits import MOST_NOISE
from .._util.notebook_bar import with_bar
from .._util.progress import Progress
from .._util.text import words
from ..errors import BadFact, WorkFailed, warn_user
from ..facts.load import FactsLike, distinct_facts, facts_from
from ..model.effects import refuse_text
from ..model.layout import ATTENTION
from ..model.model import TracedModel
from ..model.ndif import REASON
from ..model.tokens import token_ids, token_texts
from ..runs import parallel
from ..runs.journal import Journal
from . import attribution, engine
from .capabilities import shortcuts
from .corrupt import Corruption, embedding_spread, given_noise, swapped, with_noise
from .engine import Outcome, Plan, default_max_rows
from .patches import KINDS, check_kinds, labels
from .prompts import UNKNOWN, LeftOut, TracePrompt, prepare, token_roles
from .trace import DIRECTIONS, TOKENS, Trace
from .traced_fact import EVERY, METRICS, WHOLE, TracedFact, metric_names

METHODS = ("exact", "atp")

SAMPLES = 10
"""Noise draws a fact, by default."""

MIN_GAP = 0.5
"""Logits. Below this |d_clean - mean_S d_corrupted| eq. 8 divides by a number near zero, and `keep="known"` leaves the
fact out. Facts that a model recalls have gaps of 5 to 10."""

_NO_GAP = 1e-5  # `keep="all"` cannot trace below the rounding of logits: eq. 8 has no denominator there

FLAT = f"clean and corrupted logit difference are less than {MIN_GAP} apart"
STILL = "the corruption does not move the logit difference"
WHOLE_FLAT = FLAT.replace("logit difference", "log-probability difference of the whole answers")
WHOLE_STILL = STILL.replace("logit difference", "log-probability difference of the whole answers")


@dataclass(frozen=True)
class Settings:
    """The checked arguments of `causal_trace`."""

    kinds: Sequence[str]
    metrics: Sequence[str]
    samples: int
    window: int
    noise_scale: float
    corrupt: str
    keep: str
    seed: int
    max_rows: int | None
    noise_given: bool
    direction: str = "denoise"
    method: str = "exact"
    tokens: str = "all"
    at: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(dict.fromkeys(words(self.kinds))))
        object.__setattr__(self, "metrics", metric_names(self.metrics))
        check_kinds(self.kinds)
        for wrong, message in self._problems():
            if wrong:
                raise BadFact(message)

    def _problems(self) -> list[tuple[bool, str]]:
        return [
            (not self.kinds, _choose("kinds", self.kinds, KINDS)),
            (not self.metrics, _choose("metrics", self.metrics, EVERY)),
            (
                self.scored != "first" and self.method != "exact",
                f"method {self.method} estimates the first token's metrics ({', '.join(METRICS)}); trace whole answers "
                "with exact",
            ),
            (self.samples < 1, f"samples is {self.samples}; give at least 1"),
            (self.window < 1, f"window is {self.window}; give at least 1"),
            (
                not 0 < self.noise_scale <= MOST_NOISE,
                f"noise_scale is {self.noise_scale}; give a number above 0 and at most {MOST_NOISE:g} (3 is usual)",
            ),
            (self.corrupt not in ("noise", "swap"), f"corrupt is {self.corrupt!r}; choose noise or swap"),
            (
                self.corrupt == "swap" and self.noise_given,
                "noise was given, but corrupt is 'swap'; leave one of them out",
            ),
            (self.direction not in DIRECTIONS, _choose("direction", [self.direction], DIRECTIONS)),
            (self.method not in METHODS, _choose("method", [self.method], METHODS)),
            (self.tokens not in TOKENS, _choose("tokens", [self.tokens], TOKENS)),
            (self.at < 0, f"at is {self.at}; give 0 (the answer's first token) or more"),
            (self.keep not in ("known", "all"), f"keep is {self.keep!r}; choose known or all"),
            (self.max_rows is not None and self.max_rows < 1, f"max_rows is {self.max_rows}; give at least 1"),
        ]

    @property
    def min_gap(self) -> float:
        """Facts with a smaller gap between clean and corrupted logit difference are left out."""
        return MIN_GAP if self.keep == "known" else _NO_GAP

    @property
    def scored(self) -> Literal["first", "whole", "both"]:
        """Whether the metrics are of the first token, of the whole answer, or both."""
        whole = [metric in WHOLE for metric in self.metrics]
        return "both" if any(whole) and not all(whole) else "whole" if any(whole) else "first"

    def flat(self, outcome: Outcome) -> str:
        """Why a fact with a smaller gap is left out."""
        known, gap = self.keep == "known", outcome.clean[1] - outcome.corrupted[1].mean(dtype=np.float64)
        if self.scored == "first" or (self.scored == "both" and abs(gap) < self.min_gap):
            return FLAT if known else STILL
        return WHOLE_FLAT if known else WHOLE_STILL

    def metadata(self, model: TracedModel, noise_level: float | None) -> dict[str, Any]:
        """The settings part of a trace's metadata."""
        return {
            "model": model.name,
            "revision": model.revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            "n_layers": model.n_layers,
            **({} if set(model.layout.mixers) == {ATTENTION} else {"mixers": list(model.layout.mixers)}),
            "metrics": [metric for metric in EVERY if metric in self.metrics],
            "window": self.window,
            "corrupt": self.corrupt,
            "direction": self.direction,
            "method": self.method,
            **({} if self.tokens == "all" else {"tokens": self.tokens}),
            **({} if self.at == 0 else {"at": self.at}),
            "noise": None if self.corrupt == "swap" else "given" if self.noise_given else "drawn",
            "noise_scale": None if noise_level is None else self.noise_scale,
            "noise_level": noise_level,
            "keep": self.keep,
            "min_gap": MIN_GAP,
            "seed": self.seed,
        }


def _choose(name: str, values: Sequence[str], among: Sequence[str]) -> str:
    return f"{name} {', '.join(values) or '(none)'}: choose among {', '.join(among)}"


@takes(kinds=NAMES, metrics=NAMES)
@with_bar("tracing")
def causal_trace(
    model: TracedModel,
    facts: FactsLike,
    kinds: Sequence[str] = ("mlp", "attn"),
    metrics: Sequence[str] = METRICS,
    samples: int = SAMPLES,
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
    tokens: str = "all",
    only: Sequence[Mapping[str, Bool[ndarray, "layer token"]]] | None = None,
    journal: Journal | None = None,
    at: int = 0,
) -> Trace:
    """Restore each kind's clean value at every layer and token of corrupted prompts, and measure the effect on the
    answer's first token r.

    Follows IntAttn-Edit (arXiv 2510.27400), sections 3.1 and 4.1, and ROME (Meng et al. 2022), section 2.

    Args:
        model: the loaded model, as `kt.load` returns it.
        facts: one or many, as `Fact`s or dicts, or what `load_facts` reads by name.
        kinds: `mlp` (output of down_proj), `attn` (output of W_o), `hidden` (residual stream after a block);
            `hidden-no-mlp`, `hidden-no-attn` (the same with a module severed); `attn.h3` or `heads`: see patches.py.
        metrics: which of `prob` and `logit_diff` the tables show (of the first token; both are always measured), and of
            `log_prob` and `log_prob_diff` (of the whole answer and foil; both are measured if one is asked for). Facts
            whose answer and foil begin alike can be traced if only the latter are.
        samples: noise draws per fact.
        window: number of layers, centred, that are restored together.
        noise: one (samples, subject tokens, d_model) tensor per fact, added instead of drawn noise.
        noise_scale: the noise's standard deviation in units of that of the subjects' embeddings.
        corrupt: `noise`, or `swap` for another fact's subject of the same number of tokens.
        keep: `known` leaves out (and counts) facts whose answer is not the model's first choice, or whose clean and
            corrupted logit differences are less than `MIN_GAP` apart; `all` traces them with a warning.
        seed: source of every draw.
        max_rows: most rows in one forward pass; the default follows from the model's size. Results depend on it only
            by rounding.
        progress: called with (facts done, facts in all).
        reuse_prefix: take earlier tokens' keys and values from the base run, where the model allows it.
        direction: `denoise` puts clean states into the corrupted run, `noise` corrupted ones into the clean run.
        method: `exact` patches every cell; `atp` estimates all from one backward (see attribution.py, screen.py).
        tokens: `all` patches every token; `subject_last` the subject's last token alone, which is all that
            `balance_factor` reads. Its values are the same to the last bit, at a fraction of the work.
        only: for each fact the cells to patch, by kind; other cells become NaN.
        journal: keeps the measurements group by group, so that the same call with the same journal resumes there.
        at: trace the answer's token of this number instead of its first, 0; those before it are read, and patched,
            with the prompt. A foil that begins with them goes on with its own tokens, else the model's best other token
            is the foil.

    Returns:
        The traced facts, with arrays (layer, token, sample) by kind and metric, and the facts left out.

    Raises:
        BadFact: an argument or a fact that cannot be traced as given.
        KtError: an edit that puts text before prompts is applied to the model; a trace reads bare prompts.
        WorkFailed: no fact is left to trace, or a number is not finite.

    Examples:
        >>> trace = kt.causal_trace(model, facts, kinds=("mlp", "attn"), samples=2)
        >>> trace.n_facts, trace.kinds
        (4, ('mlp', 'attn'))
        >>> trace.to_dataframe().columns[:4].tolist()
        ['fact', 'kind', 'layer', 'token']
    """
    refuse_text(model, "a trace")
    if model.remote and method == "atp":
        raise BadFact(f"method atp takes gradients, which a remote model does not give ({REASON}); trace with exact")
    settings = Settings(
        kinds,
        metrics,
        samples,
        window,
        noise_scale,
        corrupt,
        keep,
        seed,
        max_rows,
        noise is not None,
        direction,
        method,
        tokens,
        at,
    )
    if only is not None and tokens != "all":
        raise BadFact(f"only and tokens={tokens!r} both choose the cells to patch; give one of them")
    if model.remote and settings.scored != "first":
        raise BadFact(
            f"whole answers ({', '.join(WHOLE)}) are traced on a model that runs here; metrics of the first "
            f"token ({', '.join(METRICS)}) remotely too"
        )
    patch_labels = labels(model, settings.kinds)
    facts = distinct_facts(facts_from(facts), target=False)
    if not facts:
        raise BadFact("there are no facts to trace; give at least one")
    # All processes need the same groups: `rows` follows from the process with the least free memory, and rank 0 alone
    # decides which facts the model knows, since another machine might round a tie the other way.
    longest = max(len(token_ids(model.reader, f.prompt)) for f in facts) + at
    rows = max_rows or min(parallel.all_gather("rows of a forward", default_max_rows(model, longest)))
    cases, left_out = parallel.on_rank_zero("cases to trace", prepare, model, facts, rows, settings.scored, at)
    unknown = [c for c in cases if not c.known]
    if keep == "known":
        cases = [c for c in cases if c.known]
        left_out += [LeftOut(c.index, c.fact.id, UNKNOWN) for c in unknown]
    level = None if noise is not None or corrupt == "swap" else noise_scale * embedding_spread(model, facts)
    cases, corruptions, no_partner = _corruptions(model, cases, settings, noise, level, len(facts))
    plan = Plan(
        patch_labels,
        window,
        rows,
        settings.min_gap,
        shortcuts(model, reuse_prefix),
        direction,
        _column(model, cases, patch_labels) if tokens == "subject_last" else only,
        journal or Journal(),
        settings.scored,
    )
    run_all = engine.run_all if method == "exact" else attribution.run_all
    outcomes = run_all(model, cases, corruptions, plan, progress)
    left_out += no_partner
    left_out += [LeftOut(o.case.index, o.case.fact.id, settings.flat(o)) for o in outcomes if o.patched is None]
    traced = tuple(_traced(model, o, direction) for o in outcomes if o.patched is not None)
    metadata = settings.metadata(model, level) | {
        "samples": sorted({c.samples for c in corruptions}),
        "n_given": len(facts),
        "warnings": _warn(unknown, traced, settings.scored) if keep == "all" else [],
    }
    trace = Trace(traced, patch_labels, tuple(sorted(left_out)), metadata)
    if not traced:
        hint = ", or keep those that the model does not know (keep='all', --keep all)" if keep == "known" else ""
        raise WorkFailed(f"no fact is left to trace ({trace.why_left_out()}); give other facts{hint}")
    return trace


def _column(
    model: TracedModel, cases: Sequence[TracePrompt], kinds: Sequence[str]
) -> dict[int, dict[str, Bool[ndarray, "layer token"]]]:
    """The cells at each subject's last token, by the fact's place in the caller's list."""
    cells = {}
    for case in cases:
        mask = np.zeros((model.n_layers, len(case.ids)), dtype=bool)
        mask[:, case.span.last] = True
        cells[case.index] = dict.fromkeys(kinds, mask)
    return cells


def _corruptions(
    model: TracedModel,
    cases: list[TracePrompt],
    settings: Settings,
    noise: Sequence[Any] | None,
    level: float | None,
    n_facts: int,
) -> tuple[list[TracePrompt], list[Corruption], list[LeftOut]]:
    """The cases that can be corrupted, their corruptions, and the facts left out."""
    if settings.corrupt == "swap":
        return swapped(model, cases, settings.seed)
    if noise is not None:
        return cases, given_noise(model, cases, noise, n_facts), []
    return cases, with_noise(model, cases, level or 0.0, settings.samples, settings.seed), []


def _traced(model: TracedModel, outcome: Outcome, direction: str) -> TracedFact:
    case, fact = outcome.case, outcome.case.fact
    metrics = EVERY[: len(outcome.clean)]
    return TracedFact(
        **{f.name: getattr(case, f.name) for f in fields(case) if f.name != "fact"},
        **{name: getattr(fact, name) for name in ("id", "relation", "prompt", "subject")},
        tokens=token_texts(model.tokenizer, case.ids),
        roles=token_roles(case.span, len(case.ids)),
        swapped_for=outcome.corruption.partner,
        clean=dict(zip(metrics, (float(v) for v in outcome.clean), strict=True)),
        corrupted=dict(zip(metrics, outcome.corrupted, strict=True)),
        patched={k: dict(zip(metrics, values, strict=True)) for k, values in (outcome.patched or {}).items()},
        direction=direction,
    )


def _warn(unknown: Sequence[TracePrompt], traced: Sequence[TracedFact], scored: str) -> list[str]:
    """Warn of facts that `keep="known"` would leave out; the warnings also go into the trace's metadata."""
    reasons = {UNKNOWN: [c.fact.prompt for c in unknown]}
    for reason, metric, without in ((FLAT, "logit_diff", "whole"), (WHOLE_FLAT, "log_prob_diff", "first")):
        if scored != without:
            reasons[reason] = [fact.prompt for fact in traced if abs(fact.gap(metric)) < MIN_GAP]
    messages = []
    for reason, prompts in reasons.items():
        if prompts:
            more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
            messages.append(f"traced all the same: {prompts[0]!r}{more}: {reason}")
    for message in messages:
        warn_user(message)
    return messages
