"""`kt apply-edit` and `kt cov`: solve an edit and write it; the key moments that solving needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .. import ranks
from ..artifacts import check_writable
from ..cells import cell, interval
from ..edit_steps import EVALUATE, MODES
from ..errors import KtError, WorkFailed
from . import parse
from .command import BadOption, option_of
from .judge import EvalOptions, show_scores
from .options import FactOptions, FigureOptions, LongRunOptions, ModelOptions, Opt, RunOptions, SolveOptions
from .results import results_of_run
from .session import Session, load_facts_file, session
from .stacked import open_stack, show_conflicts_with

if TYPE_CHECKING:
    from ..edit_run import EditRun
    from ..editing import Edit
    from ..editing.statistics import Changes
    from ..model import TracedModel


@dataclass(frozen=True)
class EditOptions(FigureOptions, LongRunOptions, SolveOptions, FactOptions, ModelOptions):
    edits: Annotated[str | None, Opt("--edits", help="The edit requests; the same as --facts.")] = None
    method: Annotated[str, Opt("--method", help="An editing method; kt ls methods lists them.")] = "intattn"
    alpha: Annotated[
        str | None,
        Opt(
            "--alpha",
            help="0 (MLP only) to 1 (attention only), auto: traced first, or per-fact [default: the preset's].",
        ),
    ] = None
    alpha_facts: Annotated[
        str | None, Opt("--alpha-facts", help="Facts that --alpha auto is traced on [default: the requests].")
    ] = None
    mode: Annotated[
        str,
        Opt(
            "--mode",
            help="batch: all requests in one edit; single: each on the unedited model; sequential: in steps, each on "
            "the model that the ones before left.",
        ),
    ] = "batch"
    step_size: Annotated[int, Opt("--step-size", min=1, help="Requests a step, with --mode sequential.")] = 1
    evaluate: Annotated[
        str, Opt("--evaluate", help="Score the requests: none, at the end, or (sequential) after every step.")
    ] = "none"
    no_generate: Annotated[bool, Opt("--no-generate", help="Score without generated text: faster.")] = False
    kl: Annotated[bool, option_of(EvalOptions, "kl")] = False
    keep_history: Annotated[
        bool | None,
        Opt("--keep-history/--no-keep-history", help="Later steps leave earlier keys alone [default: the method's]."),
    ] = None
    history: Annotated[
        str | None,
        Opt("--history", metavar="FILE,...", help="Earlier edits or stacks, in order: solve on top, hold their keys."),
    ] = None
    norm_guard: Annotated[
        bool, Opt("--norm-guard", help="Rescale each wanted value to the norm it has in the unedited model.")
    ] = False
    merge_to: Annotated[
        Path | None, Opt("--merge-to", help="Also write the edited model as a Hugging Face folder (as kt export does).")
    ] = None
    no_check: Annotated[
        bool, Opt("--no-check", help="Do not load the merged folder to compare it, which takes as much memory again.")
    ] = False
    dry_run: Annotated[bool, Opt("--dry-run", help="Solve and report, but write no edit.")] = False


@dataclass(frozen=True)
class CovOptions(RunOptions, ModelOptions):
    corpus: Annotated[str, Opt("--corpus", help="demo, a .txt or .jsonl file, or hf:repo.")] = "demo"
    layers_mlp: Annotated[str | None, Opt("--layers-mlp", help="Layers of down_proj: 4-8, none [default: all].")] = None
    layers_attn: Annotated[str | None, Opt("--layers-attn", help="Layers of W_o: 2-4, none [default: all].")] = None
    max_tokens: Annotated[int, Opt("--max-tokens", min=1, help="Tokens of the corpus that are counted.")] = 100_000
    until: Annotated[
        float | None,
        Opt("--until", help="Stop when doubling the tokens changes no moment by more than this share: 0.05."),
    ] = None
    cache: Annotated[Path | None, Opt("--cache", help="Where the moments are kept [default: the user's cache].")] = None


def apply_edit(options: EditOptions) -> None:
    """Solve edits for all requests, in one batch or in steps, and write them as files."""
    mode = parse.one(options.mode, MODES, "--mode")
    when = parse.one(options.evaluate, EVALUATE, "--evaluate")
    if options.edits is not None and (options.prompt is not None or options.facts not in ("demo", options.edits)):
        raise BadOption("--edits and --facts (or --prompt) both name the requests; give one of them")
    if options.edits is not None:
        options = replace(options, facts=options.edits)
    if mode == "single" and options.merge_to is not None:
        raise BadOption("--merge-to needs one edited model; --mode single gives one a request")
    if mode != "sequential" and (options.step_size != 1 or when == "step"):
        raise BadOption("--step-size and --evaluate step belong to --mode sequential")
    if options.kl and when == "none":
        raise BadOption("--kl is a score, and nothing is scored; add --evaluate end (or step)")
    settings = parse.settings(options.set) | {
        "layers_mlp": parse.layers(options.layers_mlp, "--layers-mlp"),
        "layers_attn": parse.layers(options.layers_attn, "--layers-attn"),
    }
    alpha = None if options.alpha is None else parse.alpha(options.alpha)
    if options.merge_to is not None and options.resume is None:  # a run that goes on may have been past its merge
        check_new(options.merge_to)
    if options.history is not None and options.merge_to is not None:
        raise BadOption("--merge-to writes one edit of the base; with --history, kt edits stack and kt export do")
    below = None if options.history is None else open_stack(options.history.split(","))
    refused: KtError | None = None
    with session(options, write=not options.dry_run) as s:
        from ..edit_run import run_edits

        requests = [fact.as_request() for fact in s.load_facts()]
        others = None if options.alpha_facts is None else load_facts_file(options.alpha_facts)
        model = s.load_model()
        met = show_conflicts_with(s.screen, model, requests, below)
        run = run_edits(
            model,
            requests,
            mode,
            options.step_size,
            when,
            not options.no_generate,
            stage=s.progress,
            kl=options.kl,
            below=below,
            method=options.method,
            alpha=alpha,
            statistics=options.statistics,
            preset=options.preset,
            variant=options.variant,
            seed=options.seed,
            corpus=options.corpus,
            max_tokens=options.max_tokens,
            keep_history=options.keep_history,
            norm_guard=options.norm_guard,
            alpha_facts=others,
            journal=None if options.dry_run else s.journal(),
            **settings,
        )
        check_changed(run.edits)
        path = None if options.dry_run else str(run.save(s.run.folder, s.path))
        s.keep(results_of_run(run, path) | met, {"steps": run.steps.figure()} if mode == "sequential" else {})
        if options.merge_to is not None and run.edit is not None and not options.dry_run:
            refused = ranks.by_main("merging", merge, s, model, run.edit, options)
        show_run(s, run)
    if refused is not None:
        raise refused


def merge(s: Session, model: TracedModel, edit: Edit, options: EditOptions) -> KtError | None:
    """The edited model as a folder. An error is returned, to be raised once the run is kept: a merge that fails does
    not take the solved edit with it."""
    from ..export import carries, to_hf

    assert options.merge_to is not None
    try:
        if options.resume is None or not carries(options.merge_to, edit):
            to_hf(model, edit, options.merge_to, check=not options.no_check)
    except KtError as error:
        return error
    s.run.results["merged"] = str(options.merge_to)
    return None


def check_new(folder: Path) -> None:
    """Refuse a `--merge-to` that is taken before solving, not after."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadOption(f"--merge-to {folder} exists and is not empty; name a new folder")
    check_writable(folder / "config.json")


