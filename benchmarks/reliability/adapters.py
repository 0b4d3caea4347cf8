"""What an exported edit is worth: its adapter's logits against its own, its merged folder, and the way back.

    python benchmarks/reliability/adapters.py  # a CPU minute; writes docs/data/adapters.json
    python benchmarks/reliability/adapters.py --table  # the file as tables

By family: a joint edit of two requests on a tiny random model of every architecture in tests/families.py, exported as
a PEFT adapter (loaded with plain peft) and as a merged folder (loaded with plain transformers), and taken out of the
folder again. By rank: ten edits on the demo model with fewer columns, shorter factors, a base of 16 bits.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402

import kt  # noqa: E402
from kt._util.data import to_json  # noqa: E402
from kt.export import revert_folder, to_hf, to_peft  # noqa: E402
from kt.facts.corpus import Corpus  # noqa: E402

OUT = ROOT / "docs" / "data" / "adapters.json"
N = 10
SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
LIMITS = (None, 8, 4, 2)


def by_family(folder):
    from editing_help import solve
    from families import FAMILIES, TEXTS, tiny_model

    words, drawn = " ".join(TEXTS).split(), random.Random(0)
    text = folder / "corpus.txt"
    text.write_text("\n".join(" ".join(drawn.choices(words, k=20)) for _ in range(150)))
    for family in FAMILIES:
        model = tiny_model(family)
        edit = solve(model, Corpus.open(text), folder / family)
        adapter = to_peft(model, edit, folder / family / "adapter")
        merged = to_hf(model, edit, folder / family / "merged")
        found = revert_folder(folder / family / "merged")
        paths = model.layout
        yield {
            "family": family,
            "modules": [paths.path(kind, 0).rpartition(".")[2] for kind in (kt.Kind.ATTN, kt.Kind.MLP)],
            "linear": type(model.projection(kt.Site(kt.Kind.MLP, 0))).__name__,
            "rank": adapter.about["rank"],
            "prompts": adapter.prompts,
            "adapter": adapter.max_error,
            "relative": adapter.relative_error,
            "merged": merged.max_error,
            "reverted": found.fingerprint == model.fingerprint(),
        }


def by_rank(folder):
    requests = [fact.as_request() for fact in kt.load_facts("demo", limit=N)]
    model = kt.load("demo")
    edit = kt.edit(model, requests, method="intattn", alpha=0.3)
    cases = [(model, edit, limit, torch.float32) for limit in LIMITS]
    cases += [(model, edit, None, dtype) for dtype in (torch.bfloat16, torch.float16)]
    # The same edit on weights that it was not solved for: solving in float16 takes a CPU half an hour.
    cases += [(kt.load("demo", dtype=base), edit, None, torch.float32) for base in ("bfloat16", "float16")]
    for number, (on, what, limit, dtype) in enumerate(cases):
        made = to_peft(on, what, folder / str(number), limit, 1.0, dtype, force=on is not model)
        yield {
            "base": SHORT[on.dtype],
            "factors": SHORT[dtype],
            "rank": made.about["rank"],
            "needed": max(row["needed"] for row in made.weights.values()),
            "prompts": made.prompts,
            "weight_error": made.about["weight_error"],
            "adapter": made.max_error,
            "relative": made.relative_error,
        }


def tables(held):
    rows = [
        "| family | W_o, down_proj | class | rank | adapter: largest logit error | of what the edit changes "
        "| merged folder: logit error | reverted to the byte |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in held["families"]:
        shown = (row["family"], ", ".join(row["modules"]), row["linear"], row["rank"], f"{row['adapter']:.1e}")
        shown += (f"{row['relative']:.1e}", f"{row['merged']:g}", "yes" if row["reverted"] else "no")
        rows.append("| " + " | ".join(map(str, shown)) + " |")
    rows += [
        "",
        "| base | factors | rank (exact: all) | missing of the edit's norm | largest logit error | of what the edit "
        "changes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in held["ranks"]:
        shown = (row["base"], row["factors"], f"{row['rank']} of {row['needed']}", f"{row['weight_error']:.1e}")
        shown += (f"{row['adapter']:.1e}", f"{row['relative']:.1e}")
        rows.append("| " + " | ".join(shown) + " |")
    return "\n".join(rows) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the file as tables, and stop")
    if parser.parse_args().table:
        sys.stdout.write(tables(json.loads(OUT.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        held = {"families": list(by_family(folder)), "ranks": list(by_rank(folder))}
    OUT.write_text(to_json(held), encoding="utf-8")
    sys.stdout.write(tables(held))


if __name__ == "__main__":
    main()
