"""Every command that reads a file of kt, on files that are broken in every known way: refused in one line, or read.

    python benchmarks/reliability/grid.py  # about ten minutes; writes docs/data/grid.md

A cell fails if a command ends with a traceback or "a bug?", with other than one line of error, with an exit code that
is not 0, 1 or 2, or leaves a file behind when it refuses.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "grid.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "security")]

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def header_changed(content: bytes, change: Callable[[dict], object]) -> bytes:
    """A file whose header, or kt's metadata in it, is another, with a digest that fits."""
    from loaders import forged

    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return forged(struct.pack("<Q", len(text)) + text + content[8 + length :])


def with_unknown_key(header: dict) -> None:
    about = header.setdefault("__metadata__", {})
    about["kt"] = json.dumps(json.loads(about.get("kt", "{}")) | {"unheard_of": [1]})


def with_nan(content: bytes) -> bytes:
    """The last float32 of the data is NaN, and the digest fits."""
    return header_changed(content[:-4] + struct.pack("<f", float("nan")), lambda header: None)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def mutations(whole: bytes, others: Mapping[str, bytes]) -> dict[str, bytes | None]:
    """Contents by name; None is a folder in the file's place, and `missing` no file at all."""
    broken: dict[str, bytes | None] = {
        "cut in half": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "a bit of the length": flipped(whole, 1),
        "a bit of the header": flipped(whole, 40),
        "a bit of the data": flipped(whole, len(whole) - 3),
        "foreign JSON": b'{"hello": 1}',
        "a JSON list": b"[1, 2]",
        "empty": b"",
        "a folder": None,
        "missing": None,
        "a header of 2^60 bytes": struct.pack("<Q", 1 << 60) + whole[8:],
        "a Git LFS pointer": POINTER,
        "an HTML page": b"<!DOCTYPE html><html><body>404</body></html>",
        "a pickle": b"\x80\x02}q\x00.",
        "random bytes": bytes(range(256)) * 4,
    }
    if whole[8:9] == b"{":
        broken |= {"NaN": with_nan(whole), "an unknown key": header_changed(whole, with_unknown_key)}
    return broken | {f"the {name}": content for name, content in others.items() if content != whole}


EDIT_COMMANDS = {
    "eval": "eval -m MODEL -f facts.json --no-generate --edit FILE -o out",
    "probe": "probe -m MODEL -f facts.json --edit FILE -o out",
    "case": "case -m MODEL -f facts.json --edits a=FILE --tokens 2 -o out",
    "export hf": "export FILE -m MODEL --to out",
    "export peft": "export FILE -m MODEL --format peft --to out",
    "edits show": "edits show FILE",
    "edits show -m": "edits show FILE -m MODEL",
    "edits diff": "edits diff FILE good.safetensors",
    "edits diff, second": "edits diff good.safetensors FILE",
    "edits stack": "edits stack FILE -m MODEL --to out",
    "revert": "revert merged --edit FILE --to out",
    "history": "apply-edit -m MODEL -f facts.json --history FILE --layers-mlp 0 --method ft --set num_steps=9 --force "
    "--dry-run",
}
OTHER_COMMANDS = {
    "editor": ("editor", "apply-edit -m MODEL -f facts.json --method malmen --set editor=FILE -o out"),
    "statistics": (
        "statistics",
        "apply-edit -m MODEL -f facts.json --method memit --layers-mlp 0 --set v_num_grad_steps=3 --statistics FILE "
        "--force --dry-run",
    ),
    "trace, report": ("run/arrays.safetensors", "report run -o out"),
    "edit, report": ("run/edit.safetensors", "report run -o out"),
    "edit, explore": ("run/edit.safetensors", "explore run -o out"),
    "revert, its edit": ("merged/kt/edit.safetensors", "revert merged --to out"),
    "revert, its undo": ("merged/kt/undo.safetensors", "revert merged --to out"),
    "revert, its weights": ("merged/model.safetensors", "revert merged --to out"),
    "revert, its record": ("merged/kt/export.json", "revert merged --to out"),
    "revert, its config": ("merged/config.json", "revert merged --to out --base MODEL"),
}


