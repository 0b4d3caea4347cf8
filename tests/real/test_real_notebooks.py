"""The notebooks run from end to end on SmolLM2 and facts that it knows, by the variables that their text names."""

import runpy
from pathlib import Path

import pytest
from real_models import MODELS

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Second moments are taken once for all notebooks; nothing is kept for other edits."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.real
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda path: path.stem)
def test_every_cell_runs_on_smollm2(path: Path, cache, monkeypatch):
    if not MODELS["smollm2"].path.is_dir():
        pytest.skip("SmolLM2 is not here; make real-models fetches it")
    monkeypatch.setenv("KT_MODEL", str(MODELS["smollm2"].path))
    monkeypatch.setenv("KT_FACTS", str(ROOT / "tools" / "real_facts.jsonl"))
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    book = TOOL["executed"](path, timeout=7200, cache=cache)  # raises where a cell fails
    said = "".join(str(out) for cell in book.cells for out in cell.get("outputs", []))
    assert "smollm2" in said
