"""Does a share for attention help on real weights? α from 0 to 1, beside the control of equal size.

    python benchmarks/quality/real_alpha.py --facts counterfact-edit.json  # fills `OUT`
    python benchmarks/quality/real_alpha.py --table  # the table, from that file

One batch of edits of SmolLM2 with no setting given, for every seed (of the prefixes before each prompt). α scales the
two paths after they are solved (eq. 13), so two solves a seed give every α. The control is the MLP's part alone, x
(1 - α). A record's value is its mean over seeds; differences are paired by record.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from methods import cell
from protocols import markdown
from real_known import facts_of, folder_of
from real_models import KEPT, METRICS, nothing_kept

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "real-alpha.json"
ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
SHOWN = {"success": "success", "paraphrase": "paraphrase", "locality": "neighbour kept"}


def measure(facts: str, edits: int, seed: int) -> dict[str, Any]:
    """A seed's values: kind (joint, control) -> α -> metric -> a number a record."""
    import torch

    import kt
    from kt.editing.resolve import configure, resolve
    from kt.experiments.shared_targets import SharedTargets
    from kt.experiments.sweep_solving import combined

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    KEPT.mkdir(exist_ok=True)
    model = kt.load(folder_of("smollm2"))
    requests = facts_of("smollm2", facts)[:edits]
    before, start = kt.evaluate(model, requests, protocols=("tf",)), time.process_time()
    kept = SharedTargets(KEPT)
    with nothing_kept("alpha"):
        layers = resolve(configure(model, "intattn", 0.5), model, requests)[0]
    configs = [replace(layers, alpha=share) for share in (0.0, 1.0)]
    mlp, attn = (kt.edit(model, requests, config, seed=seed, journal=kept) for config in configs)
    seconds = time.process_time() - start + kept.seconds
    found: dict[str, Any] = {"joint": {}, "control": {}}
    for alpha in ALPHAS:
        joint = mlp if alpha == 0 else attn if alpha == 1 else combined(mlp, attn, alpha)
        for kind, edit in (("joint", joint), ("control", joint.control())):
            if edit is not None:
                with edit.applied(model, force=True):
                    scores = kt.evaluate(model, requests, before, protocols=("tf",))
                values = {n: [scores.values[METRICS[n]].get(r) for r in scores.records] for n in SHOWN}
                found[kind][f"{alpha:g}"] = values
    return found | {"cpu_seconds": seconds}


def tables(path: Path) -> str:
    """Markdown: each α, less α = 0, and less its control."""
    from kt.stats import bootstrap_mean, paired_bootstrap_difference

    held = json.loads(path.read_text(encoding="utf-8"))
    seeds = list(held["seeds"].values())

    def values(kind: str, alpha: str, metric: str) -> Any:
        rows = [[np.nan if v is None else v for v in seed[kind][alpha][metric]] for seed in seeds]
        return np.array(rows).mean(0)

    titles = list(SHOWN.values())
    lines = [["α", *titles, *(f"{t}, less α = 0" for t in titles), *(f"{t}, less its control" for t in titles)]]
    for alpha in (f"{a:g}" for a in ALPHAS):
        own = [cell(bootstrap_mean(values("joint", alpha, m)).as_dict()) for m in SHOWN]
        others = [("joint", "0"), ("control", alpha)]
        gaps = [
            cell(paired_bootstrap_difference(values("joint", alpha, m), values(kind, at, m)).as_dict())
            if at in seeds[0][kind] and (kind, at) != ("joint", alpha)
            else "–"
            for kind, at in others
            for m in SHOWN
        ]
        lines.append([alpha, *own, *gaps])
    return markdown(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", help="counterfact-edit.json")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the file as a table, and stop")
    args = parser.parse_args()
    if args.table:
        sys.stdout.write(tables(OUT))
        return
    from kt._util.files import atomic_write

    for seed in args.seeds:
        held = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {"edits": args.edits, "seeds": {}}
        if str(seed) not in held["seeds"]:
            held["seeds"][str(seed)] = measure(args.facts, args.edits, seed)
            atomic_write(OUT, json.dumps(held) + "\n")


if __name__ == "__main__":
    main()