def cell(line: str, model: Path) -> tuple[str, str]:
    """What a command line gives in the current folder: `read`, `refused` or `FAILED`, and its last line."""
    from kt.cli import main

    before, out, err = tree(), io.StringIO(), io.StringIO()
    words = [str(model) if word == "MODEL" else word for word in line.split()]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            code: object = main(words)
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    lines = [each for each in err.getvalue().splitlines() if each.startswith("kt: error: ")]
    said = lines[-1].removeprefix("kt: error: ") if lines else ""
    left = tree() - before
    for name in left:
        shutil.rmtree(name, ignore_errors=True)
        Path(name).unlink(missing_ok=True)
    if code == 0 and not lines:
        return "read", ""
    right = code in (1, 2) and len(lines) == 1 and "a bug?" not in said and "Traceback" not in err.getvalue()
    if right and not left:
        return "refused", said
    return "FAILED", f"code {code}, left {sorted(left)}: {err.getvalue()[-600:]}"


def tree() -> set[str]:
    return {str(path) for path in Path().iterdir()}


def place(target: Path, name: str, content: bytes | None) -> None:
    """Put a mutation at a path, whatever stands there."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if content is not None:
        target.write_bytes(content)
    elif name == "a folder":
        target.mkdir()


def grid(folder: Path, only: list[str] | None = None) -> list[tuple[str, str, str, str]]:
    """Rows of command, mutation, outcome and line."""
    from whole_files import MODEL, PLAIN, make_runs

    from kt.cli import main

    runs = folder / "runs"
    runs.mkdir()
    make_runs(runs)
    model, work = runs / MODEL, folder / "work"
    work.mkdir()
    os.chdir(work)
    Path("facts.json").write_text(json.dumps(PLAIN))
    kinds = {
        "edit": runs / "edit" / "edit.safetensors",
        "adapter edit": runs / "adapter.safetensors",
        "context edit": runs / "context.safetensors",
        "editor": runs / "editor.safetensors",
        "statistics": next(runs.glob("cache/cov-*.safetensors")),
        "stack": runs / "stack.json",
        "model's weights": model / "model.safetensors",
    }
    whole = {name: path.read_bytes() for name, path in kinds.items()}
    shutil.copy(kinds["edit"], "good.safetensors")
    shutil.copy(kinds["edit"], "edit.safetensors")  # of the stack
    assert main(["export", "good.safetensors", "-m", str(model), "--to", "merged", "--quiet"]) == 0
    shutil.copytree(runs / "edit", "run")
    shutil.copy(runs / "heatmap" / "arrays.safetensors", "run")
    rows: list[tuple[str, str, str, str]] = []

    def add(*row: str) -> None:
        rows.append(row)
        sys.stdout.write(" | ".join(row) + "\n")
        sys.stdout.flush()

    for command, line in EDIT_COMMANDS.items():
        if only and command not in only:
            continue
        for name, content in mutations(whole["edit"], whole).items():
            place(Path("x.safetensors"), name, content)
            add(command, name, *cell(line.replace("FILE", "x.safetensors"), model))
    for command, (kind, line) in OTHER_COMMANDS.items():
        if only and command not in only:
            continue
        target = Path("x.safetensors") if kind in kinds else Path(kind)
        original = whole[kind] if kind in kinds else target.read_bytes()
        for name, content in mutations(original, whole).items():
            place(target, name, content)
            add(command, name, *cell(line.replace("FILE", "x.safetensors"), model))
        place(target, "", original)
    return rows


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Counts by command, and the line of each cell that was not refused."""
    lines = [
        "# Broken files, command by command",
        "",
        "Written by `python benchmarks/reliability/grid.py`. [What it means](../reliability.md).",
        "",
        "| command | cells | refused in one line | read | failed | read were |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for command in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == command]
        counts = Counter(row[2] for row in mine)
        read = ", ".join(row[1] for row in mine if row[2] == "read") or "none"
        lines.append(
            f"| {command} | {len(mine)} | {counts['refused']} | {counts['read']} | {counts['FAILED']} | {read} |"
        )
    counts = Counter(row[2] for row in rows)
    lines.append(f"| **all** | {len(rows)} | {counts['refused']} | {counts['read']} | {counts['FAILED']} | |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """All cells, or those of the commands that the first argument names (nothing is written then)."""
    import torch

    torch.set_num_threads(1)
    only = sys.argv[1].split(";") if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"KT_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        rows = grid(Path(folder), only)
        os.chdir(ROOT)
    if not only:
        OUT.write_text(table(rows))
    return 1 if any(row[2] == "FAILED" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
