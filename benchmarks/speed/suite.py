"""Every speed benchmark in one run: `make bench`. Writes docs/data/performance.json and docs/performance.md's table.

    python benchmarks/speed/suite.py  # all parts, about an hour on one core
    python benchmarks/speed/suite.py --only solve,eval  # some of them; the others' rows stay as they are
    python benchmarks/speed/suite.py --small  # seconds a part; prints, writes nothing
    python benchmarks/speed/suite.py --table  # the table again, from docs/data/performance.json

Each part is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = {
    "trace": "trace_speed.py",
    "targets": "target_speed.py",
    "solve": "solve_speed.py",
    "statistics": "statistics_speed.py",
    "eval": "eval_speed.py",
}
DOCS = HERE.parents[1] / "docs"
RECORD, PAGE = DOCS / "data" / "performance.json", DOCS / "performance.md"
BEGIN, END = "<!-- table: make bench -->", "<!-- end of table -->"
COLUMNS = (
    "work",
    "kt: CPU s (wall)",
    "beside",
    "its CPU s",
    "ratio",
    "GFLOP",
    "x floor",
    "peak MiB",
    "difference",
)


def table(parts: Mapping[str, Any]) -> str:
    """The rows as Markdown, a part after the other."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for part in PARTS:
        for row in parts.get(part, {}).get("rows", ()):
            ours, theirs = row["ours"], row["theirs"]
            goal = f" (goal {row['goal']:g})" if row["goal"] is not None else ""
            cells = [
                f"{row['part']}: {row['work']}",
                f"{ours['cpu_s']:.2f} ({ours['wall_s']:.2f})",
                row["reference"],
                f"{theirs['cpu_s']:.2f}",
                f"{row['ratio']:.2f}{goal}",
                f"{row['counted'] / 1e9:,.1f}",
                f"{row['over_floor']:.2f}",
                f"{ours['peak_mib']:,.0f}",
                f"{row['difference']:.1e}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(part: str, small: bool) -> dict[str, Any]:
    """One part's rows, with when and on what they were measured."""
    command = [sys.executable, str(HERE / PARTS[part]), *(["--small"] if small else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout.strip():
        raise SystemExit(f"{PARTS[part]} failed with exit code {done.returncode} and gave no rows")
    import torch
    import transformers

    return {
        "rows": json.loads(done.stdout),
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "on": f"{platform.machine()}, one thread, torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def _keep(record: Mapping[str, Any]) -> None:
    """The figures, and the page's table made of them."""
    RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(record)}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small models and matrices: seconds a part")
    parser.add_argument("--table", action="store_true", help="print the table of the last run")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    chosen = parser.parse_args(arguments)
    asked = chosen.only.split(",")
    if chosen.table:
        sys.stdout.write(table(_record()) + "\n")
        return 0
    if unknown := [part for part in asked if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; choose among {', '.join(PARTS)}")
    found = {}
    for part in asked:
        sys.stderr.write(f"{part} ...\n")
        found[part] = run(part, chosen.small)
        if not chosen.small:
            _keep(_record() | {part: found[part]})
    sys.stdout.write(table(found) + "\n")
    missed = [row["work"] for part in found.values() for row in part["rows"] if not row["holds"]]
    for work in missed:
        sys.stderr.write(f"goal or equality missed: {work}\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
