"""Where two pretrained models keep facts: α, the layers that a trace proposes, and whether attention comes early.

    python benchmarks/quality/real_known.py counterfact-edit.json --write known
    kt alpha -m SMOLLM2 -f known/smollm2.json --limit 100 -o runs/smollm2-alpha
    kt alpha -m GEMMA3 -f known/gemma3.json --limit 50 -o runs/gemma3-alpha
    python benchmarks/quality/real_map.py smollm2=runs/smollm2-alpha gemma3=runs/gemma3-alpha  # fills `OUT`
    python benchmarks/quality/real_map.py --table  # the tables, from that file

Only effects at the subject's last token are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from methods import cell
from protocols import markdown

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "real-map.json"
KINDS, DRAWS = {"mlp": "MLP", "attn": "attention"}, 2000


def measured(folder: Path) -> dict[str, Any]:
    """α and layers of a run's trace, and each fact's effects at the last subject token: (fact, layer), four digits."""
    import kt
    from kt.runs.folder import FILES
    from kt.tracing.means import role_effects
    from kt.tracing.prompts import ROLES

    trace = kt.Trace.load(folder / FILES["trace"])
    balance = kt.balance_factor(trace).as_dict()
    effects = {kind: role_effects(trace, kind, "logit_diff")[:, ROLES.index("subject_last")] for kind in KINDS}
    kept = {
        name: balance[name] for name in ("alpha", "ci95", "pooled", "pooled_ci95", "layers", "layer_shares", "unsteady")
    }
    kept |= {name: trace.metadata[name] for name in ("samples", "seed", "window", "corrupt")}
    return kept | {"n": trace.n_facts, "effects": {kind: e.round(4).tolist() for kind, e in effects.items()}}


def draws(held: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """By kind, the mean effect of each layer, over the facts and over draws of them."""
    effects = {kind: np.array(held["effects"][kind]) for kind in KINDS}
    chosen = np.random.default_rng(0).integers(held["n"], size=(DRAWS, held["n"]))
    return {k: e.mean(0) for k, e in effects.items()}, {k: e[chosen].mean(1) for k, e in effects.items()}


def depth(effect: Any) -> Any:
    """The mean layer, each weighted by its positive effect, as a share of the way from the first to the last."""
    positive = np.maximum(effect, 0)
    return (positive * np.linspace(0, 1, effect.shape[-1])).sum(-1) / positive.sum(-1)


def interval(value: Any, drawn: Any) -> str:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return cell({"mean": float(value), "ci95": [float(low), float(high)]})


def tables(path: Path) -> str:
    """Markdown: α and proposals; by module where the effect is; the effects by layer."""
    models = json.loads(path.read_text(encoding="utf-8"))
    proposals = [
        [
            "model",
            "facts",
            "α (eq. 12)",
            "α, pooled",
            "facts without an α of their own",
            *(f"{t} layers (share of draws)" for t in KINDS.values()),
        ]
    ]
    places = [
        [
            "model",
            "module",
            "sum over layers",
            "strongest layer",
            "share of draws",
            "mean depth",
            "first third",
            "second third",
            "last third",
        ]
    ]
    apart = [["model", "depth of attention less that of MLP"]]
    for name, held in models.items():
        mean, drawn = draws(held)
        layers = [
            ", ".join(f"{i} ({held['layer_shares'][kind][i]:.0%})" for i in held["layers"][kind]) for kind in KINDS
        ]
        alphas = [cell({"mean": held[a], "ci95": held[ci]}) for a, ci in (("alpha", "ci95"), ("pooled", "pooled_ci95"))]
        proposals.append([name, str(held["n"]), *alphas, f"{held['unsteady']} of {held['n']}", *layers])
        for kind, title in KINDS.items():
            peak = int(mean[kind].argmax())
            share = float((drawn[kind].argmax(1) == peak).mean())
            thirds = [
                interval(a.sum(), b.sum(1))
                for a, b in zip(np.array_split(mean[kind], 3), np.array_split(drawn[kind], 3, axis=1), strict=True)
            ]
            row = [name, title, interval(mean[kind].sum(), drawn[kind].sum(1)), str(peak), f"{share:.0%}"]
            places.append([*row, interval(depth(mean[kind]), depth(drawn[kind])), *thirds])
        gap, gaps = (depth(e["attn"]) - depth(e["mlp"]) for e in (mean, drawn))
        apart.append([name, interval(gap, gaps)])
    return "\n\n".join(map(markdown, (proposals, places, apart))) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="MODEL=FOLDER", help="run folders of kt alpha or kt heatmap")
    parser.add_argument("--table", action="store_true", help="print the file as tables, and stop")
    args = parser.parse_args()
    if args.table:
        sys.stdout.write(tables(OUT))
        return
    from kt._util.files import atomic_write

    held = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    found = {name: measured(Path(folder)) for name, _, folder in (run.partition("=") for run in args.runs)}
    atomic_write(OUT, json.dumps(held | found) + "\n")


if __name__ == "__main__":
    main()
