"""How the joint edit does on the demo model: edits x alpha, with the control that a smaller edit is.

    python benchmarks/quality/demo_edits.py --edits 1,10,100 --out docs/data/demo-edits.json
    python benchmarks/quality/demo_edits.py --table docs/data/demo-edits.json

For every number of edits and every α: edit success, paraphrase, neighbourhood locality and portability, teacher-forced
exact match, and the fluency of sampled text. `mlp x (1-α)` is the MLP update alone, scaled as the joint edit scales it:
where it does as well, attention's part bought nothing. One edit at a time is averaged over `--singles` facts.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

import kt
from kt.demo.loop import spread
from kt.stats import bootstrap_mean

METRICS = {
    "success": "edit_success_tf_exact",
    "paraphrase": "paraphrase_tf_exact",
    "locality": "neighbourhood_same_argmax",
    "portability": "portability_tf_exact",
    "fluency": "fluency_ngram_entropy_gen",
}


def scores(model, requests, before, edits, generate):
    """Metric -> values by record, each group of requests scored under its own edit."""
    values = {name: [] for name in METRICS}
    for group, edit, old in zip(requests, edits, before, strict=True):
        if edit is None:
            got = kt.evaluate(model, group, before=old, generate=generate)
        else:
            with edit.applied(model):
                got = kt.evaluate(model, group, before=old, generate=generate)
        for name, metric in METRICS.items():
            values[name] += list(got.values.get(metric, {}).values())
    return {name: bootstrap_mean(v)._asdict() for name, v in values.items() if v}


def rows(model, facts, n, alphas, singles, generate, options):
    groups = [[f] for f in spread(facts, singles)] if n == 1 else [spread(facts, n)]
    before = [kt.evaluate(model, g, generate=generate) for g in groups]
    base = scores(model, groups, before, [None] * len(groups), generate)
    yield {"edits": n, "alpha": None, "kind": "unedited"} | base
    full = {a: [kt.edit(model, g, method="intattn", alpha=a, **options) for g in groups] for a in (0.0, 1.0)}
    for alpha in alphas:
        mlp, attn = [scaled(e, 1 - alpha) for e in full[0.0]], [scaled(e, alpha) for e in full[1.0]]
        edits = [kt.Edit(m.updates | a.updates, {}) for m, a in zip(mlp, attn, strict=True)]
        if options.get("coupled"):  # then the MLP's update depends on α
            edits = [kt.edit(model, g, method="intattn", alpha=alpha, **options) for g in groups]
        yield {"edits": n, "alpha": alpha, "kind": "joint"} | scores(model, groups, before, edits, generate)
        if 0 < alpha < 1:
            yield {"edits": n, "alpha": alpha, "kind": "mlp x (1-α)"} | scores(model, groups, before, mlp, generate)


def scaled(edit, factor):
    """The paths are solved apart and scaled afterwards (eq. 13), so two solves give every α."""
    return kt.Edit({n: u.scaled(factor) for n, u in edit.updates.items()} if factor else {}, {})


def markdown(path):
    """The table of docs/data/demo-edits.md: mean and 95% interval over records."""
    head = ["edits", "α", "kind", *METRICS]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in json.loads(path.read_text())["rows"]:
        cells = [str(row["edits"]), "–" if row["alpha"] is None else f"{row['alpha']:g}", row["kind"]]
        for name in METRICS:
            value = row.get(name)
            mean, low, high = (round(value[k], 2) + 0.0 for k in ("mean", "low", "high")) if value else (0.0,) * 3
            cells.append("–" if value is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", default="1,10,100")
    parser.add_argument("--alphas", default="0,0.1,0.2,0.3,0.5,1")
    parser.add_argument("--singles", type=int, default=20)
    parser.add_argument("--no-fluency", action="store_true")
    parser.add_argument("--set", action="append", default=[], help="hyper-parameter=value, JSON values")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print an earlier run's file as a table, and stop")
    args = parser.parse_args()
    if args.table:
        sys.stdout.write(markdown(args.table))
        return
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    options = {k: json.loads(v) for k, _, v in (s.partition("=") for s in args.set)}
    model = kt.load("demo")
    facts = [f for f in kt.load_facts("demo") if f.foil and f.hops and f.rephrasings and f.neighbours]
    table = []
    for n in map(int, args.edits.split(",")):
        alphas = [float(a) for a in args.alphas.split(",")]
        for row in rows(model, facts, n, alphas, args.singles, not args.no_fluency, options):
            table.append(row)
            figures = "  ".join(f"{k} {row[k]['mean']:.3f}" for k in METRICS if k in row)
            sys.stdout.write(f"{n:>4} {row['alpha']!s:>5} {row['kind']:<12} {figures}\n")
            sys.stdout.flush()
    if args.out:
        args.out.write_text(json.dumps({"rows": table, "options": options}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
