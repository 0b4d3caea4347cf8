"""`kt edits`: the edits that lie in folders, what is in one, what is between two, and several on top of each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._util.files import check_writable
from .._util.text import count, interval, visible
from ..report import Column, Table
from ..report.table import before_after, pairs, setting, shown
from . import checks, parse
from .command import BadOption
from .console import Screen
from .options import ForceOptions, ModelOptions, Opt
from .session import load_model, screen_for, settle_libraries, write_result

if TYPE_CHECKING:
    from ..editing import Edit
    from ..editing.conflicts import Conflict
    from ..editing.stack import EditStack
    from ..facts.fact import Fact
    from ..model.model import TracedModel


ACTIONS = ("ls", "show", "diff", "stack")
MOST_ROWS = 20
WORDS = {"target": "other target", "same": "there already", "keys": "close keys"}


@dataclass(frozen=True)
class EditsOptions(ForceOptions, ModelOptions):
    action: Annotated[str, typer.Argument(metavar="[ls|show|diff|stack]")] = "ls"
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE...", help="ls: folders [default: this one]; show: one file; diff: two; stack: all."
        ),
    ] = None
    model: Annotated[
        str, Opt("--model", "-m", help="show: look whether it holds the edit; stack: the base [default: demo].")
    ] = ""
    remove: Annotated[
        str | None, Opt("--remove", help="stack: take these out again, by file or place: 2,b.safetensors.")
    ] = None
    to: Annotated[Path | None, Opt("--to", help="stack: write the stack as JSON, in a folder above its edits.")] = None


def edits(options: EditsOptions) -> None:
    """List edit files, show one, compare two, or stack several on one base."""
    if options.action not in ACTIONS:
        hint = parse.meant(options.action, ACTIONS)
        raise BadOption(f"kt edits {options.action!r}: unknown; write kt edits {'|'.join(ACTIONS)}{hint}")
    wanted = {"show": 1, "diff": 2}.get(options.action)
    files = options.files or []
    if wanted is not None and len(files) != wanted:
        raise BadOption(f"kt edits {options.action} takes {count(wanted, 'file')}, not {len(files)}")
    if options.action != "stack" and (options.remove is not None or options.to is not None):
        raise BadOption("--remove and --to belong to kt edits stack; leave them out")
    if options.action in ("ls", "diff") and options.model:
        raise BadOption(f"kt edits {options.action} needs no model; leave --model out")
    checks.idle(options)
    if options.action in ("show", "diff"):
        checks.edit_files(*files)
    settle_libraries()
    {"ls": ls, "show": show, "diff": compare, "stack": stack}[options.action](options)


def ls(options: EditsOptions) -> None:
    """A row a file; broken ones say why."""
    for root in options.files or ():
        if not root.exists():
            raise BadOption(f"{root}: no such file or folder; name one that holds edits")
    from ..editing.diff import stored

    files = stored(options.files or ["."])
    rows = []
    for each in files:
        size = f"{each.size / 2**10:,.0f} KiB"
        what = [each.method, each.requests, each.alpha, each.weights, each.model] if each.error is None else [None] * 5
        written = each.modified[:16].replace("T", " ")
        rows.append([shown(each.path), each.kind, *map(shown, what), size, written, shown(each.error)])
    broken = any(each.error is not None for each in files)
    columns = ["file", "is", "method", "requests", "alpha", "weights", "model", "size", "written, UTC"]
    screen = screen_for(options)
    if rows:
        columns += ["cannot be opened"] if broken else []
        screen.tables(Table(columns, [row[: len(columns)] for row in rows], "edits"))
    else:
        screen.say("kt: no edits here; kt apply-edit writes them, kt edits ls FOLDER looks elsewhere")
    write_result(options, {"edits": [each.as_dict() for each in files]})


def show(options: EditsOptions) -> None:
    """Print the content of a file; with a model, whether its weights are the edit's."""
    from ..editing import Edit
    from ..editing.apply import difference
    from ..editing.stack import open_edit

    path = (options.files or [])[0]
    edit = open_edit(path)
    model = load_model(options) if options.model else None
    screen = screen_for(options)
    if not isinstance(edit, Edit):
        return show_stack(options, screen, path, edit, model)
    states = edit.state_of(model) if model is not None else {}
    about = about_edit(path, edit)
    settings = edit.manifest.get("hyper_parameters") or {}
    own = settings if edit.config_class is None else edit.config_class.settings()
    weights = about_weights(edit, states)
    if edit.effect is not None and model is not None:
        about["now"] = "fits" if (differs := difference(edit, model)) is None else differs.what
    columns = ["weight", "shape", "rank", "norm", "relative", "before", "after", *(["now"] if states else [])]
    written = Table(columns, weight_rows(weights), "weights") if edit.effect is None else edit.effect.table()
    screen.tables(
        pairs([[n, shown(v)] for n, v in about.items() if n != "alpha" or edit.shared_alpha is not None], "edit"),
        Table(["name", "value"], [[shown(n), setting(v)] for n, v in settings.items() if n in own], "hyper-parameters"),
        requests_before_after(edit),
        written,
    )
    result = about | {"hyper_parameters": settings, "requests": [vars(r) for r in edit.report], "weights": weights}
    if edit.effect is not None:
        result["effect"] = {"kind": edit.effect.kind, "place": edit.effect.place, **edit.effect.fields()}
    if model is not None and "other" in states.values() and edit.manifest.get("stands_on"):
        screen.say("kt: the edit stands on earlier ones (stands_on); hold the stack of them against the model")
    write_result(options, result)
    return None


