"""Edits of the demo model in float32, bfloat16, float16: are they taken back to the bit, and what does rounding cost?

    python benchmarks/quality/rounding.py  # ten edits a method and dtype, minutes; writes docs/data/rounding.json
    python benchmarks/quality/rounding.py --table  # docs/data/rounding.md

Settings are the winners of tune_methods.py. Texts and second moments are the float32 model's for all;
targets and updates are each dtype's own. The hashes are of every weight of the model. A factor scales every update:
real models change by less than this small one, relative to their weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "rounding.json"
METHODS = ("memit", "intattn", "ft")
DTYPES = ("float32", "bfloat16", "float16")
FACTORS = (1.0, 0.5, 0.25, 0.1, 0.01, 0.001)
EDITS, SHOWN = 10, 12


class Broken(Exception):
    """What the block raises that an edit has to survive."""


def hashes(model: Any, edit: Any) -> dict[str, str]:
    """SHA-256 of all weights: before, with the edit, after revert, and after an exception in `applied`."""
    found = {"before": model.fingerprint()}
    edit.apply_(model)
    found["applied"] = model.fingerprint()
    edit.revert_(model)
    found["reverted"] = model.fingerprint()
    try:
        with edit.applied(model):
            raise Broken
    except Broken:
        found["after an exception"] = model.fingerprint()
    return found


def scaled(model: Any, edit: Any, facts: Any, factor: float) -> dict[str, Any]:
    """The edit times a factor: how large it is, what survives, which requests it makes and which rounding costs."""
    import kt
    from kt.editing.rounding import about_rounding, is_narrow, says_targets

    part = kt.Edit({n: u.scaled(factor) for n, u in edit.updates.items()}, edit.manifest)
    before = model.copies(n for n in part.names if is_narrow(model.own(n)))
    row: dict[str, Any] = {
        "factor": factor,
        "relative_norm": [part.updates[n].norm() / edit.manifest["weight_norms"][n] for n in part.names],
    }
    try:
        with part.applied(model):
            row["said"] = sum(says_targets(model, facts, {}))
            row |= about_rounding(model, part, before, facts)
    except kt.KtError as error:
        row["refused"] = str(error)
    return row


def measure(n: int) -> list[dict[str, Any]]:
    import torch
    from methods import MAX_TOKENS, setting_of
    from tune_methods import usable

    import kt
    from kt.demo.loop import spread
    from kt.editing.methods import method_named
    from kt.editing.resolve import take_statistics
    from kt.model.sites import Kind, Site

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    exact = kt.load("demo", dtype="float32")
    facts = [fact.as_request() for fact in spread(usable(), n)]
    sites = [Site(kind, layer) for kind in (Kind.ATTN, Kind.MLP) for layer in range(exact.n_layers)]
    moments = take_statistics(exact, sites, None, "demo", MAX_TOKENS, None)
    rows = []
    for method in METHODS:
        texts = [list(group) for group in method_named(method).contexts(exact, 0).groups]
        for dtype in DTYPES:
            model = kt.load("demo", dtype=dtype)
            edit = kt.edit(
                model, facts, method=method, statistics=moments, context_templates=texts, **setting_of(method)
            )
            parts = [scaled(model, edit, facts, factor) for factor in FACTORS]
            rows.append(
                {"method": method, "dtype": dtype, "n": len(facts), "hashes": hashes(model, edit), "scaled": parts}
            )
            sys.stderr.write(f"{method} {dtype}\n")
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """The two tables as Markdown."""
    out = [
        "| method | dtype | before | with the edit | after `revert_` | after an exception | exact |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        held = row["hashes"]
        exact = held["before"] == held["reverted"] == held["after an exception"] != held["applied"]
        shown = " | ".join(f"`{value[:SHOWN]}`" for value in held.values())
        out.append(f"| {row['method']} | {row['dtype']} | {shown} | {'yes' if exact else 'NO'} |")
    out += [
        "",
        "| method | dtype | update times | relative norm | survived | error | requests that hold | lost to rounding |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        out += [f"| {row['method']} | {row['dtype']} | {_cells(part, row['n'])} |" for part in row["scaled"]]
    return "\n".join(out) + "\n"


def _cells(part: dict[str, Any], n: int) -> str:
    size = _range(part["relative_norm"])
    if "refused" in part:
        return f"{part['factor']:g} | {size} | | | refused: {part['refused'].partition(':')[0]} | "
    rounding = part.get("rounding")
    kept, error = ("exact", "0") if rounding is None else (
        _range([found[name] for found in rounding.values()]) for name in ("survived", "error")
    )  # fmt: skip
    lost = part.get("lost_to_rounding", [])
    cost = "n/a" if lost is None else len(lost)
    return f"{part['factor']:g} | {size} | {kept} | {error} | {part['said']} of {n} | {cost}"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=EDITS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print the file as tables, and stop")
    args = parser.parse_args()
    if not args.table:
        from kt._util.data import write_json

        write_json(args.out, {"rows": measure(args.edits)})
    sys.stdout.write(tables(json.loads(args.out.read_text(encoding="utf-8"))["rows"]))


if __name__ == "__main__":
    main()
