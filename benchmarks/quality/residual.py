"""How much of the old fact an edit leaves on the demo model: alpha = 0, 0.1, 0.3 and 1, with the control of each.

    python benchmarks/quality/residual.py  # about six CPU minutes; writes docs/data/residual.json
    python benchmarks/quality/residual.py --table  # the file as tables

Two batches of ten edits, shown together (twenty facts, each under its batch's edit) and apart, and one batch of a
hundred. None of them holds a fact of `kt demo` or of the ten that the demo preset was fitted on. alpha = 0 is the MLP
path alone, which is MEMIT to the bit; alpha = 1 is the attention path alone. `mlp x (1-α)` is the joint edit without
its attention part: a smaller edit may leave more, so what attention's part took away is joint - control. Differences
are paired: the same facts, resampled together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

import kt
from kt._util.data import plain
from kt.demo.loop import spread
from kt.residual.attacks import ANY, PARAPHRASES, PROMPT
from kt.residual.run import residual_fact
from kt.residual.score import Residual
from kt.stats import paired_bootstrap_difference

ALPHAS = (0.0, 0.1, 0.3, 1.0)
KINDS = ("resid", "attn", "mlp")
POSITIONS = ("subject_last", "prediction")
WORDS = {PROMPT: "prompt", PARAPHRASES: "paraphrases", ANY: "any prefix"}
N_BOOT = 2000
OUT = Path(__file__).parents[2] / "docs" / "data" / "residual.json"


def batches(facts):
    """Facts with everything to ask about, without those that settings were chosen or shown on."""
    seen = {f.id for f in spread([f for f in facts if f.target or f.foil], 10)}
    whole = [f for f in facts if f.foil and f.hops and f.rephrasings and f.neighbours]
    seen |= {f.id for f in spread(whole, 10)}
    fresh = [f for f in whole if f.id not in seen]
    twenty = spread(fresh, 20)
    used = {f.id for f in twenty}
    return {"10 a": twenty[::2], "10 b": twenty[1::2], "100": spread([f for f in fresh if f.id not in used], 100)}


def edits(model, group):
    """(alpha, kind) -> edit. The paths are solved apart and scaled afterwards (eq. 13), so two solves give them all."""
    mlp, attn = (kt.edit(model, group, method="intattn", alpha=alpha) for alpha in (0.0, 1.0))
    found = {}
    for alpha in ALPHAS:
        rest, own = scaled(mlp, 1 - alpha), scaled(attn, alpha)
        found[alpha, "joint"] = kt.Edit(rest | own, {"method": "intattn", "alpha": alpha})
        if 0 < alpha < 1:
            found[alpha, "mlp x (1-α)"] = kt.Edit(rest, {"method": "intattn", "alpha": alpha, "control": "MLP alone"})
    return found


def scaled(edit, factor):
    return {name: update.scaled(factor) for name, update in edit.updates.items()} if factor else {}


def measure(model, facts, group):
    """(alpha, kind) -> Residual of a batch; the unedited model is measured once."""
    found = {}
    for key, edit in edits(model, group).items():
        first = next(iter(found.values()), None)
        found[key] = residual_fact(model, edit, group, pool=facts, before=first, n_boot=N_BOOT)
    return found


def row(name, key, found):
    """What the document shows of one residual, and its paired differences from alpha = 0 and from its control."""
    residual, other = found[key], control(key, found)
    about = residual.as_dict()
    shown = ("n_facts", "residual_score", "floor", "above_floor", "by_kind", "carrier")
    return {
        "batch": name,
        "alpha": key[0],
        "kind": key[1],
        **{word: about[word] for word in shown},
        **state(about, "after"),
        "minus_alpha_0": differences(residual, found[0.0, "joint"]) if key[0] else None,
        "minus_control": None if other is None else differences(residual, other),
    }


def state(about, name):
    """Candidates and attacks on one of the two models."""
    top = {k: {p: about["in_top"][k][p][name] for p in POSITIONS} for k in KINDS}
    asked = [r for r in about["attacks"] if r["state"] == name and r["measure"] != "said"]
    return {"in_top": top, "attacks": asked}


def control(key, found):
    return found.get((key[0], "mlp x (1-α)")) if key[1] == "joint" else None


def differences(residual, other):
    """Scores of all kinds, and the old answer's excess in ln P over a third one."""
    scores = {kind: residual.difference(other, kind).as_dict() for kind in KINDS}
    return scores | {f"excess, {word}": excess_difference(residual, other, name) for name, word in WORDS.items()}


