"""What a trace of the demo model owes to its choices: corruption, direction, window, severed modules, heads.

    python benchmarks/quality/trust.py  # all runs, some minutes; writes docs/data/trust.json
    python benchmarks/quality/trust.py --table  # the file as tables

Everything is at the last subject token, by the normalised logit difference (eq. 8), over the same facts and draws.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import kt
from kt._util.data import write_json
from kt.demo.loop import spread
from kt.stats import bootstrap_mean

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "trust.json"
MODULES = ("mlp", "attn")


def peak(trace: kt.Trace, kind: str) -> dict[str, Any]:
    """The largest cell of a kind's curve, and how many layers are told apart from zero."""
    curve = trace.curve(kind)
    at = int(curve.mean.argmax())
    ends = None if trace.n_facts < 2 else [float(curve.low[at]), float(curve.high[at])]
    found = {"layer": at, "mean": float(curve.mean[at]), "ci95": ends, "n": curve.n}
    return found | {"told_apart": int((curve.q < 0.05).sum()), "layers": len(curve.mean)}


def measure(n: int) -> dict[str, Any]:
    model = kt.load("demo")
    given = spread(kt.load_facts("demo"), n)
    swapped = kt.causal_trace(model, given, kinds=MODULES, corrupt="swap")
    facts = [given[fact.index] for fact in swapped.facts]  # those that have a partner: one set of facts for all rows
    found: dict[str, Any] = {"given": n, "facts": len(facts), "ways": {}, "windows": [], "severed": {}, "heads": []}
    single = None
    for corrupt in ("noise", "swap"):
        for direction in ("denoise", "noise"):
            trace = kt.causal_trace(model, facts, kinds=MODULES, corrupt=corrupt, direction=direction)
            single = single or trace
            balance = kt.balance_factor(trace)
            found["ways"][f"{corrupt}, {direction}"] = {
                "facts": trace.n_facts,
                "alpha": {"mean": balance.alpha, "ci95": balance.ci95, "n": balance.n_facts},
                "sums": {k: sum(v) for k, v in balance.per_layer.items()},
                "peaks": {kind: peak(trace, kind) for kind in MODULES},
            }
    for window in (3, 5):
        wide = kt.causal_trace(model, facts, kinds=MODULES, window=window)
        found["windows"] += [f.as_dict() for f in kt.peak_inflation(wide, single)]
    severed = kt.causal_trace(model, facts, kinds=("hidden", "hidden-no-mlp", "hidden-no-attn"))
    found["severed"] = {
        kind: [bootstrap_mean(column).as_dict() for column in last_subject(severed, kind)] for kind in severed.kinds
    }
    heads = kt.causal_trace(model, facts, kinds=("attn", "heads"))
    found["heads"] = [{"kind": kind, **peak(heads, kind)} for kind in heads.kinds]
    return found


def last_subject(trace: kt.Trace, kind: str) -> Any:
    """Effects (layer, fact) at the last subject token."""
    return zip(*(fact.effect(kind, "logit_diff")[:, fact.span.last] for fact in trace.facts), strict=True)


def cell(found: dict[str, Any]) -> str:
    mean = "–" if found["mean"] is None else f"{found['mean']:.3f}"
    return mean if found["ci95"] is None else "{} [{:.3f}, {:.3f}]".format(mean, *found["ci95"])


def tables(found: dict[str, Any]) -> str:
    """Markdown: ways, windows, severed modules, heads."""
    lines = [
        "| corruption, direction | n | α | MLP peak (layer) | attention peak (layer) | told apart: MLP, attention |"
    ]
    lines.append("| --- " * 6 + "|")
    for way, row in found["ways"].items():
        mlp, attn = (row["peaks"][kind] for kind in MODULES)
        told = f"{mlp['told_apart']} of {mlp['layers']}, {attn['told_apart']} of {attn['layers']}"
        peaks = f"{cell(mlp)} ({mlp['layer']}) | {cell(attn)} ({attn['layer']})"
        lines.append(f"| {way} | {row['facts']} | {cell(row['alpha'])} | {peaks} | {told} |")
    lines += ["", "| kind, window | peak (layer) | single layers (layer) | their sum in the window | inflation |"]
    lines.append("| --- " * 5 + "|")
    for row in found["windows"]:
        single = f"{cell(row['single_peak'])} ({row['single_layer']})"
        rest = f"{cell(row['sum_of_single'])} | {cell(row['inflation'])}"
        lines.append(f"| {row['kind']}, {row['window']} | {cell(row['peak'])} ({row['layer']}) | {single} | {rest} |")
    layers = range(len(found["severed"]["hidden"]))
    lines += [
        "",
        "| restored | " + " | ".join(f"layer {layer}" for layer in layers) + " |",
        "| --- " * (len(layers) + 1) + "|",
    ]
    for kind, row in found["severed"].items():
        lines.append(f"| {kind} | " + " | ".join(f"{value['mean']:.3f}" for value in row) + " |")
    lines += ["", "| attention | peak | layer | layers told apart |", "| --- " * 4 + "|"]
    for row in found["heads"]:
        lines.append(f"| {row['kind']} | {cell(row)} | {row['layer']} | {row['told_apart']} of {row['layers']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print the file as tables, and stop")
    options = parser.parse_args()
    if not options.table:
        write_json(options.out, measure(options.facts))
    sys.stdout.write(tables(json.loads(options.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
