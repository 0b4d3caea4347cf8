"""The whole loop in one call: trace, balance factor, joint edit, judgement before and after.

    run = kt.demo_loop.run_loop(kt.load("demo"), kt.load_facts("demo"))
    run.trace.heatmaps(); run.balance.alpha; run.after.metrics

`kt demo` runs this on the embedded model; it takes any model with facts that it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from .edit_run import run_edits
from .editing import Edit
from .evaluation import Scores
from .facts.fact import Fact
from .model import TracedModel
from .progress import Stage
from .run_folder import FILES
from .tracing import Balance, Trace, balance_factor, causal_trace


@dataclass(frozen=True)
class Loop:
    """What each stage gave."""

    trace: Trace
    balance: Balance
    edit: Edit
    before: Scores
    after: Scores
    control: Scores | None = None
    """The edit's MLP part alone, as scaled: what a joint edit is to be held against."""

    def save(self, folder: str | Path) -> None:
        """Each stage's result as a file that its own class reads; `kt report` draws from these."""
        for name in ("trace", "balance", "edit", "before", "after", "control"):
            if (stage := getattr(self, name)) is not None:
                stage.save(Path(folder) / FILES[name])


def run_loop(
    model: TracedModel,
    facts: Sequence[Fact],
    n_trace: int = 24,
    n_edits: int = 10,
    method: str = "intattn",
    samples: int = 10,
    max_tokens: int = 40_000,
    seed: int = 0,
    stage: Stage | None = None,
) -> Loop:
    """Trace `n_trace` facts, edit `n_edits` others with the α that tracing gives, and score them before and after.

    The model is left as it was. Facts are taken evenly over the list, so that every relation of a sorted list
    comes up.
    """
    stage = stage or (lambda what: nullcontext())
    requests = spread([f for f in facts if f.target or f.foil], n_edits)
    chosen = {f.id for f in requests}
    traced = spread([f for f in facts if f.id not in chosen], n_trace)
    with stage("tracing") as tick:
        trace = causal_trace(model, traced, kinds=("mlp", "attn", "hidden"), samples=samples, seed=seed, progress=tick)
    balance = balance_factor(trace, seed=seed)
    run = run_edits(
        model,
        requests,
        "batch",
        evaluate="end",
        generate=True,
        stage=stage,
        method=method,
        alpha=balance.alpha,
        seed=seed,
        max_tokens=max_tokens,
    )
    assert run.edit is not None and run.before is not None and run.after is not None, "a batch, scored at the end"
    return Loop(trace, balance, run.edit, run.before, run.after, run.control)


def spread(facts: Sequence[Fact], n: int) -> list[Fact]:
    """`n` facts at even distances."""
    if len(facts) <= n:
        return list(facts)
    return [facts[i * len(facts) // n] for i in range(n)]
