"""Run the notebooks of notebooks/ (jupytext percent scripts), each in a kernel of its own.

    python tools/notebooks.py                 # all of them, on the demo model: exit code 1 where a cell fails
    python tools/notebooks.py 1_five --write  # those whose name begins so; saves NAME.ipynb with what its cells show
    KT_MODEL=FOLDER KT_FACTS=lre python tools/notebooks.py  # on another model

A saved notebook holds every figure twice, as plotly's JSON and as an image, so that it shows where no JavaScript runs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"


def executed(path: Path, timeout: int = 1800, cache: Path | None = None) -> Any:
    """The notebook with the outputs of its cells.

    Without `cache` kt's is an empty one: what an earlier run kept (layers that were chosen for the model, for one)
    would be seen in the outputs, and what this one keeps would change later edits.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    import jupytext
    from nbclient import NotebookClient

    book = jupytext.read(path)
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with tempfile.TemporaryDirectory() as empty:
        client = NotebookClient(book, timeout=timeout, kernel_name="python3")
        client.execute(env={**os.environ, "KT_CACHE": str(cache or empty)})
    for cell in book.cells:
        cell.pop("id", None)  # drawn at random
        cell.metadata.pop("execution", None)  # when it ran
        if "outputs" in cell:
            cell["outputs"] = [out for out in cell.outputs if "IProgress" not in out.get("text", "")]
            for out in cell.outputs:
                if "text" in out:  # a warning's line in a file of the kernel's
                    out["text"] = re.sub(r"\S*ipykernel_\d+/\d+\.py:\d+: ", "", out["text"])
    return book


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="how their names begin; all by default")
    parser.add_argument("--write", action="store_true", help="save them beside the scripts (figures need Chromium)")
    args = parser.parse_args()
    os.environ["KT_NO_PROGRESS"] = "1"  # bars say how long this machine took
    os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype+png" if args.write else "plotly_mimetype")
    chosen = [p for p in sorted(FOLDER.glob("*.py")) if not args.names or p.name.startswith(tuple(args.names))]
    if not chosen:
        sys.exit(
            f"no notebook begins with {', '.join(args.names)}; there are "
            f"{', '.join(sorted(p.stem for p in FOLDER.glob('*.py')))}"
        )
    for path in chosen:
        book = executed(path)
        if args.write:
            import nbformat

            book.nbformat, book.nbformat_minor = 4, 4  # the last without ids of cells
            nbformat.write(book, path.with_suffix(".ipynb"))
        sys.stdout.write(f"{path.stem}: done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
