"""200 edits in steps of ten: what becomes of earlier edits, with and without history and a norm guard (kt's own, NAS).

    python benchmarks/quality/sequential.py  # all runs, an hour; goes on where docs/data/sequential.json ends
    python benchmarks/quality/sequential.py --figures  # a figure a method in docs, and the table

Settings are the winners of tune_methods.py. After every step all requests so far are scored, teacher-forced.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kt.experiments.sequence import Steps

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "sequential.json"
EDITS, STEP = 200, 10
VARIANTS = {
    "": {"keep_history": False},
    " + history": {"keep_history": True},
    " + norm guard": {"keep_history": False, "norm_guard": True},
    " + both": {"keep_history": True, "norm_guard": True},
    " + NAS": {"keep_history": False, "norm_guard": "nas"},
    " + history + NAS": {"keep_history": True, "norm_guard": "nas"},
}
METHODS = ("memit", "alphaedit", "intattn")


def run(label: str, edits: int = EDITS) -> dict[str, object]:
    import torch
    from methods import MAX_TOKENS, setting_of
    from tune_methods import usable

    import kt
    from kt.demo.loop import spread
    from kt.experiments.sequence import SHOWN, run_edits

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    method = label.split(" ")[0]
    options = VARIANTS[label.removeprefix(method)] | setting_of(method)
    found = run_edits(
        kt.load("demo"), spread(usable(), EDITS)[:edits], "sequential", STEP, "step", label=label, method=method,
        max_tokens=MAX_TOKENS, **options,
    )  # fmt: skip
    held = found.steps.as_dict()
    for step in held["steps"]:  # what is drawn
        step["metrics"] = {name: step["metrics"][name] for name in SHOWN}
    return held


def load(path: Path) -> dict[str, dict[str, object]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def courses(path: Path) -> dict[str, Steps]:
    """Every run's steps by its label."""
    from kt.experiments.sequence import Steps

    return {label: Steps.of(held) for label, held in load(path).items()}


def draw(path: Path) -> None:
    """One figure a method."""
    from kt.experiments.sequence import steps_figure
    from kt.figures import write_figure

    runs = courses(path)
    for method in METHODS:
        own = {label: steps for label, steps in runs.items() if label.split(" ")[0] == method}
        if own:
            title = f"{method}: {EDITS} sequential edits in steps of {STEP}"
            figure = steps_figure(own, title, "all requests so far, teacher-forced, demo model")
            write_figure(figure, png=ROOT / "docs" / f"sequential-{method}.png", scale=1.4)


def table(path: Path) -> str:
    """Markdown: after the first step, 50, 100 and all edits."""
    from methods import cell

    from kt.experiments.sequence import SHOWN

    lines = ["| run | edits | " + " | ".join(SHOWN.values()) + " | largest norm ratio |"]
    lines.append("| --- " * (len(SHOWN) + 3) + "|")
    for label, steps in courses(path).items():
        for step in (s for s in steps.steps if s.edits in (STEP, 50, 100, EDITS)):
            cells = [cell(step.metrics[name]) for name in SHOWN]
            lines.append(f"| {label} | {step.edits} | {' | '.join(cells)} | {max(step.norm_ratios.values()):.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--variants", default=",".join(VARIANTS), help="as the labels have them, such as ' + NAS'")
    parser.add_argument("--edits", type=int, default=EDITS, help="stop after so many of the 200")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--figures", action="store_true", help="draw and print the file, and stop")
    parser.add_argument("--table", action="store_true", help="print the file as a table, and stop")
    args = parser.parse_args()
    if args.figures:
        draw(args.out)
    if args.figures or args.table:
        sys.stdout.write(table(args.out))
        return
    from kt._util.files import atomic_write

    for label in (method + variant for method in args.methods.split(",") for variant in args.variants.split(",")):
        if label in load(args.out):
            continue
        steps = run(label, args.edits)
        atomic_write(args.out, json.dumps(load(args.out) | {label: steps}, ensure_ascii=False) + "\n")
        sys.stdout.write(f"{label} done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
