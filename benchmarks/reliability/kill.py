"""Kill a command at a random moment, look at what it left, let it go on, and compare with an uninterrupted run.

    python benchmarks/reliability/kill.py  # 50 kills (SIGKILL) over cov, apply-edit, heatmap and export: 15 minutes
    python benchmarks/reliability/kill.py --table  # docs/data/kills.md, from docs/data/kills.json

After the kill no file under a final name may be half written; after `--resume` (for cov and export: the same command
again) the results must be the uninterrupted run's to the byte. Every trial has an empty cache of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "kills.json"
TEMPORARY = re.compile(r"\.(tmp|old)-[0-9a-f]{8}$")


@dataclass(frozen=True)
class Command:
    """What is run in a folder, which of its files are its results, and whether `--resume` goes on with it."""

    name: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    resumes: bool
    needs_edit: bool = False


COMMANDS = (
    Command(
        "cov", ("cov", "--max-tokens", "20000", "--cache", "cache", "-o", "run"), ("cache/cov-*.safetensors",), False
    ),
    Command(
        "apply-edit",
        ("apply-edit", "--limit", "4", "--alpha", "0.3", "--max-tokens", "5000", "--force", "-o", "run"),
        ("run/edit.safetensors",),
        True,
    ),
    Command("heatmap", ("heatmap", "--limit", "8", "--samples", "3", "-o", "run"), ("run/arrays.safetensors",), True),
    Command(
        "export",
        ("export", "edit.safetensors", "--format", "hf", "--to", "merged"),
        ("merged/*.safetensors", "merged/tokenizer.json"),
        False,
        needs_edit=True,
    ),
)


@dataclass(frozen=True)
class Trial:
    """One kill. `at`: seconds after the start, `phases`: finished ones that were kept then."""

    command: str
    at: float
    of: float
    phases: int
    half_written: tuple[str, ...]
    resumed: bool
    identical: bool

    @property
    def recovered(self) -> bool:
        """An export that was killed when its folder already had its name refuses to write it again (`resumed` is
        false), and its results are held against the uninterrupted run's as they are."""
        return not self.half_written and self.identical


def start(folder: Path, arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, as `python -m kt`."""
    environment = os.environ | {"KT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "kt", *arguments, "--quiet"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    said, _ = process.communicate()
    return process.returncode, said.decode(errors="replace")


def kill(process: subprocess.Popen[bytes]) -> bool:
    """SIGKILL to the whole group; False where it had already ended."""
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


def results(folder: Path, command: Command) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for glob in command.results for p in sorted(folder.glob(glob))}


def half_written(folder: Path) -> tuple[str, ...]:
    """Files under a final name that are not whole, and finished run folders that lack one of theirs."""
    from safetensors import safe_open

    wrong = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if any(TEMPORARY.search(part) for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "numpy") as file:
                    for name in file.keys():  # noqa: SIM118 -- not a dict
                        file.get_slice(name)[:1] if file.get_slice(name).get_shape() else file.get_tensor(name)
            elif path.suffix == ".json":
                held = json.loads(path.read_text(encoding="utf-8"))
                if path.name == "manifest.json" and not held.get("unfinished"):
                    wrong += [f"{path.parent.name}: no {n}" for n in held["files"] if not (path.parent / n).exists()]
            elif path.suffix == ".html" and "</html>" not in path.read_text(encoding="utf-8")[-200:]:
                wrong.append(str(path.relative_to(folder)))
        except Exception as error:  # whatever a reader says of it: the file is not whole
            wrong.append(f"{path.relative_to(folder)}: {error}")
    return tuple(wrong)


def prepare(folder: Path, command: Command, edit: Path | None) -> None:
    folder.mkdir(parents=True)
    if command.needs_edit and edit is not None:
        shutil.copy(edit, folder / "edit.safetensors")


def go_on(folder: Path, command: Command) -> tuple[int, str]:
    """`--resume` where there is something to go on with, else the command again."""
    arguments = list(command.arguments)
    if command.resumes and (folder / "run.unfinished").exists():
        at = arguments.index("-o")
        arguments[at : at + 2] = ["--resume", "run"]
    elif (folder / "run").exists():
        arguments.append("--overwrite")
    return finish(start(folder, tuple(arguments)))


def trial(
    folder: Path, command: Command, whole: dict[str, bytes], at: float, of: float, edit: Path | None
) -> Trial | None:
    """Kill after `at` seconds; None where the command was faster."""
    prepare(folder, command, edit)
    process = start(folder, command.arguments)
    time.sleep(at)
    if not kill(process):
        return None
    phases = sum(1 for _ in folder.glob("run.unfinished/phases/*.safetensors"))
    wrong = half_written(folder)
    code, said = go_on(folder, command)
    if code:
        sys.stderr.write(said)
    identical = results(folder, command) == whole and bool(whole)
    return Trial(command.name, round(at, 2), round(of, 2), phases, wrong, code == 0, identical)


def measured(folder: Path, kills: int, seed: int, jobs: int) -> list[Trial]:
    """`kills` trials, dealt out over the commands in turn, each after 0.2 to 1 of the uninterrupted run's time."""
    drawn = random.Random(seed)
    edit: Path | None = None
    references: dict[str, tuple[dict[str, bytes], float]] = {}
    for command in COMMANDS:
        place = folder / f"{command.name}-reference"
        prepare(place, command, edit)
        began = time.perf_counter()
        code, said = finish(start(place, command.arguments))
        if code:
            sys.exit(f"{command.name}: {said}")
        references[command.name] = results(place, command), time.perf_counter() - began
        if command.name == "apply-edit":
            edit = place / "run" / "edit.safetensors"

    def one(number: int, share: float) -> Trial:
        """A kill at that share of the run; where the command was faster, earlier and earlier."""
        command = COMMANDS[number % len(COMMANDS)]
        whole, seconds = references[command.name]
        while True:
            place = folder / f"{number:03d}-{command.name}"
            found = trial(place, command, whole, share * seconds, seconds, edit)
            shutil.rmtree(place)
            if found is not None:
                sys.stdout.write(f"{found}\n")
                sys.stdout.flush()
                return found
            share *= 0.8

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, range(kills), [drawn.uniform(0.2, 1.0) for _ in range(kills)]))


def table(held: list[dict]) -> str:
    """By command: kills, when, phases kept, and what became of them."""
    lines = [
        "| command | kills | at, share of the run | phases kept | half-written | resumed | identical | recovered |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = [c.name for c in COMMANDS]
    for name in [*names, "all"]:
        rows = [Trial(**row) for row in held if name in ("all", row["command"])]
        shares = [row.at / row.of for row in rows]
        cells = [
            name,
            len(rows),
            f"{min(shares):.2f} to {max(shares):.2f}",
            f"{min(r.phases for r in rows)} to {max(r.phases for r in rows)}",
            sum(len(r.half_written) for r in rows),
            sum(r.resumed for r in rows),
            sum(r.identical for r in rows),
            f"{sum(r.recovered for r in rows)} of {len(rows)}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print the file as a table, and stop")
    args = parser.parse_args()
    if not args.table:
        from kt._util.files import atomic_write

        with tempfile.TemporaryDirectory() as folder:
            trials = measured(Path(folder), args.kills, args.seed, args.jobs)
        atomic_write(args.out, json.dumps([asdict(t) for t in trials], indent=1) + "\n")
    held = json.loads(args.out.read_text(encoding="utf-8"))
    sys.stdout.write(table(held))
    sys.exit(0 if all(Trial(**row).recovered for row in held) else 1)


if __name__ == "__main__":
    main()
