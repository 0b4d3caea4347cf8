"""The whole loop in one call: trace, balance factor, joint edit, judgement before and after.

    run = kt.demo.loop.run_loop(kt.load("demo"), kt.load_facts("demo"))
    run.trace.heatmaps(); run.balance.alpha; run.after.metrics

`kt demo` runs this on the embedded model; it takes any model with facts that it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._util.notebook_bar import stage_or_bars
from .._util.progress import Stage
from ..editing import METHODS, Edit, configure
from ..editing.evidence import Alpha, alpha_of
from ..editing.method_names import Method, MethodName
from ..editing.presets import preset_for
from ..evaluation import Scores
from ..experiments.sequence import run_edits
from ..facts.fact import Fact
from ..model.model import TracedModel
from ..probing import Probe, contrast_probe
from ..residual import Residual, residual_fact
from ..runs.folder import FILES
from ..tracing import Balance, Trace, balance_factor, causal_trace


@dataclass(frozen=True)
class Loop:
    """What each stage gave."""

    trace: Trace
    balance: Balance
    edit: Edit
    before: Scores
    after: Scores
    probe: Probe
    residual: Residual
    control: Scores | None = None
    """The edit's MLP part alone, as scaled: what a joint edit is to be held against."""
    settings: str = ""
    """In one sentence, which layers and α the edit has, and why where they are not those that tracing just gave."""

    def save(self, folder: str | Path) -> None:
        """Each stage's result as a file that its own class reads; `kt report` draws from these."""
        for name in ("trace", "balance", "probe", "edit", "residual", "before", "after", "control"):
            if (stage := getattr(self, name)) is not None:
                stage.save(Path(folder) / FILES[name])


def run_loop(
    model: TracedModel,
    facts: Sequence[Fact],
    n_trace: int = 24,
    n_edits: int = 10,
    method: Method | MethodName = "intattn",
    samples: int = 10,
    n_probe: int = 100,
    max_tokens: int = 40_000,
    seed: int = 0,
    stage: Stage | None = None,
) -> Loop:
    """Trace `n_trace` facts, probe `n_probe`, edit `n_edits` with the α and layers that tracing gives, and score them.
    Layers of a preset come first, and α that the trace does not determine is `evidence.ALPHA`.

    What is edited is not traced; probing looks at all facts that have two answers, the edited ones once more after.

    The model is left as it was. Facts are taken evenly over the list, so that every relation of a sorted list
    comes up.
    """
    stage = stage_or_bars(stage)
    contrasted = [f for f in facts if f.target or f.foil]
    requests = spread(contrasted, n_edits)
    chosen = {f.id for f in requests}
    traced = spread([f for f in facts if f.id not in chosen], n_trace)
    with stage("tracing") as tick:
        trace = causal_trace(model, traced, kinds=("mlp", "attn", "hidden"), samples=samples, seed=seed, progress=tick)
    balance = balance_factor(trace, seed=seed)
    alpha = alpha_of(balance, "traced")
    given, settings = _settings(model, method, balance, alpha)
    with stage("probing") as tick:
        probe = contrast_probe(model, spread(contrasted, n_probe), progress=tick)
    run = run_edits(
        model,
        requests,
        "batch",
        evaluate="end",
        generate=True,
        stage=stage,
        method=method,
        seed=seed,
        max_tokens=max_tokens,
        **given,
    )
    assert run.edit is not None and run.before is not None and run.after is not None, "a batch, scored at the end"
    with stage("what is left of the old facts") as tick:
        residual = residual_fact(model, run.edit, requests, pool=facts, seed=seed, progress=tick)
    return Loop(trace, balance, run.edit, run.before, run.after, probe, residual, run.control, settings)


def _settings(model: TracedModel, method: str, balance: Balance, alpha: Alpha) -> tuple[dict[str, Any], str]:
    """The edit's α from the trace, with the sentence that says so and why its layers are not the traced ones."""
    given: dict[str, Any] = {"alpha": alpha.value} if METHODS[method].writes_attention else {}
    parts = [f"α {alpha.value:.3f} ({alpha.source})"] if given else []
    preset, names = preset_for(model), {"layers_mlp": "mlp", "layers_attn": "attn"}
    config = configure(model, method, **given)
    for name in [name for name in names if name in config.settings()]:
        traced = ",".join(map(str, balance.layers.get(names[name]) or ())) or "none"
        if name not in config.missing_layers:
            used = ",".join(map(str, getattr(config, name)))
            where = "the settings" if preset is None else f"the preset {preset.name}"
            parts.append(f"{name} {used} of {where}, not the traced {traced}: tracing does not find the best")
        else:
            parts.append(
                f"{name} by relative depth, not the traced {traced}: where a fact is read is not where an edit takes"
            )
    return given, f"the edit has {'; '.join(parts)}"


def spread(facts: Sequence[Fact], n: int) -> list[Fact]:
    """`n` facts at even distances."""
    if len(facts) <= n:
        return list(facts)
    return [facts[i * len(facts) // n] for i in range(n)]
