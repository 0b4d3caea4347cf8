"""Several edits together on the command line: `kt edits stack`, and the earlier edits of `kt apply-edit --history`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import check_writable
from ..cells import interval
from ..figures.text import visible
from .command import BadOption
from .console import Screen
from .session import load_model, screen_for, write_result

if TYPE_CHECKING:
    from ..editing.conflicts import Conflict
    from ..editing.stack import EditStack
    from ..facts.fact import Fact
    from ..model import TracedModel
    from .edits import EditsOptions

MOST_ROWS = 20
WORDS = {"target": "other target", "same": "there already", "keys": "close keys"}


def stack(options: EditsOptions) -> None:
    """Check that edits fit on each other, look for conflicts, and read back every request with all of them in."""
    if not options.files:
        raise BadOption("kt edits stack needs edit files: kt edits stack a.safetensors b.safetensors -m MODEL")
    if options.to is not None:
        check_writable(options.to)
    found = open_stack(options.files, options.force)
    for word in (options.remove or "").split(",") if options.remove is not None else []:
        found.remove(place_of(found, word.strip()), options.force)
    model = load_model(replace(options, model=options.model or "demo"))
    screen = screen_for(options)
    found = found.for_model(model, options.force)
    grounds = found.grounds(model)
    met = conflicts_inside(model, found)
    show_conflicts(screen, [conflict for _, conflict in met], found)
    requests = read_back(model, found)
    show_layers(screen, found, grounds)
    show_back(screen, requests)
    if options.to is not None:
        found.save(options.to)
        screen.say(f"kt: written to {visible(str(options.to))}")
    result = as_json(found, grounds) | {
        "conflicts": [{"place": place, **vars(conflict)} for place, conflict in met],
        "requests": requests,
        "held": held(requests),
        "path": None if options.to is None else str(options.to),
    }
    write_result(options, result)


def open_stack(files: Iterable[str | Path], force: bool = False) -> EditStack:
    """Edit files and stacks, in order, as one stack."""
    from ..editing.stack import EditStack
    from ..editing.stack_file import open_edit

    found = EditStack()
    for file in map(Path, files):
        opened = open_edit(file)
        if isinstance(opened, EditStack):
            for layer in opened.layers:
                found.push(layer.edit, layer.file, layer.forced)
        else:
            found.push(opened, file)
    return found


def place_of(found: EditStack, word: str) -> int:
    """The place that `--remove` means: itself, or an edit's file."""
    places = [at for at, e in enumerate(found.layers, 1) if e.file is not None and Path(word) == e.file]
    if not places and word.isascii() and word.isdigit() and 1 <= int(word) <= len(found):
        return int(word)
    if not places:
        known = ", ".join(f"{at} ({layer.name})" for at, layer in enumerate(found.layers, start=1)) or "nothing"
        raise BadOption(f"--remove {word!r}: the stack has no such edit; it holds {known}")
    return places[0]


def conflicts_inside(model: TracedModel, found: EditStack) -> list[tuple[int, Conflict]]:
    """Every edit's requests against those of the edits below it, with the upper one's place."""
    from ..editing.conflicts import conflicts
    from ..editing.layers import facts_of

    above = range(1, len(found))
    return [(at + 1, c) for at in above for c in conflicts(model, facts_of([found.edits[at]]), found.edits[:at])]


def read_back(model: TracedModel, found: EditStack) -> list[dict[str, Any]]:
    """Every request with all edits in: the target's probability and rank, beside those when it was solved."""
    from ..editing.layers import facts_of
    from ..editing.readings import readings

    rows = []
    with found.applied(model):
        for place, edit in enumerate(found.edits, start=1):
            facts = facts_of([edit])
            solved = list(edit.report) if len(edit.report) == len(facts) else [None] * len(facts)
            for fact, said, alone in zip(facts, readings(model, facts), solved, strict=True):
                rows.append({
                    "place": place,
                    "id": fact.id,
                    "prompt": fact.prompt,
                    "target": fact.target,
                    "solved": None if alone is None else {"prob": alone.target_prob[1], "rank": alone.target_rank[1]},
                    "stacked": said.target._asdict(),
                })  # fmt: skip
    return rows


