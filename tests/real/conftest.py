"""The pretrained models that `make real-models` fetches; without them the tests here are skipped, with the reason."""

import sys
from pathlib import Path

import pytest

import kt

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from real_models import MODELS  # noqa: E402


def fetched(name):
    """The folder of a model."""
    path = MODELS[name].path
    if not path.is_dir():
        pytest.skip(f"{path.name} is not here; make real-models fetches it")
    return path


@pytest.fixture(scope="session")
def smollm2():
    return kt.load(fetched("smollm2"), device="cpu")


@pytest.fixture(scope="session")
def gemma3():
    return kt.load(fetched("gemma3"), device="cpu")


@pytest.fixture(scope="session")
def smollm2_gguf():
    pytest.importorskip("gguf", reason="needs the extra gguf")
    path = fetched("smollm2")
    return path.with_name(f"{path.name}.gguf")


@pytest.fixture(scope="session")
def facts():
    """Twenty well-known facts of four relations, all of which SmolLM2 knows."""
    return kt.load_facts(ROOT / "tools" / "real_facts.jsonl")
