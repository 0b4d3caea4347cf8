"""Trained editors on the demo model's held-out facts: 1, 10 and 100 edits at once, beside fine-tuning and MEMIT.

    python benchmarks/quality/editors.py malmen=RUN mend=RUN  # folders that hold an editor.safetensors; prints rows

Facts are those whose subjects the editors were not trained on (their seed and share; all editors need the same). The
checks that choose when a training stops read some of the same facts. One edit at a time is the mean over `SINGLES`
facts, each edited on the unedited model.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

SIZES, SINGLES, MAX_TOKENS = (1, 10, 100), 20, 40_000
METRICS = {
    "success": "edit_success_tf_exact",
    "paraphrase": "paraphrase_tf_exact",
    "locality": "neighbourhood_same_argmax",
}
BESIDE: dict[str, dict[str, Any]] = {"ft": {}, "ft-m": {}, "memit": {"max_tokens": MAX_TOKENS}}


def measured(given: dict[str, str]) -> None:
    """Print a row a method and number of edits."""
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
    for size in SIZES:
        count = SINGLES if size == 1 else size
        some = facts[:: len(facts) // count][:count]
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
            row = {"method": method, "edits": size, "cpu_seconds": seconds / len(groups), **found}
            sys.stdout.write(line(row) + "\n")
            sys.stdout.flush()


def line(row: dict[str, Any]) -> str:
    cells = [f"{row[n]['mean']:.2f} [{row[n]['ci95'][0]:.2f}, {row[n]['ci95'][1]:.2f}]" for n in METRICS]
    return f"| {row['edits']} | {row['method']} | " + " | ".join([*cells, f"{row['cpu_seconds']:.2f}"]) + " |"


if __name__ == "__main__":
    measured(dict(part.split("=", 1) for part in sys.argv[1:]))
