"""`kt heatmap` and `kt alpha`: where the fact sits, and how its work divides between attention and MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ..run_folder import FILES
from . import parse
from .console import interval
from .options import FactOptions, FigureOptions, ModelOptions, Opt, RunOptions, TraceOptions
from .results import results_of_balance, results_of_trace
from .session import Session, session, wanted_files

if TYPE_CHECKING:
    from ..tracing import Balance, Trace


@dataclass(frozen=True)
class HeatmapOptions(RunOptions, TraceOptions, FigureOptions, FactOptions, ModelOptions):
    kind: Annotated[str, Opt("--kind", help="Any of mlp, attn, hidden.")] = "mlp,attn,hidden"
    metric: Annotated[str, Opt("--metric", help="Any of logit-diff, prob; the first is drawn.")] = "logit-diff,prob"


@dataclass(frozen=True)
class AlphaOptions(RunOptions, TraceOptions, FigureOptions, FactOptions, ModelOptions):
    per_fact: Annotated[bool, Opt("--per-fact", help="Print the balance factor of every fact too.")] = False


def heatmap(options: HeatmapOptions) -> None:
    """Causal tracing: what restoring each layer and token brings back of the answer."""
    kinds = parse.names(options.kind, parse.KINDS, "--kind")
    metrics = tuple(parse.METRICS[m] for m in parse.names(options.metric, tuple(parse.METRICS), "--metric"))
    with session(options) as s:
        trace = run_trace(s, kinds, metrics)
        results = results_of_trace(trace)
        s.keep(results, figures=trace_figures(trace, metrics))
        show_trace(s, trace, results, metrics[0])


def alpha(options: AlphaOptions) -> None:
    """The balance factor: attention's share of recall (eq. 12), and the layers to edit."""
    with session(options) as s:
        from ..tracing import balance_factor

        trace = run_trace(s, ("mlp", "attn"), ("logit_diff", "prob"))
        balance = balance_factor(trace, seed=options.seed)
        balance.save(s.run.file(FILES["balance"]))
        s.keep(results_of_balance(balance), figures={"balance": balance.figure()})
        show_balance(s, balance, options.per_fact)


def run_trace(s: Session, kinds: tuple[str, ...], metrics: tuple[str, ...]) -> Trace:
    """Trace what the options name; the raw measurements go into the run folder."""
    options: Any = s.options
    scale = parse.noise(options.noise)
    parse.names(options.corrupt, ("noise", "swap"), "--corrupt")
    parse.names(options.keep, ("known", "all"), "--keep")
    rows = parse.batch_size(options.batch_size)
    facts, model = s.load_facts(), s.load_model()
    from ..tracing import causal_trace

    with s.progress("tracing") as tick:
        trace = causal_trace(
            model,
            facts,
            kinds=kinds,
            metrics=metrics,
            samples=options.samples,
            window=options.window,
            noise_scale=scale,
            corrupt=options.corrupt,
            # A fact typed by hand is traced also when the model does not know it.
            keep="all" if options.prompt is not None else options.keep,
            seed=options.seed,
            max_rows=None if rows == "auto" else int(rows),
            progress=tick,
        )
    trace.save(s.run.file(FILES["trace"]))
    s.run.manifest["trace"] = dict(trace.metadata)
    return trace


def trace_figures(trace: Trace, metrics: Sequence[str]) -> dict[str, Any]:
    """Figure 1 for each metric, in the order asked for, then Figure 2."""
    panels = {f"heatmap-{metric.replace('_', '-')}": trace.heatmaps(metric) for metric in metrics}
    return {**panels, "curves": trace.curves()}


def show_trace(s: Session, trace: Trace, results: dict[str, Any], metric: str) -> None:
    """A small heatmap per kind when no figure was asked for, then the counts."""
    from ..figures import terminal_heatmap

    if not wanted_files(s.options):
        for kind, grids in results["kinds"].items():
            title = f"{kind}, {metric.replace('_', ' ')}"
            marked = {"kind": kind, "subject_rows": results["subject_rows"]}
            s.screen.show(terminal_heatmap(grids[metric], results["rows"], title, **marked))
    rows = []
    for kind in results["kinds"]:
        curve = results["curves"][kind][metric]
        top = max(range(len(curve["mean"])), key=lambda i: curve["mean"][i])
        rows.append([kind, top, interval(curve["mean"][top], (curve["low"][top], curve["high"][top]))])
    caption = f"{trace.n_facts} facts, {trace.why_left_out()}"
    s.screen.table("strongest layer at the last subject token", ["kind", "layer", "effect [95%]"], rows, caption)


def show_balance(s: Session, balance: Balance, per_fact: bool) -> None:
    """α, the layers it proposes, and on request α of each fact."""
    rows = [["alpha", interval(balance.alpha, balance.ci95)], ["facts", str(balance.n_facts)]]
    rows += [[f"{kind} layers", ", ".join(map(str, layers)) or "none"] for kind, layers in balance.layers.items()]
    s.screen.table("balance factor (eq. 12)", ["", ""], rows)
    for warning in balance.warnings:
        s.screen.say(f"kt: warning: {warning}")
    if per_fact:
        frame = balance.to_dataframe()
        s.screen.table("by fact", [str(c) for c in frame.columns], frame.astype(object).values.tolist())