def check_changed(edits: Sequence[Edit]) -> None:
    """An update can be finite, not zero, and still vanish in the rounding of a 16-bit weight."""
    if all(r.target_prob[0] == r.target_prob[1] for edit in edits for r in edit.report):
        raise WorkFailed(
            "the edit is solved, but no target's probability changed: the update is lost in the weights' rounding; "
            "load the model with --dtype float32"
        )


def show_run(s: Session, run: EditRun) -> None:
    """The requests and the weights of the whole, and the scores where they were asked for."""
    if run.edit is not None:
        show_edit(s, run.edit)
    else:
        show_requests(s, run.edits)
    if run.after is not None:
        show_scores(s, run.after, run.before, run.control)


def show_edit(s: Session, edit: Edit) -> None:
    """A row a request, a row a weight, a row an aim."""
    show_requests(s, [edit])
    rounded = edit.manifest.get("rounding") is not None
    deltas = []
    for name, delta in edit.deltas().items():
        shape = "x".join(map(str, delta["shape"]))
        condition = "–" if delta["condition"] is None else f"{delta['condition']:.0e}"
        row = [name, shape, delta["rank"], delta["norm"], delta["relative_norm"], delta["norm_ratio"], condition]
        deltas.append(row + ([delta["survived"], delta["rounding_error"]] if rounded else []))
    columns = ["weight", "shape", "rank", "norm", "relative", "new / old norm", "condition"]
    columns += ["survived", "error"] if rounded else []
    s.screen.table("written weights", columns, deltas, rounding_note(edit) if rounded else None)
    changes = edit.manifest.get("value_change") or {}
    rows = [[aim, *(spread(change[part]) for part in ("came_through", "left"))] for aim, change in changes.items()]
    if rows:
        columns = ["aim", "of the wanted change came through", "still missing, relative"]
        s.screen.table("intended value change", columns, rows, "mean [95%] over requests, with the edit as scaled")


