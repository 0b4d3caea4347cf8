"""What attribution patching saves on the demo model, and how far its estimates can be trusted.

    python benchmarks/speed/screen_speed.py  # 20 facts, both directions: some two minutes; docs/data/screen.json
    python benchmarks/speed/screen_speed.py --facts 5

For each direction in one process, on one thread: CPU seconds of the estimate, of patching the 20 cells of each fact
that it ranks highest, and of the whole exact map; Spearman's rank correlation of estimate and exact map over the cells
of a fact, by kind, as a mean over facts with its 95% bootstrap interval; the share of each fact's 20 truly largest
cells that the estimate found; and the cells where the two differ most.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kt
from kt.demo.loop import spread
from kt.tracing.screen import Screen, screen

KINDS = ("mlp", "attn", "hidden")
LARGE = 0.2
"""Of the logit difference between the clean and the corrupted run (eq. 8): an effect worth finding."""

OUT = Path(__file__).parents[2] / "docs" / "data" / "screen.json"
GOAL = 10.0


def failures(found: Screen) -> dict[str, Any]:
    """How often an estimate misses a large effect, and the cells where it is farthest off."""
    table = found.to_dataframe()
    guess, truth = table["estimate"], table["exact"]
    large = truth.abs() >= LARGE
    wrong_sign = large & (guess * truth < 0)
    groups = {
        "large_cells": large,
        "wrong_sign": wrong_sign,
        "less_than_half": large & ~wrong_sign & (guess.abs() < truth.abs() / 2),
        "more_than_twice": (guess.abs() >= LARGE) & (guess.abs() > 2 * truth.abs()),
    }
    texts = {fact.index: (fact.prompt, fact.tokens) for fact in found.estimate.facts}
    worst = table.assign(off=(guess - truth).abs()).nlargest(8, "off")
    cells = [
        {
            "cell": f"{row.kind}.{row.layer}",
            "role": row.role,
            "token": texts[row.fact][1][row.token],
            "prompt": texts[row.fact][0],
            "estimate": round(row.estimate, 3),
            "exact": round(row.exact, 3),
        }
        for row in worst.itertuples()
    ]
    return {name: int(cells.sum()) for name, cells in groups.items()} | {"worst": cells}


def measured(found: Screen, direction: str, samples: int) -> dict[str, Any]:
    """One row of the report."""
    seconds = {name: round(float(value or 0), 2) for name, value in found.seconds.items()}
    correlations = {kind: found.correlation_of(kind).as_dict() for kind in found.estimate.kinds}
    return {
        "direction": direction,
        "facts": len(found.pairs),
        "samples": samples,
        "cells": int(sum(f.effect(k, found.metric).size for f, _ in found.pairs for k in found.estimate.kinds)),
        "cpu_s": seconds,
        "exact_over_estimate": round(seconds["exact"] / seconds["estimate"], 1),
        "spearman": {"all": (found.correlation or found.correlation_checked).as_dict()} | correlations,
        "spearman_screened_cells": found.correlation_checked.as_dict(),
        f"recall_at_{found.top}": found.recall.as_dict() if found.recall else None,
    } | failures(found)


def tables(rows: Sequence[dict[str, Any]], top: int) -> str:
    """Markdown."""
    kinds = list(rows[0]["spearman"])
    head = ["direction", "estimate, s", f"top {top} exact, s", "all exact, s", "ratio", *kinds, f"top {top} found"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        times = [f"{row['cpu_s'][name]:.2f}" for name in ("estimate", "exact_top", "exact")]
        means = [said(row["spearman"][kind]) for kind in kinds]
        lines.append([row["direction"], *times, f"{row['exact_over_estimate']}", *means, said(row[f"recall_at_{top}"])])
    counts = {"large_cells": f"effects of {LARGE:g} or more", "less_than_half": "estimated at less than half"}
    counts |= {"more_than_twice": "at more than twice", "wrong_sign": "with the wrong sign"}
    off = [["direction", *counts.values()], ["---"] * (len(counts) + 1)]
    off += [[row["direction"], *(str(row[name]) for name in counts)] for row in rows]
    head = ["direction", "cell", "role", "token", "prompt", "estimate", "exact"]
    worst = [head, ["---"] * len(head)]
    for row in rows:
        for cell in row["worst"]:
            worst.append([row["direction"], *(str(cell[name]) for name in head[1:])])
    return "\n\n".join("\n".join("| " + " | ".join(line) + " |" for line in table) for table in (lines, off, worst))


def said(mean: dict[str, Any]) -> str:
    low, high = mean["ci95"] or (np.nan, np.nan)
    return f"{mean['mean']:.2f} [{low:.2f}, {high:.2f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print the file as tables, and stop")
    chosen = parser.parse_args()
    if chosen.table:
        rows = json.loads(chosen.out.read_text())["runs"]
        sys.stdout.write(tables(rows, chosen.top) + "\n")
        return 0
    torch.set_num_threads(1)
    model, facts = kt.load("demo"), spread(kt.load_facts("demo"), chosen.facts)
    screen(model, facts[:1], KINDS, top=1, check=True, samples=1)  # what is loaded on first use is no part of either
    rows = []
    for direction in ("denoise", "noise"):
        found = screen(model, facts, KINDS, chosen.top, check=True, samples=chosen.samples, direction=direction)
        rows.append(measured(found, direction, chosen.samples))
    chosen.out.write_text(json.dumps({"model": "demo", "metric": "logit_diff", "runs": rows}, indent=2) + "\n")
    sys.stdout.write(tables(rows, chosen.top) + "\n")
    return 0 if all(row["exact_over_estimate"] >= GOAL for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
