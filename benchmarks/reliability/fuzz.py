"""Broken files for every loader, many of them: how many were loaded, refused in one line, or failed on.

    python benchmarks/reliability/fuzz.py --examples 2000  # about 20 minutes; writes docs/data/fuzz.json
    python benchmarks/reliability/fuzz.py --only report  # loaders of some name, nothing written
    python benchmarks/reliability/fuzz.py --table  # docs/data/fuzz.md

The properties are those of tests/security/fuzzing.py, the examples the same in every run of one Hypothesis version.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "fuzz.json"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "security")]


def fuzz(examples: int, only: str) -> list[dict[str, object]]:
    """A row a loader."""
    import torch
    from fuzzing import count
    from loaders import all_loaders
    from whole_files import make_runs

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "runs"
        runs.mkdir()
        make_runs(runs)
        for loader in all_loaders(runs):
            if only in loader.name:
                found = count(loader, examples, Path(place) / "fuzzed")
                rows.append(found._asdict())
                said = f"{found.loaded} loaded, {found.refused} refused, {found.failed} failed"
                sys.stderr.write(f"{found.loader}: {said}\n")
                sys.stderr.writelines(f"    {failure}\n" for failure in found.failures)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Markdown, with the sums below."""
    names = ("loaded", "refused", "failed")
    lines = ["| loader | files | loaded | refused | failed |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in [*rows, {"loader": "**all**"} | {name: sum(int(str(row[name])) for row in rows) for name in names}]:
        counts = [int(str(row[name])) for name in names]
        lines.append(f"| {row['loader']} | {sum(counts):,} | " + " | ".join(f"{n:,}" for n in counts) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="a loader; those that draw a page get a twentieth")
    parser.add_argument("--only", default="", help="loaders whose name holds this; nothing is written")
    parser.add_argument("--table", action="store_true", help="print docs/data/fuzz.json as a table")
    asked = parser.parse_args()
    if asked.table:
        sys.stdout.write(table(json.loads(OUT.read_text())["rows"]))
        return 0
    import hypothesis

    from kt._util.data import write_json

    rows = fuzz(asked.examples, asked.only)
    if not asked.only:
        write_json(OUT, {"examples": asked.examples, "hypothesis": hypothesis.__version__, "rows": rows})
    sys.stdout.write(table(rows))
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
