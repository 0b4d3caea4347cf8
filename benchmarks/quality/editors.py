"""Trained editors on the demo model's held-out facts: 1, 10, 100 and all edits at once, beside fine-tuning and MEMIT.

    kt train-editor --out runs/malmen ...   # docs/train-editor.md has both commands
    python benchmarks/quality/editors.py malmen=runs/malmen mend=runs/mend
    python benchmarks/quality/editors.py --table  # the table of docs/data/editors.md, from docs/data/editors.json

Facts are those whose subjects the editors were not trained on (their seed and share; all editors need the same). One
edit at a time is the mean over `SINGLES` facts, each edited on the unedited model.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[2] / "docs" / "data" / "editors.json"
SIZES, SINGLES, MAX_TOKENS = (1, 10, 100), 20, 40_000
METRICS = {
    "success": "edit_success_tf_exact",
    "paraphrase": "paraphrase_tf_exact",
    "locality": "neighbourhood_same_argmax",
}
BESIDE: dict[str, dict[str, Any]] = {"ft": {}, "ft-m": {}, "memit": {"max_tokens": MAX_TOKENS}}


def measured(given: dict[str, str]) -> list[dict[str, Any]]:
    """A row a method and number of edits."""
    import kt
    from kt.editing.hyper.train import split_records
    from kt.evaluation import Scores

    warnings.simplefilter("ignore")
    model = kt.load("demo")
    methods = dict(BESIDE)
    for name, run in given.items():
        path = Path(run) / "editor.safetensors"
        methods[name] = {"editor": path}
        told = kt.Editor.load(path).manifest
    facts = split_records(model, kt.load_facts("demo"), told["settings"]["held_out"], told["seed"]).held_out
    rows = []
    for size in SIZES:
        count = size or len(facts)
        if count > len(facts):
            continue
        some = facts[:: len(facts) // (SINGLES if size == 1 else count)][: SINGLES if size == 1 else count]
        groups = [[fact] for fact in some] if size == 1 else [some]
        before = kt.evaluate(model, some, protocols=("tf",))
        for method, options in methods.items():
            seconds, scores = 0.0, []
            for group in groups:
                start = time.process_time()
                edit = kt.edit(model, group, method, check=False, **options)
                seconds += time.process_time() - start
                with edit.applied(model):
                    scores.append(kt.evaluate(model, group, protocols=("tf",), before=before))
            metrics = Scores.joined(scores).metrics
            found = {name: metrics[metric].as_dict() for name, metric in METRICS.items()}
            rows.append({"method": method, "edits": count, "cpu_seconds": seconds / len(groups), **found})
            sys.stdout.write(line(rows[-1]) + "\n")
            sys.stdout.flush()
    return rows


def line(row: dict[str, Any]) -> str:
    cells = [f"{row[n]['mean']:.2f} [{row[n]['ci95'][0]:.2f}, {row[n]['ci95'][1]:.2f}]" for n in METRICS]
    return f"| {row['edits']} | {row['method']} | " + " | ".join([*cells, f"{row['cpu_seconds']:.2f}"]) + " |"


def table() -> str:
    """Markdown: mean and 95% interval over records."""
    head = f"| edits | method | {' | '.join(METRICS)} | CPU s |\n| --- | --- |{' --- |' * (len(METRICS) + 1)}\n"
    return head + "\n".join(map(line, json.loads(OUT.read_text(encoding="utf-8")))) + "\n"


if __name__ == "__main__":
    if "--table" in sys.argv[1:]:
        sys.stdout.write(table())
    else:
        rows = measured(dict(part.split("=", 1) for part in sys.argv[1:]))
        OUT.write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")