def about_edit(path: Path, edit: Edit) -> dict[str, Any]:
    """The edit's manifest as a dictionary for the table and the JSON."""
    manifest = edit.manifest
    statistics = manifest.get("statistics") or {}
    return {
        "file": str(path),
        "digest": edit.digest,
        "digest_verified": True,  # the file does not open otherwise
        **{name: manifest.get(name) for name in ("method", "alpha", "model", "revision", "dtype", "seed", "stands_on")},
        "requests_n": len(edit.requests),
        "statistics": {name: statistics.get(name) for name in ("corpus", "n_tokens")},
        "lost_to_rounding": manifest.get("lost_to_rounding"),
        **({} if edit.dequantised is None else {"dequantised": edit.dequantised}),
        "versions": manifest.get("versions"),
    }


def about_weights(edit: Edit, states: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By weight: what is written, and the fingerprints before and after."""
    before, after = (edit.manifest.get(name, {}) for name in ("fingerprints", "fingerprints_after"))
    return {
        name: row | {"before": before.get(name), "after": after.get(name), "state": states.get(name)}
        for name, row in edit.deltas().items()
    }


def weight_rows(weights: dict[str, dict[str, Any]]) -> list[list[Any]]:
    rows = []
    for name, row in weights.items():
        shape = "x".join(map(str, row["shape"]))
        digests = [shown((row[side] or "")[:12] or None) for side in ("before", "after")]
        now = [row["state"]] if row["state"] else []
        rows.append([shown(name), shape, row["rank"], row["norm"], row["relative_norm"], *digests, *now])
    return rows


def requests_before_after(edit: Edit) -> Table:
    """Target and old answer before and after; texts are clipped."""
    prob, rank = Column("prob", before_after), Column("rank", before_after)
    columns: list[str | Column] = ["prompt", "target", prob, rank, "old answer", prob, rank]
    from ..editing.request_report import with_log_probs

    rows = []
    for r, log_probs in with_log_probs(edit.manifest, edit.report):
        target_prob, answer_prob = r.as_told(log_probs)
        rows.append([
            *(shown(r.prompt), shown(r.target), target_prob, r.target_rank),
            *(shown(r.answer), answer_prob, r.answer_rank),
        ])  # fmt: skip
    return Table(columns, rows, "requests, before and after")


def compare(options: EditsOptions) -> None:
    """Print the differences between two files."""
    from ..editing import Edit
    from ..editing.diff import diff
    from ..editing.stack import open_edit

    first, second = (options.files or [])[:2]
    opened: list[Edit | EditStack] = [open_edit(first), open_edit(second)]
    difference = diff(*(each if isinstance(each, Edit) else each.as_sum() for each in opened))
    screen = screen_for(options)
    if not difference.same_base:
        screen.say(
            "kt: where both write, they were solved for other weights: of two models, or one on top of the other"
        )
    screen.tables(*difference.tables())
    write_result(options, {"first": str(first), "second": str(second), **difference.as_dict()})


# Several edits together: `kt edits stack`, and the earlier edits of `kt apply-edit --history`.


def stack(options: EditsOptions) -> None:
    """Check that edits fit on each other, look for conflicts, and read back every request with all of them in."""
    if not options.files:
        raise BadOption("kt edits stack needs edit files: kt edits stack a.safetensors b.safetensors -m MODEL")
    if options.to is not None:
        check_writable(options.to, new=True)
    layers = open_stack(options.files, options.force)
    for place in places_of(layers, options.remove):
        layers.remove(place, options.force)
    model = load_model(replace(options, model=options.model or "demo"))
    screen = screen_for(options)
    layers = layers.for_model(model, options.force)
    grounds = layers.grounds(model)
    met = conflicts_inside(model, layers)
    requests = read_back(model, layers)
    if options.to is not None:
        layers.save(options.to)
    show_conflicts(screen, [conflict for _, conflict in met], layers)
    screen.tables(*layers.tables(grounds))
    show_read_back(screen, requests)
    if options.to is None and options.remove is not None:
        screen.say("kt: nothing is written: --to FILE keeps the stack without the edit")
    result = layers.as_dict(grounds) | {
        "conflicts": [{"place": place, **vars(conflict)} for place, conflict in met],
        "requests": requests,
        "held": still_first(requests),
        "path": None if options.to is None else str(options.to),
    }
    write_result(options, result, *[] if options.to is None else [options.to])


def open_stack(files: Iterable[str | Path], force: bool = False) -> EditStack:
    """Edit files and stacks, in order, as one stack."""
    paths = [Path(file) for file in files]
    checks.edit_files(*paths)
    from ..editing.stack import EditStack, open_edit

    stacked = EditStack()
    for file in paths:
        opened = open_edit(file)
        if isinstance(opened, EditStack):
            for layer in opened.layers:
                stacked.push(layer.edit, layer.file, layer.forced)
        else:
            stacked.push(opened, file)
    return stacked


def places_of(layers: EditStack, text: str | None) -> list[int]:
    """The places in the stack as it is given that `--remove` means, from the top down: taking one out moves those
    above it alone."""
    found: dict[int, str] = {}
    for word in [] if text is None else map(str.strip, text.split(",")):
        place = place_of(layers, word)
        if place in found:
            name = layers.layers[place - 1].name
            raise BadOption(f"--remove {text!r}: {found[place]} and {word} are one edit, {name}; name each once")
        found[place] = word
    return sorted(found, reverse=True)


def place_of(layers: EditStack, word: str) -> int:
    """The place that `--remove` means: itself, or an edit's file."""
    places = [at for at, e in enumerate(layers.layers, 1) if e.file is not None and Path(word) == e.file]
    if not places and word.isascii() and word.isdigit() and 1 <= int(word) <= len(layers):
        return int(word)
    if not places:
        known = ", ".join(f"{at} ({layer.name})" for at, layer in enumerate(layers.layers, start=1)) or "nothing"
        raise BadOption(f"--remove {word!r}: the stack has no such edit; it holds {known}")
    return places[0]


def conflicts_inside(model: TracedModel, layers: EditStack) -> list[tuple[int, Conflict]]:
    """Every edit's requests against those of the edits below it, with the upper one's place."""
    from ..editing.conflicts import conflicts
    from ..editing.stack import facts_of

    above = range(1, len(layers))
    return [(at + 1, c) for at in above for c in conflicts(model, facts_of([layers.edits[at]]), layers.edits[:at])]


def read_back(model: TracedModel, layers: EditStack) -> list[dict[str, Any]]:
    """Every request with all edits in: the target's probability and rank, beside those when it was solved."""
    from ..editing.request_report import with_log_probs
    from ..editing.rounding import readings
    from ..editing.stack import facts_of

    rows = []
    with layers.applied(model):
        for place, edit in enumerate(layers.edits, start=1):
            facts = facts_of([edit])
            solved: list[dict[str, Any] | None] = [None] * len(facts)
            if len(edit.report) == len(facts):
                solved = [
                    {"prob": r.target_prob[1], "rank": r.target_rank[1]}
                    | ({"log_prob": logs["target"][1]} if "target" in logs else {})
                    for r, logs in with_log_probs(edit.manifest, edit.report)
                ]
            for fact, reading, alone in zip(facts, readings(model, facts), solved, strict=True):
                rows.append({
                    "place": place,
                    "id": fact.id,
                    "prompt": fact.prompt,
                    "target": fact.target,
                    "solved": alone,
                    "stacked": reading.target._asdict(),
                })  # fmt: skip
    return rows


def still_first(requests: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Share of the requests whose target is still first, among those where it was first when they were solved."""
    from ..stats import bootstrap_mean

    first = [row for row in requests if row["solved"] is not None and row["solved"]["rank"] == 0]
    return bootstrap_mean([float(row["stacked"]["rank"] == 0) for row in first]).as_dict() if first else None


def show_read_back(screen: Screen, requests: Sequence[dict[str, Any]]) -> None:
    """Whether each request is still there with the edits above it in."""
    from ..editing.request_report import told

    rows = []
    for row in requests:
        solved = row["solved"] or {"prob": None, "rank": None}
        probs = [told(side["prob"], side.get("log_prob")) for side in (solved, row["stacked"])]
        both = [*probs, solved["rank"], row["stacked"]["rank"]]
        rows.append([row["place"], visible(row["prompt"]), visible(row["target"]), *both])
    share = still_first(requests)
    note = ""
    if share is not None:
        note = f"first when solved and still first: {interval(share['mean'], share['ci95'])} of {share['n']}"
    columns = ["edit", "prompt", "target", "prob, solved", "prob, stacked", "rank, solved", "rank, stacked"]
    screen.tables(Table(columns, rows, "requests, read back with the whole stack in", note))


def show_stack(options: EditsOptions, screen: Screen, path: Path, layers: EditStack, model: TracedModel | None) -> None:
    """`kt edits show` of a stack."""
    grounds = None if model is None else layers.for_model(model, options.force).grounds(model)
    screen.say(f"kt: {visible(str(path))} is a stack of {len(layers)} edits")
    screen.tables(*layers.tables(grounds))
    write_result(options, {"file": str(path), **layers.as_dict(grounds)})


def show_conflicts_with(
    screen: Screen, model: TracedModel, requests: Sequence[Fact], below: EditStack | None
) -> dict[str, Any]:
    """Print the conflicts of new requests with earlier edits, before anything is solved; their part of the JSON."""
    if below is None:
        return {}
    from ..editing.conflicts import conflicts

    below.grounds(model)  # what does not fit is refused before any work
    met = conflicts(model, requests, below.edits)
    show_conflicts(screen, met, below)
    digests = [layer.digest for layer in below.layers]
    return {"stands_on": digests, "conflicts": [vars(conflict) for conflict in met]}


def show_conflicts(screen: Screen, met: Sequence[Conflict], below: EditStack) -> None:
    """The conflicts, closest first; the JSON holds all of them."""
    if not met:
        screen.say("kt: no conflicts with the edits below")
        return
    order = sorted(met, key=lambda c: (c.what == "keys", -abs(c.overlap or 0)))
    rows = []
    for each in order[:MOST_ROWS]:
        edit = visible(below.layers[each.edit - 1].name)
        sides = [each.prompt, each.target, each.earlier_prompt, each.earlier_target]
        rows.append([WORDS[each.what], *map(visible, sides), edit, each.overlap])
    left = len(met) - len(rows)
    dense = any(each.measure == "cosine" for each in met)
    note = "overlap: of what the earlier request wrote, the share that the new prompt reads"
    note += "; of an edit that is kept dense, the cosine of the keys" if dense else ""
    note += f"; {left} more in --json" if left else ""
    columns = ["conflict", "new prompt", "target", "earlier prompt", "its target", "in", "overlap"]
    screen.tables(Table(columns, rows, f"conflicts with earlier edits: {len(met)}", note))
