"""Run folders as one HTML page: a section for each result that lies in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._util.data import complete_file, read_json
from ..editing import Edit
from ..evaluation import Scores
from ..experiments.sequence import Steps
from ..probing import Probe
from ..residual import Residual
from ..residual.show import attack_lines
from ..runs.folder import FILES, MANIFEST
from ..runs.provenance import versions
from ..tracing import Balance, Trace
from . import Card, Figure, Section, Table, Text, build

Block = Text | Table | Figure
METRICS = {"prob": "probability", "logit_diff": "logit difference"}


def write_report(folders: Sequence[str | Path], out: str | Path, title: str = "kt report") -> Path:
    """Draw every result in the folders, in the order of the loop: trace, balance, edit, scores."""
    sections: list[Section] = []
    cards: list[Card] = []
    for folder in map(Path, folders):
        name = f"{folder.name}: " if len(folders) > 1 else ""
        for file, draw in DRAWERS.items():
            if (folder / file).exists():
                with complete_file(folder / file, "result of kt", "run its command again"):
                    found, headline = draw(folder / file)
                sections += [Section(name + s.title, s.blocks) for s in found]
                cards += [Card(name + c.name, c.value, c.note, c.digits) for c in headline]
    return build(title, sections, out, meta=_meta([Path(f) for f in folders]), summary=cards)


def _meta(folders: Sequence[Path]) -> dict[str, Any]:
    """What the runs were: from their manifests, which a run that is being written does not have yet."""
    about: dict[str, Any] = {}
    for folder in folders:
        if (folder / MANIFEST).exists():
            manifest = read_json(folder / MANIFEST)
            with complete_file(folder / MANIFEST, "manifest", "run the command again"):
                about[folder.name] = " ".join(manifest["command_line"])
    return about | {f"{name} version": version for name, version in versions().items()}


def draw_trace(path: Path) -> tuple[list[Section], list[Card]]:
    """Figure 1 for each metric, and Figure 2."""
    trace = Trace.load(path)
    blocks: list[Block] = [
        Text(
            f"{trace.n_facts} facts traced; {trace.why_left_out()}. Each cell restores one clean state in the "
            "corrupted run and shows how much of the answer comes back."
        )
    ]
    for metric in trace.metrics:
        blocks.append(Figure(trace.heatmaps(metric), f"Effect on the {METRICS[metric]}, tokens down, layers across."))
    blocks.append(Figure(trace.curves(), "By layer at the last subject token, with 95% intervals over facts."))
    return [Section("Causal tracing", blocks)], [Card("facts traced", trace.n_facts)]


def draw_balance(path: Path) -> tuple[list[Section], list[Card]]:
    """α with its interval, and the layers it comes from."""
    balance = Balance.load(path)
    low, high = balance.ci95 or (None, None)
    rows = [[name, sum(values), list(balance.layers[name])] for name, values in balance.per_layer.items()]
    blocks: list[Block] = [
        Figure(balance.figure(), "What each layer adds to the two sums of eq. 12, and the layers it proposes."),
        Table(["module", "sum over layers", "layers"], rows),
        *(Text(warning) for warning in balance.warnings),
    ]
    note = f"{low:.3f} to {high:.3f}, n = {balance.n_facts}" if low is not None else f"n = {balance.n_facts}"
    return [Section("Balance factor", blocks)], [Card("α, attention's share", balance.alpha, note)]


def draw_probe(path: Path) -> tuple[list[Section], list[Card]]:
    """Figure 2 of JEEP, the stages, and word sets where there are some."""
    probe = Probe.load(path)
    stages = probe.stages
    rows = [
        [s.name, list(s.layers) or "none", s.gain if s.found else s.reason]
        for s in (stages.enrichment, stages.extraction, stages.promotion)
    ]
    norm = "through the final norm" if probe.metadata["final_norm"] else "without the final norm"
    blocks: list[Block] = [
        Text(f"{probe.n_facts} facts, read {norm}; {probe.why_left_out()}. Rank 0 is the top of the vocabulary."),
        Figure(probe.figure(), "The residual stream: means over facts with 95% intervals; stages shaded."),
        Table(["stage", "layers", "gain"], rows, "Stages of recall (JEEP, section 4.1), by a written rule."),
    ]
    if probe.set_names:
        blocks.append(Figure(probe.sets_figure(), "Mean probability of a token of each word set (JEEP, Figure 5)."))
    return [Section("Contrast probe", blocks)], []


def draw_residual(path: Path) -> tuple[list[Section], list[Card]]:
    """What an edit left of the old facts: the lens before and after, the score, the attacks."""
    residual = Residual.load(path)
    left = [
        [kind, place, r.score, r.before.mean, r.after.mean]
        for kind, places in residual.by_kind.items()
        for place, r in places.items()
    ]
    lines = attack_lines(residual)
    compared = [
        ["residual score", residual.score],
        ["of what was never learnt", residual.floor],
        ["difference", residual.above_floor],
    ]
    blocks: list[Block] = [
        Text(
            f"{len(residual.facts)} facts; {residual.why_left_out()}. The score is the share of the old answer's lead "
            "over other answers of its relation that the edit left: 1 is all of it, 0 none."
        ),
        Figure(residual.figure(), "Rank at the prediction position, before and after the edit."),
        Table(["", "share of the lead"], compared, "An answer that was never true shows what is merely common."),
        Table(["kind", "position", "residual score", "advantage before", "after"], left, "Where it is left."),
        Table(
            ["prompt", "old answer", "a third, named alike", "difference"],
            [[line.attack, line.old, line.third, line.excess] for line in lines],
            "Share of facts on which it is more probable than the new answer after the edit.",
        ),
        Table(
            ["prompt", "before the edit", "after"],
            [[line.attack, line.lead_before, line.lead] for line in lines],
            "The old answer's lead over a third one, ln P(old)/P(third), in nats.",
        ),
    ]
    low, high = residual.score.ci95 or (None, None)
    note = f"{low:.3f} to {high:.3f}, n = {residual.score.n}" if low is not None else f"n = {residual.score.n}"
    return [Section("What is left of the old facts", blocks)], [Card("residual score", residual.score.mean, note)]


def draw_edit(path: Path) -> tuple[list[Section], list[Card]]:
    """A row a request, a row a weight."""
    edit = Edit.load(path)
    columns = ["prompt", "target", "prob before", "after", "old answer", "prob before", "after"]
    requests = []
    for r in edit.report:
        requests.append([r.prompt, r.target, *r.target_prob, r.answer, *(r.answer_prob or (None, None))])
    weights = [[n, d["shape"], d["rank"], d["norm"], d["relative_norm"]] for n, d in edit.deltas().items()]
    blocks: list[Block] = [
        Figure(edit.figure(), "Means over requests with 95% intervals."),
        Table(columns, requests, "Probability of the new and of the old answer."),
        Table(["weight", "shape", "rank", "norm", "relative to the weight"], weights, "What was written."),
    ]
    return [Section(f"Edit: {edit.manifest.get('method')}", blocks)], [Card("facts edited", len(edit.report))]


def draw_scores(path: Path) -> tuple[list[Section], list[Card]]:
    """Every metric with n and interval, beside the unedited model's where that was measured."""
    after = Scores.load(path)
    beside = path.with_name(FILES["before"])
    before = Scores.load(beside) if beside.exists() else None
    held = path.with_name(FILES["control"])
    control = Scores.load(held) if held.exists() else None
    columns = ["metric", "before", "after"] if before else ["metric", "mean"]
    columns += ["MLP alone"] if control else []
    rows = []
    for name, metric in after.metrics.items():
        old, rest = ([s.metrics.get(name)] if s else [] for s in (before, control))
        rows.append([name, *old, metric, *rest])
    protocol = Table(["name", "what it is"], [[n, says] for n, says in after.protocol.items()], "How it was measured.")
    title = "Before and after" if before else "Scores"
    note = "MLP alone: the joint edit's MLP part by itself, scaled by 1 - α as in it." if control else ""
    return [Section(title, [Table(columns, rows, note), protocol])], []


