"""`kt sweep`: one edit a setting, over the papers' grids or your own; interrupted, it goes on where it was."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._util.data import read_json, write_json
from ..errors import KtError, warn_user
from ..runs.folder import MANIFEST, default_folder
from . import checks, interrupt, parse
from .command import BadOption, option_of
from .eval import EvalOptions, questions
from .options import ChatOptions, FactOptions, FigureOptions, ModelOptions, Opt, RunOptions, SolveOptions
from .session import Session, session, with_todays_names

if TYPE_CHECKING:
    from ..experiments import Point
    from ..facts.fact import Fact
    from ..model.model import TracedModel


# What `kt sweep` is given, and the points that it comes to.

KINDS = ("alpha", "layers", "edits", "clamp", "modules")
NUMBER = r"\d*\.?\d+"


@dataclass(frozen=True)
class SweepOptions(FigureOptions, RunOptions, SolveOptions, FactOptions, ChatOptions, ModelOptions):
    first = ("grid", "requests")

    method: Annotated[
        str | None,
        Opt("--method", help="An editing method, for edits several: memit,pmet,jeep [default: intattn; clamp: jeep]."),
    ] = None
    alpha: Annotated[
        str | None,
        Opt("--alpha", help="Attention's share where not swept: 0.3, or auto [default: the preset's]."),
    ] = None
    kind: Annotated[str, typer.Argument(metavar="|".join(KINDS))] = "alpha"
    grid: Annotated[
        str | None,
        Opt(
            "--grid",
            help="The settings: 0,0.3,1 or 0:1:0.1 (from:to:step); of layers 1-2;2-3 [default: the papers'].",
        ),
    ] = None
    requests: Annotated[
        int | None,
        Opt("--requests", min=1, help="How many facts are edited, evenly over all [default: all; 20 of the demo's]."),
    ] = None
    module: Annotated[str, Opt("--module", help="Whose layers are swept: attn or mlp.")] = "attn"
    region: Annotated[
        str | None, Opt("--region", help="Whose clamp is swept: high, of jeep, or low [default: high for jeep].")
    ] = None
    protocol: Annotated[str, option_of(EvalOptions, "protocol")] = EvalOptions.protocol
    heldout: Annotated[str | None, option_of(EvalOptions, "heldout")] = None
    no_generate: Annotated[bool, Opt("--no-generate", help="Score without generated text: faster.")] = False
    no_trace: Annotated[bool, Opt("--no-trace", help="Sweep alpha without tracing the α to mark.")] = False
    resume: Annotated[
        Path | None, Opt("--resume", metavar="DIR", help="Go on with an interrupted sweep; repeat its options.")
    ] = None


def fixed_settings(options: SweepOptions) -> dict[str, Any]:
    """The settings that all points share."""
    named = {"preset": options.preset, "variant": options.variant}
    return parse.solve_settings(options) | {name: value for name, value in named.items() if value is not None}


def protocols_of(options: SweepOptions) -> tuple[str, ...]:
    """The ways to ask, read as `kt eval` reads them; what cannot work is refused before a model loads."""
    names = ("protocol", "no_generate", "heldout")
    protocols: tuple[str, ...] = questions(EvalOptions(**{name: getattr(options, name) for name in names}))["protocols"]
    if "ppl" in protocols:
        from ..evaluation.perplexity import heldout_corpus

        heldout_corpus(options.heldout, options.model)
    return protocols


def methods_of(options: SweepOptions) -> list[str]:
    """One method, or several in a sweep of the number of edits."""
    methods = list(checks.methods_of(options))
    if len(methods) > 1 and options.kind != "edits":
        raise BadOption(f"--method {options.method}: only a sweep of edits takes several methods; name one")
    return methods


def default_grid(kind: str, n_facts: int) -> Any:
    """The papers' grid of a kind; of edits, up to all facts."""
    from ..experiments import edit_counts, grids

    known = {"alpha": grids.ALPHAS, "layers": grids.ATTENTION_SETS, "clamp": grids.CLAMPS}
    return edit_counts(n_facts) if kind == "edits" else known.get(kind, ())


def points_of(
    grid: Any, options: SweepOptions, given: Mapping[str, Any], shares: Mapping[str, float | None]
) -> list[Point]:
    """The grid as points; whatever writes attention gets its α as a number, so that all points have the same.

    Args:
        shares: by method its α; None where it writes no attention.
    """
    from ..experiments import alpha_points, clamp_points, edit_points, layer_points, module_points

    kind, methods = options.kind, methods_of(options)
    method = methods[0]
    if kind == "alpha":
        return alpha_points(grid, method, **given)
    of_alpha = {name: {} if share is None else {"alpha": share} for name, share in shares.items()}
    fixed = {**given, **of_alpha[method]}
    if kind == "modules":
        return module_points(float(shares[method] or 0), method, **given)
    if kind == "layers":
        return layer_points(grid, options.module, method, **fixed)
    if kind == "clamp":
        if "region" in fixed:
            raise BadOption("--set region: here --region says whose clamp is swept, of both regions; leave it out")
        region = options.region or ("high" if method == "jeep" else "low")
        return clamp_points(grid, method, region, **fixed)
    points = edit_points([int(number) for number in grid], methods, given)
    return [replace(point, options={**point.options, **of_alpha[point.series]}) for point in points]


