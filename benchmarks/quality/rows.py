"""A benchmark whose rows are (method, edits): each in a process of its own, kept in a file when it is done.

A process of its own has its own peak memory; a file that is kept lets an hour's run go on where it was cut.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def run(
    script: str,
    about: str | None,
    *,
    row: Callable[..., Rows],
    table: Callable[[Path], str],
    jobs: Callable[[Sequence[str], Sequence[int]], Iterable[tuple[str, int]]],
    methods: Callable[[], Sequence[str]],
    sizes: Sequence[int],
    out: Path,
    shown: Callable[[dict[str, Any], int], str],
    indent: int | None = None,
    given: Mapping[str, str] | None = None,
) -> None:
    """The command line of such a benchmark: all rows, `--table` for what the file holds, one row for itself.

    Args:
        row: the rows of a method's name and a number of edits; also called with every option of `given`.
        given: options of its own, and their help.
    """
    given = given or {}
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="comma-separated; all by default")
    parser.add_argument("--edits", default=",".join(map(str, sizes)), help="how many at a time, comma-separated")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--table", action="store_true", help="print the file as tables, and stop")
    parser.add_argument("--row", nargs=2, metavar=("METHOD", "EDITS"), help=argparse.SUPPRESS)
    for name, about_it in given.items():
        parser.add_argument(f"--{name}", help=about_it)
    args = parser.parse_args()
    own = {name: getattr(args, name) for name in given}
    if args.table:
        sys.stdout.write(table(args.out))
        return
    if args.row:
        sys.stdout.write(json.dumps(row(args.row[0], int(args.row[1]), **own)) + "\n")
        return
    from kt._util.files import atomic_write

    chosen = args.methods.split(",") if args.methods else list(methods())
    for method, size in jobs(chosen, [int(part) for part in args.edits.split(",")]):
        done = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
        kept = [r for r in done if r["method"] == method and r["edits"] == size]
        if any("commit" not in r for r in kept):  # with it, a row of an older kt that is to be measured anew
            continue
        command = [sys.executable, script, "--row", method, str(size)]
        command += [part for name, value in own.items() if value is not None for part in (f"--{name}", value)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            sys.exit(f"{method}, {size} edits: {found.stderr[-2000:]}")
        rows = json.loads(found.stdout.splitlines()[-1])
        done = [r for r in done if r not in kept]
        atomic_write(args.out, json.dumps(done + rows, indent=indent, ensure_ascii=False) + "\n")
        for each in rows:
            sys.stdout.write(shown(each, size) + "\n")
        sys.stdout.flush()
