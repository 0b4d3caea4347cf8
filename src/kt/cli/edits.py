"""`kt edits`: the edits that lie in folders, what is in one, what is between two, and several on top of each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..figures.text import clip, visible
from .command import BadOption
from .console import Screen
from .options import ForceOptions, ModelOptions, Opt
from .stacked import show_stack, stack
from .session import load_model, screen_for, settle_libraries, write_result

if TYPE_CHECKING:
    from ..editing import Edit
    from ..editing.diff import EditDiff
    from ..editing.stack import EditStack

ACTIONS = ("ls", "show", "diff", "stack")


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
        raise BadOption(f"kt edits {options.action!r}: unknown; write kt edits {'|'.join(ACTIONS)}")
    wanted = {"show": 1, "diff": 2}.get(options.action)
    files = options.files or []
    if wanted is not None and len(files) != wanted:
        raise BadOption(f"kt edits {options.action} takes {wanted} file{'s' * (wanted > 1)}, not {len(files)}")
    if options.action != "stack" and (options.remove is not None or options.to is not None):
        raise BadOption("--remove and --to belong to kt edits stack")
    if options.action in ("ls", "diff") and options.model:
        raise BadOption(f"kt edits {options.action} needs no model; leave --model out")
    settle_libraries()
    {"ls": ls, "show": show, "diff": compare, "stack": stack}[options.action](options)


def ls(options: EditsOptions) -> None:
    """A row a file; broken ones say why."""
    from ..editing.stored import stored

    found = stored(options.files or ["."])
    rows = []
    for each in found:
        size = f"{each.size / 2**10:,.0f} KiB"
        what = [each.method, each.requests, each.alpha, each.weights, each.model] if each.error is None else [None] * 5
        written = each.modified[:16].replace("T", " ")
        rows.append([shown(each.path), each.kind, *map(shown, what), size, written, shown(each.error)])
    broken = any(each.error is not None for each in found)
    columns = ["file", "is", "method", "requests", "alpha", "weights", "model", "size", "written, UTC"]
    screen = screen_for(options)
    if rows:
        screen.table("edits", [*columns, *(["cannot be opened"] * broken)], rows if broken else [r[:-1] for r in rows])
    else:
        screen.say("kt: no edits here; kt apply-edit writes them, kt edits ls FOLDER looks elsewhere")
    write_result(options, {"edits": [each.as_dict() for each in found]})


def show(options: EditsOptions) -> None:
    """What a file holds; with a model, whether its weights are the edit's."""
    from ..editing import Edit
    from ..editing.stack_file import open_edit

    path = (options.files or [])[0]
    found = open_edit(path)
    model = load_model(options) if options.model else None
    screen = screen_for(options)
    if not isinstance(found, Edit):
        return show_stack(options, screen, path, found, model)
    states = found.state_of(model) if model is not None else {}
    about = about_edit(path, found)
    screen.table("edit", ["", ""], [[name, shown(value)] for name, value in about.items()])
    settings = found.manifest.get("hyper_parameters") or {}
    screen.table("hyper-parameters", ["name", "value"], [[shown(n), setting(v)] for n, v in settings.items()])
    show_requests(screen, found)
    weights = about_weights(found, states)
    columns = ["weight", "shape", "rank", "norm", "relative", "before", "after", *(["now"] if states else [])]
    screen.table("weights", columns, weight_rows(weights))
    result = about | {"hyper_parameters": settings, "requests": [vars(r) for r in found.report], "weights": weights}
    if model is not None and "other" in states.values() and found.manifest.get("stands_on"):
        screen.say("kt: the edit stands on earlier ones (stands_on); hold the stack of them against the model")
    write_result(options, result)
    return None


def about_edit(path: Path, edit: Edit) -> dict[str, Any]:
    """What the manifest says of the whole."""
    held = edit.manifest
    statistics = held.get("statistics") or {}
    return {
        "file": str(path),
        "digest": edit.digest,
        "digest_verified": True,  # the file does not open otherwise
        **{name: held.get(name) for name in ("method", "alpha", "model", "revision", "dtype", "seed", "stands_on")},
        "requests_n": len(edit.requests),
        "statistics": {name: statistics.get(name) for name in ("corpus", "n_tokens")},
        "lost_to_rounding": held.get("lost_to_rounding"),
        "versions": held.get("versions"),
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


def show_requests(screen: Screen, edit: Edit) -> None:
    """Target and old answer before and after; without a report, what was asked for."""
    from .edit import arrow

    side = lambda said, prob, rank: [shown(said), arrow(prob), arrow(rank)]  # noqa: E731
    columns = ["prompt", "target", "prob", "rank", "old answer", "prob", "rank"]
    rows = [
        [shown(r.prompt), *side(r.target, r.target_prob, r.target_rank), *side(r.answer, r.answer_prob, r.answer_rank)]
        for r in edit.report
    ]
    screen.table("requests, before and after", columns, rows)


def compare(options: EditsOptions) -> None:
    """What differs between two files."""
    from ..editing import Edit
    from ..editing.diff import diff
    from ..editing.stack_file import open_edit

    first, second = (options.files or [])[:2]
    opened: list[Edit | EditStack] = [open_edit(first), open_edit(second)]
    found = diff(*(each if isinstance(each, Edit) else each.as_sum() for each in opened))
    show_diff(screen_for(options), found)
    write_result(options, {"first": str(first), "second": str(second), **found.as_dict()})


def show_diff(screen: Screen, found: EditDiff) -> None:
    """Settings, requests, weights; A is the first file."""
    if not found.same_base:
        screen.say(
            "kt: where both write, they were solved for other weights: of two models, or one on top of the other"
        )
    settings = [[shown(name), *map(setting, pair)] for name, pair in found.settings.items()]
    screen.table("settings that differ", ["name", "A", "B"], settings)
    words = {"only A": found.only(0), "only B": found.only(1), "other target": found.conflicts, "both": found.both}
    rows = [[word, shown(r.prompt), *map(shown, r.targets)] for word, some in words.items() for r in some]
    counts = ", ".join(f"{word} {len(some)}" for word, some in words.items())
    screen.table("requests", ["in", "prompt", "A's target", "B's target"], rows, counts)
    weights = [[shown(w.name), *w.norms, w.cosine, w.difference] for w in found.weights]
    screen.table("weights", ["weight", "|A|", "|B|", "cosine", "|A - B| / |A|"], weights)


def setting(value: Any) -> Any:
    """A hyper-parameter as a user types it: every digit that it has."""
    return f"{value:g}" if isinstance(value, float) else shown(value)


def shown(value: Any, limit: int = 160) -> Any:
    """A cell from a file's text: control characters made visible, long ones cut; numbers as they are."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, dict):
        value = ", ".join(f"{name} {item}" for name, item in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return clip(visible(str(value)), limit)