def parse_grid(kind: str, text: str | None) -> Any:
    """`0,0.3,1` or `0:1:0.1`; sets of layers `1-2;2-3`; None for the default of the kind."""
    if text is None:
        return None
    if kind == "modules":
        raise BadOption("--grid has no meaning for modules, which are MLP, attention, and both; leave it out")
    if kind == "layers":
        return tuple(parse.layers(part.strip(), "--grid") or () for part in text.split(";"))
    if match := re.fullmatch(rf"({NUMBER}):({NUMBER}):({NUMBER})", text.strip()):
        first, last, step = (float(part) for part in match.groups())
        if step <= 0 or last < first or (last - first) / step > 1000:
            raise BadOption(f"--grid {text!r}: write from:to:step with a step above 0 and at most 1000 points")
        return _shares(kind, text, [round(first + i * step, 10) for i in range(int((last - first) / step + 1e-9) + 1)])
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(NUMBER, part) for part in parts):
        raise BadOption(f"--grid {text!r}: write numbers as 0,0.3,1 or from:to:step as 0:1:0.1")
    if kind == "edits" and not all(part.isdigit() for part in parts):
        raise BadOption(f"--grid {text!r}: numbers of edits are whole: 1,10,100")
    return _shares(kind, text, [float(part) for part in parts])


def _shares(kind: str, text: str, values: Sequence[float]) -> tuple[float, ...]:
    """The grid's numbers; of α each lies between 0 and 1."""
    if kind == "alpha" and (wrong := [value for value in values if not 0 <= value <= 1]):
        raise BadOption(f"--grid {text!r}: alpha {wrong[0]:g} must lie between 0 (MLP only) and 1 (attention only)")
    return tuple(values)


def _alpha(
    model: TracedModel,
    method: str,
    options: SweepOptions,
    given: Mapping[str, Any],
    balance: Mapping[str, Any] | None,
) -> float | None:
    """A method's α: None where it writes no attention; the traced one where nobody set it."""
    from ..editing.methods import METHODS

    if not METHODS[method].writes_attention:
        return None
    fixed = fixed_alpha(model, method, options, given)
    if fixed is not None:
        return fixed
    if balance is None:
        raise KtError(f"{method} needs an α, and it could not be traced on these facts; give --alpha as a number")
    return float(balance["alpha"])


def fixed_alpha(model: TracedModel, method: str, options: SweepOptions, given: Mapping[str, Any]) -> float | None:
    from ..editing.methods import used_by
    from ..editing.resolve import configure

    names = used_by(method, given)
    return configure(model, method, given_alpha(options), options.preset, options.variant, **names).fixed_alpha


def given_alpha(options: SweepOptions) -> float | str | None:
    """`--alpha`, which all points share."""
    alpha = parse.alpha(options.alpha)
    if alpha == "per-fact":
        raise BadOption("--alpha per-fact: a sweep takes one α for all facts; write auto or a number")
    return alpha


def outlined(options: SweepOptions, grid: Any, given: Mapping[str, Any], n_facts: int) -> list[Point]:
    """The points before the model is there, with an α of our own where it is still to be traced.

    Raises:
        KtError: a point that its method cannot have, or one of more facts than there are.
    """
    from ..editing.methods import METHODS
    from ..experiments.grids import check_points

    alpha = given_alpha(options)
    some = alpha if isinstance(alpha, float) else 0.5
    shares = {name: some if METHODS[name].writes_attention else None for name in methods_of(options)}
    points = points_of(grid or default_grid(options.kind, n_facts), options, given, shares)
    check_points(points, n_facts)
    list(checks.configurations(options, *(point.options for point in points)))  # each is refused where it is made
    return points


DEMO_REQUESTS = 20


