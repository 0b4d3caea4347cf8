"""`kt sweep`: one edit a setting, over the papers' grids or your own; interrupted, it goes on where it was."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import read_json, write_json
from ..errors import KtError
from ..run_folder import MANIFEST, default_folder
from . import parse
from .command import BadOption
from .session import Session, session
from .sweep_points import (
    KINDS,
    SweepOptions,
    default_grid,
    fixed_alpha,
    fixed_settings,
    methods_of,
    parse_grid,
    points_of,
    protocols_of,
)

if TYPE_CHECKING:
    from ..facts.fact import Fact
    from ..model import TracedModel
    from ..sweep import Sweep

DEMO_REQUESTS = 20


def sweep(options: SweepOptions) -> None:
    """Solve and score an edit for every setting of a grid: alpha, layers, edits, clamp or modules."""
    kind = parse.one(options.kind, KINDS, "kt sweep")
    options = _with_folder(options)
    grid = parse_grid(kind, options.grid)
    given, protocols = fixed_settings(options), protocols_of(options)
    folder = options.out
    assert folder is not None
    with session(options) as s:
        from ..sweep import sweep as run

        methods_of(options)  # refused now, before anything is traced
        facts = requests_of(s, options, kind)
        model = s.load_model()
        balance = _balance(s, model, facts, options, kind, folder)
        points = points_of(grid or default_grid(kind, len(facts)), model, options, given, balance)
        try:
            found = run(
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
            # Said here, since "nothing was written" would be wrong.
            s.screen.say(f"kt: interrupted; finished points are kept: go on with --resume {folder}")
            raise SystemExit(130) from None
        take_over(s, folder)
        found.save(s.run.file("sweep.json"))
        s.keep(found.as_dict(), drawn(found))
        show(s, found)


def _with_folder(options: SweepOptions) -> SweepOptions:
    """The folder where points are kept while the sweep runs is the run folder itself."""
    if options.resume is None:
        out = options.out or default_folder("sweep", f"{options.kind}-{Path(options.model.partition('@')[0]).name}")
        return replace(options, out=out)
    if options.out not in (None, options.resume):
        raise BadOption("--resume and --out name two folders; --resume is enough")
    prepare_resume(options.resume, options.argv)
    return replace(options, out=options.resume)


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
    """Carry the finished points into the folder that replaces the one they were kept in."""
    for path in sorted(folder.rglob("settings.json")):
        inside = s.run.folder / path.parent.relative_to(folder)
        inside.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, inside / path.name)
        shutil.copytree(path.parent / "points", inside / "points", dirs_exist_ok=True)


def requests_of(s: Session, options: SweepOptions, kind: str) -> list[Fact]:
    """The facts that are edited. A sweep of their number takes the first m, so the demo's, which stand by relation,
    are shuffled for it."""
    import random

    from ..demo_loop import spread
    from ..sweep import distinct

    demo = options.facts == "demo" and options.prompt is None
    most = options.requests or (DEMO_REQUESTS if demo and options.limit is None else None)
    facts = s.load_facts()
    facts = distinct(facts if most is None else spread(facts, most))
    if kind == "edits" and demo:
        random.Random(options.seed).shuffle(facts)
    return facts


def drawn(found: Sweep) -> dict[str, Any]:
    """The figure by its name; none, with a warning, where the facts have nothing that the protocols ask for."""
    from ..sweep.show import columns

    if columns(found):
        return {found.kind: found.figure()}
    warnings.warn("no figure: these facts have none of its metrics; results.json has what there is", stacklevel=1)
    return {}


def show(s: Session, found: Sweep) -> None:
    """One row a point; of modules, what the joint edit is more than its parts."""
    from ..sweep.show import AXES, difference_rows, table_rows, tables

    note = None
    if found.balance is not None:
        ends = found.balance.get("ci95")
        span = "" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]"
        note = f"traced α {found.balance['alpha']:.3f}{span}, n = {found.balance['n_facts']}"
    title = f"{found.about['model']}: {found.kind}, {found.about['n_facts']} facts"
    for shown in tables(found):
        head = ["method", AXES[found.kind], *shown, "edits", "seconds"]
        s.screen.table(title, head, table_rows(found, shown), note)
    for shown in tables(found):
        if rows := difference_rows(found, shown):
            s.screen.table("paired differences over the same records", ["", *shown], rows)


def _balance(
    s: Session, model: TracedModel, facts: list[Fact], options: SweepOptions, kind: str, folder: Path
) -> Mapping[str, Any] | None:
    """The traced α: to be marked on a sweep of it, or to be used where nobody set one. A resumed sweep has its own."""
    from ..editing import METHODS
    from ..sweep import traced_balance

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
    try:
        with s.progress("tracing α") as tick:
            found = traced_balance(model, facts, options.seed, tick)
    except KtError as error:
        if kind != "alpha":
            raise type(error)(f"α cannot be traced on these facts ({error}); give --alpha as a number") from None
        warnings.warn(f"no α is marked: these facts cannot be traced ({error})", stacklevel=1)
        return None
    found.save(s.run.file("balance.json"))
    return {"alpha": found.alpha, "alpha_raw": found.alpha_raw, "ci95": found.ci95, "n_facts": found.n_facts}
