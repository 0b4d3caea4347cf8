"""Every method on the demo model: 1, 10 and 100 edits, what they do and what they cost.

    python benchmarks/quality/methods.py  # all, an hour; goes on where docs/data/demo-methods.json ends
    python benchmarks/quality/methods.py --table  # the table of docs/data/demo-methods.md, from that file

Settings are the winners of tune_methods.py, found on other facts. One edit at a time is the mean over
`SINGLES` facts, each edited on the unedited model. Each row is its own process: CPU seconds are of solving alone (the
second moments are in the cache), peak memory is that of the process after solving and before scoring; beside it stands
by how much it is more than after a first edit of two facts.
"""

from __future__ import annotations

import itertools
import json
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from rows import run

ROOT = Path(__file__).parents[2]
OUT, TUNED = ROOT / "docs" / "data" / "demo-methods.json", ROOT / "docs" / "data" / "demo-tuning.json"
SIZES, SINGLES, MAX_TOKENS = (1, 10, 100), 20, 40_000
METRICS = {
    "success": "edit_success_tf_exact",
    "paraphrase": "paraphrase_tf_exact",
    "locality": "neighbourhood_same_argmax",
    "portability": "portability_tf_exact",
    "fluency": "fluency_ngram_entropy_gen",
}


def setting_of(method: str) -> dict[str, Any]:
    """The best setting of the tuning grid; the first of equals. None of a method that was not tuned: its defaults."""
    tuned = json.loads(TUNED.read_text(encoding="utf-8")).get(method, [{"score": 0.0, "setting": {}}])
    return max(tuned, key=lambda row: row["score"])["setting"]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(method: str, size: int) -> list[dict[str, Any]]:
    """One method at one number of edits: its row, and that of its control where it has one."""
    import torch
    from tune_methods import usable

    import kt
    from kt.demo.loop import spread
    from kt.evaluation import Scores

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = kt.load("demo")
    facts = spread(usable(), SINGLES if size == 1 else size)
    groups = [[fact] for fact in facts] if size == 1 else [facts]
    about: dict[str, Any] = {"method": method, "edits": size}
    before = unedited(model, facts)
    if method == "unedited":
        return [about | metrics_of(kt.evaluate(model, facts, before=before))]
    setting = setting_of(method)
    kt.edit(model, groups[0][:2], method=method, max_tokens=MAX_TOKENS, **setting)  # fills the cache, loads the code
    held = peak_mib()  # with the model, its scores, and the code of one small edit
    edits, failed, seconds = [], "", time.process_time()
    for group in groups:
        try:
            edits.append(kt.edit(model, group, method=method, max_tokens=MAX_TOKENS, **setting))
        except kt.KtError as error:
            edits.append(None)
            failed = str(error)
    seconds = (time.process_time() - seconds) / len(groups)
    cost = {"cpu_seconds": seconds, "peak_mib": peak_mib(), "held_mib": held, "setting": setting}
    about |= cost | ({"failed": f"{edits.count(None)} of {len(edits)}: {failed}"} if None in edits else {})
    after: list[Scores] = []
    controls: list[Scores] = []
    for group, edit in zip(groups, edits, strict=True):
        control = None if edit is None else edit.control()
        for part, scores in ((edit, after), (control, controls)):
            if part is not None:
                with part.applied(model):
                    scores.append(kt.evaluate(model, group, before=before))
    rows = [about | (metrics_of(Scores.joined(after)) if after else {})]
    if controls:
        rows.append({"method": f"{method}: MLP alone", "edits": size} | metrics_of(Scores.joined(controls)))
    return rows


def unedited(model: Any, facts: list[Any]) -> Any:
    """The unedited model's scores: the same for every method, so kept beside the other temporary files."""
    import kt

    path = Path(tempfile.gettempdir()) / f"kt-unedited-{len(facts)}-{model.fingerprint()[:16]}.json"
    if not path.exists():
        kt.evaluate(model, facts).save(path)
    return kt.Scores.load(path)


def metrics_of(scores: Any) -> dict[str, Any]:
    return {name: scores.metrics[m].as_dict() for name, m in METRICS.items() if m in scores.metrics}


def cell(value: dict[str, Any]) -> str:
    """Mean and interval; rounding leaves no minus zero."""
    mean, low, high = (f"{round(v, 2) + 0.0:.2f}" for v in (value["mean"], *value["ci95"]))
    return f"{mean} [{low}, {high}]"


def table(path: Path) -> str:
    """Markdown: mean and 95% interval over records."""
    head = ["method", "edits", *METRICS, "CPU s an edit", "peak MiB"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    rows = json.loads(path.read_text(encoding="utf-8"))
    order = all_methods()
    for each in sorted(rows, key=lambda r: (r["edits"], order.index(r["method"].split(":")[0]))):
        cells = [each["method"], str(each["edits"])]
        for name in METRICS:
            cells.append(cell(each[name]) if name in each else "–")
        seconds, peak = each.get("cpu_seconds"), each.get("peak_mib")
        cells.append("–" if seconds is None else f"{seconds / max(1, each['edits']):.2f}")
        cells.append("–" if peak is None else f"{peak:.0f} (+{peak - each['held_mib']:.0f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def all_methods() -> list[str]:
    """The unedited model, then all methods in the order of the table: batched closed forms, ROME's family, the rest."""
    from kt.editing.methods import METHODS

    first = ("memit", "intattn", "alphaedit", "emmet", "pmet", "jeep")
    learned = [name for name, config in METHODS.items() if "editor" in config.settings()]  # editors.py measures them
    return [name for name in dict.fromkeys(("unedited", *first, *METHODS)) if name not in learned]


def shown(each: dict[str, Any], size: int) -> str:
    means = "  ".join(f"{name} {each[name]['mean']:.2f}" for name in METRICS if name in each)
    return f"{each['method']:<24}{size:>4}  {means}"


if __name__ == "__main__":
    run(
        __file__,
        __doc__,
        row=row,
        table=table,
        jobs=itertools.product,
        methods=all_methods,
        sizes=SIZES,
        out=OUT,
        shown=shown,
        indent=1,
    )
