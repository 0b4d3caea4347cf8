"""What new requests read of earlier edits, and what holding the earlier keys keeps, on the demo model.

    python benchmarks/quality/stacks.py  # both, half an hour; writes docs/data/stacks.json
    python benchmarks/quality/stacks.py --table  # docs/data/stacks.md

Overlap: one edit of 50 facts; its overlap (kt.editing.conflicts) with 200 other facts, by whether they share a
relation, and with the same subjects in a template of another relation, and in another wording of their own.
History: 50 facts in one edit, then 50 others on top of it, without and with the first one's keys held.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[2] / "docs" / "data" / "stacks.json"
METHODS = {"memit": {}, "intattn": {"alpha": 0.3}, "alphaedit": {}}
N, OTHERS, MAX_TOKENS = 50, 200, 40_000
QUANTILES = (0.05, 0.5, 0.95, 0.99, 0.999)


def drawn() -> tuple[list[Any], list[Any]]:
    """The facts of the first edit, and others; of no subject are there two."""
    import kt

    facts = {f.subject: f.as_request() for f in kt.load_facts("demo") if f.foil and f.rephrasings}
    order = random.Random(0).sample(sorted(facts), N + OTHERS)
    return [facts[name] for name in order[:N]], [facts[name] for name in order[N:]]


def overlap(model: Any, method: str, edit: Any, old: list[Any], others: list[Any]) -> list[dict[str, Any]]:
    """Quantiles of |overlap| and |cosine| by kind of pair, and the share of pairs at the thresholds."""
    import torch

    from kt.editing import conflicts
    from kt.model.update import Dense

    templates = {f.relation: f.template for f in others}
    elsewhere = [replace(f, template=next(t for r, t in templates.items() if r != f.relation)) for f in old]
    reworded = [replace(f, template=next(r for r in f.rephrasings if r.count("{}") == 1)) for f in old]
    dense = replace(edit, updates={name: Dense(update.dense()) for name, update in edit.updates.items()})
    kinds: dict[str, tuple[list[Any], Callable[[Any, Any], bool]]] = {
        "another relation, another subject": (others, lambda a, b: a.relation != b.relation),
        "one relation, another subject": (others, lambda a, b: a.relation == b.relation),
        "one subject, another relation": (elsewhere, lambda a, b: a.subject == b.subject),
        "one subject, another wording": (reworded, lambda a, b: a.subject == b.subject),
    }
    rows = []
    for what, least, held in (("overlap", conflicts.OVERLAP, edit), ("cosine", conflicts.COSINE, dense)):
        for kind, (new, chosen) in kinds.items():
            found = conflicts.overlaps(model, new, held)
            assert found is not None and found.measure == what
            picked = [[chosen(a, b) for b in old] for a in new]
            values = found.values.abs()[torch.tensor(picked)]
            quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=values.dtype)).tolist()
            rows.append({
                "method": method, "measure": what, "pairs": kind, "n": len(values), "quantiles": quantiles,
                "least": least, "share": float((values >= least).double().mean()),
            })  # fmt: skip
    return rows


def history(model: Any, method: str, first: Any, old: list[Any], new: list[Any], options: dict[str, Any]) -> Any:
    """The first edit's requests alone, and under a second edit without and with their keys held."""
    from kt.editing.rounding import readings
    from kt.editing.session import SessionOnEdits
    from kt.editing.stack import EditStack
    from kt.stats import bootstrap_mean, paired_bootstrap_difference

    def said(facts: list[Any]) -> list[float]:
        return [reading.target.prob for reading in readings(model, facts)]

    below = EditStack([first])
    kept, told, alone = {}, {}, []
    for name, keep in (("without", False), ("with", None)):
        asked = {"method": method, "max_tokens": MAX_TOKENS, "keep_history": keep, **options}
        with SessionOnEdits(model, below, new, **asked) as session:
            alone = said(old)
            second = session.solve(new)
        with EditStack([first, second]).applied(model):
            kept[name], told[name] = said(old), said(new)
    mean = lambda values: bootstrap_mean(values).as_dict()  # noqa: E731
    return {
        "method": method,
        "first, alone": mean(alone),
        "first, without": mean(kept["without"]),
        "first, with": mean(kept["with"]),
        "first, with - without": paired_bootstrap_difference(kept["with"], kept["without"]).as_dict(),
        "second, without": mean(told["without"]),
        "second, with": mean(told["with"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the file as tables, and stop")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    if args.table:
        sys.stdout.write(tables(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    import torch

    import kt
    from kt._util.data import write_json

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = kt.load("demo")
    old, others = drawn()
    held: dict[str, Any] = {"overlap": [], "history": []}
    for method, options in METHODS.items():
        first = kt.edit(model, old, method=method, max_tokens=MAX_TOKENS, **options)
        held["overlap"] += overlap(model, method, first, old, others)
        held["history"].append(history(model, method, first, old, others[:N], options))
        write_json(args.out, held)
        sys.stdout.write(f"{json.dumps(held['history'][-1])}\n")


def tables(held: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    names = ["5%", "median", "95%", "99%", "99.9%"]
    lines = [f"| method | measure | pairs | n | {' | '.join(names)} | shown |", "| --- " * 3 + "| ---: " * 7 + "|"]
    for row in held["overlap"]:
        cells = " | ".join(f"{value:.2f}" for value in row["quantiles"])
        start = f"| {row['method']} | {row['measure']} ≥ {row['least']} | {row['pairs']} | {row['n']:,} "
        lines.append(f"{start}| {cells} | {row['share']:.2%} |")
    lines += ["", "| method | first edit alone | under a second | with its keys held | gained | the second | with |"]
    lines.append("| --- " + "| ---: " * 6 + "|")
    columns = (
        "first, alone",
        "first, without",
        "first, with",
        "first, with - without",
        "second, without",
        "second, with",
    )
    for row in held["history"]:
        found = [row[name] for name in columns]
        cells = [f"{each['mean']:.3f} [{each['ci95'][0]:.3f}, {each['ci95'][1]:.3f}]" for each in found]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
