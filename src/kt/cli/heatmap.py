"""`kt heatmap` and `kt alpha`: where the fact sits, and how its work divides between attention and MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from .._util.text import cell, interval
from ..runs.folder import FILES
from . import parse
from .command import BadOption
from .options import FactOptions, FigureOptions, LongRunOptions, ModelOptions, Opt, TraceOptions
from .session import Session, results_of_balance, results_of_screen, results_of_trace, session, wanted_files

if TYPE_CHECKING:
    from ..tracing import Balance, Trace
    from ..tracing.screen import Screen
    from ..tracing.windows import Inflation


@dataclass(frozen=True)
class HeatmapOptions(LongRunOptions, TraceOptions, FigureOptions, FactOptions, ModelOptions):
    kind: Annotated[
        str, Opt("--kind", help="Any of mlp, attn, hidden; hidden-no-mlp, hidden-no-attn sever a module.")
    ] = "mlp,attn,hidden"
    heads: Annotated[bool, Opt("--heads", help="Also every attention head by itself.")] = False
    metric: Annotated[str, Opt("--metric", help="Any of logit-diff, prob; the first is drawn.")] = "logit-diff,prob"
    direction: Annotated[
        str, Opt("--direction", help="denoise: clean states into the corrupted run; noise: the other way round.")
    ] = "denoise"
    method: Annotated[
        str, Opt("--method", help="exact, or atp: estimate all cells by one backward, then patch the --top.")
    ] = "exact"
    top: Annotated[int, Opt("--top", min=1, help="With --method atp: cells of each fact that are patched.")] = 20
    check: Annotated[bool, Opt("--check", help="With --method atp: patch everything too, and compare.")] = False


@dataclass(frozen=True)
class AlphaOptions(LongRunOptions, TraceOptions, FigureOptions, FactOptions, ModelOptions):
    per_fact: Annotated[bool, Opt("--per-fact", help="Print the balance factor of every fact too.")] = False


def heatmap(options: HeatmapOptions) -> None:
    """Causal tracing: what restoring each layer and token brings back of the answer."""
    kinds = parse.names(options.kind, parse.KINDS, "--kind")
    metrics = tuple(parse.METRICS[m] for m in parse.names(options.metric, tuple(parse.METRICS), "--metric"))
    parse.one(options.direction, ("denoise", "noise"), "--direction")
    if parse.one(options.method, ("exact", "atp"), "--method") == "atp":
        if options.resume is not None:
            raise BadOption("--resume belongs to --method exact; estimates are not kept, run them again")
        return screened(options, kinds, metrics)
    if options.check:
        raise BadOption("--check compares an estimate with the exact map; give --method atp with it")
    with session(options) as s:
        kinds += ("heads",) if options.heads else ()
        trace = run_trace(s, kinds, metrics)
        results = results_of_trace(trace)
        inflations: list[Inflation] = []
        if options.window > 1:
            from ..tracing.windows import peak_inflation

            single = measure(s, "single layers, to compare", kinds, metrics, window=1)
            inflations = peak_inflation(trace, single, metrics[0], seed=options.seed)
            results["windows"] = [found.as_dict() for found in inflations]
        s.keep(results, figures=trace_figures(trace, metrics))
        show_trace(s, trace, results, metrics[0])
        show_inflation(s, inflations)
    return None


def screened(options: HeatmapOptions, kinds: tuple[str, ...], metrics: tuple[str, ...]) -> None:
    """`--method atp`: a map of estimates, and exact patching where they are largest."""
    with session(options) as s:
        from ..tracing.screen import screen

        arguments = trace_arguments(options)
        facts, model = s.load_facts(), s.load_model()
        kinds += ("heads",) if options.heads else ()
        with s.progress("screening") as tick:
            found = screen(
                model,
                facts,
                kinds=kinds,
                metrics=metrics,
                top=options.top,
                metric=metrics[0],
                check=options.check,
                progress=tick,
                **arguments,
            )
        found.estimate.save(s.run.file(FILES["trace"]))
        found.exact.save(s.run.file(FILES["exact"]))
        results = results_of_trace(found.estimate) | {"screen": results_of_screen(found)}
        s.keep(results, figures={**trace_figures(found.estimate, metrics), "screen": found.figure()})
        show_trace(s, found.estimate, results, metrics[0])
        show_screen(s, found)


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
    trace = measure(s, "tracing", kinds, metrics)
    trace.save(s.run.file(FILES["trace"]))
    s.run.manifest["trace"] = dict(trace.metadata)
    return trace


def measure(s: Session, what: str, kinds: tuple[str, ...], metrics: tuple[str, ...], **instead: Any) -> Trace:
    """`kt.causal_trace` with the options' arguments, some of them replaced."""
    arguments = trace_arguments(s.options)
    facts, model = s.load_facts(), s.load_model()
    from ..tracing import causal_trace

    arguments |= {"kinds": kinds, "metrics": metrics, "journal": s.journal().within(what)} | instead
    with s.progress(what) as tick:
        return causal_trace(model, facts, progress=tick, **arguments)


