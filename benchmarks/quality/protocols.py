"""One edit, many protocols: how much teacher forcing flatters, on the demo model.

    python benchmarks/quality/protocols.py  # T = 100, ten minutes; goes on where docs/data/demo-protocols.json ends
    python benchmarks/quality/protocols.py --edits 300,500
    python benchmarks/quality/protocols.py --table  # docs/data/demo-protocols.md

The unedited model, MEMIT and IntAttn-Edit, each with the winner of tune_methods.py (found on other facts),
write T facts in one batch; the same edited weights are then asked under every protocol. Perplexity is of the demo's
held-out text. Each row is its own process.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rows import run

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "demo-protocols.json"
METHODS = ("unedited", "memit", "intattn")
EDITS, MAX_TOKENS = (100,), 40_000
WAYS = ("tf_token", "tf_exact", "gen_exact", "gen_contains", "wild_exact", "wild_contains")
ROLES = {"edit_success": "the edit prompt", "paraphrase": "a rephrased prompt", "portability": "a consequence"}
PROB = {"edit_success": "efficacy_prob_success", "paraphrase": "generalization_prob_success"}
KEPT = {
    "same argmax": "neighbourhood_same_argmax",
    "same tokens (EasyEdit)": "neighbourhood_same_tf_token",
    "KL, nats": "neighbourhood_kl",
    "P(own) > P(new)": "specificity_prob_success",
    "right, free": "neighbourhood_wild_contains",
    "Score (prob)": "score_prob_harmonic",
    "Score (tf)": "score_tf_token",
    "perplexity": "perplexity_heldout",
    "fluency, bits": "fluency_ngram_entropy_gen",
    "repetition": "repetition_rate_gen",
}


def row(method: str, size: int, choose: Callable[[Any], list[Any]] | None = None) -> dict[str, Any]:
    """One method at one number of edits: every metric, and what teacher forcing adds on the same records; of the
    facts that `choose` has for the model."""
    import torch
    from methods import setting_of
    from tune_methods import usable

    import kt
    from kt.demo.loop import spread
    from kt.evaluation import distributions

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = kt.load("demo")
    facts = spread(usable() if choose is None else choose(model), size)
    asked: dict[str, Any] = {"protocols": ("tf", "gen", "prob", "wild", "ppl")}
    reference, before = distributions(model, facts), kt.evaluate(model, facts, **asked)
    about: dict[str, Any] = {"method": method, "edits": size, "facts": len(facts)}
    if method == "unedited":
        return about | figures(kt.evaluate(model, facts, before=before, reference=reference, **asked))
    setting, seconds = setting_of(method), time.process_time()
    edit = kt.edit(model, facts, method=method, max_tokens=MAX_TOKENS, **setting)
    about |= {"setting": setting, "cpu_seconds": round(time.process_time() - seconds, 1)}
    with edit.applied(model):
        return about | figures(kt.evaluate(model, facts, before=before, reference=reference, **asked))


def figures(scores: Any) -> dict[str, Any]:
    """The metrics with interval and n, the values that pairs of methods need, and tf_token less wild_contains."""
    from kt.stats import paired_bootstrap_difference

    flattery = {}
    for role in ROLES:
        ways = [scores.values.get(f"{role}_{way}", {}) for way in ("tf_token", "wild_contains")]
        both = [[way.get(record, float("nan")) for record in scores.records] for way in ways]
        flattery[role] = paired_bootstrap_difference(*both).as_dict()
    metrics = {name: metric.as_dict() for name, metric in scores.metrics.items()}
    shown = [f"{role}_{way}" for role in ROLES for way in WAYS]
    values = {n: [scores.values[n].get(r) for r in scores.records] for n in shown if n in scores.values}
    return {"metrics": metrics, "flattery": flattery, "values": values}


def cell(value: dict[str, Any] | None) -> str:
    """Mean and interval; rounding leaves no minus zero."""
    if value is None or value["mean"] is None:
        return "–"
    if value["ci95"] is None:
        return f"{value['mean']:.2f}"
    mean, low, high = (f"{round(v, 2) + 0.0:.2f}" for v in (value["mean"], *value["ci95"]))
    return f"{mean} [{low}, {high}]"


def tables(path: Path) -> str:
    """Markdown: the answers under every protocol, what is kept, and IntAttn-Edit less MEMIT on the same records."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows.sort(key=lambda r: (r["edits"], METHODS.index(r["method"])))
    answers = [["asked after", "method", "T", *WAYS[:2], "P(new) > P(old)", *WAYS[2:], "tf_token − wild_contains"]]
    for role, where in ROLES.items():
        for each in rows:
            found = each["metrics"]
            cells = [cell(found.get(f"{role}_{way}")) for way in WAYS]
            cells.insert(2, cell(found.get(PROB.get(role, ""))))
            answers.append([where, each["method"], str(each["edits"]), *cells, cell(each["flattery"][role])])
    kept = [["method", "T", *KEPT]]
    kept += [[r["method"], str(r["edits"]), *(cell(r["metrics"].get(n)) for n in KEPT.values())] for r in rows]
    return "\n\n".join(map(markdown, (answers, kept, gaps(rows)))) + "\n"


def gaps(rows: list[dict[str, Any]]) -> list[list[str]]:
    """IntAttn-Edit less MEMIT, paired by record, under every protocol."""
    from kt.stats import paired_bootstrap_difference

    found = [["asked after", "T", *WAYS]]
    by_name = {(r["method"], r["edits"]): r["values"] for r in rows}
    for role, where in ROLES.items():
        for size in sorted({r["edits"] for r in rows}):
            pair = [by_name.get((method, size)) for method in ("intattn", "memit")]
            if None in pair:
                continue
            columns = [[[v if v is not None else float("nan") for v in p[f"{role}_{w}"]] for p in pair] for w in WAYS]
            cells = [cell(paired_bootstrap_difference(*column).as_dict()) for column in columns]
            found.append([where, str(size), *cells])
    return found


def markdown(rows: list[list[str]]) -> str:
    """A table; its first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def by_size(methods: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, int]]:
    return [(method, size) for size in sizes for method in methods]


if __name__ == "__main__":
    run(
        __file__,
        __doc__,
        row=lambda method, size: [row(method, size)],
        table=tables,
        jobs=by_size,
        methods=lambda: METHODS,
        sizes=EDITS,
        out=OUT,
        shown=lambda each, size: f"{each['method']}, T = {size}: done",
    )
