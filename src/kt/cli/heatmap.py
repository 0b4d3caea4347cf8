"""`kt heatmap` and `kt alpha`: where the fact sits, and how its work divides between attention and MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ..runs.folder import FILES
from . import parse
from .command import BadOption
from .options import ChatOptions, FactOptions, FigureOptions, LongRunOptions, ModelOptions, Opt, TraceOptions
from .session import Session, session, wanted_files

if TYPE_CHECKING:
    from ..tracing import Balance, Trace


@dataclass(frozen=True)
class HeatmapOptions(LongRunOptions, TraceOptions, FigureOptions, FactOptions, ChatOptions, ModelOptions):
    first = ("kind", "png")

    kind: Annotated[
        str,
        Opt(
            "--kind",
            help="Any of mlp, attn, hidden; hidden-no-mlp, hidden-no-attn sever a module; experts, or one: mlp.e3.",
        ),
    ] = "mlp,attn,hidden"
    heads: Annotated[bool, Opt("--heads", help="Also every attention head by itself.")] = False
    metric: Annotated[
        str,
        Opt("--metric", help="Any of logit-diff, prob; of whole answers log-prob-diff, log-prob. The first is drawn."),
    ] = "logit-diff,prob"
    direction: Annotated[
        str, Opt("--direction", help="denoise: clean states into the corrupted run; noise: the other way round.")
    ] = "denoise"
    method: Annotated[
        str, Opt("--method", help="exact, or atp: estimate all cells by one backward, then patch the --top.")
    ] = "exact"
    top: Annotated[int, Opt("--top", min=1, help="With --method atp: cells of each fact that are patched.")] = 20
    check: Annotated[bool, Opt("--check", help="With --method atp: patch everything too, and compare.")] = False


@dataclass(frozen=True)
class AlphaOptions(LongRunOptions, TraceOptions, FigureOptions, FactOptions, ChatOptions, ModelOptions):
    metric: Annotated[
        str | None, Opt("--metric", help="logit-diff (the default) or prob; of whole answers log-prob-diff, log-prob.")
    ] = None
    per_fact: Annotated[bool, Opt("--per-fact", help="Print the balance factor of every fact too.")] = False


def heatmap(options: HeatmapOptions) -> None:
    """Causal tracing: what restoring each layer and token brings back of the answer."""
    kinds = parse.names(options.kind, parse.KINDS, "--kind", parse.ONE_PART)
    metrics = tuple(parse.METRICS[m] for m in parse.names(options.metric, tuple(parse.METRICS), "--metric"))
    parse.one(options.direction, ("denoise", "noise"), "--direction")
    if parse.one(options.method, ("exact", "atp"), "--method") == "atp":
        if options.resume is not None:
            raise BadOption("--resume belongs to --method exact; estimates are not kept, run them again")
        if set(metrics) & set(parse.WHOLE):
            raise BadOption("--method atp estimates logit-diff and prob; trace whole answers with --method exact")
        return screened(options, kinds, metrics)
    with session(options) as s:
        kinds += ("heads",) if options.heads else ()
        trace = run_trace(s, kinds, metrics)
        more, tables = {}, list(trace.tables(metrics[0]))
        if options.window > 1:
            from ..tracing.windows import inflation_table, peak_inflation

            single = measure(s, "single layers, to compare", kinds, metrics, window=1)
            inflations = peak_inflation(trace, single, metrics[0], seed=options.seed)
            more = {"windows": [inflation.as_dict() for inflation in inflations]}
            tables.append(inflation_table(inflations))
        s.keep(trace, trace.figures(metrics), **more)
        show_heatmaps(s, metrics[0])
        s.screen.tables(*tables)
    return None


def screened(options: HeatmapOptions, kinds: tuple[str, ...], metrics: tuple[str, ...]) -> None:
    """`--method atp`: a map of estimates, and exact patching where they are largest."""
    with session(options) as s:
        from ..tracing.screen import screen

        arguments = trace_arguments(options)
        facts, model = s.load_facts(), s.load_model()
        kinds += ("heads",) if options.heads else ()
        with s.progress("screening") as tick:
            result = screen(
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
        result.estimate.save(s.run.file(FILES["trace"]))
        result.exact.save(s.run.file(FILES["exact"]))
        s.keep(result, result.figures(metrics))
        show_heatmaps(s, metrics[0])
        s.screen.tables(*result.tables(metrics[0]))


def alpha(options: AlphaOptions) -> None:
    """The balance factor: attention's share of recall (eq. 12), and the layers to edit."""
    metric = parse.METRICS[parse.one(options.metric or "logit-diff", tuple(parse.METRICS), "--metric")]
    with session(options) as s:
        from ..tracing import balance_factor

        metrics = parse.WHOLE if metric in parse.WHOLE else ("logit_diff", "prob")
        trace = run_trace(s, ("mlp", "attn"), metrics, tokens="subject_last")
        balance = balance_factor(trace, metric, seed=options.seed)
        balance.save(s.run.file(FILES["balance"]))
        s.keep(balance)
        plain = (options.window, options.noise, options.corrupt, options.keep) == (1, "3s", "noise", "known")
        if plain and options.prompt is None and metric == "logit_diff" and not options.at:
            from ..editing.evidence import keep_balance

            keep_balance(s.load_model(), balance)
        show_balance(s, balance, options.per_fact)


def run_trace(s: Session, kinds: tuple[str, ...], metrics: tuple[str, ...], **instead: Any) -> Trace:
    """Trace what the options name; the raw measurements go into the run folder."""
    trace = measure(s, "tracing", kinds, metrics, **instead)
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
    """The arguments of `kt.causal_trace` from the options, checked."""
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
        "at": options.at or 0,
    }


def show_heatmaps(s: Session, metric: str) -> None:
    """A small heatmap a module or state, when no figure was asked for."""
    from ..figures import terminal_heatmap
    from ..tracing.titles import METRIC_NAMES

    results = s.run.results
    for kind in (kind for kind in results["kinds"] if ".h" not in kind and not wanted_files(s.options)):
        title = f"{kind}, {METRIC_NAMES[metric]}"
        tested = {"q": results["tests"][kind][metric]["q"], "n": results["intervals"][kind][metric]["n"]}
        marked = {"kind": kind, "subject_rows": results["subject_rows"]}
        cells = results["kinds"][kind][metric]
        s.screen.draw(terminal_heatmap(cells, results["rows"], title, **tested, **marked))


def show_balance(s: Session, balance: Balance, per_fact: bool = False) -> None:
    """α, the layers that it proposes, what is not determined, and on request α of each fact."""
    first, *rest = balance.tables(per_fact)
    s.screen.tables(first)
    s.screen.warn(*balance.notes())
    s.screen.tables(*rest)