def rounding_note(edit: Edit) -> str:
    """What the two columns of a rounded edit are, and which requests rounding cost."""
    what = "survived, error: of each update after rounding to 16 bits, relative to it"
    lost = edit.manifest.get("lost_to_rounding")
    if lost is None:
        return f"{what}; requests lost to rounding: not measured where other weights than W_o and down_proj change"
    named = [f"{r.subject} ({r.id})" for r in edit.report if r.id in lost]
    return f"{what}; requests lost to rounding: {len(lost)} of {len(edit.report)}" + "".join(f", {n}" for n in named)


def show_requests(s: Session, edits: Sequence[Edit]) -> None:
    """Target and old answer before and after; beside them the control of a joint edit."""
    reports = [r for edit in edits for r in edit.report]
    held = any(r.control_prob is not None for r in reports)
    columns = ["prompt", "target", "prob", *(["MLP alone"] if held else []), "rank", "old answer", "prob", "rank"]
    rows = []
    for r in reports:
        control = [r.control_prob] if held else []
        target = [r.target, arrow(r.target_prob), *control, arrow(r.target_rank)]
        rows.append([r.prompt, *target, r.answer, arrow(r.answer_prob), arrow(r.answer_rank)])
    about = edits[-1].manifest
    s.screen.table(f"{about.get('method')}, alpha {cell(about.get('alpha'))}", columns, rows)


def spread(mean: dict[str, Any]) -> str:
    return interval(mean["mean"], mean["ci95"])


def arrow(pair: tuple[Any, Any] | None) -> str:
    """`0.012 → 0.981`."""
    return "–" if pair is None else f"{cell(pair[0])} → {cell(pair[1])}"


def cov(options: CovOptions) -> None:
    """Take the second moments of the keys over a corpus, into the cache."""
    mlp = parse.layers(options.layers_mlp, "--layers-mlp")
    attn = parse.layers(options.layers_attn, "--layers-attn")
    with session(options) as s:
        from ..editing import key_statistics, memory_needed
        from ..sites import Kind, Site

        model = s.load_model()
        everywhere = tuple(range(model.n_layers))
        chosen = {Kind.MLP: everywhere if mlp is None else mlp, Kind.ATTN: everywhere if attn is None else attn}
        sites = [Site(kind, model.checked(layer)) for kind, layers in chosen.items() for layer in layers]
        if not sites:
            raise BadOption("--layers-mlp none and --layers-attn none leave nothing to do; name some layers")
        s.screen.say(f"kt: {len(sites)} second moments need {memory_needed(model, sites) / 2**20:.0f} MiB")
        with s.progress("tokens") as tick:
            found = key_statistics(
                model, sites, options.corpus, options.max_tokens, options.cache, tick, until=options.until
            )
        files = {name: str(path) for name, path in found.files.items()}
        s.keep({"files": files, "n_tokens": found.n_tokens, "corpus": found.corpus, "changes": dict(found.changes)})
        rows = [[name, _last_change(found.changes.get(name)), path] for name, path in files.items()]
        note = "change: of the moment's norm over the last doubling of the tokens"
        s.screen.table(f"second moments over {found.n_tokens} tokens", ["module", "change", "file"], rows, note)


def _last_change(changes: Changes | None) -> str:
    return f"{changes[-1][1]:.3f}" if changes else "–"
