"""Settings of every method for the demo model: a small grid each, scored on facts that no table uses.

    python benchmarks/quality/tune_methods.py  # all methods, into docs/data/demo-tuning.json; resumes
    python benchmarks/quality/tune_methods.py --methods ft,lora

One batch edit of thirty facts a setting. Its score is the harmonic mean of edit success, paraphrase and locality
(teacher-forced), as JEEP's Score; ties go to the setting tried first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import kt
from kt._util.files import atomic_write
from kt.demo.loop import spread
from kt.editing import METHODS
from kt.errors import KtError

N_TUNING, N_TABLE = 30, 100
SCORE = ("edit_success_tf_exact", "paraphrase_tf_exact", "neighbourhood_same_argmax")
ROME = {"layers": [[0], [1], [2]], "clamp_norm_factor": [1.5, 4.0]}
LATE = {"layers": [[1, 2, 3], [5, 6, 7]], "clamp_norm_factor": [1.5, 4.0]}
FT = {"lr": [5e-4, 2e-3, 5e-3], "layers": [[1], [3], [5]]}
GRIDS: dict[str, dict[str, list[Any]]] = {
    "memit": {"mom2_update_weight": [15.0, 50.0, 150.0], "clamp_norm_factor": [1.0, 1.5]},
    "intattn": {"alpha": [0.3], "mom2_update_weight": [15.0, 50.0, 150.0], "clamp_norm_factor": [1.0, 1.5]},
    "rome": ROME,
    "r-rome": ROME,
    "intattn-rome": {"alpha": [0.3], "layers": [[0], [1]], "layers_attn": [[0], [1]], "clamp_norm_factor": [4.0]},
    "pmet": {"mom2_update_weight": [15.0], "clamp_norm_factor": [1.5, 4.0], "v_weight_decay": [1e-3, 0.5]},
    "alphaedit": {"nullspace_threshold": [3e-3, 1e-2, 3e-2], "L2": [0.1, 0.5], "clamp_norm_factor": [1.0]},
    "emmet": {"emmet_lambda": [0.0, 0.1, 1.0], "clamp_norm_factor": [1.0]},
    "jeep": {
        "layers_high": [[4], [6]],
        "clamp_norm_factor_high": [0.75],
        "clamp_norm_factor": [1.0, 4.0],
        "v_weight_decay": [1e-3, 0.5],
        "v_weight_decay_high": [1e-3, 0.5],
    },
    "ultraedit": {"lr": [1e-4, 3e-4, 1e-3, 3e-3], "layers": [[5, 6, 7]]},
    "ft": FT,
    "ft-m": FT,
    "locft": FT,
    "crispedit": {"lr": [2e-3, 5e-3, 2e-2], "layers": [[1, 2, 3], [5]]},
    "memit-are": LATE | {"mom2_update_weight": [1.5, 15.0]},
    "alphaedit-are": LATE | {"nullspace_threshold": [3e-2, 3e-1], "L2": [5e-2]},
    "unke": {"layers": [[5], [6], [7]], "clamp_norm_factor": [1.5, 4.0], "num_steps": [50, 200]},
    "wise": ROME,
    "memoir": ROME,
    "ft-l": {"norm_constraint": [3e-3, 1e-2, 3e-2], "layers": [[1], [3]], "lr": [2e-3]},
    "ft-wd": {"lr": [2e-4, 1e-3, 3e-3], "weight_decay": [1e-3], "layers": [[1], [3]]},
    "lora": {"lr": [2e-3, 5e-3, 2e-2], "num_steps": [30, 70], "layers": [[1, 2, 3]]},
}


def usable() -> list[Any]:
    """Demo facts that every metric can be asked of."""
    return [f for f in kt.load_facts("demo") if f.foil and f.hops and f.rephrasings and f.neighbours]


def tuning_facts() -> list[Any]:
    """Thirty facts, evenly, of those in none of the tables (which take 1, 10, 100 or 200 evenly)."""
    facts = usable()
    taken = {f.id for n in (1, 10, 20, N_TABLE, 2 * N_TABLE) for f in spread(facts, n)}
    return spread([f for f in facts if f.id not in taken], N_TUNING)


def score(model: Any, facts: list[Any], before: Any, method: str, setting: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        edit = kt.edit(model, facts, method=method, max_tokens=40_000, **setting)
        with edit.applied(model):
            metrics = kt.evaluate(model, facts, before=before, generate=False).metrics
    except KtError as error:
        return {"error": str(error), "score": 0.0}
    parts = [metrics[name].mean for name in SCORE]
    mean = len(parts) / sum(1 / p for p in parts) if min(parts) > 0 else 0.0
    return dict(zip(SCORE, parts, strict=True)) | {"score": mean, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=Path("docs/data/demo-tuning.json"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, facts = kt.load("demo"), tuning_facts()
    before = kt.evaluate(model, facts, generate=False)
    for method in args.methods.split(","):
        grid = GRIDS.get(method, {})  # a method without a grid: its defaults
        for values in itertools.product(*grid.values()):
            setting = dict(zip(grid, values, strict=True))
            # Read again each time: two processes may share the file.
            table = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
            tried = table.setdefault(method, [])
            if any(row["setting"] == setting for row in tried):
                continue
            row = {"setting": setting} | score(model, facts, before, method, setting)
            table = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
            table.setdefault(method, []).append(row)
            atomic_write(args.out, json.dumps(table, indent=1, ensure_ascii=False) + "\n")
            sys.stdout.write(f"{method:<13} {row['score']:.3f} {setting}\n")
            sys.stdout.flush()
        best = max(json.loads(args.out.read_text(encoding="utf-8"))[method], key=lambda row: row["score"])
        sys.stdout.write(f"best of {method}: {best}\n")


if __name__ == "__main__":
    main()