def excess_difference(residual, other, attack):
    place, ratio = residual.attacks.names.index(attack), 2
    values = [r.attacks.after[:, place, :, ratio] for r in (residual, other)]
    first, second = (v[:, 0] - v[:, 1] for v in values)
    return paired_bootstrap_difference(first, second, N_BOOT).as_dict()


# The tables ------------------------------------------------------------------------------------------------------
def markdown(path):
    """The tables of the document: mean and 95% interval over facts. The file also has each batch of ten by itself."""
    data = [r for r in json.loads(path.read_text())["rows"] if r["batch"] not in ("10 a", "10 b")]
    scores = ["batch", "α", "edit", "score", "floor", "score - floor", "left in attention", "left in MLPs"]
    said = ["batch", "α", "edit", "old in top 10", "old beats new", "any prefix", "any prefix, third", "excess, nats"]
    minus = ["batch", "α", "minus", "score", "left in attention", "left in MLPs", "excess, nats"]
    lines = [*table(scores, map(left, data)), "", *table(said, map(shown, data)), "", *table(minus, paired(data))]
    return "\n".join(lines) + "\n"


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|", *("| " + " | ".join(r) + " |" for r in rows)]


def named(r):
    return [r["batch"], f"{r['alpha']:g}", r["kind"]]


def left(r):
    kinds = (r["by_kind"][kind]["both"]["score"] for kind in ("attn", "mlp"))
    return [*named(r), *map(number, (r["residual_score"], r["floor"], r["above_floor"], *kinds))]


def shown(r):
    attacks = {(a["attack"], a["measure"]): a for a in r["attacks"]}
    found = [r["in_top"]["resid"]["prediction"]["original"], attacks[PROMPT, "beats_new"]["old"]]
    found += [attacks[ANY, "beats_new"][who] for who in ("old", "third")]
    return [*named(r), *map(number, (*found, attacks[PARAPHRASES, "log_ratio"]["excess"]))]


def paired(data):
    for r in data:
        for name, other in (("minus_alpha_0", "α = 0"), ("minus_control", "control")):
            if (found := r[name]) is not None:
                numbers = [number(found[k]) for k in (*KINDS, "excess, paraphrases")]
                yield [r["batch"], f"{r['alpha']:g}" + (" (control)" if r["kind"] != "joint" else ""), other, *numbers]


def number(interval):
    if interval["mean"] is None:
        return "–"
    if interval["ci95"] is None:
        return f"{interval['mean'] + 0.0:.2f}"
    low, high = (round(v, 2) + 0.0 for v in interval["ci95"])
    return f"{round(interval['mean'], 2) + 0.0:.2f} [{low:.2f}, {high:.2f}]"


def rounded(value):
    """Four decimals are more than the intervals can tell apart."""
    if isinstance(value, float):
        return round(value, 4) + 0.0
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def write(path, rows, groups, found):
    """One line a row: the file is for reading back."""
    first = {name: next(iter(by_key.values())).as_dict() for name, by_key in found.items()}
    unedited = {name: rounded(plain(state(about, "before"))) for name, about in first.items()}
    facts = {name: [f.id for f in group] for name, group in groups.items() if name in found}
    about = {"model": "demo", "seed": 0, "n_boot": N_BOOT, "facts": facts, "unedited": unedited}
    lines = [json.dumps({k: v}, ensure_ascii=False)[1:-1] for k, v in about.items()]
    lines.append('"rows": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]")
    path.write_text("{" + ",\n".join(lines) + "}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="10 a,10 b,100")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print the file as tables, and stop")
    args = parser.parse_args()
    if args.table:
        sys.stdout.write(markdown(args.out))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    model, facts = kt.load("demo"), kt.load_facts("demo")
    groups = batches(facts)
    found = {name: measure(model, facts, groups[name]) for name in args.batches.split(",")}
    if {"10 a", "10 b"} <= set(found):
        both = {key: Residual.joined([found["10 a"][key], found["10 b"][key]]) for key in found["10 a"]}
        found = {"10 a + b": both} | found
    rows = []
    for name, by_key in found.items():
        for key in by_key:
            rows.append(rounded(plain(row(name, key, by_key))))
            sys.stdout.write(f"{name:>8} {key[0]:>4} {key[1]:<12} {by_key[key]!r}\n")
    write(args.out, rows, groups, found)
    sys.stderr.write(f"{time.process_time() - start:.0f} CPU s\n")


if __name__ == "__main__":
    main()
