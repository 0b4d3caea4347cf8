"""`kt apply-edit`: solve an edit and write it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .._util.data import read_json
from .._util.text import count
from ..errors import FailedCheck, KtError, WorkFailed
from ..experiments.sequence import EVALUATE, MODES
from ..runs import parallel
from ..runs.journal import SETTINGS
from . import checks, parse
from .command import BadOption, option_of
from .edits import open_stack, show_conflicts_with
from .eval import EvalOptions
from .options import ChatOptions, FactOptions, FigureOptions, LongRunOptions, ModelOptions, Opt, SolveOptions
from .session import UNFINISHED, Session, screen_for, session, unfinished, with_todays_names

if TYPE_CHECKING:
    from ..editing import Edit
    from ..editing.verdict import Verdict
    from ..model.model import TracedModel


@dataclass(frozen=True)
class EditOptions(FigureOptions, LongRunOptions, SolveOptions, FactOptions, ChatOptions, ModelOptions):
    first = ("alpha", "mode", "evaluate", "merge_to")

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
        Opt(
            "--keep-history/--no-keep-history",
            help="Later steps leave earlier keys alone [default: in steps, on; beside a guard, as the method has it].",
        ),
    ] = None
    history: Annotated[
        str | None,
        Opt("--history", metavar="FILE,...", help="Earlier edits or stacks, in order: solve on top, hold their keys."),
    ] = None
    norm_guard: Annotated[
        bool | None,
        Opt(
            "--norm-guard/--no-norm-guard",
            help="kt's own: rescale each wanted value to its norm in the unedited model [default: on in steps, unless "
            "--keep-history or --nas is given].",
        ),
    ] = None
    nas: Annotated[
        bool | None, Opt("--nas", help="NAS: rescale each solved value to the mean norm of --nas-facts' in that model.")
    ] = None
    nas_facts: Annotated[str | None, Opt("--nas-facts", help="Facts for --nas [default: the requests].")] = None
    update_guard: Annotated[
        str | None,
        Opt("--update-guard", help="Done to solved updates before they are written: rect, prune, sphere, simie."),
    ] = None
    merge_to: Annotated[
        Path | None, Opt("--merge-to", help="Also write the edited model as a Hugging Face folder (as kt export does).")
    ] = None
    strict: Annotated[
        bool | None,
        Opt("--strict", help="Refuse requests that contradict an earlier one of their batch; else they are left out."),
    ] = None
    no_check: Annotated[
        bool, Opt("--no-check", help="Do not load the merged folder to compare it, which takes as much memory again.")
    ] = False
    dry_run: Annotated[bool, Opt("--dry-run", help="Solve and report, but write no edit.")] = False
    force: Annotated[
        bool,
        Opt("--force", help="Exit 0 and write --merge-to also where the edit fails its own check."),
    ] = False


def apply_edit(options: EditOptions) -> None:
    """Solve edits for all requests, in one batch or in steps, and write them as files."""
    from ..editing.methods import METHODS

    options = with_todays_names(options)
    mode = parse.one(options.mode, MODES, "--mode")
    when = parse.one(options.evaluate, EVALUATE, "--evaluate")
    if options.edits is not None and (options.prompt is not None or options.facts not in ("demo", options.edits)):
        raise BadOption("--edits and --facts (or --prompt) both name the requests; give one of them")
    if options.edits is not None:
        options = replace(options, facts=options.edits)
    if mode == "single" and options.merge_to is not None:
        raise BadOption("--merge-to needs one edited model; --mode single gives one a request")
    if mode != "sequential" and (options.step_size != 1 or when == "step"):
        raise BadOption("--step-size and --evaluate step belong to --mode sequential; add it, or leave them out")
    if options.strict and (mode == "single" or (mode == "sequential" and options.step_size == 1)):
        raise BadOption(
            "--strict refuses requests of one batch that contradict each other, and here each is edited alone"
        )
    if options.norm_guard is None and (mode != "sequential" or begun_before_steps_held(options.resume)):
        options = replace(options, norm_guard=False)
    if options.update_guard is not None:
        parse.one(options.update_guard, ("rect", "prune", "sphere", "simie"), "--update-guard")
    if options.nas and options.norm_guard:
        raise BadOption("--nas and --norm-guard both rescale the wanted values; give one of them")
    if options.nas_facts is not None and not options.nas:
        raise BadOption("--nas-facts is what --nas takes its anchor from; add --nas")
    if options.kl and when == "none":
        raise BadOption("--kl is a score, and nothing is scored; add --evaluate end (or step)")
    if options.merge_to is not None and options.method in METHODS and METHODS[options.method].effect:
        kind = METHODS[options.method].effect
        raise BadOption(
            f"--merge-to writes changed weights, and {options.method} changes none (its edits are of kind {kind}); "
            "leave it out, and apply the edit file with kt"
        )
    settings = parse.solve_settings(options)
    alpha = parse.alpha(options.alpha)
    if options.merge_to is not None and options.resume is None:  # a run that goes on may have been past its merge
        checks.new_folder(options.merge_to, "--merge-to")
    if options.history is not None and options.merge_to is not None:
        raise BadOption("--merge-to writes one edit of the base; with --history, kt edits stack and kt export do")
    below = None if options.history is None else open_stack(options.history.split(","))
    refused: KtError | None = None
    held = [edit for edit in below.edits if edit.keys] if below and options.keep_history is not False else None
    with session(
        options,
        write=not options.dry_run,
        before_model=lambda _: checks.unfit(
            options,
            norm_guard=("norm_guard", bool(options.norm_guard)),
            nas=("norm_guard", "nas" if options.nas else None),
            keep_history=("keep_history", options.keep_history),
            update_guard=("update_guard", options.update_guard),
            history=("history", held),
            alpha_facts=("alpha_facts", options.alpha_facts),
        ),
    ) as s:
        from ..facts.load import load_facts

        others = None if options.alpha_facts is None else load_facts(options.alpha_facts)
        anchors = None if options.nas_facts is None else load_facts(options.nas_facts)
        from ..editing.method_names import MethodName
        from ..experiments.sequence import run_edits

        warnings.simplefilter("ignore", FailedCheck)  # said behind the edit's tables, or as the error
        requests = [fact.as_request() for fact in s.load_facts()]
        if options.strict and mode == "batch":
            from ..editing.resolve import without_contradictions

            without_contradictions(requests, strict=True)  # before a model is loaded
        said = (options.keep_history, options.norm_guard, options.nas)
        if mode == "sequential" and len(requests) > options.step_size and said == (None, None, None):
            s.screen.say(
                "kt: where the method can, steps leave earlier edits' keys alone and keep the unedited norm "
                "(--keep-history, --norm-guard; --no-norm-guard: the method alone)"
            )
        checks.planned(options)
        model = s.load_model()
        met = show_conflicts_with(screen_for(options), model, requests, below)
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
            method=MethodName(options.method),
            alpha=alpha,
            statistics=options.statistics,
            preset=options.preset,
            variant=options.variant,
            seed=options.seed,
            corpus=options.corpus,
            max_tokens=options.max_tokens,
            keep_history=options.keep_history,
            norm_guard="nas" if options.nas else options.norm_guard,
            norm_facts=anchors,
            update_guard=options.update_guard,
            strict=bool(options.strict),
            alpha_facts=others,
            journal=None if options.dry_run else s.journal(),
            **settings,
        )
        check_changed(run.edits)
        path = None if options.dry_run else str(run.save(s.run.folder, s.path))
        s.keep(run, edit=path, **met)
        failed = None if options.force else failed_check(run.verdict)
        if options.merge_to is not None and run.edit is not None and not options.dry_run and failed is None:
            refused = parallel.on_rank_zero("merging", merge, s, model, run.edit, options)
        s.screen.tables(*run.tables())
        warned = run.verdict.warnings if run.verdict else ()
        s.screen.warn(*(warned if failed is None else warned[1:]))
        if merged := s.run.results.get("merged"):
            s.screen.say(f"kt: kt revert {merged} takes the edit out of the merged folder")
    if failed is not None and options.merge_to is not None:
        failed += f"; {options.merge_to} is not written"
    if failed is not None and not options.dry_run:
        failed += f"; the edit is kept in {s.path}"
    if failed is not None:
        raise WorkFailed(f"{failed} (--force accepts it)")
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
    s.beside.append(options.merge_to)
    return None


def begun_before_steps_held(resume: Path | None) -> bool:
    """Whether `resume` is of a kt whose steps held nothing unasked: it noted `norm_guard` false, not null."""
    if resume is None:
        return False
    noted = unfinished(resume.with_name(resume.name.removesuffix(UNFINISHED))) / SETTINGS
    return noted.is_file() and read_json(noted).get("norm_guard") is False


def failed_check(verdict: Verdict | None) -> str | None:
    """The first number that an edit's own check failed in, the others being warnings; None where it holds."""
    if verdict is None or not verdict.warnings:
        return None
    first, *others = verdict.warnings
    more = f" (and {count(len(others), 'more warning')})" if others else ""
    return f"the edit failed its own check ({verdict.text}): {first}{more}"


def check_changed(edits: Sequence[Edit]) -> None:
    """An update can be finite, not zero, and still vanish in the rounding of a 16-bit weight."""
    from ..editing.request_report import with_log_probs
    from ..editing.rounding import WARN_BELOW

    written = [edit for edit in edits if edit.effect is None]
    reports = [pair for edit in written for pair in with_log_probs(edit.manifest, edit.report)]
    told = [log_probs.get("target", request.target_prob) for request, log_probs in reports]
    if not written or not all(before == after for before, after in told):
        return
    survived = [part["survived"] for edit in written for part in edit.manifest.get("rounding", {}).values()]
    if any(share is not None and share < WARN_BELOW for share in survived):
        why = "the update is lost in the weights' rounding; load the model with --dtype float32"
    else:
        why = "the update is too small, or its layers do not reach them; solve a larger edit, or take other layers"
    raise WorkFailed(f"the edit is solved, but no target's probability changed: {why}")