def trace_arguments(options: Any) -> dict[str, Any]:
    """What the options of tracing say, checked."""
    rows = parse.batch_size(options.batch_size)
    return {
        "samples": options.samples,
        "window": options.window,
        "noise_scale": parse.noise(options.noise),
        "corrupt": parse.one(options.corrupt, ("noise", "swap"), "--corrupt"),
        # A fact typed by hand is traced also when the model does not know it.
        "keep": "all" if options.prompt is not None else parse.one(options.keep, ("known", "all"), "--keep"),
        "seed": options.seed,
        "max_rows": None if rows == "auto" else int(rows),
        "direction": getattr(options, "direction", "denoise"),
    }


def trace_figures(trace: Trace, metrics: Sequence[str]) -> dict[str, Any]:
    """Figure 1 for each metric, in the order asked for, then the heads, then Figure 2."""
    panels = {f"heatmap-{metric.replace('_', '-')}": trace.heatmaps(metric) for metric in metrics}
    heads = {"heads": trace.heads(metrics[0])} if any(".h" in kind for kind in trace.kinds) else {}
    return {**panels, **heads, "curves": trace.curves()}


def show_trace(s: Session, trace: Trace, results: dict[str, Any], metric: str) -> None:
    """A small heatmap per kind when no figure was asked for, then the counts."""
    from ..figures import terminal_heatmap

    modules = [kind for kind in results["kinds"] if ".h" not in kind]
    if not wanted_files(s.options):
        for kind in modules:
            title = f"{kind}, {metric.replace('_', ' ')}"
            marked = {"kind": kind, "subject_rows": results["subject_rows"]}
            tested = {"q": results["tests"][kind][metric]["q"], "n": results["intervals"][kind][metric]["n"]}
            cells = results["kinds"][kind][metric]
            s.screen.show(terminal_heatmap(cells, results["rows"], title, **tested, **marked))
    rows = [strongest(kind, results["curves"][kind][metric]) for kind in modules]
    heads = [strongest(kind, results["curves"][kind][metric]) for kind in results["kinds"] if ".h" in kind]
    rows += sorted(heads, key=lambda row: -row[3])[:5]
    caption = f"{trace.n_facts} facts, {trace.why_left_out()}"
    title = "strongest layer at the last subject token"
    s.screen.table(title, ["kind", "layer", "effect [95%]"], [row[:3] for row in rows], caption)


def strongest(kind: str, curve: dict[str, Any]) -> list[Any]:
    """A row of the table: the peak of a kind's curve, as text and (last) as a number."""
    measured = [i for i, value in enumerate(curve["mean"]) if not math.isnan(value)]
    top = max(measured, default=0, key=lambda i: curve["mean"][i])
    return [kind, top, interval(curve["mean"][top], (curve["low"][top], curve["high"][top])), curve["mean"][top]]


def show_inflation(s: Session, inflations: Sequence[Inflation]) -> None:
    """What a window adds to the peaks at the last subject token."""
    if not inflations:
        return
    columns = ["kind", "peak (layer)", "single layers (layer)", "their sum in the window", "inflation [95%]"]
    rows = [
        [
            f.kind,
            f"{f.peak.mean:.3f} ({f.layer})",
            f"{f.single_peak.mean:.3f} ({f.single_layer})",
            cell(f.sum_of_single.mean),
            interval(f.inflation.mean, f.inflation.ci95),
        ]
        for f in inflations
        if ".h" not in f.kind
    ]
    note = "inflation: the window's peak over the peak of single layers, last subject token"
    s.screen.table(f"window of {inflations[0].window} against single layers", columns, rows, note)


def show_screen(s: Session, screen: Screen) -> None:
    """How far the estimates can be trusted, and what they saved."""
    rho = f"Spearman's ρ over the {screen.top} patched cells of a fact (chosen by the estimate: biased)"
    rows = [[rho, str(screen.correlation_checked)]]
    if screen.correlation is not None:
        rows.append(["Spearman's ρ over all cells of a fact", str(screen.correlation)])
        rows.append([f"share of the {screen.top} largest effects that were patched", str(screen.recall)])
    names = {"estimate": "estimating all cells", "exact_top": "patching the top", "exact": "patching all"}
    rows += [[f"CPU seconds, {names[n]}", f"{v:.2f}"] for n, v in screen.seconds.items() if v is not None]
    if (whole := screen.seconds["exact"]) and (estimate := screen.seconds["estimate"]):
        rows.append(["the estimate is cheaper by a factor of", f"{whole / estimate:.1f}"])
    s.screen.table("attribution patching against exact patching", ["", ""], rows)


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
