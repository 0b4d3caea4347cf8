"""200 edits in steps of ten: what becomes of earlier edits, with and without history and norm guard.

    python benchmarks/sequential.py                    # all runs, into docs/sequential.json; resumes; about an hour
    python benchmarks/sequential.py --figures          # docs/sequential-METHOD.png and the table, from that file

Settings are the winners of benchmarks/tune_methods.py. After every step all requests so far are scored, teacher-forced.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "sequential.json"
EDITS, STEP = 200, 10
VARIANTS = {
    "": {"keep_history": False},
    " + history": {"keep_history": True},
    " + norm guard": {"keep_history": False, "norm_guard": True},
    " + both": {"keep_history": True, "norm_guard": True},
}
METHODS = ("memit", "alphaedit", "intattn")


def run(label: str) -> dict[str, object]:
    import torch
    from methods import MAX_TOKENS, setting_of
    from tune_methods import usable

    import kt
    from kt.demo_loop import spread
    from kt.edit_run import run_edits

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    method = label.split(" ")[0]
    options = VARIANTS[label.removeprefix(method)] | setting_of(method)
    found = run_edits(
        kt.load("demo"), spread(usable(), EDITS), "sequential", STEP, "step", label=label, method=method,
        max_tokens=MAX_TOKENS, **options,
    )  # fmt: skip
    return found.steps.as_dict()


def load(path: Path) -> dict[str, dict[str, object]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def figures(path: Path) -> None:
    """One figure a method, and the last step as a table."""
    from kt.edit_steps import SHOWN, Step, Steps, steps_figure
    from kt.figures import write_figure

    runs = {}
    for label, held in load(path).items():
        steps = tuple(Step(**(s | {"requests": tuple(s["requests"])})) for s in held["steps"])
        runs[label] = Steps(held["mode"], held["about"], steps)
    for method in METHODS:
        own = {label: steps for label, steps in runs.items() if label.split(" ")[0] == method}
        if own:
            title = f"{method}: {EDITS} sequential edits in steps of {STEP}"
            write_figure(
                steps_figure(own, title, "all requests so far, demo model"), path.with_name(f"sequential-{method}.png")
            )
    lines = ["| run | edits | " + " | ".join(SHOWN.values()) + " | largest norm ratio |"]
    lines.append("| --- " * (len(SHOWN) + 3) + "|")
    for label, steps in runs.items():
        for step in (s for s in steps.steps if s.edits in (50, 100, EDITS)):
            cells = [
                f"{step.metrics[m]['mean']:.2f} [{step.metrics[m]['ci95'][0]:.2f}, {step.metrics[m]['ci95'][1]:.2f}]"
                for m in SHOWN
            ]
            lines.append(f"| {label} | {step.edits} | {' | '.join(cells)} | {max(step.norm_ratios.values()):.2f} |")
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--figures", action="store_true")
    args = parser.parse_args()
    if args.figures:
        return figures(args.out)
    from kt.artifacts import atomic_write

    for label in (method + variant for method in args.methods.split(",") for variant in VARIANTS):
        if label in load(args.out):
            continue
        steps = run(label)
        atomic_write(args.out, json.dumps(load(args.out) | {label: steps}, ensure_ascii=False) + "\n")
        sys.stdout.write(f"{label} done\n")
        sys.stdout.flush()
    return None


if __name__ == "__main__":
    main()