def draw_steps(path: Path) -> tuple[list[Section], list[Card]]:
    """Scores and weight norms by number of edits."""
    steps = Steps.load(path)
    says = "Requests so far under each step's weights; the largest weight norm, over that before the first edit."
    return [Section(f"Edits in steps: {steps.mode}", [Figure(steps.figure(), says)])], []


def draw_abilities(path: Path) -> tuple[list[Section], list[Card]]:
    """What the edit did to tasks that have nothing to do with it."""
    from ..capability import Abilities

    return [Section("General abilities", [Abilities.load(path).report_table()])], []


def draw_case(path: Path) -> tuple[list[Section], list[Card]]:
    """One record under several edits."""
    from ..experiments.case_study import CaseStudy

    return [Section("A case", [CaseStudy.load(path).report_table()])], []


DRAWERS: dict[str, Callable[[Path], tuple[list[Section], list[Card]]]] = {
    FILES["trace"]: draw_trace,
    FILES["balance"]: draw_balance,
    FILES["probe"]: draw_probe,
    FILES["edit"]: draw_edit,
    FILES["steps"]: draw_steps,
    FILES["after"]: draw_scores,
    FILES["residual"]: draw_residual,
    FILES["abilities"]: draw_abilities,
    FILES["case"]: draw_case,
}