def held(requests: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the requests whose target came first when they were solved, the share of which it still does."""
    from ..stats import bootstrap_mean

    first = [row for row in requests if row["solved"] is not None and row["solved"]["rank"] == 0]
    return bootstrap_mean([float(row["stacked"]["rank"] == 0) for row in first]).as_dict() if first else None


def as_json(found: EditStack, grounds: Sequence[str] | None = None) -> dict[str, Any]:
    """The stack, an object an edit."""
    rows = []
    for place, layer in enumerate(found.layers, start=1):
        about = {name: layer.edit.manifest.get(name) for name in ("method", "alpha", "model", "dtype")}
        rows.append({
            "place": place,
            "file": None if layer.file is None else str(layer.file),
            "digest": layer.digest,
            **about,
            "requests": len(layer.edit.requests),
            "forced": layer.forced,
            "stands_on": found.stands_on(place),
            "solved_for": None if grounds is None else grounds[place - 1],
        })  # fmt: skip
    return {"edits": rows}


def show_layers(screen: Screen, found: EditStack, grounds: Sequence[str] | None) -> None:
    """A row an edit, the base's side first."""
    said = {"base": "the base", "below": "the edits below", "forced": "other weights (forced)"}
    rows = []
    for place, layer in enumerate(found.layers, start=1):
        on = ", ".join(map(str, found.stands_on(place))) or "the base"
        method, digest = visible(str(layer.edit.manifest.get("method"))), layer.digest[:12]
        ground = [] if grounds is None else [said[grounds[place - 1]]]
        rows.append(
            [place, visible(layer.name), method, len(layer.edit.requests), layer.edit.alpha, digest, on, *ground]
        )
    columns = ["place", "edit", "method", "requests", "alpha", "digest", "stands on"]
    screen.table("stack", [*columns, *(["solved for"] if grounds is not None else [])], rows)


def show_back(screen: Screen, requests: Sequence[dict[str, Any]]) -> None:
    """Whether each request is still there with the edits above it in."""
    rows = []
    for row in requests:
        solved = row["solved"] or {"prob": None, "rank": None}
        both = [solved["prob"], row["stacked"]["prob"], solved["rank"], row["stacked"]["rank"]]
        rows.append([row["place"], visible(row["prompt"]), visible(row["target"]), *both])
    share = held(requests)
    note = None
    if share is not None:
        note = f"first when solved and still first: {interval(share['mean'], share['ci95'])} of {share['n']}"
    columns = ["edit", "prompt", "target", "prob, solved", "prob, stacked", "rank, solved", "rank, stacked"]
    screen.table("requests, read back with the whole stack in", columns, rows, note)


def show_stack(options: EditsOptions, screen: Screen, path: Path, found: EditStack, model: TracedModel | None) -> None:
    """`kt edits show` of a stack."""
    grounds = None if model is None else found.for_model(model, options.force).grounds(model)
    screen.say(f"kt: {visible(str(path))} is a stack of {len(found)} edits")
    show_layers(screen, found, grounds)
    write_result(options, {"file": str(path), **as_json(found, grounds)})


def show_conflicts_with(
    screen: Screen, model: TracedModel, requests: Sequence[Fact], below: EditStack | None
) -> dict[str, Any]:
    """Where new requests meet earlier edits, shown before anything is solved; what the JSON says of it."""
    if below is None:
        return {}
    from ..editing.conflicts import conflicts

    below.grounds(model)  # what does not fit is refused before any work
    found = conflicts(model, requests, below.edits)
    show_conflicts(screen, found, below)
    digests = [layer.digest for layer in below.layers]
    return {"stands_on": digests, "conflicts": [vars(conflict) for conflict in found]}


def show_conflicts(screen: Screen, found: Sequence[Conflict], below: EditStack) -> None:
    """The conflicts, closest first; the JSON holds all of them."""
    if not found:
        screen.say("kt: no conflicts with the edits below")
        return
    order = sorted(found, key=lambda c: (c.what == "keys", -abs(c.overlap or 0)))
    rows = []
    for each in order[:MOST_ROWS]:
        edit = visible(below.layers[each.edit - 1].name)
        sides = [each.prompt, each.target, each.earlier_prompt, each.earlier_target]
        rows.append([WORDS[each.what], *map(visible, sides), edit, each.overlap])
    left = len(found) - len(rows)
    dense = any(each.measure == "cosine" for each in found)
    note = "overlap: of what the earlier request wrote, the share that the new prompt reads"
    note += "; of an edit that is kept dense, the cosine of the keys" if dense else ""
    note += f"; {left} more in --json" if left else ""
    columns = ["conflict", "new prompt", "target", "earlier prompt", "its target", "in", "overlap"]
    screen.table(f"conflicts with earlier edits: {len(found)}", columns, rows, note)