def sweep(options: SweepOptions) -> None:
    """Solve and score an edit for every setting of a grid: alpha, layers, edits, clamp or modules."""
    options = with_todays_names(options)
    kind = parse.one(options.kind, KINDS, "kt sweep")
    folder = points_folder(options, f"{kind}-{Path(options.model.partition('@')[0]).name}")
    options = replace(options, out=folder)
    parse.one(options.module, ("attn", "mlp"), "--module")
    grid = parse_grid(kind, options.grid)
    given, protocols = fixed_settings(options), protocols_of(options)
    methods_of(options), given_alpha(options)
    facts: list[Fact] = []
    points: list[Point] = []

    def before_model(s: Session) -> None:
        facts.extend(requests_of(s, options, kind))
        points.extend(outlined(options, grid, given, len(facts)))

    with session(options, before_model=before_model) as s:
        from ..experiments.sweep import sweep as run

        checks.planned(options, *(point.options for point in points))
        model = s.load_model()
        balance = _balance(s, model, facts, options, kind, folder)
        swept = kind == "alpha"  # which then is in the grid alone
        shares = {} if swept else {m: _alpha(model, m, options, given, balance) for m in methods_of(options)}
        points = points_of(grid or default_grid(kind, len(facts)), options, given, shares)
        try:
            if options.resume is None:
                s.run.make_room()  # points are kept under the run's own name
            result = run(
                model,
                facts,
                points,
                kind=kind,
                folder=folder,
                resume=options.resume is not None,
                protocols=protocols,
                heldout=options.heldout,
                seeds=(options.seed,),
                statistics=options.statistics,
                corpus=options.corpus,
                max_tokens=options.max_tokens,
                batch_size=parse.batch_size(options.batch_size),
                balance=balance,
                stage=s.progress,
            )
        except KeyboardInterrupt:
            interrupt.note(f"finished points are kept: go on with --resume {folder}")
            raise
        take_over(s, folder)
        result.save(s.run.file("sweep.json"))
        s.keep(result)
        if not s.figures:
            s.screen.say("kt: no figure: these facts have none of its metrics; results.json has what there is")
        s.screen.tables(*result.tables())


def points_folder(options: Any, slug: str) -> Path:
    """The run folder, where finished points are kept while the command runs; with `--resume` the interrupted run's.

    Raises:
        BadOption: `--out` names another folder than `--resume`, or no points are kept there.
    """
    if options.resume is None:
        return options.out or default_folder(options.command, slug)
    if options.out not in (None, options.resume):
        raise BadOption("--resume and --out name two folders; --resume is enough")
    prepare_resume(options.resume, options.argv)
    folder: Path = options.resume
    return folder


def prepare_resume(folder: Path, argv: tuple[str, ...]) -> None:
    """Make an unfinished sweep's folder a run of ours, which the finished one may replace.

    Raises:
        BadOption: there is no sweep in it.
    """
    if not any(folder.rglob("settings.json")):
        raise BadOption(f"--resume {folder}: no sweep has kept a point there; leave --resume out")
    if not (folder / MANIFEST).exists():
        write_json(folder / MANIFEST, {"command_line": ["kt", *argv], "unfinished": True})


def take_over(s: Session, folder: Path) -> None:
    """Carry the finished points, and what was searched for, into the folder that replaces the one they were kept in."""
    from ..experiments.shared_targets import SEARCHED

    for path in sorted(folder.rglob("settings.json")):
        inside = s.run.folder / path.parent.relative_to(folder)
        inside.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, inside / path.name)
        if (path.parent / "points").is_dir():  # none where a run was cut in its first search
            shutil.copytree(path.parent / "points", inside / "points", dirs_exist_ok=True)
    for path in sorted(folder.rglob(SEARCHED)):
        shutil.copytree(path, s.run.folder / path.relative_to(folder), dirs_exist_ok=True)


def requests_of(s: Session, options: SweepOptions, kind: str) -> list[Fact]:
    """The facts that are edited. A sweep of their number takes the first m, so the demo's, which stand by relation,
    are shuffled for it."""
    import random

    from ..demo.loop import spread
    from ..experiments import distinct

    demo = options.facts == "demo" and options.prompt is None
    most = options.requests or (DEMO_REQUESTS if demo and options.limit is None else None)
    facts = s.load_facts()
    facts = distinct(facts if most is None else spread(facts, most))
    if kind == "edits" and demo:
        random.Random(options.seed).shuffle(facts)
    return facts


def _balance(
    s: Session, model: TracedModel, facts: list[Fact], options: SweepOptions, kind: str, folder: Path
) -> Mapping[str, Any] | None:
    """The traced α: of these facts, to be marked on a sweep of it, or the default one, where nobody set one. A resumed
    sweep has its own."""
    from ..editing import METHODS
    from ..editing.evidence import default_alpha
    from ..experiments import traced_balance

    given = fixed_settings(options)
    if kind == "alpha":
        wanted = not options.no_trace
    else:
        joint = [m for m in methods_of(options) if METHODS[m].writes_attention]
        wanted = any(fixed_alpha(model, m, options, given) is None for m in joint)
    if not wanted:
        return None
    if options.resume is not None and (old := read_json(folder / "settings.json").get("balance")):
        return dict(old)
    if kind != "alpha":
        alpha = default_alpha(model, facts)
        s.screen.say(f"kt: alpha {alpha.value:.3g} for all points: {alpha.source}")
        return {"alpha": alpha.value, "ci95": None, "n_facts": 0, "source": alpha.source}
    try:
        with s.progress("tracing α") as tick:
            balance = traced_balance(model, facts, options.seed, tick)
    except KtError as error:
        warn_user(f"no α is marked: these facts cannot be traced ({error})")
        return None
    balance.save(s.run.file("balance.json"))
    return {"alpha": balance.alpha, "alpha_raw": balance.alpha_raw, "ci95": balance.ci95, "n_facts": balance.n_facts}
