"""The notebooks run on the demo model, and those that are saved were made from the scripts beside them."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
TOOL = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_and_shows_something(path, monkeypatch):
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    book = TOOL["executed"](path)  # raises where a cell fails
    shown = [out for cell in book.cells for out in cell.get("outputs", []) if out.output_type != "stream"]
    assert shown
    assert not [out for out in shown if len(str(out.get("data", {}).get("text/plain", ""))) > 1_000]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_saved_notebook_is_its_script_and_its_figures_show_without_javascript(path):
    jupytext = pytest.importorskip("jupytext")
    saved = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert ["".join(cell["source"]) for cell in saved["cells"]] == [cell.source for cell in jupytext.read(path).cells]
    figures = [out["data"] for c in saved["cells"] for out in c.get("outputs", [])
               if "application/vnd.plotly.v1+json" in out.get("data", {})]  # fmt: skip
    assert all("image/png" in data for data in figures)
    assert "/tmp/" not in path.with_suffix(".ipynb").read_text(encoding="utf-8")
